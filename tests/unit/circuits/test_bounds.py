"""Bounds by search: what is left out of an OR, edges that do nothing, and held-out pairs."""

import functools

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch import Circuit
from causalpatch.base.errors import PairError
from causalpatch.circuits.ground_truth import cases
from causalpatch.circuits.keep import first_metric, run_kept

torch.set_num_threads(1)

VALUES = ("source", "zero")


@functools.cache
def case_of(name):
    return next(case for case in cases([name], forms=["plain"]) if case.ablation == "resample")


def test_half_of_an_or_is_faithful_and_incomplete():
    case = case_of("or")
    experiment = case.experiment()
    half = cp.acdc(experiment, 1e-3)
    assert cp.evaluate_circuit(experiment, half, n_random=0).f()[0] == pytest.approx(1)
    found = cp.completeness(experiment, half, n_random=4, n_steps=2)
    assert found.found == pytest.approx(1)
    assert set(found.edges) <= set(half.edges())
    assert found.n_tried == 4 + min(10, half.n_edges) + min(10, half.n_edges - 1)
    assert "does not show that the circuit is complete" in str(found)
    whole = cp.completeness(experiment, Circuit.of(case.model, case.true_edges), n_random=4, n_steps=1)
    assert whole.found == pytest.approx(0, abs=1e-9)
    assert whole.held_out is None


def parted(case):
    """The experiment on the pairs of one independent component, and those of the others."""
    is_first = case.pairs.components == 0
    first, others = (case.pairs.take(np.flatnonzero(some)) for some in (is_first, ~is_first))
    return cp.Experiment(case.model, first, case.metric, show_progress=False), others


def test_what_is_found_is_measured_on_held_out_pairs():
    experiment, others = parted(case_of("reverse"))
    circuit = Circuit.of(experiment.model, ["embed -> logits"])  # by itself it does nothing
    found = cp.completeness(experiment, circuit, others, n_random=2, n_steps=1)
    without = Circuit.of(experiment.model, found.edges).mask
    on = first_metric(cp.Experiment(experiment.model, others, experiment.metrics, show_progress=False))
    f = run_kept(on, np.stack([circuit.mask & ~without, circuit.graph.exists & ~without])).f
    assert found.held_out.estimate == pytest.approx(f[0] - f[1])
    assert found.held_out.estimate == pytest.approx(-1)
    for search in (cp.completeness, cp.minimality):
        with pytest.raises(PairError, match="not independent of the pairs that are searched on"):
            search(experiment, circuit, experiment.pairs)


def test_what_is_not_needed_changes_nothing():
    experiment, others = parted(case_of("reverse"))
    idle = "m0 -> logits"
    circuit = Circuit.of(experiment.model, [*case_of("reverse").true_edges, idle])
    frame = cp.minimality(experiment, circuit, others)
    assert frame["edge"][0] == idle
    assert frame["change"][0] == pytest.approx(0, abs=1e-9)
    np.testing.assert_allclose(frame["change"][1:], 1, atol=1e-6)
    np.testing.assert_allclose(frame["held_out"][1:], 1, atol=1e-6)
    assert set(frame.columns) == {"edge", "change", "n_out", "held_out", "low", "high"}


def test_an_edge_may_be_needed_beside_others_alone():
    """Each branch of an OR is needed only where the other one is out."""
    case = case_of("or")
    circuit = Circuit.of(case.model, case.true_edges)
    alone = cp.minimality(case.experiment(), circuit, n_sets=0).set_index("edge")["change"]
    beside = cp.minimality(case.experiment(), circuit, n_sets=8).set_index("edge")["change"]
    assert (beside >= alone[beside.index] - 1e-12).all()
    branches = alone[alone < 1e-6].index
    assert len(branches)
    assert (beside[branches] > 0.9).any()


def test_ablated_edges_carry_what_is_asked_for():
    """Without K, by zero: the numbers of the runs themselves, and others than by the corrupted run."""
    case = case_of("or")
    experiment, circuit = case.experiment(), Circuit.of(case.model, case.true_edges)
    found = {value: cp.completeness(experiment, circuit, n_random=3, n_steps=1, value=value) for value in VALUES}
    needed = {value: cp.minimality(experiment, circuit, n_sets=0, value=value) for value in VALUES}
    tested = {value: cp.minimality_test(experiment, circuit, n_random=2, value=value) for value in VALUES}
    for value in VALUES:
        without = Circuit.of(case.model, found[value].edges).mask
        f = run_kept(first_metric(experiment), np.stack([circuit.mask & ~without, ~without]), value).f
        assert found[value].found == pytest.approx(abs(f[0] - f[1]))
        masks = [circuit.mask & ~Circuit.of(case.model, [edge]).mask for edge in needed[value]["edge"]]
        f = run_kept(first_metric(experiment), np.stack([circuit.mask, *masks]), value).f
        for frame in (needed[value], tested[value].set_index("edge").loc[needed[value]["edge"]]):
            np.testing.assert_allclose(frame["change"], np.abs(f[0] - f[1:]), atol=1e-12)
    assert not np.allclose(*(needed[value].sort_values("edge")["change"] for value in VALUES))
