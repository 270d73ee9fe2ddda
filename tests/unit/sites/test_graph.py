"""The graph of components: its size, its order, and its labels both ways."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen2Config

import causalpatch as cp
from causalpatch.sites.graph import Graph

SIZES = {
    "GPT-2 small": (GPT2Config(), 32_491),
    "Qwen2.5-0.5B": (
        Qwen2Config(num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, hidden_size=896),
        179_749,
    ),
    "Gemma-2-2B": (Gemma2Config(num_hidden_layers=26, num_attention_heads=8, num_key_value_heads=4), 74_218),
    "Llama-3.1-8B": (LlamaConfig(num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8), 1_592_881),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_those_of_the_literature(name):
    config, n_edges = SIZES[name]
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(config)
    graph = cp.graph_of(cp.open_model(module))
    assert graph.n_edges == n_edges == graph.exists.sum()
    assert graph.shape == graph.exists.shape


@pytest.mark.parametrize("graph", [Graph(3, 2), Graph(2, 3, is_parallel=True)])
def test_edges_are_named_and_found_again(graph):
    names = graph.names(graph.edges)
    assert len(set(names)) == graph.n_edges
    assert [graph.parse(name) for name in names] == [tuple(edge) for edge in graph.edges.tolist()]
    assert graph.parse(" input->m0") == graph.parse("embed -> m0")


def test_every_sender_is_heard_by_what_comes_behind_it():
    def order(label):
        if label in ("embed", "logits"):
            return -1 if label == "embed" else 99
        layer = int(label[1:].split(".")[0])
        return 2 * layer + label.startswith("m")

    graph = Graph(3, 2)
    for s, sender in enumerate(graph.sender_labels):
        for r, receiver in enumerate(graph.receiver_labels):
            assert graph.exists[s, r] == (order(sender) < order(receiver))
    parallel = Graph(3, 2, is_parallel=True)
    assert not parallel.exists[parallel.find_sender("a1.h0"), parallel.find_receiver("m1")]
    assert parallel.exists[parallel.find_sender("m0"), parallel.find_receiver("a1.h1<k>")]


def test_a_mask_holds_edges_and_nodes_with_all_their_edges():
    graph = Graph(2, 2)
    mask = graph.mask(["embed -> m0", (1, graph.logits)], ["m0"])
    node = graph.find_sender("m0")
    assert mask.sum() == 2 + graph.exists[node].sum()
    np.testing.assert_array_equal(mask[node], graph.exists[node])
    assert graph.check(mask).shape == (1, *graph.shape)
