"""Cells that need no run: what is derived is exactly what would have been measured, and only where it may be."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.pairs import Pair, Pairs
from causalpatch.results.status import Status
from causalpatch.testing.tiny import tiny_model
from tiers import (
    METRICS,
    assert_agree,
    assert_as_raw_hooks,
    laid_at,
    quickly,
    run_model,
    run_on,
    statuses,
    tier_of,
    world_of,
)
from worlds import FIRST, ON_WAVEFRONT, assert_same, numbers, projection, random_pairs

COMMON = 4  # tokens that clean and corrupted prompts begin with
LENGTH = 8  # the last token sees the fifth through a window of four


def with_prefix(n_pairs, seed=0):
    """Return pairs that differ in their fifth token, and in no other."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(n_pairs):
        clean = rng.integers(3, 40, LENGTH)
        corrupt = clean.copy()
        corrupt[COMMON] = (clean[COMMON] - 2) % 37 + 3
        answer, wrong = rng.choice(40, 2, replace=False).tolist()
        pairs.append(Pair(clean, corrupt, ((answer,),), ((wrong,),), id=f"pair {number}"))
    return Pairs(pairs, name="prefix")


PAIRS = with_prefix(2)
NAMES = ("embed", "resid_pre.0", "resid_post.1", "k.1.0", "q.0.1", "v.1.0", "z.1.2", "head_out.0.3", "attn_out.0")
NAMES += ("mlp_post.1.7", "mlp_out.1")


ALL_TOKENS = [metric.name for metric in METRICS].index("all tokens")


def effects_of(effects):
    return np.stack([effects.metric(name).effect(per_pair=True).values for name in effects.metrics])


