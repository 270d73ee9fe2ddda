"""The graph engine puts in what is read at other sites, tokens, runs, prompts and models as the reference does."""

import pytest

import causalpatch as cp
from tiers import METRICS, assert_agree, run_model, tier_of
from toys import Chain, Pooled, opened, prompts, vectors
from worlds import random_pairs, tiny_world

EMBED, MIX = "module(embed).output", "module(mix).output"
PROMPTS = prompts(([3, 4, 5, 6], [3, 9, 5, 7]), ([8, 4, 1], [2, 4, 6]), answer=1, wrong=2)
OTHERS = prompts(([9, 1, 7], [9, 1, 7]), ([6, 8, 2, 3], [6, 8, 2, 3]), answer=1, wrong=2)


def agree(model, pairs, asked, **settings):
    for direction in ("denoise", "noise"):
        given = {"direction": direction} | settings
        got = run_model("graph", model, pairs, asked, **given)
        assert tier_of(got) == "graph"
        assert_agree(got, run_model("reference", model, pairs, asked, **given))


@pytest.mark.parametrize("has_other", [pytest.param(False, marks=pytest.mark.slow), True])
def test_tokens_of_any_module_take_values_of_other_modules_tokens_runs_prompts_and_models(has_other):
    asked = [
        cp.Patch(f"{MIX}@1", cp.From(f"{EMBED}@-1")),
        cp.Patch(f"{EMBED}@-1", cp.From(f"{MIX}@0", run="base")),
        cp.Patch(f"{MIX}@0", cp.From(f"{MIX}@2", prompts=cp.OtherPrompts.one([4, 7, 9]))),
        cp.Patch(f"{MIX}@0", cp.From(f"{EMBED}@-1", prompts=cp.OtherPrompts.of(PROMPTS, OTHERS))),
        [f"{EMBED}@0", cp.Patch(f"{MIX}@-1", cp.From(f"{MIX}@0"))],
        cp.Patch(f"{MIX}@1", "interpolate(0.4)"),
    ]
    agree(opened(Pooled()), PROMPTS, asked, source_model=opened(Pooled(), 1) if has_other else None)


@pytest.mark.slow
def test_arrays_take_values_of_another_model_of_the_same_shape():
    asked = ["module(first).output", "module(head).input", cp.Patch("module(second).output", "interpolate(0.3)")]
    agree(opened(Chain()), vectors(5), asked, source_model=opened(Chain(), 1))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("has_other", [False, True])
def test_named_sites_take_values_of_other_sites_tokens_runs_prompts_and_models(family, has_other):
    model, other = (tiny_world(family, (2, 4, 2, seed))[0] for seed in (0, 7))
    pairs = random_pairs(3, 4)
    asked = [
        cp.Patch("resid_pre.1@1", cp.From("resid_post.0@-1")),
        cp.Patch("mlp_out.0@-1", cp.From("attn_out.1@0", "base")),
        cp.Patch("resid_pre.0@0", cp.From("resid_post.1@2", prompts=cp.OtherPrompts.one([4, 7, 9, 3]))),
        cp.Patch("z.1.2@-1", cp.From("z.0.1@-1", prompts=cp.OtherPrompts.of(pairs, random_pairs(4, 4)))),
        cp.Patch("resid_post.0", cp.From("resid_post.0")),
        cp.Patch("head_out.1.0@-1", cp.From("head_out.0.1@-1")),
        ["z.1.0", "mlp_post.0.3", cp.Patch("resid_mid.0@1", cp.From("resid_post.1@-1"))],
        *("head_out.0.1", "resid_mid.1", "k.0.1", cp.Patch("v.1.0", "interpolate(0.4)")),
    ]
    agree(model, pairs, asked, metric=list(METRICS), source_model=other if has_other else None)
