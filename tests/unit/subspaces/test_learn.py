"""A planted direction is found, to a few degrees, and nothing is found where nothing is."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import AnswerError, MemoryExhausted, PairError, SettingError
from planted import SITE, VALUES, WIDTH, Planted, planted_pairs

LEARNING = planted_pairs(300, 0, [0, 1, 3, 5, 6], "seen values")
HELD_OUT = planted_pairs(300, 1, [2, 4], "other values")
FEW = cp.RotationSearch(epochs=3)
BRIEF = cp.RotationSearch(epochs=2)
ALONE = cp.SubspaceControls(n_random=0, is_shuffled=False)


def experiment(pairs=LEARNING, *, is_random=False, seed=0, direction="denoise", **settings):
    with torch.random.fork_rng():
        model = cp.open_model(Planted(seed, is_random=is_random))
    return cp.Experiment(model, pairs, "answer_logit", direction, show_progress=False, **settings)


def angle(basis, wanted):
    """Return the largest principal angle between two subspaces, in degrees."""
    return np.degrees(np.arccos(np.clip(np.linalg.svd(basis @ wanted, compute_uv=False).min(), 0, 1)))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_a_planted_direction_is_found_and_holds_for_values_it_was_not_learnt_on(seed):
    asked = experiment(seed=seed)
    found = cp.learn_subspace(asked, SITE, HELD_OUT, wanted="swapped")
    assert found.accuracy.share >= 0.99
    assert found.accuracy.low > 0.98
    assert angle(found.basis, asked.model.module.rotation[:, :1]) <= 5
    assert found.controls["best random"] < 0.5
    assert found.controls["whole site"] < 0.3  # the whole site brings the other variable along
    assert found.controls["shuffled"] <= found.accuracy.chance + 0.05
    assert not found.parts.is_illusion
    assert found.parts.of["row"].share > 0.99
    assert found.epochs[-1].loss < found.epochs[0].loss / 10


def test_where_nothing_is_planted_nothing_is_found():
    found = cp.learn_subspace(experiment(is_random=True), SITE, HELD_OUT, wanted="swapped")
    assert found.accuracy.share <= found.accuracy.chance + 0.05
    assert found.controls["shuffled"] <= found.accuracy.chance + 0.05


@pytest.mark.slow
def test_both_variables_take_two_dimensions_and_the_sources_own_answer():
    asked = experiment()
    found = cp.learn_subspace(asked, SITE, HELD_OUT, dimension=2, controls=ALONE)
    assert found.accuracy.share >= 0.99
    assert angle(found.basis, asked.model.module.rotation[:, :2]) <= 5
    alone = cp.learn_subspace(asked, SITE, HELD_OUT, dimension=1, controls=ALONE)
    assert alone.accuracy.share < 0.6
    assert alone.controls == {"whole site": 1.0}


def test_noising_wants_the_corrupted_runs_answer():
    asked = experiment(direction="noise")
    found = cp.learn_subspace(asked, SITE, HELD_OUT, dimension=2, controls=ALONE)
    assert found.accuracy.share >= 0.99
    assert found.accuracy.chance == pytest.approx(
        np.unique([pair.wrong_answer[0][0] for pair in HELD_OUT], return_counts=True)[1].max() / len(HELD_OUT)
    )


@pytest.mark.parametrize(("wanted", "dimension"), [("swapped", 1), pytest.param(None, 2, marks=pytest.mark.slow)])
def test_boundless_the_dimension_is_found_too(wanted, dimension):
    asked = experiment()
    found = cp.learn_subspace(asked, SITE, HELD_OUT, dimension="boundless", wanted=wanted, controls=ALONE)
    assert found.dimension == dimension
    assert found.accuracy.share >= 0.99
    assert angle(found.basis, asked.model.module.rotation[:, :dimension]) <= 5
    temperatures = [epoch.temperature for epoch in found.epochs]
    assert temperatures == sorted(temperatures, reverse=True)
    assert temperatures[-1] == pytest.approx(0.1)
    assert found.epochs[0].dimension == WIDTH // 2


def test_the_same_seed_gives_the_same_subspace_and_another_one_another_search():
    one, again, other = (
        cp.learn_subspace(
            experiment(seed=0).__class__(experiment().model, LEARNING, "answer_logit", seed=seed),
            SITE,
            HELD_OUT,
            wanted="swapped",
            search=FEW,
            controls=ALONE,
        )
        for seed in (0, 0, 1)
    )
    assert np.array_equal(one.basis, again.basis)
    assert one.epochs == again.epochs
    assert one.epochs[0] != other.epochs[0]


def test_the_search_stops_when_nothing_gets_better_and_keeps_the_best():
    search = cp.RotationSearch(epochs=200, patience=3)
    found = cp.learn_subspace(experiment(), SITE, HELD_OUT, wanted="swapped", search=search, controls=ALONE)
    losses = [epoch.loss for epoch in found.epochs]
    assert len(losses) < 60
    assert min(losses[:-3]) <= min(losses[-3:]) * (1 + 1e-3)
    measured = cp.learn_subspace(
        experiment(), SITE, HELD_OUT, wanted="swapped", search=cp.RotationSearch(epochs=2, restarts=3), controls=ALONE
    )
    assert len(measured.epochs) == 3


def test_of_several_searches_the_best_is_kept():
    ends = []
    for restarts in (1, 4):
        search = cp.RotationSearch(epochs=1, restarts=restarts)
        found = cp.learn_subspace(experiment(), SITE, HELD_OUT, wanted="swapped", search=search, controls=ALONE)
        ends.append(min(epoch.loss for epoch in found.epochs))
    assert ends[1] <= ends[0]


@pytest.mark.slow
def test_small_forwards_give_the_same_subspace():
    whole, small = (
        cp.learn_subspace(experiment(max_rows=rows), SITE, HELD_OUT, wanted="swapped", search=BRIEF, controls=ALONE)
        for rows in (None, 7)
    )
    assert np.abs(whole.basis - small.basis).max() < 1e-4


def test_the_model_is_left_as_it_was():
    asked = experiment()
    before = {name: (p.clone(), p.requires_grad) for name, p in asked.model.module.named_parameters()}
    cp.learn_subspace(asked, SITE, HELD_OUT, wanted="swapped", search=FEW, controls=ALONE)
    for name, parameter in asked.model.module.named_parameters():
        assert torch.equal(before[name][0], parameter)
        assert parameter.requires_grad == before[name][1]
        assert parameter.grad is None
    assert not sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in asked.model.module.modules())


def test_pairs_that_share_a_prompt_are_not_held_out():
    with pytest.raises(PairError, match="pair 0 of 'seen values' shares a prompt"):
        cp.learn_subspace(experiment(), SITE, LEARNING.take([3]), wanted="swapped")


def test_a_confirmation_takes_other_pairs():
    found = cp.learn_subspace(experiment(), SITE, HELD_OUT, wanted="swapped", controls=ALONE)
    confirmed = found.confirm(experiment(planted_pairs(100, 2, [2, 3], "fresh")))
    assert confirmed.share >= 0.99
    assert confirmed.on == "fresh"
    with pytest.raises(PairError, match="shares a prompt"):
        found.confirm(experiment(LEARNING.take([5])))


def test_the_record_of_a_run_names_the_pairs_that_a_subspace_was_learnt_on():
    found = cp.learn_subspace(experiment(), SITE, HELD_OUT, wanted="swapped", search=FEW, controls=ALONE)
    effects = experiment(HELD_OUT).run([found.patch])
    (record,) = effects.provenance["fitted"]
    assert record["pairs"] == "seen values"
    assert record["pairs_hash"] == LEARNING.content_hash
    assert record["hash"] == found.value.hash


def test_what_cannot_be_learnt_is_refused():
    with pytest.raises(SettingError, match="no subspace of dimension 17"):
        cp.learn_subspace(experiment(), SITE, HELD_OUT, dimension=17)
    with pytest.raises(SettingError, match="cannot have dimension 0"):
        cp.learn_subspace(experiment(), SITE, HELD_OUT, dimension=0)
    with pytest.raises(PairError, match="no column 'other' of wanted answers"):
        cp.learn_subspace(experiment(), SITE, HELD_OUT, wanted="other")
    with pytest.raises(SettingError, match="epochs=0"):
        cp.RotationSearch(epochs=0)


def test_a_wanted_answer_must_be_one_token():
    pairs = planted_pairs(4, 3)
    bad = [
        type(pair)(pair.clean, pair.corrupt, pair.answer, pair.wrong_answer, extra={"x": x})
        for pair, x in zip(pairs, ("no", 3, [4, 5], [[1, 2]]), strict=True)
    ]
    held = type(pairs)(bad, kind="arrays")
    assert cp.patched_accuracy(experiment(held.take([1, 2])), cp.Patch(SITE), "x").n_pairs == 2
    for number in (0, 3):
        with pytest.raises(AnswerError, match="no wanted answer of one token"):
            cp.patched_accuracy(experiment(held.take([number])), cp.Patch(SITE), "x")


def test_memory_that_runs_out_is_met_with_smaller_forwards_or_said(monkeypatch):
    asked = experiment()
    forward, most = asked.model.module.forward, [16]

    def narrow(x):
        if torch.is_grad_enabled() and len(x) > most[0]:
            raise torch.OutOfMemoryError("too many rows")
        return forward(x)

    monkeypatch.setattr(asked.model.module, "forward", narrow)
    found = cp.learn_subspace(asked, SITE, HELD_OUT, wanted="swapped", search=BRIEF, controls=ALONE)
    whole = cp.learn_subspace(experiment(), SITE, HELD_OUT, wanted="swapped", search=BRIEF, controls=ALONE)
    assert np.abs(found.basis - whole.basis).max() < 1e-4
    most[0] = 0
    with pytest.raises(MemoryExhausted):
        cp.learn_subspace(asked, SITE, HELD_OUT, wanted="swapped", search=BRIEF, controls=ALONE)


def test_accuracy_counts_first_choices_by_hand():
    asked = experiment(HELD_OUT)
    direction = asked.model.module.rotation[:, 0]
    patch = cp.Patch(SITE, cp.Subspace(direction))
    got = cp.patched_accuracy(asked, patch, "swapped")
    module, hits = asked.model.module, 0
    for pair in HELD_OUT:
        with torch.no_grad():
            base, source = (module.turn(torch.tensor(x, dtype=torch.float32)) for x in (pair.corrupt, pair.clean))
            u = torch.tensor(direction, dtype=torch.float32)
            hits += int(module.classes(base + u * (u @ (source - base))).argmax()) == pair.extra["swapped"]
    assert got.share == hits / len(HELD_OUT)
    assert VALUES * VALUES > 1 / got.chance > 1
