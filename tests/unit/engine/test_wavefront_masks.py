"""Which keys a row sees: windows, padding, prompts of different lengths, and tokens that no metric reads."""

from itertools import cycle

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.pairs import Pair, Pairs
from causalpatch.results.status import Status
from causalpatch.sites import NAMES, Site
from causalpatch.testing.tiny import WINDOW
from tiers import (
    Watch,
    assert_agree,
    assert_as_raw_hooks,
    early,
    laid_at,
    quickly,
    run_on,
    several,
    statuses,
    tier_of,
    world_of,
)
from worlds import FIRST, ON_WAVEFRONT, Laid, assert_same, numbers, projection, read_off

WINDOWED = ("mistral", "gemma2")


def of_lengths(*lengths, seed=0, prefix=0):
    """Return pairs whose clean and corrupted prompts have these lengths and differ at every token after a prefix."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number, length in enumerate(lengths):
        clean = rng.integers(3, 40, length)
        corrupt = np.where(np.arange(length) < prefix, clean, (clean - 3 + rng.integers(1, 37, length)) % 37 + 3)
        answer, wrong = rng.choice(40, 2, replace=False).tolist()
        pairs.append(Pair(clean, corrupt, ((answer,),), ((wrong,),), id=f"pair {number}"))
    return Pairs(pairs, name="prompts")


def each_name(world, token):
    """Return one patch for every name of site that has layers, at a token and in a layer that vary with the name."""
    shape, found = world.model.shape, []
    for number, name in enumerate(world.site_names):
        info = NAMES[name]
        layer = number % shape.n_layers if info.has_layer else None
        unit = number % shape.units[info.unit_axis] if info.unit_axis else None
        found.append([laid_at(world.pairs, str(Site(name, layer, unit).at(token)))])
    return found


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", WINDOWED)
def test_rows_that_see_no_key_of_the_base_run_through_their_window(family, side):
    # From 4 tokens after the patch on, no token before the patch is in the window.
    world = world_of(family, of_lengths(14, 9, 5), side)
    laid = [
        [laid_at(world.pairs, f"{site}@{token}")]
        for site in ("resid_pre.0", "k.1.0", "v.0.1", "z.0.2")
        for token in range(5)
    ]
    assert_as_raw_hooks("wavefront", world, laid)
    assert_as_raw_hooks("wavefront", world, each_name(world, 2), "clean")


@pytest.mark.parametrize("family", WINDOWED)
def test_the_window_counts_the_row_itself_and_three_tokens_before_it(family):
    # With one layer, of which a token reaches exactly as far as the window, one token more is out of reach.
    pairs = of_lengths(12)
    world = world_of(family, pairs, shape=(1, 2, 2, 2))
    for token in range(12):
        laid = laid_at(pairs, f"k.0.0@{token}", cp.Constant(3.0))
        effects = assert_as_raw_hooks("wavefront", world, [[laid]])
        moved = abs(effects.metric("projection").effect(per_pair=True).values[0, 0]) > 1e-9
        assert moved == (token > 11 - WINDOW)


@pytest.mark.parametrize("value", [None, "zero", cp.Mean("positions"), cp.Constant(0.5)], ids=str)
def test_a_patch_that_no_metric_can_see_through_the_windows_is_not_run(value):
    pairs = of_lengths(14, 12)
    world = world_of("mistral", pairs, shape=(2, 4, 2, 0))
    reach = 2 * (WINDOW - 1)
    texts = [f"resid_pre.0@{token}" for token in range(12)]
    effects = run_on("wavefront", world, [cp.Patch(text, value) for text in texts], metric=projection)
    for number, pair in enumerate(pairs):
        last = len(pair.corrupt) - 1
        for token in range(12):
            is_seen = token + reach >= last
            assert statuses(effects)[token, number] == (Status.MEASURED if is_seen else Status.DERIVED)
            effect = effects.effect(per_pair=True).values[token, number]
            assert (effect != 0) == is_seen
    assert_agree(effects, run_on("reference", world, [cp.Patch(text, value) for text in texts], metric=projection))


def test_what_lies_behind_the_last_token_that_is_read_is_not_run():
    world = world_of("llama", of_lengths(9, 7))
    texts = ["resid_pre.0@1", "resid_pre.0@2", "z.0.1@1", "k.1.0@-1", "mlp_out.1@0", "resid_pre.1@0", "embed@3"]
    patches = [cp.Patch(text, "zero") for text in texts]
    effects = run_on("wavefront", world, patches, metric=early)
    wanted = [Status.MEASURED, *[Status.DERIVED] * 6]
    wanted[2] = wanted[5] = Status.MEASURED
    assert (statuses(effects) == np.array(wanted)[:, None]).all()
    assert_agree(effects, run_on("reference", world, patches, metric=early))


@pytest.mark.parametrize("family", quickly(ON_WAVEFRONT, *FIRST))
def test_rows_before_which_there_is_only_padding(family):
    world = world_of(family, of_lengths(3, 12, 4, seed=1), "left")
    assert_as_raw_hooks("wavefront", world, each_name(world, 0))
    assert_as_raw_hooks("wavefront", world, each_name(world, 0), "clean")


@pytest.mark.parametrize(("family", "side"), zip(FIRST, cycle(["left", "right"])))
def test_every_site_at_middle_and_last_tokens_of_prompts_of_different_lengths(family, side):
    world = world_of(family, of_lengths(3, 11, 6, seed=2), side)
    assert_as_raw_hooks("wavefront", world, [*each_name(world, 1), *each_name(world, -1), *each_name(world, -2)])


@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_never_rows(side):
    """A short prompt beside a long one adds as many rows as it has tokens."""
    world = world_of("llama", of_lengths(3, 12, seed=3), side, shape=(2, 2, 2, 7))
    weight = world.model.module.model.layers[1].mlp.down_proj.weight
    patches = [f"resid_pre.1@{token}" for token in (0, 1, -1)] + ["resid_pre.1"]
    wanted = run_on("reference", world, patches, metric=several)
    assert_agree(run_on("wavefront", world, patches, metric=several), wanted)

    def n_rows(some):
        seen = []

        def see(name, args, result):
            if any(x is weight for x in args) and isinstance(result, torch.Tensor):
                seen.append(result.numel() // world.model.width)

        with Watch(see):
            run_on("wavefront", world, some, metric=several)
        return sum(seen)

    # Beyond the first, these patch: from 1 on 2 + 11 tokens, the last 1 + 1, and from 0 on 3 + 12.
    assert 13 <= n_rows(patches) - n_rows(patches[:1]) <= 13 + 2 + 15


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_spans_of_different_places_and_lengths_in_every_pair(family, side):
    rng = np.random.default_rng(4)
    spans = [((0, 3), (0, 3)), ((2, 4), (4, 6)), ((5, 6), (1, 2)), ((1, 7), (1, 7))]
    pairs = [
        Pair(
            rng.integers(3, 40, 8 + 2 * n), rng.integers(3, 40, 8 + n), ((4,),), ((9,),), f"pair {n}", spans={"s": span}
        )
        for n, span in enumerate(spans)
    ]
    world = world_of(family, Pairs(pairs, name="spans"), side)

    def tokens(number):
        (a, b), (c, d) = spans[number]
        return list(range(c, d)), [[token] for token in range(a, b)]

    names = ["resid_pre.0@s", "k.1.0@s", "q.1.0@s", "z.0.1@s", "mlp_out.1@s", "mlp_post.0.2@s", "resid_post.1@s"]
    laid = [[Laid(cp.Patch(name), tokens)] for name in names]
    both = [[laid[0][0], laid[4][0]], [laid[4][0], laid[1][0]]]
    assert_as_raw_hooks("wavefront", world, [*laid, *both])


def test_metrics_that_read_different_tokens_each_get_their_own():
    world = world_of("qwen3", of_lengths(7, 5, 9, seed=5), "right")
    metrics = [projection.at(token) for token in (0, 1, 2, -1, -3)]
    patches = [f"{site}@{token}" for site in ("resid_pre.0", "z.1.2", "mlp_out.0") for token in (0, 1, 3, -1)]
    effects = run_on("wavefront", world, patches, metric=metrics)
    for number, pair in enumerate(world.pairs):
        base = world.plain.logits(pair.corrupt)
        for which, token in enumerate((0, 1, 2, -1, -3)):
            alone = run_on("wavefront", world, patches, metric=metrics[which])
            assert_same(numbers(effects)[which], numbers(alone))
            corrupt = effects.to_xarray()["baseline_corrupt"].values[which, number]
            assert_same(corrupt, read_off(base[: len(base) + token + 1 if token < 0 else token + 1], pair)[1])
    assert_agree(effects, run_on("reference", world, patches, metric=metrics))


def test_pairs_that_have_a_prompt_in_common_measure_what_they_measure_alone():
    rng = np.random.default_rng(6)
    shared, others = rng.integers(3, 40, 7), rng.integers(3, 40, (4, 7))
    prompts = [(shared, others[0]), (shared, others[1]), (others[2], shared), (others[3], others[0]), (shared, shared)]
    answers = [tuple(rng.choice(40, 2, replace=False).tolist()) for _ in prompts]
    pairs = Pairs(
        [
            Pair(clean, corrupt, ((answer,),), ((wrong,),), f"pair {n}")
            for n, ((clean, corrupt), (answer, wrong)) in enumerate(zip(prompts, answers, strict=True))
        ],
        name="shared",
    )
    world = world_of("gemma2", pairs)
    for base in ("corrupt", "clean"):
        effects = assert_as_raw_hooks("wavefront", world, each_name(world, 1), base)
        patches = [laid[0].patch for laid in each_name(world, 1)]
        direction = "denoise" if base == "corrupt" else "noise"
        for number in range(len(pairs)):
            alone = run_on("wavefront", world_of("gemma2", pairs.take([number])), patches, direction=direction)
            assert_same(numbers(alone)[..., 0], numbers(effects)[..., number])


def test_one_pair_of_one_token():
    pairs = Pairs([Pair(np.array([5]), np.array([9]), ((4,),), ((7,),), "one")], name="one")
    world = world_of("llama", pairs)
    patches = ["resid_pre.0", "z.0.1@0", "k.1.0@-1", "mlp_out.1", "logits", "embed@0"]
    got = run_on("wavefront", world, patches, metric=[projection, cp.log_probability])
    assert_agree(got, run_on("reference", world, patches, metric=[projection, cp.log_probability]))
    assert tier_of(got) == "wavefront"
