"""Every engine measures what the reference measures, and what raw hooks measure."""

import numpy as np
from hypothesis import strategies as st

import causalpatch as cp
from tiers import (
    assert_agree,
    baselines,
    by_raw_hooks,
    experiment_on,
    log_probability_by_raw_hooks,
    modules_of,
    run_on,
    some_intervention,
    with_answers,
)
from worlds import CAUSAL, ON_WAVEFRONT, World, assert_same, law, numbers, some_patch

DIRECTIONS = ("denoise", "noise")


def some_direction(draw) -> tuple[str, str]:
    """Draw a direction; return it with the side of its base."""
    direction = draw(st.sampled_from(DIRECTIONS))
    return direction, "corrupt" if direction == "denoise" else "clean"


@law(is_varied=True, is_for_all=True)
def test_every_tier_measures_what_the_reference_measures_whatever_is_patched(world, draw):
    direction, base = some_direction(draw)
    laid = [some_intervention(world, draw, base) for _ in range(10)]
    interventions = [[one.patch for one in each] for each in laid]
    wanted = run_on("reference", world, interventions, direction=direction)
    for tier in world.tiers:
        assert_agree(run_on(tier, world, interventions, direction=direction), wanted)


@law(is_varied=True, only=ON_WAVEFRONT)
def test_the_wavefront_measures_what_raw_hooks_measure_whatever_is_patched(world, draw):
    direction, base = some_direction(draw)
    laid = [some_intervention(world, draw, base) for _ in range(6)]
    interventions = [[one.patch for one in each] for each in laid]
    got = numbers(run_on("wavefront", world, interventions, direction=direction))
    for number, each in enumerate(laid):
        assert_same(got[:, number], by_raw_hooks(world, each, base))


@law(is_varied=True, only=ON_WAVEFRONT)
def test_the_wavefront_measures_what_a_raw_hook_measures_at_every_site(world, draw):
    direction, base = some_direction(draw)
    laid = [some_patch(world, draw, world.some_site(draw, name), base=base) for name in world.site_names]
    got = numbers(run_on("wavefront", world, [one.patch for one in laid], direction=direction))
    for number, one in enumerate(laid):
        assert_same(got[:, number], by_raw_hooks(world, [one], base))


@law
def test_every_tier_measures_what_the_reference_measures_in_modules(world, draw):
    patches = modules_of(world, draw)
    wanted = run_on("reference", world, patches)
    for tier in ("auto", world.tiers[-2:][0]):
        assert_agree(run_on(tier, world, patches), wanted)


@law(only=CAUSAL)
def test_every_tier_spells_out_answers_of_several_tokens_as_the_reference_and_raw_hooks_do(world, draw):
    pairs = with_answers(world.pairs, draw(st.integers(0, 1000)))
    spelt = World(world.family, world.model, world.plain, pairs, world.padding_side)
    direction, base = some_direction(draw)
    laid = [some_intervention(spelt, draw, base) for _ in range(3)]
    interventions = [[one.patch for one in each] for each in laid]
    settings = {"metric": [cp.log_probability, cp.log_probability_difference], "direction": direction}
    wanted = run_on("reference", spelt, interventions, **settings)
    for tier in world.tiers:
        got = run_on(tier, spelt, interventions, **settings)
        assert_agree(got, wanted)
    for number, each in enumerate(laid):
        assert_same(numbers(got)[0, number], log_probability_by_raw_hooks(spelt, each, base))


@law(is_varied=True)
def test_the_order_and_the_mix_of_interventions_change_nothing_in_any_tier(world, draw):
    direction, base = some_direction(draw)
    interventions = [[one.patch for one in some_intervention(world, draw, base)] for _ in range(10)]
    order = draw(st.permutations(range(len(interventions))))
    some = order[: draw(st.integers(1, 5))]
    tier = draw(st.sampled_from([world.tiers[0], *world.tiers]))
    straight = numbers(run_on(tier, world, interventions, direction=direction))
    mixed = numbers(run_on(tier, world, [interventions[i] for i in order], direction=direction))
    assert_same(mixed, straight[:, order])
    alone = numbers(run_on(tier, world, [interventions[i] for i in some], direction=direction))
    assert_same(alone, straight[:, some])


@law(is_varied=True)
def test_the_size_of_chunks_changes_nothing_and_running_again_not_one_bit(world, draw):
    direction, base = some_direction(draw)
    interventions = [[one.patch for one in some_intervention(world, draw, base)] for _ in range(8)]
    tier = draw(st.sampled_from([world.tiers[0], *world.tiers]))
    together = run_on(tier, world, interventions, direction=direction)
    again = run_on(tier, world, interventions, direction=direction)
    assert np.array_equal(numbers(again), numbers(together), equal_nan=True)
    for max_rows in (1, draw(st.integers(2, 30))):
        assert_agree(run_on(tier, world, interventions, direction=direction, max_rows=max_rows), together)


@law(is_varied=True, lengths="equal")
def test_a_sweep_is_the_same_in_every_tier(world, draw):
    direction, _ = some_direction(draw)
    name = draw(st.sampled_from(world.among("resid_pre", "z", "mlp_out", "attn_out", "k")))
    over = draw(st.sampled_from([("layer", "position"), ("layer",)]))
    swept = {}
    for engine in ("reference", *world.tiers):
        experiment = experiment_on(engine, world, direction=direction)
        swept[engine] = cp.sweep(experiment, name, over=over)
    for tier in world.tiers:
        assert_agree(swept[tier], swept["reference"])


@law(lengths="equal", needs=["resid_pre"])
def test_patching_the_whole_first_stream_gives_the_source_run_in_every_tier(world, draw):
    direction, base = some_direction(draw)
    for tier in world.tiers:
        effects = run_on(tier, world, ["resid_pre.0", "embed"], direction=direction)
        source = baselines(effects)[int(base == "clean")]
        assert_same(numbers(effects)[:, 0], source)
        assert_same(numbers(effects)[:, 1], source)
