"""Scores of nodes: what small patches do, what integrals sum to, and what other rules give by hand."""

import functools

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import tiny_model
from dictionaries import weights, write_saelens
from oracle import Edit, Plain
from toys import Chain, Narrow, hooks_of, opened, prompts, vectors

torch.set_num_threads(1)

PROMPTS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]), ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]))
SHORT = (([4, 6, 15, 8], [4, 7, 16, 8]),)


@functools.cache
def model_of(family, **more):
    return cp.open_model(tiny_model(family, **more))


def experiment_of(family, pairs=PROMPTS + SHORT, direction="denoise", **more):
    return cp.Experiment(model_of(family), prompts(*pairs), direction=direction, **more)


def smooth_experiment():
    return cp.Experiment(model_of("gpt2", effect_scale=1.0), prompts(*PROMPTS[:1]))


def small_patch(experiment, site, share=1e-6, **more):
    """Return what moving a site a little towards the source does, per unit of the way; every pair."""
    effects = cp.sweep(experiment, site, value=cp.Interpolate(share), budget=10**6, **more)
    return effects.effect(per_pair=True).values / share


@pytest.mark.parametrize(
    ("family", "sites"),
    [
        ("gpt2", ["z", "resid_mid", "mlp_out", "head_out", "mlp_post@-1", "pattern", "embed"]),
        ("gemma2", ["k", "attn_out", "q_rot", "mlp_gate@-1"]),
    ],
)
def test_a_score_is_the_slope_of_the_effect_of_a_patch(family, sites):
    experiment = experiment_of(family)
    for site, scores in cp.attribute(experiment, sites).items():
        wanted = small_patch(experiment, site)
        assert scores.values.shape == wanted.shape
        np.testing.assert_array_equal(np.isnan(scores.values), np.isnan(wanted))
        np.testing.assert_allclose(scores.values, wanted, rtol=0, atol=2e-5 * np.nanmax(np.abs(wanted)))


@pytest.mark.parametrize("metric", ["kl_divergence", "log_probability", "cosine"])
def test_any_metric_with_a_gradient_has_a_slope(metric):
    experiment = experiment_of("gpt2", metric=metric)
    wanted = small_patch(experiment, "z.1")
    found = cp.attribute(experiment, "z.1").values
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


def test_features_of_a_dictionary_and_experts_are_scored(tmp_path):
    model = cp.open_model(tiny_model("mixtral"))
    write_saelens(tmp_path, "standard", weights(width=model.width, features=6), hook="blocks.1.hook_resid_pre")
    model.add_dictionary("sae", tmp_path)
    experiment = cp.Experiment(model, prompts(*PROMPTS))
    for site in ("feature(sae).1", "feature_error(sae).1", "expert_out.0"):
        wanted = small_patch(experiment, site)
        found = cp.attribute(experiment, site).values
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())
        assert np.abs(wanted).max() > 0


def test_sites_together_are_sums_over_what_is_not_an_axis():
    experiment = experiment_of("gpt2")
    heads, layers = cp.attribute(experiment, "z"), cp.attribute(experiment, "z", over="layer")
    np.testing.assert_allclose(heads.values.sum(1), layers.values, atol=1e-12)
    each = cp.attribute(experiment, "z", over=("position", "layer", "head"))
    np.testing.assert_allclose(np.nansum(each.values, 0), heads.values, atol=1e-12)
    last = cp.attribute(experiment, "z@-1").values
    for pair, length in enumerate((6, 6, 4)):
        np.testing.assert_allclose(each.values[length - 1, ..., pair], last[..., pair], atol=1e-12)


def test_batches_padding_and_order_change_nothing():
    wanted = cp.attribute(experiment_of("gemma2"), "z", "ig", steps=2)
    for other in (
        experiment_of("gemma2", max_rows=1),
        experiment_of("gemma2", padding_side="left"),
        experiment_of("gemma2", (PROMPTS + SHORT)[::-1]),
    ):
        found = cp.attribute(other, "z", "ig", steps=2)
        np.testing.assert_allclose(found.score(), wanted.score(), atol=1e-10)


