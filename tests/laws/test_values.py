"""Values other than the source run's, against what the oracle puts in by hand."""

import numpy as np
import torch
from hypothesis import strategies as st

import causalpatch as cp
from causalpatch.sites import NAMES, Range
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
        # Rows over keys have no mean over positions, and as many keys as the prompt has tokens.
        site = world.some_site(draw)
        while site.info.has_keys and value in ("over all", "constant"):
            site = world.some_site(draw)
        sizes = [] if site.info.has_keys else [*world.sizes(site.name).values()]
        array = np.random.default_rng(shape.n_layers).normal(size=sizes)
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


@law
def test_interpolating_by_nothing_and_by_everything_are_the_identity_and_the_source(world, draw):
    site = world.some_site(draw)
    laid = [some_patch(world, draw, site, value) for value in (cp.Interpolate(0.0), cp.Interpolate(1.0))]
    asked = []
    for one, value in zip(laid, (cp.Identity(), cp.Source()), strict=True):
        patch = one.patch
        asked += [patch, cp.Patch(patch.site, value, patch.align, patch.column)]
    nothing, identity, everything, source = run_all(world.experiment(), asked).swapaxes(0, 1)
    is_there = ~np.isnan(nothing)
    base = np.broadcast_to(world.experiment().baseline.corrupt, nothing.shape)
    assert_same(nothing[is_there], base[is_there])
    assert_same(identity[is_there], base[is_there])
    assert_same(everything, source)


@law
def test_a_direction_that_is_projected_out_is_gone_whatever_its_length_and_whatever_was_added_along_it(world, draw):
    sizes = {"width": world.model.width, "head_width": world.model.head_width}
    site = world.some_site(draw, draw(st.sampled_from(["resid_post", "z", "q", "attn_out"])))
    direction = np.random.default_rng(draw(st.integers(0, 99))).normal(size=sizes[NAMES[site.name].value_axes[0]])
    last, end = site.at(-1), site.at(Range(-1, None))
    out = cp.ProjectOut(direction)
    once, scaled, steered, twice = run_all(
        world.experiment(),
        [
            cp.Patch(last, out),
            cp.Patch(last, cp.ProjectOut(-1e-3 * direction)),
            [cp.Patch(last, cp.Steer(direction, 5.0)), cp.Patch(end, out)],
            [cp.Patch(last, out), cp.Patch(end, out)],
        ],
    ).swapaxes(0, 1)
    assert_same(scaled, once)
    assert_same(steered, once)
    assert_same(twice, once)


@law
def test_steering_back_at_a_token_leaves_the_others_steered(world, draw):
    site = world.some_site(draw, draw(st.sampled_from(["resid_pre", "mlp_out", "attn_out"])))
    vector = np.random.default_rng(1).normal(size=world.model.width)
    back, rest = run_all(
        world.experiment(),
        [
            [cp.Patch(site, cp.Steer(vector, 2.0)), cp.Patch(site.at(0), cp.Steer(vector, -2.0))],
            cp.Patch(site.at(Range(1, None)), cp.Steer(2.0 * vector)),
        ],
    ).swapaxes(0, 1)
    assert_same(back, rest)
