"""Causal tracing against raw hooks: the same noise, the same restored states, the same shares."""

from xml.etree import ElementTree

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PairError, SettingError
from causalpatch.pairs.tasks import generate
from oracle import Edit
from oracle_values import noise_of
from worlds import random_pairs, tiny_world, unchecked

SITES = {"resid": "resid_post", "attn": "attn_out", "mlp": "mlp_out"}
ENGINES = ("wavefront", "restart", "rows", "reference")


@pytest.fixture(scope="module")
def world():
    model, plain = tiny_world("gpt2", (3, 3, 1, 1))
    return model, plain, random_pairs(4, n_pairs=3)


def traced(world, *arguments, engine="auto", metric="answer_logit", **settings):
    model, _, pairs = world
    with unchecked():
        return cp.trace(cp.Experiment(model, pairs, metric=metric, engine=engine), *arguments, **settings)


def answer_logit(plain, pair, prompt, edits):
    return float(plain.logits(prompt, edits)[-1][pair.answer[0][0]])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", SITES)
def test_a_trace_by_noise_is_what_raw_hooks_measure(world, kind, engine):
    model, plain, pairs = world
    effects = traced(world, window=2, by="noise", kind=kind, draws=2, engine=engine)["noise", kind]
    assert effects.dims == ("layer", "position", "draw", "pair")
    spans = [pair.spans["subject"][0] for pair in pairs]
    embed = [plain.value(pair.clean, ("embed", None, None)) for pair in pairs]
    sigma = 3 * float(torch.cat([each[slice(*span)] for each, span in zip(embed, spans, strict=True)]).std())
    data = effects.to_xarray()
    for number, (pair, span) in enumerate(zip(pairs, spans, strict=True)):
        for draw in range(2):
            noise = noise_of(cp.Noise(draw=draw), cp.Site("embed"), pair.clean, (model.width,))
            tokens = list(range(*span))
            noised = Edit(("embed", None, None), tokens, embed[number][tokens] + sigma * noise[tokens])
            reference = data["baseline_reference"].values[draw, number]
            assert reference == pytest.approx(answer_logit(plain, pair, pair.clean, [noised]), abs=1e-9)
            for layer in range(3):
                around = [layer] if kind == "resid" else [one for one in (layer - 1, layer) if one >= 0]
                for token in range(data.sizes["position"]):
                    got = data["metric"].values[layer, token, draw, number]
                    if token >= len(pair.clean):
                        assert np.isnan(got)
                        continue
                    sites = [(SITES[kind], one, None) for one in around]
                    edits = [noised, *(Edit(s, [token], plain.value(pair.clean, s)[[token]]) for s in sites)]
                    assert got == pytest.approx(answer_logit(plain, pair, pair.clean, edits), abs=1e-9)


@pytest.mark.parametrize("kind", SITES)
def test_a_trace_by_pairs_restores_clean_states_in_the_corrupted_prompt(world, kind):
    _, plain, pairs = world
    effects = traced(world, window=2, by="pairs", kind=kind)["pairs", kind]
    assert effects.dims == ("layer", "position", "pair")
    for number, pair in enumerate(pairs):
        for layer in range(3):
            around = [layer] if kind == "resid" else [one for one in (layer - 1, layer) if one >= 0]
            for token in range(len(pair.clean)):
                sites = [(SITES[kind], one, None) for one in around]
                edits = [Edit(s, [token], plain.value(pair.clean, s)[[token]]) for s in sites]
                got = effects.to_xarray()["metric"].values[layer, token, number]
                assert got == pytest.approx(answer_logit(plain, pair, pair.corrupt, edits), abs=1e-9)


@pytest.mark.parametrize("metric", ["answer_logit", "kl_from_base"])
def test_restoring_the_last_stream_at_the_last_token_restores_everything(world, metric):
    for effects in traced(world, kind="resid", draws=2, metric=metric).effects.values():
        assert effects.direction == "denoise"
        data = effects.over_draws().to_xarray()
        for number, pair in enumerate(world[2]):
            restored = data["metric"].values[2, len(pair.clean) - 1, number]
            assert restored == pytest.approx(data["baseline_clean"].values[number], abs=1e-9)


def test_a_metric_that_compares_with_the_source_has_nothing_to_compare_with_by_noise(world):
    with pytest.raises(SettingError, match="has no source run"):
        traced(world, metric="kl_divergence")
    assert traced(world, metric="kl_divergence", by="pairs", kind="mlp")


