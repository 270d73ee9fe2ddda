"""How right the numbers are: in float32 against float64, with soft-caps, whole answers, long prompts, small chunks."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import tiny_model
from oracle import Edit, Plain
from tiers import (
    METRICS,
    assert_agree,
    assert_as_raw_hooks,
    laid_at,
    log_probability_by_raw_hooks,
    quickly,
    run_model,
    run_on,
    tier_of,
    with_answers,
    world_of,
)
from worlds import ON_WAVEFRONT, World, assert_same, key, numbers, projection, random_pairs


def long_pairs(n_pairs, length, seed=0, n_changed=2):
    """Return pairs of long prompts that differ in a few early tokens."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(n_pairs):
        clean = rng.integers(3, 40, length)
        corrupt = clean.copy()
        changed = rng.choice(length // 2, n_changed, replace=False)
        corrupt[changed] = (clean[changed] - 2) % 37 + 3
        answer, wrong = rng.choice(40, 2, replace=False).tolist()
        pairs.append(Pair(clean, corrupt, ((answer,),), ((wrong,),), id=f"pair {number}"))
    return Pairs(pairs, name="long")


def in_both_precisions(family, **settings):
    """Return a model in float32 and the same weights in float64."""
    narrow, wide = (tiny_model(family, dtype=dtype, **settings) for dtype in (torch.float32, torch.float64))
    wide.load_state_dict({name: value.double() for name, value in narrow.state_dict().items()})
    return narrow, wide


def effects_by_raw_hooks(plain, pairs, texts):
    """Return the change of a logit difference by each patch, (patch, pair), measured with raw hooks."""
    found = np.zeros((len(texts), len(pairs)))
    for number, pair in enumerate(pairs):
        answer, wrong = pair.answer[0][0], pair.wrong_answer[0][0]
        base = plain.logits(pair.corrupt)[-1]
        kept = {}
        for which, text in enumerate(texts):
            site = cp.parse(text)
            name = key(site)
            kept[name] = kept[name] if name in kept else plain.value(pair.clean, name)
            token = site.position % len(pair.corrupt)
            logits = plain.logits(pair.corrupt, [Edit(name, [token], kept[name][[token]])])[-1]
            found[which, number] = float(logits[answer] - logits[wrong]) - float(base[answer] - base[wrong])
    return found


@pytest.mark.parametrize("family", quickly(["gpt2", "llama", "gemma2", "gpt_neox"], "gpt2", "gemma2"))
def test_in_float32_effects_are_as_right_as_those_of_raw_hooks_small_effects_too(family):
    """Errors against float64, at most twice those of raw hooks on the same cells: in all, and by size of the effect."""
    narrow, wide = in_both_precisions(family, layers=4, heads=4, seed=2, effect_scale=1.0)
    pairs = long_pairs(40, 8)  # many pairs, since the error of a base run is in all effects of its pair
    texts = [f"{name}.{layer}@{token}" for name in ("resid_pre", "mlp_out") for layer in (1, 3) for token in (4, 6, -1)]
    texts += [f"z.{layer}.{head}@-1" for layer in (1, 2) for head in range(4)]
    exact = effects_by_raw_hooks(Plain(wide, family), pairs, texts)
    hooks = effects_by_raw_hooks(Plain(narrow, family), pairs, texts)
    effects = run_model("wavefront", cp.open_model(narrow), pairs, texts)
    assert tier_of(effects) == "wavefront"
    ours = effects.effect(per_pair=True).values
    is_real = np.abs(exact) > 1e-12
    size, theirs, error = (np.abs(x)[is_real] for x in (exact, hooks - exact, ours - exact))
    assert len(size) > 500
    rounding = np.finfo(np.float32).eps * np.abs(numbers(effects)).max()  # a logit's last bits
    assert (ours[~is_real] == 0).all()
    assert np.median(error) <= 2 * np.median(theirs)
    assert error.max() <= 2 * theirs.max()
    deciles = np.argsort(np.argsort(size)) * 10 // len(size)
    for decile in range(10):
        some = deciles == decile
        assert np.median(error[some]) <= 2 * max(np.median(theirs[some]), rounding / 10), decile
        assert np.quantile(error[some], 0.9) <= 2 * max(np.quantile(theirs[some], 0.9), rounding / 10), decile


@pytest.mark.parametrize("family", quickly(ON_WAVEFRONT, "llama", "gemma2", "gpt_neox", "opt"))
def test_in_float32_every_tier_measures_what_the_reference_measures_up_to_rounding(family):
    model = cp.open_model(tiny_model(family, dtype=torch.float32, layers=3))
    pairs = random_pairs(41, 4, "equal", prefix=1 / 3)
    patches = ["resid_pre.1@-1", "z.1.2", "mlp_out.0@1", "k.2.0@0", cp.Patch("q.1.1", "zero"), "mlp_post.0.4@-1"]
    wanted = run_model("reference", model, pairs, patches, metric=list(METRICS))
    for engine in ("wavefront", "restart", "rows"):
        assert_agree(run_model(engine, model, pairs, patches, metric=list(METRICS)), wanted, tolerance=1e-4)


def test_a_soft_cap_on_the_logits_holds_for_single_columns_and_for_the_whole_vocabulary():
    module = tiny_model("gemma2", layers=2, heads=4, seed=6)
    module.config.final_logit_softcapping = 1.5
    pairs = random_pairs(42, 3, "equal")
    world = World("gemma2", cp.open_model(module), Plain(module, "gemma2"), pairs, "left")
    texts = ["resid_pre.1@-1", "z.1.2@-1", "mlp_out.0@1", "final_norm@-1", "logits@-1"]
    assert_as_raw_hooks("wavefront", world, [[laid_at(pairs, text)] for text in texts])
    for metric in (cp.logit_difference, cp.log_probability, cp.answer_logit):
        got = run_on("wavefront", world, texts, metric=metric)
        assert_agree(got, run_on("reference", world, texts, metric=metric))


@pytest.mark.parametrize("cap", [0.5, None])
def test_a_soft_cap_on_the_scores_holds(cap):
    module = tiny_model("gemma2", layers=3, heads=4, seed=7)
    module.config.attn_logit_softcapping = cap
    for layer in module.model.layers:
        layer.self_attn.attn_logit_softcapping = cap
    pairs = random_pairs(43, 3, "equal")
    world = World("gemma2", cp.open_model(module), Plain(module, "gemma2"), pairs, "left")
    texts = ["resid_pre.1@-1", "k.1.0@0", "q.0.2@-1", "z.1.2@-1", "v.2.1@1"]
    assert_as_raw_hooks("wavefront", world, [[laid_at(pairs, text)] for text in texts])


@pytest.mark.parametrize(
    "metric", [cp.rank, cp.top1, cp.cosine, cp.probability, cp.cross_entropy, "logit_difference@0"]
)
def test_every_built_in_metric_is_measured_as_the_reference_measures_it(metric):
    world = world_of("gpt2", random_pairs(44, 3, "equal"))
    patches = ["resid_pre.1@-1", "z.1.2@0", "mlp_out.0@1", "resid_post.0"]
    got = run_on("wavefront", world, patches, metric=metric)
    assert_agree(got, run_on("reference", world, patches, metric=metric))


@pytest.mark.parametrize(
    ("family", "side"), [("gpt2", "left"), ("mistral", "left"), ("gemma2", "right"), ("gpt_neox", "right")]
)
def test_answers_of_several_tokens_measure_what_whole_runs_through_them_measure(family, side):
    pairs = with_answers(random_pairs(45, 4, "equal", prefix=1 / 3), 1)
    world = world_of(family, pairs, side)
    texts = ["resid_pre.0@1", "resid_pre.1@-1", "k.1.0@0", "v.0.1@2", "z.0.3@-1", "mlp_out.1@-2", "final_norm@-1"]
    laid = [[laid_at(pairs, text)] for text in texts]
    laid += [[laid_at(pairs, "z.1.0@-1"), laid_at(pairs, "k.1.0@0", cp.Zero())]]
    for base, direction in (("corrupt", "denoise"), ("clean", "noise")):
        patches = [[one.patch for one in each] for each in laid]
        got = run_on("wavefront", world, patches, metric=cp.log_probability, direction=direction)
        assert tier_of(got) == "wavefront"
        for number, each in enumerate(laid):
            assert_same(numbers(got)[number], log_probability_by_raw_hooks(world, each, base))


def test_a_patch_far_before_the_end_reaches_answers_only_through_windows_that_see_it():
    """With windows of four tokens the later tokens of an answer see less of the prompt than the first."""
    rng = np.random.default_rng(8)
    pairs = Pairs(
        [
            Pair(rng.integers(3, 40, 8), rng.integers(3, 40, 8), ((5, 6, 7, 8),), ((9, 4),), f"pair {number}")
            for number in range(3)
        ],
        name="far",
    )
    world = world_of("mistral", pairs)
    laid = [
        [laid_at(pairs, f"{name}@{token}", cp.Constant(1.5))] for name in ("k.1.0", "resid_pre.0") for token in range(8)
    ]
    got = run_on("wavefront", world, [[one.patch for one in each] for each in laid], metric=cp.log_probability)
    for number, each in enumerate(laid):
        assert_same(numbers(got)[number], log_probability_by_raw_hooks(world, each, "corrupt"))


@pytest.mark.parametrize("family", quickly(["llama", "gemma2", "gpt2"], "llama", "gemma2"))
def test_a_suffix_longer_than_a_chunk_is_cut_without_losing_its_keys(family):
    pairs = long_pairs(2, 30, n_changed=6)
    world = world_of(family, pairs, shape=(3, 3, 3, 1))
    patches = [
        "resid_pre.0@0",
        "k.1.0@2",
        "z.0.1@3",
        "mlp_out.2@1",
        "resid_pre.1",
        cp.Patch("v.0.2", "zero"),
        "embed@-1",
    ]
    wanted = run_on("reference", world, patches)
    for max_rows in (1, 7, 29, 31):
        got = run_on("wavefront", world, patches, max_rows=max_rows)
        assert tier_of(got) == "wavefront"
        assert_agree(got, wanted)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_long_segments_and_many_single_tokens_attend_as_short_and_few_ones_do(family, side, monkeypatch):
    """Fused kernels and products of their own take over from a size on, which no tiny model has."""
    rng = np.random.default_rng(9)
    pairs = Pairs(
        [
            Pair(rng.integers(3, 40, n), rng.integers(3, 40, n), ((4 + n,),), ((20 + n,),), f"pair {n}")
            for n in (9, 6, 13)
        ],
        name="long",
    )
    world = world_of(family, pairs, side)
    monkeypatch.setattr("causalpatch.engine.rows.LONG", 3)
    monkeypatch.setattr("causalpatch.engine.rows.MANY", 2)
    sites = ("resid_pre.0", "resid_pre.1", "k.1.1", "v.0.0", "z.0.3", "mlp_out.0", "q.1.2")
    laid = [[laid_at(pairs, f"{site}@{token}")] for site in sites for token in (0, 2, 4, -1)]
    laid += [[laid_at(pairs, f"mlp_post.0.{neuron}@-1")] for neuron in range(5)]
    assert_as_raw_hooks("wavefront", world, laid)
    many = [cp.Patch(f"z.0.{head}@-1", value) for head in range(4) for value in (None, "zero", 0.5)]
    for metric in (projection, [cp.log_probability, cp.kl_divergence]):
        assert_agree(run_on("wavefront", world, many, metric=metric), run_on("reference", world, many, metric=metric))


def test_a_prompt_of_sixty_four_tokens_and_seventy_neurons_at_its_end():
    pairs = long_pairs(2, 64, n_changed=20)
    world = world_of("llama", pairs, shape=(2, 4, 2, 0))
    patches = [f"mlp_post.0.{neuron}@-1" for neuron in range(70)] + ["resid_pre.0@0", "z.0.1@0", "k.1.0@0", "v.0.1"]
    got = run_on("wavefront", world, patches, metric=projection)
    assert_agree(got, run_on("reference", world, patches, metric=projection))


def test_a_small_budget_changes_no_number():
    pairs = long_pairs(3, 20)
    world = world_of("llama", pairs)
    patches = [f"{site}@{token}" for site in ("resid_pre.1", "z.0.2", "mlp_out.1") for token in range(0, 20, 3)]
    wanted = run_on("wavefront", world, patches)
    for budget in (1e-2, 2e-3, 5e-4):
        assert_agree(run_on("wavefront", world, patches, budget_gib=budget), wanted)


def test_many_interventions_of_every_kind_at_once_give_what_each_gives_alone():
    pairs = random_pairs(46, 3, "equal")
    world = world_of("qwen3", pairs, shape=(3, 3, 1, 1))
    patches = [
        f"{site}@{token}"
        for site in ("resid_pre.0", "resid_pre.2", "z.1.0", "k.2.0", "mlp_out.1", "final_norm")
        for token in (0, 1, -1)
    ]
    patches += [["q.1.1@-1", "z.1.1@-1"], ["resid_pre.2@0", "mlp_out.0@-1"], ["logits@-1"], ["embed@0", "k.0.0@0"]]
    together = numbers(run_on("wavefront", world, patches))
    for number in range(0, len(patches), 3):
        assert_same(numbers(run_on("wavefront", world, [patches[number]]))[:, 0], together[:, number])


@pytest.mark.parametrize("engine", ["wavefront", "restart", "rows", "reference"])
@pytest.mark.parametrize("name", ["resid_pre", "resid_mid", "resid_post"])
def test_a_stream_that_is_set_to_zero_stays_zero_through_norms_that_would_blow_up_rounding(engine, name):
    model = cp.open_model(tiny_model("llama", dtype=torch.float32, seed=3))
    patches = [cp.Patch(f"{name}.0@0", cp.Zero())]
    effects = run_model(engine, model, random_pairs(3, 4), patches, metric=projection.at(0))
    assert (numbers(effects) == 0).all()


def test_running_again_gives_the_same_bits_in_float32():
    model = cp.open_model(tiny_model("llama", dtype=torch.float32, layers=3, heads=8))
    pairs = long_pairs(4, 16)
    patches = [f"{site}@{token}" for site in ("resid_pre.1", "z.0.2", "mlp_out.1") for token in range(16)]
    runs = [numbers(run_model("wavefront", model, pairs, patches, metric=[projection])) for _ in range(3)]
    assert np.array_equal(runs[0], runs[1])
    assert np.array_equal(runs[0], runs[2])


@pytest.mark.parametrize("family", quickly(["gemma2", "gpt2", "gpt_neox", "gpt_neox_sequential"], "gemma2", "gpt_neox"))
def test_heads_and_neurons_go_through_biases_post_norms_and_parallel_blocks(family):
    pairs = random_pairs(47, 3, "equal")
    world = world_of(family, pairs, shape=(2, 4, 4, 5))
    sites = (
        "z.0.1",
        "z.1.3",
        "head_out.0.2",
        "head_out.1.0",
        "mlp_post.0.9",
        "mlp_post.1.2",
        "attn_out.0",
        "mlp_out.1",
    )
    texts = [f"{site}@{token}" for site in sites for token in (0, -1)]
    laid = [[laid_at(pairs, text, value)] for value in (None, cp.Constant(4.0)) for text in texts]
    assert_as_raw_hooks("wavefront", world, laid)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mistral", "qwen3"])
def test_keys_and_values_reach_the_heads_that_they_serve_and_all_later_rows(family):
    pairs = random_pairs(48, 3, "equal")
    world = world_of(family, pairs, shape=(2, 4, 2, 0))
    texts = [f"{site}@{token}" for site in ("k.0.0", "k.1.1", "v.0.1", "v.1.0") for token in (0, 1, -1)]
    laid = [[laid_at(pairs, text, value)] for value in (None, cp.Constant(2.0)) for text in texts]
    both = [[laid_at(pairs, text), laid_at(pairs, f"q.{text[2]}.{head}@-1")] for text in texts[:2] for head in (0, 3)]
    assert_as_raw_hooks("wavefront", world, [*laid, *both])


@pytest.mark.parametrize("family", quickly(["gpt_neox", "gptj", "phi", "llama", "gpt2"], "gpt_neox", "llama"))
def test_a_run_that_patches_both_sublayers_of_a_layer_keeps_both(family):
    pairs = random_pairs(3, 2, shared=0.0)
    world = world_of(family, pairs)
    attention, neuron, out = (laid_at(pairs, text) for text in ("z.0.1@1", "mlp_post.0.3@1", "mlp_out.0@1"))
    effects = assert_as_raw_hooks("wavefront", world, [[attention], [neuron], [attention, neuron], [attention, out]])
    alone, _, both, whole = numbers(effects)[0]
    assert not np.allclose(alone, both, rtol=1e-6)
    assert not np.allclose(alone, whole, rtol=1e-6)