def test_both_directions_have_opposite_scores_by_midpoints():
    denoise, noise = (
        cp.attribute(experiment_of("gpt2", direction=each), "mlp_out", "ig", steps=3) for each in ("denoise", "noise")
    )
    np.testing.assert_allclose(noise.values, -denoise.values, atol=1e-11)
    np.testing.assert_allclose(noise.importance(), denoise.importance(), atol=1e-11)


def test_clean_and_corrupted_slopes_are_averaged():
    found = cp.attribute(experiment_of("gpt2"), "resid_post.1", "clean-corrupted").values
    there, back = (
        cp.attribute(experiment_of("gpt2", direction=each), "resid_post.1").values for each in ("denoise", "noise")
    )
    np.testing.assert_allclose(found, (there - back) / 2, atol=1e-11)


def errors_by_steps(experiment, site, method, wanted):
    """Return how far a sum is off at 16, 32 and 64 steps, as a share of the mean gap."""
    gap = float(np.abs(experiment.baseline.clean - experiment.baseline.corrupt).mean())
    return [
        float(np.abs(cp.attribute(experiment, site, method, steps=steps, over="layer").score() - wanted).max()) / gap
        for steps in (16, 32, 64)
    ]


def test_integrated_over_inputs_the_embedding_has_the_whole_difference():
    experiment = smooth_experiment()
    difference = float((experiment.baseline.clean - experiment.baseline.corrupt).mean())
    first, second, third = errors_by_steps(experiment, "resid_pre.0", "ig", difference)
    assert third < 0.01
    assert first / second == pytest.approx(4, rel=0.3)
    assert second / third == pytest.approx(4, rel=0.3)


def test_integrated_over_its_activations_a_node_has_its_exact_effect():
    experiment = smooth_experiment()
    wanted = cp.sweep(experiment, "mlp_out", over="layer").effect()
    errors = errors_by_steps(experiment, "mlp_out", "ig-activations", wanted)
    assert errors[-1] < 0.01
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.3)
    assert errors[1] / errors[2] == pytest.approx(4, rel=0.3)


