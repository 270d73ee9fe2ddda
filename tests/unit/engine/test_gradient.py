"""Patched runs that are differentiated, against differences of runs that are not."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import Gauge, Job, Means, Placer, targets_of
from causalpatch.engine.gradient import differentiable, measure_rows
from causalpatch.engine.job import Cost, lay_rows
from causalpatch.engine.untouched import run_untouched
from causalpatch.testing.tiny import tiny_model
from toys import prompts
from worlds import tiny_world

PAIRS = prompts(([3, 4, 5, 6], [3, 9, 5, 7]), ([8, 4, 1], [2, 4, 6]), answer=1, wrong=2)


def losses(model, sites, constants):
    """Return the metric of every pair with constants at some sites together, as a tensor with its gradient."""
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
        return measure_rows(job, gauge, batch, rows)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_gradients_of_patched_values_are_the_limits_of_differences(family):
    model, _ = tiny_world(family, (2, 4, 2, 0))
    sites = ["z.0.1", "attn_out.0@1", "head_out.1.2@-1", "mlp_post.1.3"]
    sites += [] if "resid_mid" in model.shape.refused else ["resid_mid.0@0"]
    rng = np.random.default_rng(0)
    sizes = {"z": model.head_width, "mlp_post": None}
    shapes = [sizes.get(site.partition(".")[0], model.width) for site in sites]
    values = [torch.as_tensor(rng.normal(size=() if n is None else n)) for n in shapes]
    opened = [value.clone().requires_grad_() for value in values]
    weights = torch.as_tensor(rng.normal(size=(2, len(PAIRS))))
    (losses(model, sites, opened) * weights).sum().backward()
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