def test_states_before_the_subject_restore_nothing_by_noise(world):
    _, _, pairs = world
    effects = traced(world, by="noise", draws=1)
    for each in effects.effects.values():
        per_pair = each.effect(per_pair=True).values
        for number, pair in enumerate(pairs):
            first = pair.spans["subject"][0][0]
            assert np.abs(per_pair[:, :first, :, number]).max(initial=0.0) < 1e-9


def test_shares_go_by_the_mean_over_draws(world):
    effects = traced(world, by="noise", kind="mlp", draws=3)["noise", "mlp"]
    data = effects.to_xarray()
    base = data["baseline_reference"].mean("draw")
    with np.errstate(invalid="ignore"):
        wanted = (data["metric"].mean("draw") - base)[:, 0].mean("pair") / (data["baseline_clean"] - base).mean()
    if float((data["baseline_clean"] - base).mean()) > 0:
        np.testing.assert_allclose(effects.over_draws().recovered().values[:, 0], wanted, rtol=1e-9, atol=1e-12)
    spread = (data["metric"] - data["baseline_base"]).mean("pair").std("draw", ddof=1)
    np.testing.assert_allclose(effects.spread().values[:, 0], spread.values[:, 0], rtol=1e-9, atol=1e-12)


def test_the_metrics_of_one_trace_are_measured_together(world):
    both = traced(world, by="noise", kind="attn", draws=1, metric=["answer_logit", "probability"])
    alone = traced(world, by="noise", kind="attn", draws=1, metric="probability")
    first = both["noise", "attn"].metric("probability").effect().values
    np.testing.assert_allclose(first, alone["noise", "attn"].effect().values, rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def stories():
    model = cp.open_model("zoo:stories", device="cpu")
    pairs = cp.load_pairs(generate("agreement", n=12, templates=["near"]), model, name="agreement")
    return cp.Experiment(model, pairs)


def test_one_figure_holds_both_protocols_and_all_kinds(stories, tmp_path):
    with unchecked():
        found = cp.trace(stories, span="subject", window=10, draws=2)
    assert list(found.effects) == [(by, kind) for by in ("noise", "pairs") for kind in SITES]
    picture = found.plot()
    words = [each.text for each in ElementTree.fromstring(picture.to_svg()).iter() if each.text and each.text.strip()]
    for row in ("by noise", "by pairs"):
        for column in ("resid_post", "attn_out, windows of 10 layers", "mlp_out, windows of 10 layers"):
            assert f"{row}, {column}" in words
    assert words.count("2 (varies)*") == 6
    assert words.count("1 The*") == 6
    assert words.count("3 near") == 6
    assert any("token of the span 'subject'" in word for word in words)
    assert any("by noise: clean run" in word and "2 draws" in word for word in words)
    assert len(picture.frame) == 6 * 4 * 6
    assert "by noise" in picture.frame["row"].values
    folder = found.save(tmp_path / "trace")
    assert (folder / "trace.svg").is_file()
    again = cp.Effects.load(folder / "noise-mlp")
    assert again.to_xarray().equals(found["noise", "mlp"].to_xarray())
    assert "noise mlp" in repr(found)


def test_the_subject_and_then_the_end_carry_the_number(stories):
    with unchecked():
        found = cp.trace(stories, kind="resid", draws=2)
    for effects in found.effects.values():
        share = effects.over_draws().recovered().values
        assert share[0, 2] > 0.7
        assert share[3, 2] < 0.1
        assert share[0, 5] < 0.1
        assert share[3, 5] == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"by": "zero"}, "by='zero'"),
        ({"kind": ["mlp", "head"]}, "kind='head'"),
        ({"kind": []}, "at least one kind"),
        ({"window": 0}, "holds nothing"),
        ({"draws": 0}, "0 draws"),
    ],
)
def test_a_trace_that_means_nothing_is_refused(world, settings, why):
    with pytest.raises(SettingError, match=why):
        traced(world, **settings)


def test_a_span_that_a_pair_lacks_is_refused_before_anything_runs(world):
    with pytest.raises(PairError, match="has no span 'object' to trace from"):
        traced(world, "object")


def test_pairs_of_unequal_lengths_need_an_alignment(world):
    model, plain, _ = world
    uneven = random_pairs(8, n_pairs=3, lengths="unequal")
    bare = cp.Pairs(list(uneven), name="uneven")
    with pytest.raises(PairError):
        traced((model, plain, bare))
    assert traced((model, plain, uneven), kind="mlp", draws=1)["noise", "mlp"].dims[0] == "layer"
