"""Circuits learnt by masks: on circuits that are known, and what is said of them."""

import functools

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import NoGap, SettingError
from causalpatch.circuits.ground_truth import cases
from causalpatch.testing.tiny import tiny_model
from toys import prompts

torch.set_num_threads(1)

METHODS = ["hard-concrete", "ugs", "sigmoid-topk"]
PROMPTS = (([1, 7, 3, 9], [1, 8, 3, 10]), ([4, 6, 15], [4, 7, 16]))


@functools.cache
def case_of(name, ablation="resample"):
    return next(case for case in cases([name], forms=["plain"]) if case.ablation == ablation)


def tiny(seed=0, **more):
    return cp.Experiment(cp.open_model(tiny_model("gpt2", heads=2)), prompts(*PROMPTS), seed=seed, **more)


@pytest.mark.parametrize(
    ("method", "name", "objective"),
    [*((method, "fraction", "gap") for method in METHODS), ("sigmoid-topk", "reverse", "kl")],
)
def test_true_edges_are_learnt(method, name, objective):
    case = case_of(name)
    circuit = cp.learn_circuit(
        case.experiment(), len(case.true_edges), method=method, objective=objective, steps=60, rate=0.3
    )
    assert set(circuit.edges()) == case.true_edges
    found = circuit.record["found"]
    assert found["method"] == method == circuit.method
    assert found["tied"] == 0
    assert found["last_loss"] < found["first_loss"]


def test_one_order_serves_all_sizes():
    case = case_of("fraction")
    gates = cp.learn_edges(case.experiment(), steps=60, rate=0.3)
    best = [set(cp.discover_circuit(gates, n, by=by).edges()) for n in (3, 8) for by in ("importance", "magnitude")]
    assert best[0] == best[1] == case.true_edges < best[2] == best[3]
    found = cp.evaluate_circuit(case.experiment(), gates, fractions=(3 / 46, 0.5, 1), n_random=0)
    np.testing.assert_allclose(found.summary()["f"], 1, atol=1e-6)
    assert "gate learnt by sigmoid-topk" in str(gates.top(3))
    values = gates.values[gates.graph.exists]
    assert ((values > 0) & (values < 1)).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_seed_gives_the_same_gates_whatever_the_memory(method):
    how = {"steps": 4, "n_edges": None if method == "sigmoid-topk" else 20}
    first, again, split = (cp.learn_edges(tiny(max_rows=rows), method, **how).values for rows in (None, None, 1))
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, split, atol=1e-6)
    assert not np.array_equal(first, cp.learn_edges(tiny(seed=1), method, **how).values, equal_nan=True)


def test_gates_are_held_to_a_size():
    case = case_of("fraction")
    gates = cp.learn_edges(case.experiment(), "hard-concrete", 3, objective="gap", steps=150, rate=0.3)
    values = gates.values[gates.graph.exists]
    assert 3 <= (values > 0.5).sum() <= 5


def test_a_circuit_says_what_its_ablated_edges_carry():
    circuit = cp.learn_circuit(tiny(), 10, steps=2, value="zero")
    assert circuit.facts["value"] == "zero: nothing"
    assert circuit.record["found"]["held_to"] == 10
    same, other = (cp.evaluate_circuit(tiny(), circuit, n_random=0, value=value) for value in ("zero", "source"))
    assert not any("ablation" in note for note in same.notes)
    assert any("found with another ablation (zero: nothing)" in note for note in other.notes)
    assert circuit.method == "hard-concrete"


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(SettingError, match="'ugs' is held to a number of edges"):
        cp.learn_edges(tiny(), "ugs")
    with pytest.raises(SettingError, match="steps=0 is no whole number"):
        cp.learn_edges(tiny(), steps=0)
    same = cp.Experiment(cp.open_model(tiny_model("gpt2", heads=2)), prompts(([1, 7, 3], [1, 7, 3])))
    with pytest.raises(NoGap, match="no share of the gap"):
        cp.learn_edges(same, objective="gap")


def test_gates_can_be_confirmed_and_have_no_sign():
    case = case_of("fraction")
    gates = cp.learn_edges(case.experiment(), steps=60, rate=0.3)
    found = cp.confirm_scores(case.experiment().turned("noise"), gates, top=3, random_sample=10)
    assert "3 of the 3 largest scores" in str(found)
    assert "same sign" not in str(found)
