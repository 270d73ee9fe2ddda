"""Graph files: made by hand in the layout of others, read as they would, and written so that they could."""

import functools
import json

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.testing.tiny import tiny_model
from scored import scores_of
from toys import prompts

torch.set_num_threads(1)

PROMPTS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]), ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]))


@functools.cache
def model_of(family="gpt2"):
    return cp.open_model(tiny_model(family))


def their_config(model):
    parallel = cp.graph_of(model).is_parallel
    return {"n_layers": 2, "n_heads": 4, "parallel_attn_mlp": parallel, "d_model": model.width}


# What follows says again, from their code, how they call and number components.
def forward_index(cfg, name):
    if name == "input":
        return 0
    if name[0] == "m":
        return 1 + int(name[1:]) * (cfg["n_heads"] + 1) + cfg["n_heads"]
    layer, head = (int(part[1:]) for part in name.split("."))
    return 1 + layer * (cfg["n_heads"] + 1) + head


def backward_index(cfg, name):
    if name == "logits":
        return cfg["n_layers"] * (3 * cfg["n_heads"] + 1)
    if name[0] == "m":
        return int(name[1:]) * (3 * cfg["n_heads"] + 1) + 3 * cfg["n_heads"]
    layer, head = (int(part[1:]) for part in name[:-3].split("."))
    return layer * (3 * cfg["n_heads"] + 1) + "qkv".index(name[-2]) * cfg["n_heads"] + head


def their_edges(cfg):
    stream, edges = ["input"], []
    for layer in range(cfg["n_layers"]):
        heads = [f"a{layer}.h{head}" for head in range(cfg["n_heads"])]
        edges += [f"{node}->{head}<{kind}>" for node in stream for head in heads for kind in "qkv"]
        if cfg["parallel_attn_mlp"]:
            edges += [f"{node}->m{layer}" for node in stream]
            stream += heads
        else:
            stream += heads
            edges += [f"{node}->m{layer}" for node in stream]
        stream.append(f"m{layer}")
    return edges + [f"{node}->logits" for node in stream], stream


def by_hand(model, seed=0):
    """A file of each layout with the same numbers: positive for what matters."""
    cfg = their_config(model)
    names, nodes = their_edges(cfg)
    draw = np.random.default_rng(seed)
    score = {name: float(np.float32(draw.normal())) for name in names}
    kept = {name: bool(draw.random() < 0.2) for name in names}
    node_score = {name: float(np.float32(draw.normal())) for name in nodes}
    as_json = {
        "cfg": cfg,
        "nodes": {
            **{name: {"in_graph": True, "score": node_score[name]} for name in nodes},
            "logits": {"in_graph": True, "score": float("nan")},
        },
        "edges": {name: {"score": score[name], "in_graph": kept[name]} for name in names},
    }
    shape = len(nodes), cfg["n_layers"] * (3 * cfg["n_heads"] + 1) + 1
    scores, in_graph, nodes_scores = torch.zeros(shape), torch.zeros(shape, dtype=torch.bool), torch.zeros(shape[0])
    for name in names:
        at = forward_index(cfg, name.split("->")[0]), backward_index(cfg, name.split("->")[1])
        scores[at], in_graph[at] = score[name], kept[name]
    for name in nodes:
        nodes_scores[forward_index(cfg, name)] = node_score[name]
    receivers = []
    for layer in range(cfg["n_layers"]):
        receivers += [f"a{layer}.h{head}<{kind}>" for kind in "qkv" for head in range(cfg["n_heads"])] + [f"m{layer}"]
    as_pt = {
        "cfg": cfg,
        "src_nodes": nodes,
        "dst_nodes": [*receivers, "logits"],
        "edges_scores": scores,
        "edges_in_graph": in_graph,
        "nodes_in_graph": torch.ones(shape[0], dtype=torch.bool),
        "nodes_scores": nodes_scores,
    }
    return as_json, as_pt, score, kept, node_score


