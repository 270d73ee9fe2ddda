"""Changes that run side by side, and trainings made side by side, do what each does alone."""

import pytest
import torch
from torch import nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.sites import Site
from causalpatch.tuning import train as training
from causalpatch.tuning.low_rank import LowRank
from causalpatch.tuning.parts import parts_of
from causalpatch.tuning.together import may_be_together, side_by_side
from causalpatch.tuning.train import Schedule, Trial, train, train_all
from causalpatch.tuning.untrained import Steered
from causalpatch.tuning.ways import Offsets, Slices
from causalpatch.tuning.whole import Full
from tunings import prompts, stirred, tiny, tiny_data

IDS = torch.as_tensor(prompts(7, 5))
SIZES = (2, 1, 4)


def changes(model):
    """Return changes of several kinds and components that act from layer 1 on."""
    head, neurons = parts_of([Site("z", 1, 2)], model), parts_of([Site("mlp_post", 1, 3)], model)
    offsets = parts_of([Site("z", 1, 0), Site("q", 1, 1)], model, outputs_alone=True)
    return [stirred(Slices(model, head)), stirred(Offsets(model, offsets), 1), stirred(Slices(model, neurons), 2)]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt", "phi3", "bloom"])
def test_rows_side_by_side_are_what_each_change_makes_of_them_alone(family):
    model = tiny(family, dtype=torch.float64)
    ways = changes(model)
    assert may_be_together(ways)
    with torch.no_grad():
        with side_by_side(ways, SIZES) as module:
            found = module(input_ids=IDS, use_cache=False).logits
        for way, ids, own in zip(ways, torch.split(IDS, SIZES), torch.split(found, SIZES), strict=True):
            with way.running() as module:
                torch.testing.assert_close(own, module(input_ids=ids, use_cache=False).logits, rtol=0, atol=1e-9)


def trials(model):
    """Return trainings of several changes, rates and seeds, of which the third diverges."""
    made = []
    for k, (way, rate) in enumerate(zip(changes(model), (0.02, 0.01, 1e200), strict=True)):
        for each in way.trained().values():
            nn.init.zeros_(each)
        made.append(Trial(way, rate, seed=k))
    return made


def test_trainings_side_by_side_go_as_each_goes_alone():
    model, data = tiny("llama", dtype=torch.float64), tiny_data()
    schedule = Schedule(steps=40, every=2, patience=2)
    together = trials(model)
    found = train_all(together, data, schedule)
    assert len({each.n_steps for each in found}) > 1  # they do not end at the same step
    assert not found[2].is_whole
    assert found[2].ended.startswith("diverged")
    for told, ours, own in zip(found, together, trials(model), strict=True):
        alone = train(own.way, data, schedule, rate=own.rate, seed=own.seed)
        assert (told.n_steps, told.ended, told.best.step) == (alone.n_steps, alone.ended, alone.best.step)
        assert [each.success for each in told.looks] == [each.success for each in alone.looks]
        for name, each in ours.way.state().items():
            torch.testing.assert_close(each, own.way.state()[name], rtol=0, atol=1e-9)


def test_what_cannot_share_a_run_is_trained_by_itself(monkeypatch):
    model, data, seen = tiny("llama"), tiny_data(), []
    real = training.looks

    def looks(ways, *given):
        seen.append(len(ways))
        return real(ways, *given)

    monkeypatch.setattr(training, "looks", looks)
    schedule, parts = Schedule(steps=2, every=2), parts_of([Site("z", 1, 2)], model)
    ways = [Full(model), Full(model), LowRank(model, parts), Slices(model, parts), Slices(model, parts)]
    early = Slices(model, parts_of([Site("z", 0, 2)], model))
    assert not may_be_together([ways[3], early])
    found = train_all([Trial(way, 0.01, 0) for way in (*ways, early)], data, schedule)
    assert len(found) == 6
    assert seen == [*[1] * 8, 2, 2]  # at the beginning and at the end of each group; what begins early comes first
    monkeypatch.setattr(training, "_MOST_NUMBERS", 1)
    seen.clear()
    train_all([Trial(Slices(model, parts), 0.01, 0) for _ in range(2)], data, schedule)
    assert seen == [1, 1, 1, 1]  # where a run is more arithmetic than calls


def test_a_model_that_mixes_rows_is_trained_one_change_at_a_time(monkeypatch):
    model, data = tiny("llama"), tiny_data()
    schedule, parts = Schedule(steps=4, every=2), parts_of([Site("mlp_post", 1, 3)], model)
    mlp = model.module.model.layers[1].mlp
    own = type(mlp).forward
    monkeypatch.setattr(mlp, "forward", lambda x: own(mlp, x.flatten(0, 1)[None])[0].reshape(x.shape), raising=False)
    ways = [Slices(model, parts) for _ in range(2)]
    refused = pytest.raises(ModelUnsupported, match="rows cannot be told apart")
    with refused, torch.no_grad(), side_by_side(ways, [3, 4]) as module:
        module(IDS)
    found = train_all([Trial(way, 0.01, 0) for way in ways], data, schedule)
    assert [each.n_steps for each in found] == [4, 4]
    assert all(torch.equal(each, ways[1].state()[name]) for name, each in ways[0].state().items())


def test_vectors_behind_layers_run_side_by_side_too():
    model = tiny("gpt2", dtype=torch.float64)
    ways = [Steered(model, 0, torch.full((model.width,), size, dtype=torch.float64), "") for size in (1.0, -1.0)]
    with torch.no_grad():
        with side_by_side(ways, [3, 4]) as module:
            found = module(IDS).logits
        with ways[1].running() as module:
            torch.testing.assert_close(found[3:], module(IDS[3:]).logits, rtol=0, atol=1e-9)
