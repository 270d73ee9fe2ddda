"""What must not matter: order, chunks, padding, company, and which of two names a run has."""

import numpy as np
from hypothesis import strategies as st

import causalpatch as cp
from worlds import World, assert_same, law, run_all, some_patch


def some_patches(world: World, draw, n: int = 8, base: str = "corrupt") -> list[cp.Patch]:
    """Draw patches of several kinds of values at several kinds of places."""
    values = ["source", "zero", cp.Constant(0.5), cp.Mean(over="positions"), "identity"]
    patches = []
    while len(patches) < n:
        site, value = world.some_site(draw), draw(st.sampled_from(values))
        if not (site.info.has_keys and isinstance(value, cp.Mean)):  # which have no mean over positions
            patches.append(some_patch(world, draw, site, None if value == "source" else value, base).patch)
    return patches


def apart_from_others(world: World, patches: list[cp.Patch]) -> list[cp.Patch]:
    """Return the patches that mean the same for a pair whatever pairs stand beside it: no means, no long columns."""
    fewest = min(world.pairs.take([number]).aligned().n_columns for number in range(len(world.pairs)))
    return [p for p in patches if not isinstance(p.value, cp.Mean) and (p.column is None or p.column < fewest)]


@law
def test_the_order_of_interventions_changes_nothing(world, draw):
    patches = some_patches(world, draw)
    order = draw(st.permutations(range(len(patches))))
    straight = run_all(world.experiment(), patches)
    mixed = run_all(world.experiment(), [patches[i] for i in order])
    assert_same(mixed, straight[:, order])


@law
def test_how_many_rows_stand_in_a_forward_changes_nothing(world, draw):
    patches = some_patches(world, draw)
    together = run_all(world.experiment(), patches)
    for max_rows in (1, draw(st.integers(2, 7))):
        assert_same(run_all(world.experiment(max_rows=max_rows), patches), together)


@law
def test_the_order_and_number_of_pairs_change_nothing_for_any_of_them(world, draw):
    patches = apart_from_others(world, some_patches(world, draw))
    order = draw(st.permutations(range(len(world.pairs))))
    straight = run_all(world.experiment(), patches)
    assert_same(run_all(world.experiment(world.pairs.take(order)), patches), straight[..., order])
    some = order[:2]
    assert_same(run_all(world.experiment(world.pairs.take(some)), patches), straight[..., some])


@law
def test_the_side_of_the_padding_changes_nothing(world, draw):
    patches = some_patches(world, draw)
    left, right = (world.experiment(padding_side=side) for side in ("left", "right"))
    assert_same(left.baseline.clean, right.baseline.clean)
    assert_same(left.baseline.corrupt, right.baseline.corrupt)
    assert_same(run_all(left, patches), run_all(right, patches))


@law
def test_a_padded_run_equals_the_run_of_the_prompt_alone(world, draw):
    patches = apart_from_others(world, some_patches(world, draw))
    experiment = world.experiment()
    padded = run_all(experiment, patches)
    for number in range(len(world.pairs)):
        alone = world.experiment(world.pairs.take([number]))
        assert_same(run_all(alone, patches)[..., 0], padded[..., number])
        assert_same(alone.baseline.clean[:, 0], experiment.baseline.clean[:, number])
        assert_same(alone.baseline.corrupt[:, 0], experiment.baseline.corrupt[:, number])


@law
def test_noising_swapped_pairs_is_denoising_the_pairs(world, draw):
    patches = some_patches(world, draw)
    # The mean is taken over a side by its name, so it is named anew.
    renamed = [
        cp.Patch(p.site, cp.Mean(p.value.over, "clean"), p.align, p.column) if isinstance(p.value, cp.Mean) else p
        for p in patches
    ]
    denoise, noise = world.experiment(), world.experiment(world.pairs.swapped(), direction="noise")
    assert_same(run_all(noise, renamed), run_all(denoise, patches))
    assert_same(noise.baseline.clean, denoise.baseline.corrupt)
    assert_same(noise.baseline.corrupt, denoise.baseline.clean)
    swept = [cp.sweep(one, world.among("resid_pre", "mlp_out")[0]) for one in (denoise, noise)]
    assert_same(*(one.effect(per_pair=True).values for one in swept))


@law
def test_running_again_gives_the_same_bits(world, draw):
    patches = some_patches(world, draw)
    assert np.array_equal(run_all(world.experiment(), patches), run_all(world.experiment(), patches), equal_nan=True)
