"""The test of minimality: random paths, and edges that do nothing."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import binom

import causalpatch as cp
from causalpatch import Circuit, Graph
from causalpatch.base.seeds import generator
from causalpatch.circuits.circuit import inputs_of
from causalpatch.circuits.ground_truth import cases
from causalpatch.circuits.minimal import _random_path

torch.set_num_threads(1)

RECORD = {"model": {"name": "", "hash": ""}, "found": {"method": "given"}, "facts": {"circuit": ""}}


@pytest.mark.parametrize("graph", [Graph(3, 2), Graph(2, 3, is_parallel=True)])
def test_random_paths_lead_from_the_embedding_to_the_logits_beside_the_circuit(graph):
    rng = np.random.default_rng(0)
    circuit = Circuit(graph, graph.exists & (rng.random(graph.shape) < 0.5), RECORD)
    into, draw = inputs_of(graph), generator(0, "paths")
    lengths = set()
    for _ in range(40):
        path = sorted(map(tuple, _random_path(circuit, draw).tolist()))
        assert path[0][0] == 0
        assert path[-1][1] == graph.logits
        for (_, receiver), (sender, _) in pairwise(path):
            assert receiver in into[sender]
        assert all(graph.exists[edge] for edge in path)
        assert not all(circuit.mask[edge] for edge in path)
        lengths.add(len(path))
    assert len(lengths) > 1


def test_an_edge_that_does_nothing_is_told_from_those_that_do_all():
    case = next(case for case in cases(["reverse"], forms=["plain"]) if case.ablation == "resample")
    idle = "m0 -> logits"
    circuit = Circuit.of(case.model, [*case.true_edges, idle])
    frame = cp.minimality_test(case.experiment(), circuit, n_random=30)
    assert frame["edge"][0] == idle
    assert frame["p_holm"][0] < 0.01
    row = frame.iloc[0]
    assert row.p == pytest.approx(binom.cdf(round(row.beats * 30), 30, 0.9))
    assert row.p_holm == pytest.approx(3 * row.p)
    np.testing.assert_allclose(frame["change"][1:], 1, atol=1e-6)
    assert (frame["beats"][1:] > 0.9).all()
    assert (frame["p_holm"][1:] > 0.05).all()