def put(folder, data, ending):
    path = folder / f"importances{ending}"
    if ending == ".json":
        path.write_text(json.dumps(data))
    else:
        torch.save(data, path)
    return path


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox"])
@pytest.mark.parametrize("ending", [".json", ".pt"])
def test_a_file_in_their_layout_is_read_edge_by_edge(tmp_path, family, ending):
    model = model_of(family)
    as_json, as_pt, score, kept, node_score = by_hand(model)
    path = put(tmp_path, as_json if ending == ".json" else as_pt, ending)
    found = cp.read_graph(path, model)
    importance = found.scores.importance()
    assert len(score) == cp.graph_of(model).n_edges
    for name, value in score.items():
        sender, receiver = name.replace("input", "embed").split("->")
        assert float(importance.sel(sender=sender, receiver=receiver)) == pytest.approx(value)
        assert found.scores[f"{sender} -> {receiver}"] == pytest.approx(-value)  # what noising does to the metric
        assert (f"{sender} -> {receiver}" in found.circuit) == kept[name]
    assert found.nodes == pytest.approx({name.replace("input", "embed"): value for name, value in node_score.items()})
    metric = cp.read_graph(path, cp.Experiment(model, prompts(*PROMPTS)), of="metric")
    np.testing.assert_array_equal(metric.scores.values, -found.scores.values)
    assert metric.nodes["m0"] == -found.nodes["m0"]
    with np.errstate(invalid="ignore"):
        order = cp.discover_circuit(found.scores, 5).edges()
    largest = sorted(score, key=score.get)[-5:]
    assert sorted(order) == sorted(name.replace("input", "embed").replace("->", " -> ") for name in largest)


