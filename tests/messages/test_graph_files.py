"""Refusals of graph files of other tools."""

import json
import pickle

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, PathError, ResultsNotFound, SettingError, StoreCorrupt
from causalpatch.testing.tiny import tiny_model


@pytest.fixture(scope="module")
def model():
    """Two layers of four heads, which share two keys."""
    return cp.open_model(tiny_model("llama"))


@pytest.fixture
def written(model, tmp_path):
    """What a file of a circuit holds, and how one is put into a file again."""
    circuit = cp.Circuit.of(model, ["a0.h1 -> m1", "m0 -> logits"])
    data = json.loads(cp.write_graph(tmp_path / "graph.json", model, circuit=circuit).read_text())
    held = torch.load(cp.write_graph(tmp_path / "graph.pt", model, circuit=circuit), weights_only=True)

    def put(changed):
        if "edges" in changed or "nodes" in changed:
            (tmp_path / "graph.json").write_text(json.dumps({**data, **changed}))
            return tmp_path / "graph.json"
        torch.save({**held, **changed}, tmp_path / "graph.pt")
        return tmp_path / "graph.pt"

    return data, held, put


class Stranger:
    """Something that is no tensor and no plain data."""

    def __reduce__(self):
        return print, ("unpickled!",)


def test_a_file_that_would_run_code_is_not_unpickled(model, refuses, tmp_path, capsys):
    path = tmp_path / "graph.pt"
    text = """
        the graph in 'graph.pt' cannot be read
          why  it holds more than tensors and plain data, or is no file of torch.save
          fix: write it by Graph.to_json or to_pt
        """
    torch.save({"cfg": Stranger()}, path)
    with refuses(StoreCorrupt, text):
        cp.read_graph(path, model)
    path.write_bytes(pickle.dumps({"cfg": Stranger()}, protocol=2))
    with refuses(StoreCorrupt, text):
        cp.read_graph(path, model)
    assert "unpickled" not in capsys.readouterr().out


def test_graphs_of_other_models_are_refused(model, refuses, written):
    _, held, put = written
    own = "2 layers of 4 heads, width 32, attention and MLP one after the other"
    for cfg, words, why in (
        ({"n_layers": 3}, own.replace("2 layers", "3 layers"), ""),
        ({"d_model": 64}, own.replace("32", "64"), ""),
        ({"parallel_attn_mlp": True}, own.replace("one after the other", "in parallel"), ""),
        (
            {"n_heads": 2},
            own.replace("4 heads", "2 heads"),
            "\n  why    it counts heads that share keys once; edges go into the heads of queries, one by one",
        ),
    ):
        text = "the graph in 'graph.pt' is not of 'LlamaForCausalLM'\n"
        text += f"  file   {words}\n  model  {own}{why}\n  fix: open the model that it was made for"
        with refuses(ModelUnsupported, text):
            cp.read_graph(put({"cfg": {**held["cfg"], **cfg}}), model)


def test_edges_and_components_that_there_are_not_are_named(model, refuses, written):
    _, held, put = written
    with refuses(
        PathError,
        """
        there is no 'a0.h9' in this graph
          heads  0 to 3
          fix: name one of these
        """,
    ):
        cp.read_graph(put({"edges": {"a0.h9->m1": {"score": 1.0, "in_graph": True}}}), model)
    with refuses(
        PathError,
        """
        there is no edge 'm1 -> a0.h0<q>'
          why  'a0.h0<q>' reads the stream before 'm1' adds to it
          fix: name a receiver behind the sender
        """,
    ):
        cp.read_graph(put({"edges": {"m1->a0.h0<q>": {"score": 1.0, "in_graph": True}}}), model)
    with refuses(
        PathError,
        """
        'graph.pt' does not have the components of the model
          in file  11, such as hook_embed
          missing  input
          fix: open the model that it was made for
        """,
    ):
        cp.read_graph(put({"src_nodes": ["hook_embed", *held["src_nodes"][1:]]}), model)
    scores = torch.ones(held["edges_scores"].shape)
    with refuses(
        PathError,
        """
        'graph.pt' has a number at 'a0.h0 -> a0.h0<q>', which is no edge
          such  187 of 297 entries
          fix: see whether its rows are senders, and its columns receivers
        """,
    ):
        cp.read_graph(put({"edges_scores": scores}), model)


