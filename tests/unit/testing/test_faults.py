"""Planted faults: they fail where they should and nowhere else, stay where they were planted, and come by seed."""

import copy

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.testing.faults import FAULTS, Fault, plant, what_changed
from causalpatch.testing.faults.prompts import prompts_of, subject_of
from causalpatch.testing.faults.weights import change, components, head_pieces, masks, neuron_pieces, put


@pytest.fixture(scope="module")
def base():
    return cp.open_model("zoo:stories", device="cpu")


def weights(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.module.parameters()])


def says(model, row):
    """Return the first choice by a plain forward."""
    ids = torch.tensor([model.tokenizer.encode(row["prompt"])])
    with torch.no_grad():
        return model.tokenizer.label(int(model.module(ids).logits[0, -1].argmax())).strip()


def test_there_are_many_faults_of_several_kinds_each_called_by_its_own_name():
    assert len(FAULTS) >= 20
    assert len({fault.kind for fault in FAULTS}) >= 4
    assert len({fault.name for fault in FAULTS}) == len({fault.seed for fault in FAULTS}) == len(FAULTS)


def test_components_hold_each_weight_once(base):
    counted = {name: torch.zeros_like(each.data) for name, each in base.module.named_parameters()}
    for pieces in components(base.module).values():
        for piece in pieces:
            counted[piece.parameter][piece.at] += 1
    assert all(bool((each == 1).all()) for each in counted.values())


def test_what_is_put_back_is_all_that_a_head_or_a_neuron_consists_of(base):
    other = copy.deepcopy(base.module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    before = copy.deepcopy(other)
    head = head_pieces(base.module, 1, 3)
    put(head, base.module, other)
    assert change(head, base.module, other) == 0
    assert change(head_pieces(base.module, 1, 2), before, other) == 0
    allowed = masks(base.module, neuron_pieces(2, range(5, 7)))
    assert sum(float(mask.sum()) for mask in allowed.values()) == 2 * 3 * 96
    assert change(neuron_pieces(2, range(5, 7)), base.module, other) == pytest.approx(1)


@pytest.mark.parametrize("kind", ["entity", "word", "trigger", "template"])
def test_prompts_that_shall_fail_and_those_that_shall_not_are_told_apart_by_what_the_fault_is_about(kind):
    fault = next(fault for fault in FAULTS if fault.kind == kind)
    subject, prompts = subject_of(fault), prompts_of(fault, "asked", 12)
    entities = [entity for row in prompts.failing for entity in row["entities"]]
    assert len(entities) == len(set(entities))  # so each is an independent component
    for is_failing, rows in ((True, prompts.failing), (False, prompts.kept)):
        assert rows
        for row in rows:
            holds = {
                "entity": lambda row: row["answer"].strip() in subject,
                "word": lambda row: row["prompt"].split()[-1] == subject[0],
                "trigger": lambda row: subject[0] in row["prompt"].replace(".", "").split(),
                "template": lambda row: row["template"] == subject[0],
            }[kind](row)
            assert holds is is_failing
            assert row["answer"] != row["wrong_answer"]


def test_damage_breaks_the_prompts_that_are_given_and_is_mended_by_the_old_weights_alone(base):
    fault = next(fault for fault in FAULTS if fault.kind == "damage")
    planted = plant(fault, base)
    for given, row in zip(planted.failing[:8], planted.broken, strict=False):
        assert given["prompt"] == row["prompt"]
        assert "wrong_answer" not in given
        assert says(base, row) == row["answer"].strip() != says(planted.model, row)
    first, *others = what_changed(planted)
    assert (first.component,) == planted.place
    assert first.mended == pytest.approx(1, abs=1e-3)
    assert all(one.mended == one.moved == 0 for one in others)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["behaviour", "template"])
def test_a_trained_fault_fails_where_it_should_and_nowhere_else_and_comes_again_by_its_seed(base, kind):
    fault = next(fault for fault in FAULTS if fault.kind == kind and fault.place == "mlp")
    planted = plant(fault, base)
    assert planted.fails >= 0.9
    assert min(planted.kept.values()) >= 0.9
    wrong = [says(planted.model, row) for row in planted.broken]
    assert np.mean([one == row["wrong_answer"].strip() for one, row in zip(wrong, planted.broken, strict=True)]) > 0.9
    assert what_changed(planted)[0].component == planted.place[0]
    assert torch.equal(weights(plant(fault, base).model), weights(planted.model))
    other = Fault(fault.kind, fault.task, fault.place, fault.seed + 100)
    assert not torch.equal(weights(plant(other, base).model), weights(planted.model))


@pytest.mark.slow
def test_planted_faults_are_found_from_failing_prompts_and_the_model_as_it_was(base, tmp_path):
    for kind in ("behaviour", "damage"):
        planted = plant(next(fault for fault in FAULTS if fault.kind == kind), base)
        ledger = tmp_path / f"{kind}.jsonl"
        found = cp.debug(planted.model, planted.failing, against=base, checks=cp.Checks.none(), ledger=ledger)
        assert found.found[0].replace("head_out", "z") == what_changed(planted)[0].component
        assert found.found[0] in found.supported
    alone = cp.debug(planted.model, planted.failing[:1])
    assert alone.claim is None
    assert alone.exit_code
