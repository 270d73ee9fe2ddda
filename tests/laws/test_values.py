"""Values other than the source run's, against what the oracle puts in by hand."""

import numpy as np
import torch
from hypothesis import strategies as st

import causalpatch as cp
from causalpatch.sites import NAMES, Range, SiteSet
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
    site = world.some_site(draw, draw(st.sampled_from(world.among("resid_post", "z", "q", "attn_out"))))
    (size,) = world.sizes(site.name).values()
    direction = np.random.default_rng(draw(st.integers(0, 99))).normal(size=size)
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
    site = world.some_site(draw, draw(st.sampled_from(world.among("resid_pre", "mlp_out", "attn_out"))))
    vector = np.random.default_rng(1).normal(size=world.model.width)
    back, rest = run_all(
        world.experiment(),
        [
            [cp.Patch(site, cp.Steer(vector, 2.0)), cp.Patch(site.at(0), cp.Steer(vector, -2.0))],
            cp.Patch(site.at(Range(1, None)), cp.Steer(2.0 * vector)),
        ],
    ).swapaxes(0, 1)
    assert_same(back, rest)


@law(lengths="equal")
def test_the_whole_space_is_the_source_and_two_halves_make_a_whole(world, draw):
    names = [name for name in world.site_names if len(NAMES[name].value_axes) == 1 and not NAMES[name].has_keys]
    site = world.some_site(draw, draw(st.sampled_from([name for name in names if name != "logits"])))
    (n,) = world.sizes(site.name).values()
    rows = np.linalg.qr(np.random.default_rng(draw(st.integers(0, 99))).normal(size=(n, n)))[0]
    half = draw(st.integers(1, n - 1))
    level = np.linspace(0.5, 1.0, n)  # a stream that is level has no spread, and a norm would blow rounding up
    first, rest = cp.Subspace(3.0 * rows[:half]), cp.Subspace(rows[half:])
    whole, source, both, constant, wanted = run_all(
        world.experiment(direction=draw(st.sampled_from(["denoise", "noise"]))),
        [
            cp.Patch(site, cp.Subspace(rows)),
            cp.Patch(site),
            [cp.Patch(site, first), cp.Patch(site.at(Range(0, None)), rest)],
            cp.Patch(site, cp.Subspace(rows, cp.Constant(level))),
            cp.Patch(site, level),
        ],
    ).swapaxes(0, 1)
    assert_same(whole, source)
    assert_same(both, source)
    assert_same(constant, wanted)


@law(needs=["z"])
def test_a_subspace_across_the_units_of_a_layer_is_one_of_each_where_it_lies_in_one(world, draw):
    name = draw(st.sampled_from(world.among("z", "mlp_post")))
    one = world.some_site(draw, name)
    shape = [world.model.shape.units[NAMES[name].unit_axis]]
    shape += [world.model.head_width] if name == "z" else []
    basis = np.zeros((1, *shape))
    basis[0, one.unit] = np.random.default_rng(2).normal(size=shape[1:])
    of = draw(st.sampled_from([cp.Source(), cp.Zero()]))
    token = draw(st.integers(-3, 2))
    across = cp.Patch(SiteSet(name, one.layer).at(token), cp.Subspace(basis, of))
    alone = cp.Patch(one.at(token), cp.Subspace(basis[0, one.unit], of) if name == "z" else of)
    joined, single = run_all(world.experiment(), [across, alone]).swapaxes(0, 1)
    assert_same(joined, single)