def test_files_that_are_no_graphs_are_refused(model, refuses, written, tmp_path):
    _, held, put = written

    def refused(why, path):
        text = f"the graph in '{path.name}' cannot be read\n  why  {why}\n  fix: write it by Graph.to_json or to_pt"
        with refuses(StoreCorrupt, text):
            cp.read_graph(path, model)

    refused("its edges_scores are of shape (3, 3), not (11, 27)", put({"edges_scores": torch.zeros(3, 3)}))
    refused("its edges_scores are of shape list, not (11, 27)", put({"edges_scores": [1.0]}))
    refused("its cfg does not say n_layers, n_heads, parallel_attn_mlp", put({"cfg": {}}))
    infinite = held["edges_scores"].clone()
    infinite[0, 0] = torch.inf
    refused("the score of 'embed -> a0.h0<q>' is infinite", put({"edges_scores": infinite}))
    torch.save([1], tmp_path / "list.pt")
    refused("it has no cfg, src_nodes, dst_nodes, edges_in_graph", tmp_path / "list.pt")
    refused("its edges do not have a score and in_graph each", put({"edges": {"m0->m1": 3}}))
    refused("its nodes do not have a score and in_graph each", put({"nodes": ["m0"]}))
    (tmp_path / "text.json").write_text("no")
    refused("it is no JSON: Expecting value: line 1 column 1 (char 0)", tmp_path / "text.json")


def test_circuits_of_neurons_are_refused(model, refuses, written):
    data, held, put = written
    text = """
        the circuit in '{}' leaves out neurons of 'a0.h1'
          why  circuits here are of edges between whole components
          fix: write it again without neurons
        """
    neurons = torch.ones(len(held["src_nodes"]), 32, dtype=torch.bool)
    neurons[2, 5] = False
    with refuses(ModelUnsupported, text.format("graph.pt")):
        cp.read_graph(put({"neurons_in_graph": neurons}), model)
    nodes = {**data["nodes"], "a0.h1": {"in_graph": True, "neurons": [True, False]}}
    with refuses(ModelUnsupported, text.format("graph.json")):
        cp.read_graph(put({"nodes": nodes}), model)
    neurons[2, 5], neurons[4, 0] = True, False  # m0 sends to the logits; a0.h3 is in no edge
    cp.read_graph(put({"neurons_in_graph": neurons}), model)


def test_what_is_written_and_where_is_said(model, refuses, tmp_path):
    circuit = cp.Circuit.of(model, ["m0 -> logits"])
    with refuses(
        SettingError,
        """
        graph files end in .json or .pt, and not as 'graph.npz'
          fix: graph.json, or graph.pt
        """,
    ):
        cp.write_graph(tmp_path / "graph.npz", model, circuit=circuit)
    with refuses(
        SettingError,
        """
        neither scores nor a circuit are given to write
          fix: write_graph(path, model, scores)
        """,
    ):
        cp.write_graph(tmp_path / "graph.pt", model)
    with refuses(
        ResultsNotFound,
        """
        there is no graph file 'TMP/none.pt'
          fix: name a file that Graph.to_json or to_pt wrote
        """,
    ):
        cp.read_graph(tmp_path / "none.pt", model)
    other = cp.open_model(tiny_model("gpt2"))
    graph, about = cp.graph_of(other), {"name": other.name, "hash": other.content_hash}
    scores = cp.EdgeScores(graph, np.zeros(graph.shape), {"model": about})
    with refuses(
        ModelUnsupported,
        f"""
        scores are written for the model that they are of
          of     'GPT2LMHeadModel', weights {other.content_hash[:12]}
          given  'LlamaForCausalLM', weights {model.content_hash[:12]}
          fix: open that model, or score this one
        """,
    ):
        cp.write_graph(tmp_path / "graph.pt", model, scores)
    assert list(tmp_path.iterdir()) == []
