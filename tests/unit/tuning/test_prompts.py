"""Runs that begin where a change begins, over few logits, are what whole runs are; so are trainings made of them."""

import numpy as np
import pytest
import torch

from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import Site
from causalpatch.tuning import prompts as rows_of
from causalpatch.tuning.losses import Answers, Kept
from causalpatch.tuning.parts import parts_of
from causalpatch.tuning.prompts import Prompts
from causalpatch.tuning.train import Schedule, train
from causalpatch.tuning.untrained import Prefixed, Steered
from causalpatch.tuning.ways import Offsets, Slices
from causalpatch.tuning.whole import Full
from tunings import prompts, stirred, tiny, tiny_data

LATE = [Site("z", 1, 1), Site("mlp_post", 1, 3)]


def slices(model):
    return Slices(model, parts_of(LATE, model))


def offsets(model):
    return Offsets(model, parts_of(LATE, model, outputs_alone=True))


def uneven(n=9):
    """Return pairs of different lengths, with answers of one and of several tokens, and sets of them."""
    answers = [(((7, 8), (9,)), ((4,),)), (((6,),), ((5, 5), (3, 2, 1))), (((6,),), ())]
    made = []
    for k in range(n):
        ids = prompts(1, 50 + k, 3 + k % 4)[0]
        made.append(Pair(ids, ids, *answers[k % 3], id=str(k)))
    return Pairs(made)


@pytest.fixture
def plainly(monkeypatch):
    """Make all runs whole, from the first layer and over all logits."""

    def switch():
        monkeypatch.setattr(Prompts, "_may_enter", lambda *_: False)
        monkeypatch.setattr(Prompts, "_may_be_cut", lambda *_: False)

    return switch


def both(make, plainly):
    """Return what is made with the short runs, then with whole ones."""
    short = make()
    plainly()
    return short, make()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "phi3", "bloom", "gemma2"])
@pytest.mark.parametrize("kind", [slices, offsets])
def test_short_runs_say_what_whole_ones_say_with_the_same_slopes(family, kind, plainly):
    model = tiny(family, dtype=torch.float64)

    def make():
        way = stirred(kind(model))
        answers, kept = Answers(model, uneven()), Kept(model, uneven())
        for held in (answers, kept):
            held.prompts.ready(way)
        said = answers.said(way, [4, 0, 8, 1])
        moved = kept.distances(way, [3, 2, 6])
        loss = said.wanted.sum() + moved.sum()
        slopes = torch.autograd.grad(loss, list(way.trained().values()))
        compared = kept.compared(way)
        return said.wanted, said.unwanted, said.succeeds(), moved, *slopes, *compared, answers, kept

    *short, answers, kept = make()
    assert kept.prompts._streams[1] is not None
    assert answers.prompts._is_cut
    plainly()
    *whole, answers, kept = make()
    assert kept.prompts._streams[1] is None
    assert not answers.prompts._is_cut
    for one, other in zip(short, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [slices, offsets, Full])
def test_a_training_of_short_runs_ends_as_one_of_whole_runs(kind, plainly):
    model, data = tiny("llama", dtype=torch.float64), tiny_data()
    schedule = Schedule(steps=25, every=5)

    def make():
        way = kind(model)
        return train(way, data, schedule, rate=0.02, seed=2), way.state()

    (short, state), (whole, other) = both(make, plainly)
    assert [look.step for look in short.looks] == [look.step for look in whole.looks]
    assert [look.success for look in short.looks] == [look.success for look in whole.looks]
    np.testing.assert_allclose([look.moved for look in short.looks], [look.moved for look in whole.looks], atol=1e-9)
    assert short.best.step == whole.best.step
    for name, each in state.items():
        torch.testing.assert_close(each, other[name], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    "make",
    [
        lambda model: Prefixed(model, [6, 7, 8], "three tokens"),
        lambda model: Steered(model, 1, torch.ones(model.width, dtype=model.dtype), "ones"),
    ],
)
def test_short_runs_hold_without_training_too(make, plainly):
    model = tiny("llama", dtype=torch.float64)

    def run():
        way, answers = make(model), Answers(model, uneven())
        answers.prompts.ready(way)
        with torch.no_grad():
            return answers.said(way, [5, 2, 0]).wanted

    short, whole = both(run, plainly)
    torch.testing.assert_close(short, whole, rtol=0, atol=1e-9)


def test_layers_below_a_change_are_not_run_again():
    model, ran = tiny("llama"), []
    way, kept = stirred(slices(model)), Kept(model, uneven())
    kept.prompts.ready(way)
    kept.base([0, 1])
    handle = model.module.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    kept.distances(way, [0, 1])
    assert ran == []
    handle.remove()


def test_where_someone_elses_hooks_stand_runs_are_whole():
    model, ran = tiny("llama"), []
    model.module.model.layers[0].mlp.register_forward_hook(lambda *_: ran.append(1))
    way, kept = stirred(slices(model)), Kept(model, uneven())
    kept.prompts.ready(way)
    assert kept.prompts._streams[way.entry] is None
    before = len(ran)
    kept.distances(way, [0, 1])
    assert len(ran) > before
    assert not Answers(model, uneven()).prompts._is_cut


def test_streams_that_do_not_go_into_memory_are_not_kept(monkeypatch):
    model = tiny("llama")
    kept = Kept(model, uneven())
    stream = len(uneven()) * 6 * model.width * 4
    monkeypatch.setattr(rows_of, "HELD_BYTES", stream)
    kept.prompts.ready(slices(model))
    assert kept.prompts._streams[1].nbytes == stream
    monkeypatch.setattr(rows_of, "HELD_BYTES", stream - 1)
    again = Kept(model, uneven())
    again.prompts.ready(slices(model))
    assert again.prompts._streams[1] is None