def test_activations_are_moved_cell_by_cell():
    experiment = experiment_of("gpt2")
    found = cp.attribute(experiment, "z.1.0:2", "ig-activations", steps=8, over=("layer", "head", "position"))
    wanted = cp.sweep(experiment, "z.1.0:2", over=("layer", "head", "position")).effect(per_pair=True)
    np.testing.assert_allclose(found.values, wanted, atol=0.02 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_queries_and_keys_are_scored_by_what_they_change_of_the_weights(family):
    experiment = experiment_of(family, PROMPTS[:1])
    plain = Plain(experiment.model.module, family)
    clean, corrupt = PROMPTS[0]
    found = {
        "q": cp.attribute(experiment, "q.1", "atp*").values[0, :, 0],
        "k": cp.attribute(experiment, "k.1", "atp*").values[0, :, 0],
    }
    shared = plain.n_heads // plain.n_kv_heads
    for name, of_units in found.items():
        for unit, score in enumerate(of_units):
            heads = [unit] if name == "q" else range(unit * shared, (unit + 1) * shared)
            total = sum(along_weights(plain, corrupt, clean, name, unit, head) for head in heads)
            # In the last of two layers, dropping the first changes nothing and dropping its own leaves nothing.
            assert score == pytest.approx(abs(total), rel=1e-4, abs=1e-7)


def along_weights(plain, base, source, name, unit, head, small=1e-4):
    """Return the slope of the metric along what each query, or key, of the source changes of a head's weights."""
    pattern = ("pattern", 1, head)
    weights, other = plain.value(base, pattern), plain.value(source, (name, 1, unit))
    total = 0.0
    for token in range(len(base)):
        kept = []
        edit = Edit((name, 1, unit), [token], other[[token]])
        seen = Edit(pattern, range(len(base)), lambda now, kept=kept: (kept.append(now.clone()), now)[1])
        plain.logits(base, [edit, seen])
        change = kept[0] - weights
        ends = [
            plain.logits(base, [Edit(pattern, range(len(base)), weights + sign * small * change)])[-1]
            for sign in (1, -1)
        ]
        total += float((ends[0] - ends[1])[5] - (ends[0] - ends[1])[6]) / (2 * small)
    return total


@pytest.mark.parametrize("n_layers", [2, 3])
def test_a_layers_writes_are_dropped_one_after_the_other(n_layers):
    experiment = cp.Experiment(cp.open_model(tiny_model("gpt2", layers=n_layers)), prompts(*PROMPTS))
    found = cp.attribute(experiment, "mlp_out", "atp*", over="layer")
    module = experiment.model.module
    wanted = np.zeros((n_layers, len(PROMPTS)))
    for pair, (clean, corrupt) in enumerate(PROMPTS):
        for dropped in range(n_layers):
            for node, slope in enumerate(dropping(module, corrupt, clean, dropped)):
                wanted[node, pair] += abs(slope) / (n_layers - 1)
    np.testing.assert_allclose(found.values, wanted, atol=1e-11)
    assert not found.is_signed


def dropping(module, base, source, dropped):
    """Return the scores of all MLPs where no gradient goes through what one layer writes."""

    def run(ids):
        kept, handles = [], []
        for layer, block in enumerate(module.transformer.h):

            def attend(_, __, out, layer=layer):
                return (out[0].detach(), *out[1:]) if layer == dropped else out

            def mlp(_, __, out, layer=layer):
                out = out.detach().requires_grad_() if layer == dropped else out
                kept.append(out)
                return out.detach() if layer == dropped else out

            handles += [block.attn.register_forward_hook(attend), block.mlp.register_forward_hook(mlp)]
        logits = module(torch.tensor([ids])).logits[0, -1]
        for handle in handles:
            handle.remove()
        return kept, logits[5] - logits[6]

    (now, metric), (then, _) = run(base), run(source)
    slopes = torch.autograd.grad(metric, now, allow_unused=True)
    return [
        0.0 if slope is None else float((slope * (after - before).detach()).sum())
        for slope, before, after in zip(slopes, now, then, strict=True)
    ]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2"])
def test_relevance_goes_back_as_through_modules_with_fixed_scales(family):
    dtype = torch.float64 if family == "gpt2" else torch.float32  # where norms are those of transformers
    experiment = cp.Experiment(model_of(family, dtype=dtype), prompts(*PROMPTS))
    found = cp.attribute(experiment, ["z", "mlp_post@-1"], "relp")
    changed = tiny_model(family, dtype=dtype)
    with_fixed_scales(changed)
    other = cp.Experiment(cp.open_model(changed), experiment.pairs)
    for site, scores in found.items():
        wanted = cp.attribute(other, site).values
        plain = cp.attribute(experiment, site).values
        np.testing.assert_allclose(scores.values, wanted, atol=100 * torch.finfo(dtype).eps * np.abs(wanted).max())
        assert np.abs(wanted - plain).max() > 0.01 * np.abs(wanted).max()
    assert "LN-rule" in scores.provenance["rules"]["norms"]
    assert hooks_of(experiment.model.module) == 0


def with_fixed_scales(module):
    """Let norms divide by a constant, activations be multiples and gates count half; the forward stays as it is."""
    for part in module.modules():
        kind = type(part).__name__
        if "Norm" in kind:
            part.forward = functools.partial(fixed_norm, part, centred="LayerNorm" in kind)
        elif "GELU" in kind or "SiLU" in kind:
            part.forward = functools.partial(multiple, type(part).forward.__get__(part))
        elif kind in ("LlamaMLP", "Gemma2MLP", "Olmo2MLP"):
            part.forward = functools.partial(half, part)


def fixed_norm(part, x, *, centred):
    centre = x - x.mean(-1, keepdim=True) if centred else x
    eps = getattr(part, "eps", None) or part.variance_epsilon
    scale = (centre.square().mean(-1, keepdim=True) + eps).rsqrt().detach()
    weight = 1 + part.weight if "Gemma" in type(part).__name__ else part.weight
    return centre * scale * weight + (part.bias if centred else 0)


def multiple(forward, x):
    return x * (forward(x) / x).detach()


def half(part, x):
    product = part.act_fn(part.gate_proj(x)) * part.up_proj(x)
    return part.down_proj(product / 2 + product.detach() / 2)


def test_any_module_is_scored_and_arrays_are_integrated():
    model = opened(Chain())
    experiment = cp.Experiment(model, vectors(), "answer_logit")
    site = "module(first).output axes=(width)"
    scores = cp.attribute(experiment, site)
    np.testing.assert_allclose(scores.values, small_patch(experiment, site), atol=1e-4)
    whole = cp.attribute(experiment, site, "ig", steps=64).score()
    assert float(whole[0]) == pytest.approx(
        float((experiment.baseline.clean - experiment.baseline.corrupt).mean()), rel=1e-2
    )


@functools.cache
def two_streams():
    """Return pairs for a model with an encoder and a decoder."""
    rng = np.random.default_rng(0)
    made = []
    for number, (read, written) in enumerate(((6, 3), (8, 2))):
        ids = [rng.integers(3, 40, size) for size in (read, read, written, written)]
        encoder = Pair(ids[0], ids[1])
        made.append(Pair(ids[2], ids[3], ((3 + number,),), ((20 + number,),), id=str(number), encoder=encoder))
    return Pairs(made, name="two streams")


@pytest.mark.parametrize("side", ["right", "left"])
def test_sites_of_an_encoder_and_a_decoder_are_scored(side):
    experiment = cp.Experiment(model_of("t5"), two_streams(), padding_side=side)
    sites = ["encoder/resid_pre", "encoder/z", "decoder/resid_post", "decoder/cross_z"]
    for site, scores in cp.attribute(experiment, sites).items():
        wanted = small_patch(experiment, site, share=1e-7)
        np.testing.assert_array_equal(np.isnan(scores.values), np.isnan(wanted))
        np.testing.assert_allclose(scores.values, wanted, rtol=0, atol=5e-5 * np.nanmax(np.abs(wanted)))


def test_batches_are_halved_when_memory_runs_out():
    site = "module(second).output axes=(width)"
    wanted, found = (
        cp.attribute(cp.Experiment(opened(module), vectors(), "answer_logit"), site, "ig", steps=2).values
        for module in (Chain(), Narrow(2))
    )
    np.testing.assert_allclose(found, wanted, atol=1e-12)


def test_tokens_without_a_partner_are_noted():
    pairs = prompts(([1, 7, 3, 9, 4], [1, 8, 8, 3, 9, 4])).align("difference")
    scores = cp.attribute(cp.Experiment(model_of("gpt2"), pairs), "z")
    wanted = small_patch(cp.Experiment(model_of("gpt2"), pairs), "z")
    np.testing.assert_allclose(scores.values, wanted, atol=2e-5 * np.abs(wanted).max())
    assert any("have no partner" in note for note in scores.top(1).notes)


def test_values_may_come_from_an_older_model():
    older = cp.open_model(tiny_model("gpt2", seed=1))
    experiment = cp.Experiment(model_of("gpt2"), prompts(*PROMPTS), source_model=older)
    wanted = small_patch(experiment, "z.1")
    np.testing.assert_allclose(cp.attribute(experiment, "z.1").values, wanted, atol=1e-4 * np.abs(wanted).max())


def test_scores_are_labelled_listed_saved_and_read(tmp_path):
    scores = cp.attribute(experiment_of("gpt2", PROMPTS), "resid_pre")
    assert scores.dims == ("layer", "position", "pair")
    assert list(scores.score().coords["position_label"].values) == list(scores.labels["position"])
    table = scores.to_dataframe()
    assert len(table) == scores.values.size
    np.testing.assert_allclose(
        scores.importance() * float(scores.provenance["mean_source"] - scores.provenance["mean_base"]), scores.score()
    )
    top = scores.top(2)
    assert abs(top["score"][0]) == pytest.approx(float(np.abs(scores.score()).max()))
    assert scores.sel(layer=top["layer"][0], position=top["position"][0]) == pytest.approx(top["score"][0])
    read = cp.Scores.load(scores.save(tmp_path / "scores.npz"))
    np.testing.assert_array_equal(read.values, scores.values)
    assert (read.coordinates, read.labels, read.provenance) == (scores.coordinates, scores.labels, scores.provenance)


def test_pairs_without_a_column_are_left_out_of_its_mean():
    scores = cp.attribute(experiment_of("gpt2", PROMPTS + SHORT), "resid_pre")
    assert np.isnan(scores.values[:, 4:, 2]).all()
    np.testing.assert_allclose(scores.score()[:, 5], scores.values[:, 5, :2].mean(-1))
