"""Circuits from scores: the largest edges, ties, and the greedy search against a plain one."""

import numpy as np
import pytest

from causalpatch import discover_circuit
from causalpatch.circuits.circuit import inputs_of
from causalpatch.sites.graph import Graph
from scored import scores_of

GRAPH = Graph(2, 2)


def test_importance_leaves_out_what_works_against_and_magnitude_counts_it():
    values = np.zeros(GRAPH.n_edges)
    values[[3, 5, 8]] = -4, 3, 2
    edges = list(GRAPH.names(GRAPH.edges))
    scores = scores_of(GRAPH, values)
    assert discover_circuit(scores, 2).edges() == [edges[5], edges[8]]
    assert discover_circuit(scores, 2, by="magnitude").edges() == [edges[3], edges[5]]
    # Where the source has less of the metric, what takes it away is what moves it to the source.
    turned = scores_of(GRAPH, -values, base=1.0, source=0.0)
    np.testing.assert_array_equal(discover_circuit(turned, 2).mask, discover_circuit(scores, 2).mask)


def test_ties_do_not_change_the_size_and_are_counted():
    values = np.zeros(GRAPH.n_edges)
    values[[2, 4, 6, 9]] = 5, 1, 1, 1
    edges = list(GRAPH.names(GRAPH.edges))
    circuit = discover_circuit(scores_of(GRAPH, values), 3)
    assert circuit.edges() == [edges[n] for n in (2, 4, 6)]
    assert circuit.record["found"]["tied"] == 1
    assert circuit.record["found"]["method"] == "top by importance"
    assert len(circuit.record["found"]["scores"]["hash"]) == 16


@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
def test_a_fraction_is_rounded_down(fraction):
    scores = scores_of(GRAPH, np.arange(GRAPH.n_edges))
    assert discover_circuit(scores, fraction=fraction).n_edges == int(GRAPH.n_edges * fraction)


def plainly(graph, key, n):
    """Look at all edges into what is reached, each time anew."""
    into, edges = inputs_of(graph), graph.edges.tolist()
    reached, taken = {graph.logits}, []
    while len(taken) < n:
        open_edges = [i for i, (_, receiver) in enumerate(edges) if receiver in reached and i not in taken]
        best = max(open_edges, key=lambda i: (key[i], -i))
        taken.append(best)
        reached.update(into[edges[best][0]])
    return taken


@pytest.mark.parametrize("graph", [GRAPH, Graph(2, 3, is_parallel=True)])
@pytest.mark.parametrize("by", ["importance", "magnitude"])
def test_the_greedy_search_takes_the_best_edge_into_what_is_reached(graph, by):
    rng = np.random.default_rng(3)
    values = rng.integers(-9, 9, graph.n_edges).astype(float)  # with ties
    key = values if by == "importance" else np.abs(values)
    for n in (1, 7, 20, graph.n_edges):
        circuit = discover_circuit(scores_of(graph, values), n, method="greedy", by=by)
        wanted = np.zeros(graph.shape, dtype=bool)
        wanted[tuple(graph.edges[plainly(graph, key, n)].T)] = True
        np.testing.assert_array_equal(circuit.mask, wanted)


def test_positions_are_summed():
    values = np.zeros((2, *GRAPH.shape))
    values[0, 0, 0], values[1, 0, 0], values[1, 0, 1] = 2, -2, 1
    scores = scores_of(GRAPH, np.zeros(GRAPH.n_edges))
    both = type(scores)(GRAPH, values, scores.provenance, ["a", "b"])
    assert discover_circuit(both, 1).edges() == [GRAPH.label(0, 1)]
