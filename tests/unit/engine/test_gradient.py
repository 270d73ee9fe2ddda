"""Patched runs that are differentiated, against differences of runs that are not."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import causalpatch as cp
from causalpatch.engine import Gauge, Job, Means, Placer, targets_of
from causalpatch.engine.gradient import Room, differentiable, measure_rows, room_for
from causalpatch.engine.job import Cost, lay_rows
from causalpatch.engine.memory import row_cost
from causalpatch.engine.untouched import run_untouched
from causalpatch.testing.tiny import tiny_model
from toys import hooks_of, prompts
from worlds import tiny_world

HELD_OUT = prompts(([5, 4, 9, 6], [5, 9, 9, 7]), ([7, 4, 1], [3, 4, 6]), answer=1, wrong=2)
PAIRS = prompts(([3, 4, 5, 6], [3, 9, 5, 7]), ([8, 4, 1], [2, 4, 6]), answer=1, wrong=2)


def losses(model, sites, constants, weights=None, **settings):
    """Return the metric of every pair with constants at some sites together; with weights, add up gradients too."""
    patches = [
        cp.Patch(site, cp.Function(lambda current, _, c=c: c.expand_as(current), "given", needs_source=False))
        for site, c in zip(sites, constants, strict=True)
    ]
    job = Job(model, PAIRS, [targets_of(model, cp.Intervention(tuple(patches)))], "clean", "left")
    gauge = Gauge([cp.logit_difference, cp.kl_from_base], PAIRS, model)
    batch = run_untouched(job, gauge, Means(), Cost(), np.arange(len(PAIRS)))
    batch.known.tried.update(id(target.value) for target in job.interventions[0])
    rows, _ = lay_rows(job, Placer(PAIRS, "clean"), np.arange(len(PAIRS)))
    with differentiable(model):
        found = measure_rows(job, gauge, batch, rows, **settings)
        if weights is not None:
            (found * weights).sum().backward()
        return found


def given(model, sites, seed=0):
    """Return random constants for sites, with gradients to come, and weights for the losses."""
    rng = np.random.default_rng(seed)
    sizes = {"z": model.head_width, "q": model.head_width, "mlp_post": None, "pattern": None}
    shapes = [sizes.get(site.partition(".")[0], model.width) for site in sites]
    values = [torch.as_tensor(rng.normal(size=() if n is None else n)).requires_grad_() for n in shapes]
    return values, torch.as_tensor(rng.normal(size=(2, len(PAIRS))))


@contextmanager
def counted_bytes(found):
    """Count the bytes that autograd keeps for the backward, but for those of parameters."""

    def keep(tensor):
        if not tensor.is_leaf:
            found.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "opt", "mixtral", "bloom", "bert"])
def test_layers_that_are_computed_once_more_give_the_same_gradients_and_keep_less(family):
    model, _ = tiny_world(family, (3, 4, 4, 0))
    every = ["z.0.1", "attn_out.0@1", "head_out.1.2@-1", "mlp_post.1.3", "resid_pre.2@0", "resid_mid.0@0"]
    every += ["pattern.1.1@-1", "resid_post.0@-1", "q.2.3", "mlp_out.2"]
    sites = [site for site in every if site.partition(".")[0] not in model.shape.refused]
    of_all, bytes_of = {}, {}
    for is_checkpointed in (False, True):
        constants, weights = given(model, sites)
        kept = []
        with counted_bytes(kept):
            found = losses(model, sites, constants, weights, is_checkpointed=is_checkpointed)
        of_all[is_checkpointed] = [found.detach(), *(constant.grad for constant in constants)]
        bytes_of[is_checkpointed] = sum(kept)
    for plain, again in zip(of_all[False], of_all[True], strict=True):
        assert torch.equal(plain, again)
        assert plain.abs().max() > 0
    assert hooks_of(model.module) == 0
    assert all("forward" not in part.__dict__ for part in model.module.modules())
    first, then = bytes_of[False], bytes_of[True]
    assert then < 0.6 * first, (first, then)


def test_layers_are_computed_once_more_where_not_one_row_fits_otherwise():
    model, _ = tiny_world("llama", (3, 4, 4, 0))
    job = Job(model, PAIRS, [targets_of(model, cp.Intervention.of("z.0.1"))], "clean", "left")
    one = row_cost(model, 4).total / 2**30
    assert room_for(replace(job, budget_gib=6.5 * one)) == Room(2, can_checkpoint=True)
    assert room_for(replace(job, budget_gib=2.5 * one)) == Room(1, is_checkpointed=True, can_checkpoint=True)
    assert Room(3, can_checkpoint=True).tighter(3) == Room(1, can_checkpoint=True)
    assert Room(1, can_checkpoint=True).tighter(1) == Room(1, is_checkpointed=True, can_checkpoint=True)
    assert Room(1, is_checkpointed=True, can_checkpoint=True).tighter(1) is None
    assert Room(1).tighter(1) is None


@pytest.mark.parametrize("value", [cp.Optimal(steps=5), None])
def test_what_is_learnt_is_the_same_where_layers_are_computed_once_more(value, monkeypatch):
    model, _ = tiny_world("gpt2", (3, 4, 4, 0))

    def learnt(budget):
        experiment = cp.Experiment(model, PAIRS, show_progress=False, budget_gib=budget)
        if value is not None:
            return experiment.run([cp.Patch("z.0.1", value)]).to_xarray()["metric"].values
        search = cp.RotationSearch(epochs=3)
        return cp.learn_subspace(experiment, "resid_pre.1@-1", HELD_OUT, dimension=2, search=search).basis

    plain = learnt(None)
    seen = []
    monkeypatch.setattr("causalpatch.engine.checkpoint.checkpoint", partial(_noted, seen))
    again = learnt(2.5 * row_cost(model, 4).total / 2**30)
    assert seen
    np.testing.assert_allclose(again, plain, rtol=1e-7)


def _noted(seen, *args, **kwargs):
    seen.append(1)
    return checkpoint(*args, **kwargs)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_gradients_of_patched_values_are_the_limits_of_differences(family):
    model, _ = tiny_world(family, (2, 4, 2, 0))
    sites = ["z.0.1", "attn_out.0@1", "head_out.1.2@-1", "mlp_post.1.3"]
    sites += [] if "resid_mid" in model.shape.refused else ["resid_mid.0@0"]
    rng = np.random.default_rng(1)
    opened, weights = given(model, sites)
    values = [value.detach() for value in opened]
    losses(model, sites, opened, weights)
    for number, value in enumerate(values):
        direction = torch.as_tensor(rng.normal(size=tuple(value.shape)))
        step = 1e-5
        ends = []
        for sign in (1, -1):
            moved = [v + sign * step * direction if n == number else v for n, v in enumerate(values)]
            ends.append((losses(model, sites, moved).detach() * weights).sum())
        wanted = float(ends[0] - ends[1]) / (2 * step)
        assert float((opened[number].grad * direction).sum()) == pytest.approx(wanted, rel=1e-5, abs=1e-7)


def test_weights_stay_as_they_were_and_get_no_gradient():
    model = cp.open_model(tiny_model("llama"))
    model.module.lm_head.weight.requires_grad_(False)
    model.module.train()
    before = {name: (p.requires_grad, p.clone()) for name, p in model.module.named_parameters()}
    constant = torch.zeros(model.head_width, dtype=model.dtype, requires_grad=True)
    losses(model, ["z.0.1"], [constant]).sum().backward()
    assert constant.grad.abs().max() > 0
    for name, parameter in model.module.named_parameters():
        assert parameter.requires_grad == before[name][0]
        assert torch.equal(parameter, before[name][1])
        assert parameter.grad is None
    assert model.module.training
    with pytest.raises(RuntimeError, match="stop here"), differentiable(model):
        raise RuntimeError("stop here")
    assert [p.requires_grad for p in model.module.parameters()] == [was for was, _ in before.values()]


def test_runs_that_are_not_differentiated_keep_no_graph():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    constant = torch.zeros(model.head_width, dtype=model.dtype, requires_grad=True)
    seen = []

    def give(current, _):
        seen.append(torch.is_grad_enabled())
        return constant.expand_as(current)

    cp.Experiment(model, PAIRS).run([cp.Patch("z.0.1", cp.Function(give, "given", needs_source=False))])
    assert set(seen) == {False}
