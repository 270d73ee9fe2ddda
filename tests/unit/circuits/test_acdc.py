"""ACDC: against one candidate after the other by raw hooks, and on circuits that are known."""

import functools
import importlib

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import CausalPatchWarning
from causalpatch.circuits.circuit import inputs_of
from causalpatch.circuits.ground_truth import cases
from causalpatch.testing.tiny import tiny_model
from oracle_edges import EdgePlain
from toys import prompts

torch.set_num_threads(1)

room = importlib.import_module("causalpatch.circuits.acdc")
THRESHOLD = 3e-4  # nats
PROMPTS = (([1, 7, 3, 9], [1, 8, 3, 10]),)


def plainly(module, threshold):
    """Take edges away one by one, with a run of raw hooks for each prompt."""
    plain = EdgePlain(module, "gpt2")
    graph = cp.graph_of(cp.open_model(module))
    sources = [plain.run(corrupt) for _, corrupt in PROMPTS]

    wanted = [plain.run(clean).logits[-1].log_softmax(-1) for clean, _ in PROMPTS]

    def loss(mask):
        ablated = torch.tensor(graph.exists & ~mask)
        found = []
        for (clean, _), source, right in zip(PROMPTS, sources, wanted, strict=True):
            got = plain.patched(clean, source, ablated)[-1].log_softmax(-1)
            found.append(float((right.exp() * (right - got)).sum()))
        return float(np.mean(found))

    mask = graph.exists.copy()
    current = loss(mask)
    receivers = [graph.logits]
    for sender in range(graph.n_senders - 1, 0, -1):
        receivers += reversed(inputs_of(graph)[sender])
    for receiver in receivers:
        for sender in range(int(graph.heard[receiver]) - 1, -1, -1):
            without = mask.copy()
            without[sender, receiver] = False
            found = loss(without)
            if found - current < threshold:
                mask, current = without, found
    return mask


def test_batched_candidates_are_decided_as_one_after_the_other():
    module = tiny_model("gpt2", heads=2)
    experiment = cp.Experiment(cp.open_model(module), prompts(*PROMPTS), "kl_from_base", show_progress=False)
    circuit = cp.acdc(experiment, THRESHOLD)
    np.testing.assert_array_equal(circuit.mask, plainly(module, THRESHOLD))
    assert 5 < circuit.n_edges < circuit.graph.n_edges - 5
    assert circuit.record["found"]["threshold"] == THRESHOLD
    assert circuit.record["found"]["runs"] > circuit.n_edges


@functools.cache
def case_of(name, form="plain"):
    return next(case for case in cases([name], forms=[form]) if case.ablation == "resample")


@pytest.mark.parametrize(("name", "form"), [("reverse", "plain"), ("reverse", "hidden"), ("fraction", "plain")])
def test_true_edges_are_found_where_nothing_is_redundant(name, form):
    case = case_of(name, form)
    assert set(cp.acdc(case.experiment(), 1e-4).edges()) == case.true_edges


def test_of_an_or_one_way_is_left_and_of_an_and_both():
    either, both = (cp.acdc(case_of(name).experiment(), 1e-3) for name in ("or", "and"))
    assert set(both.edges()) == case_of("and").true_edges
    assert set(either.edges()) < case_of("or").true_edges
    assert cp.evaluate_circuit(case_of("or").experiment(), either, n_random=0).f()[0] == pytest.approx(1)


def test_what_is_left_when_it_is_stopped_is_kept(monkeypatch):
    case = case_of("or")
    whole, run, n_runs = cp.acdc(case.experiment(), 1e-3), room.run_kept, []

    def stopping(*args):
        if len(n_runs) == 2:
            raise KeyboardInterrupt
        n_runs.append(len(args[1]))
        return run(*args)

    monkeypatch.setattr(room, "run_kept", stopping)
    with pytest.warns(CausalPatchWarning, match=r"stopped after \d+ runs: \d+ of \d+ edges are left"):
        circuit = cp.acdc(case.experiment(), 1e-3)
    assert circuit.record["found"]["complete"] is False
    assert whole.record["found"]["complete"] is True
    assert (whole.mask <= circuit.mask).all()
    assert whole.n_edges < circuit.n_edges < circuit.graph.n_edges
    with pytest.raises(KeyboardInterrupt):  # nothing was found yet
        cp.acdc(case.experiment(), 1e-3)


def closeness(outputs, pairs):
    """How near the output of the cancelling pair's model is to what it is in clean runs, 1."""
    return -((outputs.logits[:, -1, 3] - outputs.logits[:, -1, 0] - 1) ** 2)


def test_a_metric_that_may_rise_loses_what_works_against_it():
    case = case_of("cancelling")
    by_difference = set(cp.acdc(case.experiment(), 1e-3).edges())
    by_distance = set(cp.acdc(case.experiment().measuring(cp.metric(closeness)), 1e-3).edges())
    assert by_difference < case.true_edges
    assert by_distance == case.true_edges