@pytest.mark.parametrize(("side", "direction"), [("left", "denoise"), ("right", "noise")])
@pytest.mark.parametrize("family", quickly(ON_WAVEFRONT, "llama", "gemma2"))
def test_patches_before_the_first_difference_are_derived_and_their_effect_is_zero(family, side, direction):
    world = world_of(family, PAIRS, side, (2, 4, 4, 3))
    patches = [f"{name}@{token}" for name in NAMES for token in (0, COMMON - 1)]
    effects = run_on("wavefront", world, patches, direction=direction)
    assert (statuses(effects) == Status.DERIVED).all()
    assert (effects_of(effects) == 0).all()
    some = patches[:: len(patches) // 3]
    wanted = effects_of(run_on("reference", world, some, direction=direction))
    np.testing.assert_allclose(wanted, 0, atol=1e-12)


@pytest.mark.parametrize("family", quickly(ON_WAVEFRONT, *FIRST))
def test_equal_tokens_after_a_difference_are_measured_because_their_values_differ(family):
    world = world_of(family, PAIRS, shape=(2, 4, 4, 3))
    texts = [f"{name}@{token}" for name in NAMES if name not in ("embed", "resid_pre.0") for token in (5, -1)]
    texts = [text for text in texts if not text.startswith("q.0")]  # which comes before any attention
    effects = assert_as_raw_hooks("wavefront", world, [[laid_at(PAIRS, text)] for text in texts])
    assert (statuses(effects) == Status.MEASURED).all()
    at_the_end = [number for number, text in enumerate(texts) if text.endswith("@-1")]
    assert (effects.metric("projection").effect(per_pair=True).values[at_the_end] != 0).all()


def test_different_tokens_of_equal_values_are_derived():
    """What is compared are values: two ids of one embedding are one and the same to the model."""
    module = tiny_model("llama", seed=4)
    with torch.no_grad():
        module.model.embed_tokens.weight[9] = module.model.embed_tokens.weight[8]
    clean = np.array([5, 8, 20, 31, 8])
    twins = Pairs(
        [Pair(clean, np.array([5, 9, 20, 31, 8]), ((4,),), ((7,),), "twins"), Pair(clean, clean + 2, ((4,),), ((7,),))]
    )
    model = cp.open_model(module)
    texts = [f"{name}@{token}" for name in ("embed", "resid_pre.0", "z.1.2", "mlp_out.0") for token in range(5)]
    effects = run_model("wavefront", model, twins, texts, metric=projection)
    # Behind a product, rows may differ in their last digit by their place in it: then they are run, to no effect.
    assert (statuses(effects)[:10, 0] == Status.DERIVED).all()
    assert np.abs(effects.effect(per_pair=True).values[:, 0]).max() < 1e-12
    assert (statuses(effects)[4::5, 1] == Status.MEASURED).all()
    assert_agree(effects, run_model("reference", model, twins, texts, metric=projection))


@pytest.mark.parametrize(
    "value",
    [
        "zero",
        0.25,
        cp.Mean("pairs"),
        cp.Mean("positions"),
        cp.Function(lambda current, source: current - 0.5 * source, "less"),
        cp.Function(lambda current, source: source, "source itself"),
        "identity",
    ],
    ids=str,
)
def test_values_other_than_the_source_are_measured_even_where_the_prompts_are_equal(value):
    world = world_of("llama", PAIRS)
    patches = [cp.Patch(f"{name}@{token}", value) for name in NAMES for token in (1, 2)]
    effects = run_on("wavefront", world, patches)
    assert (statuses(effects) == Status.MEASURED).all()
    assert_agree(effects, run_on("reference", world, patches))
    if str(value) in ("zero", "constant 0.25", "mean over positions of the corrupt side", "function less"):
        assert (np.abs(effects.metric("all tokens").effect(per_pair=True).values) > 1e-12).any(1).all()


def test_a_source_value_that_undoes_an_earlier_patch_is_written():
    """Its value is the base's, and no longer the current one: an earlier patch of the same run came before."""
    world = world_of("llama", PAIRS)
    for broken, mended in [
        ("resid_pre.0@1", "resid_pre.1@1"),
        ("z.0.0@2", "attn_out.0@2"),
        ("mlp_post.0.3@0", "mlp_out.0@0"),
        ("resid_pre.1@1", "k.1.0@1"),
        ("q.1.2@3", "z.1.2@3"),
        ("attn_out.0@1", "resid_mid.0@1"),
    ]:
        alone = laid_at(PAIRS, broken, cp.Constant(2.0))
        mending = laid_at(PAIRS, mended)
        effects = assert_as_raw_hooks("wavefront", world, [[alone], [alone, mending], [mending]])
        broke, both, nothing = numbers(effects)[ALL_TOKENS]
        assert not np.allclose(broke, both, rtol=1e-6)
        assert (statuses(effects) == np.array([Status.MEASURED, Status.MEASURED, Status.DERIVED])[:, None]).all()
        assert np.isfinite(nothing).all()


def test_neurons_that_are_off_in_both_runs_are_written_where_an_earlier_patch_may_switch_them_on():
    """A ReLU is off in many runs, so that values are equal by no accident: in part of a vector, or behind a patch."""
    pairs = random_pairs(6, 2, shared=0.0)
    world = world_of("opt", pairs)
    neurons = [f"mlp_post.1.{neuron}@1" for neuron in range(60, 68)]
    stream, whole = laid_at(pairs, "resid_pre.0@1"), laid_at(pairs, "mlp_post.1@1")
    after = [[stream, laid_at(pairs, text)] for text in neurons]
    effects = assert_as_raw_hooks("wavefront", world, [[whole], [stream], *after, *([one] for _, one in after)])
    found, are = numbers(effects)[ALL_TOKENS], statuses(effects)
    is_off_in_both = are[2 + len(neurons) :] == Status.DERIVED
    is_switched_on = ~np.isclose(found[2 : 2 + len(neurons)], found[1], rtol=1e-9)
    assert (is_off_in_both & is_switched_on).any()
    assert (are[0] == Status.MEASURED).all()


def test_a_vector_that_is_equal_in_some_numbers_only_is_measured():
    module = tiny_model("llama", seed=5)
    with torch.no_grad():
        module.model.layers[0].mlp.down_proj.weight[::2] = 0  # half of what this MLP adds is zero in every run
    model, pairs = cp.open_model(module), random_pairs(8, 2, shared=0.0)
    cells = ["mlp_out.0@1", "mlp_out.0@-1"]
    effects = run_model("wavefront", model, pairs, cells, metric=projection)
    assert (statuses(effects) == Status.MEASURED).all()
    assert_agree(effects, run_model("reference", model, pairs, cells, metric=projection))
    assert (np.abs(effects.effect(per_pair=True).values[1]) > 1e-9).all()


def test_of_two_patches_of_which_one_changes_nothing_the_other_is_measured():
    world = world_of("qwen3", PAIRS)
    pairs_of_sites = [("resid_pre.0@1", "z.1.0@-1"), ("z.1.0@-1", "k.0.1@0"), ("mlp_out.0@2", "resid_post.0@-1")]
    laid = [[laid_at(PAIRS, text) for text in texts] for texts in pairs_of_sites]
    effects = assert_as_raw_hooks("wavefront", world, [*laid, [laid_at(PAIRS, "k.0.1@0"), laid_at(PAIRS, "v.0.1@3")]])
    assert (statuses(effects)[:3] == Status.MEASURED).all()
    assert (statuses(effects)[3] == Status.DERIVED).all()


def test_a_patch_of_all_tokens_is_measured_if_one_of_them_differs():
    world = world_of("llama", PAIRS)
    effects = run_on("wavefront", world, ["resid_pre.0", "z.0.1", cp.Patch("embed", column=2), "v.0"])
    assert (statuses(effects)[[0, 1, 3]] == Status.MEASURED).all()
    assert (statuses(effects)[2] == Status.DERIVED).all()
    assert_agree(effects, run_on("reference", world, ["resid_pre.0", "z.0.1", cp.Patch("embed", column=2), "v.0"]))


def test_pairs_of_unequal_lengths_with_a_common_beginning():
    pairs = random_pairs(31, 4, "unequal", prefix=1 / 2)
    world = world_of("llama", pairs, "left")
    texts = [f"{name}@{token}" for name in NAMES for token in (0, 1, -1)]
    effects = assert_as_raw_hooks("wavefront", world, [[_at_both_ends(pairs, text)] for text in texts])
    assert tier_of(effects) == "wavefront"


def _at_both_ends(pairs, text):
    laid = laid_at(pairs, text)
    token = laid.patch.site.position

    def tokens(number):
        pair = pairs[number]
        return [token % len(pair.corrupt)], [[token % len(pair.clean)]]

    return type(laid)(laid.patch, tokens)


def test_a_pair_whose_prompts_are_equal_is_derived_everywhere_and_needs_no_patched_run():
    clean = np.arange(5, 12)
    twins = Pairs([Pair(clean, clean, ((4,),), ((7,),), "twins")])
    world = world_of("gpt2", twins)
    effects = run_on("wavefront", world, NAMES)
    assert (statuses(effects) == Status.DERIVED).all()
    assert (effects_of(effects) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_the_noise_floor_is_measured_never_assumed(family, dtype):
    """A patch that puts back what is there runs like any other; in bfloat16 other shapes of products show."""
    pairs = random_pairs(32, 6, "equal")
    model = cp.open_model(tiny_model(family, dtype=dtype, layers=3, heads=8))
    sites = ["resid_pre.0", "resid_pre.1", "resid_post.2@-1", "attn_out.1@-1"]
    identity = [cp.Patch(site, "identity") for site in sites]
    effects = run_model("wavefront", model, pairs, [sites[1], *identity], metric=[projection])
    assert tier_of(effects) == "wavefront"
    assert (statuses(effects)[1:] == Status.MEASURED).all()
    floor = effects.provenance["noise_floor"]["projection"]
    measured = np.abs(effects.effect(per_pair=True).values[2])
    scale = np.abs(numbers(effects)).max()
    assert floor <= scale * (1e-5 if dtype == torch.float32 else 0.5)
    # The control patches what the first intervention patches: here the second of the sites.
    np.testing.assert_allclose(floor, measured.max(), rtol=0.9, atol=scale * torch.finfo(dtype).eps)


def test_in_bfloat16_the_noise_floor_is_not_zero():
    floors = []
    for family in FIRST:
        model = cp.open_model(tiny_model(family, dtype=torch.bfloat16, layers=4, heads=8))
        effects = run_model("wavefront", model, random_pairs(33, 8, "equal"), ["resid_pre.1@-1"], metric=projection)
        floors.append(effects.provenance["noise_floor"]["projection"])
    assert max(floors) > 0
    assert np.isfinite(floors).all()


def test_equal_interventions_give_equal_numbers_and_cost_no_more_rows():
    world = world_of("llama", PAIRS)
    once = run_on("wavefront", world, ["resid_pre.1@-1", "z.0.1@-1", cp.Patch("mlp_out.0@5", "zero")])
    patches = ["resid_pre.1@-1", "z.0.1@-1", cp.Patch("mlp_out.0@5", "zero")]
    often = run_on("wavefront", world, [*patches, *patches[::-1], *patches])
    for copy in (numbers(often)[:, :3], numbers(often)[:, 5:2:-1], numbers(often)[:, 6:]):
        assert np.array_equal(copy, numbers(often)[:, :3])
        assert_same(copy, numbers(once))
    assert often.provenance["cost"]["rows"] == once.provenance["cost"]["rows"]
    assert (statuses(often) == Status.MEASURED).all()


def test_two_names_of_one_activation_give_equal_numbers_and_cost_no_more_rows():
    world = world_of("llama", PAIRS, shape=(3, 4, 4, 0))
    named = [["resid_post.0@-1"], ["attn_out.1@-1"], ["resid_pre.2@5"]]
    again = [["resid_pre.1@-1"], ["z.1@-1"], ["resid_post.1@5"]]
    once, both = run_on("wavefront", world, named), run_on("wavefront", world, [*named, *again])
    assert_same(numbers(both)[:, 3:], numbers(both)[:, :3])
    assert_agree(both, run_on("reference", world, [*named, *again]))
    streams = run_on("wavefront", world, [named[0], named[2]])
    doubled = run_on("wavefront", world, [named[0], named[2], again[0], again[2]])
    assert doubled.provenance["cost"]["rows"] == streams.provenance["cost"]["rows"]
    assert once.metrics == [metric.name for metric in METRICS]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_what_leaves_a_layer_is_written_before_what_enters_the_next_in_whatever_order_they_are_named(order):
    pairs = with_prefix(3, seed=2)
    world = world_of("llama", pairs, shape=(3, 4, 4, 0))
    values = (cp.Constant(1.5), cp.Function(lambda current, source: 2 * current + source, "twice"))
    for first, second in (values, values[::-1]):
        both = [laid_at(pairs, "resid_post.0@-1", first), laid_at(pairs, "resid_pre.1@-1", second)]
        assert_as_raw_hooks("wavefront", world, [[both[i] for i in order]])


def test_functions_that_are_not_the_same_object_are_not_the_same_value():
    world = world_of("llama", PAIRS)
    functions = [cp.Function(lambda current, source, by=by: by * current, "times") for by in (0.0, 2.0, -1.0)]
    patches = [cp.Patch("z.1.0@-1", function) for function in functions]
    effects = run_on("wavefront", world, patches)
    assert_agree(effects, run_on("reference", world, patches))
    assert len(np.unique(numbers(effects)[1, :, 0])) == 3


def test_constants_that_differ_are_not_the_same_value():
    world = world_of("llama", PAIRS)
    arrays = [np.eye(8)[0], np.eye(8)[1], np.zeros(8), 1.0]
    patches = [cp.Patch("z.1.0@-1", cp.Constant(array)) for array in arrays]
    effects = run_on("wavefront", world, patches)
    assert_agree(effects, run_on("reference", world, patches))
    assert len(np.unique(numbers(effects)[1, :, 0])) == 4