@pytest.mark.parametrize("ending", [".json", ".pt"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_scores_come_back_as_they_were_written(tmp_path, ending, direction):
    model = model_of("llama")
    experiment = cp.Experiment(model, prompts(*PROMPTS), direction=direction, show_progress=False)
    scores = cp.attribute_edges(experiment, "eap")
    circuit = cp.discover_circuit(scores, 9)
    path = cp.write_graph(tmp_path / f"sub/graph{ending}", model, scores, circuit=circuit)
    again = cp.read_graph(path, model)
    gap = abs(experiment.baseline.clean.mean() - experiment.baseline.corrupt.mean())
    np.testing.assert_allclose(again.scores.importance(), scores.importance() * gap, rtol=1e-6)
    assert again.circuit.edges() == circuit.edges()
    assert again.nodes == {}
    twice = cp.read_graph(cp.write_graph(tmp_path / f"twice{ending}", model, again.scores), model)
    np.testing.assert_array_equal(twice.scores.values, again.scores.values)
    assert twice.circuit is None
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name] == []


def test_what_is_written_has_their_names_numbers_and_keys(tmp_path):
    model = model_of()
    as_json, as_pt, score, kept, _ = by_hand(model)
    graph = cp.graph_of(model)
    values = [score[name.replace("embed", "input").replace(" -> ", "->")] for name in graph.names(graph.edges)]
    scores = scores_of(graph, values, model=model)
    circuit = cp.Circuit.of(model, [n.replace("input", "embed") for n, is_in in kept.items() if is_in])
    written = json.loads(cp.write_graph(tmp_path / "g.json", model, scores, circuit=circuit).read_text())
    assert written["cfg"] == as_json["cfg"]
    assert written["edges"] == as_json["edges"]
    assert next(iter(written["nodes"])) == "input"
    assert set(written["nodes"]) == set(as_json["nodes"])
    held = torch.load(cp.write_graph(tmp_path / "g.pt", model, scores, circuit=circuit), weights_only=True)
    assert set(held) == set(as_pt) - {"nodes_scores"}
    for key in ("cfg", "src_nodes", "dst_nodes"):
        assert held[key] == as_pt[key]
    for key in ("edges_scores", "edges_in_graph"):
        assert torch.equal(held[key], as_pt[key])
        assert held[key].dtype == as_pt[key].dtype
    only = cp.Circuit.of(model, ["a0.h1 -> m1"])
    nodes = json.loads(cp.write_graph(tmp_path / "o.json", model, circuit=only).read_text())["nodes"]
    assert [name for name, node in nodes.items() if node["in_graph"]] == ["a0.h1", "m1", "logits"]
    assert cp.read_graph(tmp_path / "o.json", model).scores is None


def test_early_layouts_and_files_of_nodes_alone_are_read(tmp_path):
    model = model_of()
    as_json, as_pt, score, kept, node_score = by_hand(model)
    del as_json["cfg"]["d_model"]
    early = {**as_json, "nodes": dict.fromkeys(as_json["nodes"], True)}
    found = cp.read_graph(put(tmp_path, early, ".json"), model)
    assert found.circuit.n_edges == sum(kept.values())
    assert found.nodes == {}
    nodes = cp.read_graph(put(tmp_path, {"cfg": as_json["cfg"], "nodes": as_json["nodes"]}, ".json"), model)
    assert (nodes.scores, nodes.circuit) == (None, None)
    assert nodes.nodes["embed"] == pytest.approx(node_score["input"])
    some = {name: {"score": score[name]} for name in list(score)[:7]}
    part = cp.read_graph(put(tmp_path, {**as_json, "edges": some}, ".json"), model)
    assert np.isfinite(part.scores.values).sum() == 7
    assert part.circuit is None
    beyond = torch.where(torch.tensor(cp.graph_of(model).exists), as_pt["edges_scores"], -torch.inf)
    assert (
        cp.read_graph(put(tmp_path, {**as_pt, "edges_scores": beyond}, ".pt"), model).scores["m0 -> m1"]
        == -score["m0->m1"]
    )
    without = {key: value for key, value in as_pt.items() if key != "edges_scores"}
    assert cp.read_graph(put(tmp_path, without, ".pt"), model).scores is None


def test_rows_and_columns_in_another_order_are_put_into_ours(tmp_path):
    model = model_of()
    _, as_pt, *_ = by_hand(model)
    rows, columns = (np.random.default_rng(1).permutation(len(as_pt[key])) for key in ("src_nodes", "dst_nodes"))
    turned = {
        **as_pt,
        "src_nodes": [as_pt["src_nodes"][n] for n in rows],
        "dst_nodes": [as_pt["dst_nodes"][n] for n in columns],
        **{key: as_pt[key][rows][:, columns] for key in ("edges_scores", "edges_in_graph")},
        "nodes_scores": as_pt["nodes_scores"][rows],
    }
    found, plain = (cp.read_graph(put(tmp_path, data, ".pt"), model) for data in (turned, as_pt))
    np.testing.assert_array_equal(found.scores.values, plain.scores.values)
    assert found.circuit.edges() == plain.circuit.edges()
    assert found.nodes == plain.nodes


def test_scores_of_a_file_are_confirmed_and_evaluated(tmp_path):
    model = model_of("llama")
    pairs = prompts(*PROMPTS)
    experiment = cp.Experiment(model, pairs, direction="noise", show_progress=False)
    if experiment.baseline.clean.mean() < experiment.baseline.corrupt.mean():
        experiment = cp.Experiment(model, prompts(*PROMPTS, answer=6, wrong=5), direction="noise", show_progress=False)
    scores = cp.attribute_edges(experiment, "eap")
    read = cp.read_graph(cp.write_graph(tmp_path / "g.pt", model, scores), model).scores
    found, own = cp.confirm_scores(experiment, read, top=3, random_sample=4), scores.confirm(top=3, random_sample=4)
    assert found.axes == own.axes
    np.testing.assert_array_equal(found.effects, own.effects)
    assert "known but for a factor" in found.notes[0]
    both = [cp.evaluate_circuit(experiment, each, fractions=(0.1, 0.5), n_random=0).f() for each in (read, scores)]
    np.testing.assert_array_equal(*both)
