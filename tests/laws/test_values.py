"""Values other than the source run's, against what the oracle puts in by hand."""

import functools

import numpy as np
import torch
from hypothesis import strategies as st

import causalpatch as cp
from worlds import assert_same, by_plain_hooks, law, run_all, some_patch


def halfway(current: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return 1.5 * current - 0.5 * source


@law
def test_zero_mean_constant_and_function_put_in_what_raw_hooks_put_in(world, draw):
    direction = draw(st.sampled_from(["denoise", "noise"]))
    base = "corrupt" if direction == "denoise" else "clean"
    shape = world.model.shape
    laid = []
    for value in ("zero", "mean", "constant", "number", "over all", "function", "square"):
        site = world.some_site(draw)
        array = np.random.default_rng(shape.n_layers).normal(size=[*world.sizes(site.name).values()])
        made = {
            "zero": cp.Zero(),
            "mean": cp.Mean(side=base),
            "over all": cp.Mean("positions", draw(st.sampled_from(["clean", "corrupt"]))),
            "constant": cp.Constant(array),
            "number": cp.Constant(0.75),
            "function": cp.Function(halfway),
            "square": cp.Function(lambda current, source: current**2, "square", needs_source=False),
        }[value]
        laid.append(some_patch(world, draw, site, made, base))
    got = run_all(world.experiment(direction=direction), [one.patch for one in laid])
    for number, one in enumerate(laid):
        assert_same(got[:, number], by_plain_hooks(world, [one], base))


@law
def test_a_function_sees_what_earlier_patches_of_its_run_have_written(world, draw):
    site = world.some_site(draw, draw(st.sampled_from(world.among("resid_post", "z", "mlp_post", "q", "embed"))))
    token = draw(st.integers(-3, 2))
    twice = cp.Function(lambda current, source: 2 * current, "twice", needs_source=False)
    first, then = cp.Patch(site, cp.Constant(0.25)), cp.Patch(site.at(token), twice)
    doubled, wanted = run_all(
        world.experiment(), [[first, then], [first, cp.Patch(site.at(token), cp.Constant(0.5))]]
    ).swapaxes(0, 1)
    assert_same(doubled, wanted)


def interpolate(share: float, current: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    return current + share * (source - current)


@law
def test_interpolating_by_nothing_and_by_everything_are_the_identity_and_the_source(world, draw):
    laid = some_patch(world, draw, world.some_site(draw))
    site, align, column = laid.patch.site, laid.patch.align, laid.patch.column
    made = [
        cp.Patch(site, cp.Function(functools.partial(interpolate, share), str(share)), align, column)
        for share in (0.0, 1.0)
    ]
    experiment = world.experiment()
    nothing, everything, source = run_all(experiment, [*made, laid.patch]).swapaxes(0, 1)
    assert_same(nothing, np.where(np.isnan(source), np.nan, experiment.baseline.corrupt))
    assert_same(everything, source)
