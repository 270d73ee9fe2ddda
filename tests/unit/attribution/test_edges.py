"""Scores of edges against a slow implementation by hand, and what must not change them."""

import functools

import numpy as np
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import causalpatch as cp
from causalpatch.engine import edge_slopes as room
from causalpatch.engine.few_logits import Few
from causalpatch.testing.tiny import tiny_model
from oracle_edges import EdgePlain, ungrouped
from toys import hooks_of, prompts

torch.set_num_threads(1)

PROMPTS = (
    ([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]),
    ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]),
    ([3, 33, 14, 8, 22, 19], [3, 32, 14, 8, 21, 19]),
)
SHORT = (([4, 6, 15, 8], [4, 7, 16, 8]),)
GROUPED = ("llama", "gemma2", "qwen3", "phi3")
FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "qwen3", "olmo2", "phi", "granite", "opt")


@functools.cache
def model_of(family):
    return cp.open_model(tiny_model(family, kv_heads=2 if family in GROUPED else 4))


def experiment_of(family, pairs=PROMPTS, direction="denoise", **more):
    return cp.Experiment(model_of(family), prompts(*pairs), direction=direction, **more)


def by_hand(family, pairs=PROMPTS, direction="denoise", shares=(0.0,)):
    """Return the scores of all edges, by receivers' tokens: position, sender, receiver."""
    plain = EdgePlain(ungrouped(family) if family in GROUPED else tiny_model(family, kv_heads=4), family)
    total = 0.0
    for clean, corrupt in pairs:
        base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        runs = plain.run(base), plain.run(source)
        deltas = plain.deltas(*runs, shares)
        for share in shares:
            embed = runs[0].embed + share * deltas[0]
            slopes = plain.slopes(base, deltas, lambda logits: logits[-1, 5] - logits[-1, 6], embed)
            total = total + slopes / len(shares) / len(pairs)
    return np.asarray(total.movedim(2, 0))


def close(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_heads_taken_apart_by_hand(family):
    scores = cp.attribute_edges(experiment_of(family), "eap")
    exists = scores.graph.exists
    wanted = by_hand(family).sum(0)
    assert wanted.shape == scores.graph.shape
    assert not wanted[~exists].any()
    close(scores.values[exists], wanted[exists])


# Behind a post-norm (gemma2) the mean of products over points is not the product of their means.
@pytest.mark.parametrize(
    ("family", "method", "of_nodes"),
    [
        *((family, "eap", "atp") for family in ("gemma2", "gpt_neox", "phi3", "gpt_bigcode")),
        *((family, "eap-ig", "ig") for family in ("gpt2", "gpt_neox", "phi3")),
        *((family, "clean-corrupted", "clean-corrupted") for family in ("gpt2", "gpt_neox", "phi3")),
    ],
)
def test_the_score_of_a_node_is_the_sum_over_the_edges_out_of_it(family, method, of_nodes):
    experiment = experiment_of(family)
    scores = cp.attribute_edges(experiment, method)
    nodes = cp.attribute(experiment, ["z", "mlp_out", "resid_pre.0"], of_nodes, over="layer")
    out = scores.score().sum("receiver").values
    graph = scores.graph
    assert out[0] == pytest.approx(float(nodes["resid_pre.0"].score()[0]), rel=1e-9)
    for layer in range(graph.n_layers):
        assert out[graph.mlp_from(layer)] == pytest.approx(float(nodes["mlp_out"].score()[layer]), rel=1e-9)
        heads = out[graph.heads_from(layer)].sum()
        assert heads == pytest.approx(float(nodes["z"].score()[layer]), rel=1e-9)


@pytest.mark.parametrize(("method", "shares"), [("eap-ig", (0.25, 0.75)), ("clean-corrupted", (0.0, 1.0))])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "gpt_neox", "qwen3"])
def test_slopes_along_the_way_are_those_of_runs_with_moved_embeddings(family, method, shares):
    scores = cp.attribute_edges(experiment_of(family), method, steps=2)
    close(scores.values[scores.graph.exists], by_hand(family, shares=shares).sum(0)[scores.graph.exists])


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_rule_of_eap_ig_counts_from_the_corrupted_end(direction):
    shares = (0.0, 0.5) if direction == "denoise" else (1.0, 0.5)
    scores = cp.attribute_edges(experiment_of("gpt2", direction=direction), steps=2, rule="eap-ig")
    wanted = by_hand("gpt2", direction=direction, shares=shares).sum(0)
    close(scores.values[scores.graph.exists], wanted[scores.graph.exists])


def test_positions_are_told_apart_and_sum_to_the_whole():
    scores = cp.attribute_edges(experiment_of("gemma2"), "eap", positions=True)
    exists = scores.graph.exists
    close(scores.values[:, exists], by_hand("gemma2")[:, exists])
    whole = cp.attribute_edges(experiment_of("gemma2"), "eap")
    np.testing.assert_allclose(scores.over_positions().values, whole.values, atol=1e-12)
    assert scores.score().dims == ("position", "sender", "receiver")
    assert scores["m0 -> logits"] == pytest.approx(whole["m0 -> logits"])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "olmo2", "granite"])
def test_integrated_over_its_activations_all_edges_of_a_sender_are_its_exact_effect(family):
    experiment = experiment_of(family, PROMPTS[:1])
    graph = cp.graph_of(experiment)
    wanted = cp.patch_edges(experiment, list(graph.sender_labels)).effect().values
    scores = cp.attribute_edges(experiment, "eap-ig-activations", steps=64).score().sum("receiver").values
    gap = abs(float((experiment.baseline.clean - experiment.baseline.corrupt).mean()))
    assert np.abs(scores - wanted).max() < 0.01 * gap
    assert np.abs(wanted).max() > 0.1 * gap


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_activations_are_moved_one_sender_at_a_time(family):
    scores = cp.attribute_edges(experiment_of(family, PROMPTS[:1]), "eap-ig-activations", steps=1)
    plain = EdgePlain(ungrouped(family) if family in GROUPED else tiny_model(family, kv_heads=4), family)
    clean, corrupt = PROMPTS[0]
    deltas = plain.deltas(plain.run(corrupt), plain.run(clean))
    for sender in (0, 2, plain.n_heads + 1, plain.n_senders - 1):
        moved = torch.zeros(plain.n_senders)
        moved[sender] = 0.5
        slopes = plain.slopes(corrupt, deltas, lambda logits: logits[-1, 5] - logits[-1, 6], moved=moved)
        exists = scores.graph.exists[sender]
        close(scores.values[sender, exists], slopes.sum(-1)[sender].numpy()[exists])


@pytest.mark.parametrize("method", ["eap", "eap-ig"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_batches_padding_and_order_change_nothing(family, method):
    pairs = PROMPTS + SHORT
    wanted = cp.attribute_edges(experiment_of(family, pairs), method, steps=2).values
    for other in (
        experiment_of(family, pairs, max_rows=1),
        experiment_of(family, pairs, padding_side="left"),
        experiment_of(family, pairs[::-1]),
        experiment_of(family, pairs, budget_gib=1e-6),  # a pair and a point at a time
    ):
        found = cp.attribute_edges(other, method, steps=2).values
        np.testing.assert_allclose(found, wanted, atol=1e-10 * np.nanmax(np.abs(wanted)))


def test_points_may_be_many(monkeypatch):
    wanted = {family: cp.attribute_edges(experiment_of(family), steps=5) for family in ("llama", "opt")}
    monkeypatch.setattr(room, "AT_ONCE", 2)
    for family, scores in wanted.items():
        found = cp.attribute_edges(experiment_of(family), steps=5)
        np.testing.assert_allclose(found.values, scores.values, atol=1e-12)


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "gemma2"])
def test_points_share_forwards_and_tokens_are_taken_in_blocks(family, monkeypatch):
    pairs = PROMPTS + SHORT
    found, rows = {}, {}
    for name, value in {"one": 1, "some": 2 * 4 * 6, "all": 10**6}.items():
        monkeypatch.setattr(room, "CPU_TOKENS", value)
        monkeypatch.setattr(room, "BLOCK_NUMBERS", value)
        for by_position in (False, True):
            scores = cp.attribute_edges(experiment_of(family, pairs), steps=5, positions=by_position)
            found[name, by_position] = scores.values
        cost = scores.provenance["cost"]
        rows[name], n_forwards = cost["rows"], {"one": 7, "some": 5, "all": 3}[name]
        assert cost["forwards"] == n_forwards
    assert set(rows.values()) == {7 * len(pairs)}
    for name in ("some", "all"):
        for by_position in (False, True):
            wanted = found["one", by_position]
            np.testing.assert_allclose(
                found[name, by_position], wanted, atol=1e-12 * np.nanmax(np.abs(wanted)), rtol=1e-9
            )


def test_a_hook_of_the_readers_that_shifts_a_projection_is_part_of_the_run():
    shift = torch.linspace(-1, 1, 96, dtype=torch.float64)
    hooked, biased = tiny_model("gpt2"), tiny_model("gpt2")
    hooked.transformer.h[1].attn.c_attn.register_forward_hook(lambda module, args, out: out + shift)
    with torch.no_grad():
        biased.transformer.h[1].attn.c_attn.bias += shift
    found, wanted = (
        cp.attribute_edges(cp.Experiment(cp.open_model(module), prompts(*PROMPTS)), "eap").values
        for module in (hooked, biased)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-10 * np.nanmax(np.abs(wanted)))


@pytest.mark.parametrize(
    ("family", "method", "steps", "rule", "runs"),
    [
        ("gpt2", "eap", 1, "midpoint", 2),  # slopes are those of the base run
        ("gpt2", "eap-ig", 3, "eap-ig", 4),  # the first point is the base run
        ("gpt2", "eap-ig", 3, "midpoint", 5),
        ("llama", "eap", 1, "midpoint", 3),  # attention is computed step by step for slopes alone
    ],
)
def test_no_run_is_made_twice(family, method, steps, rule, runs):
    scores = cp.attribute_edges(experiment_of(family), method, steps=steps, rule=rule)
    assert scores.provenance["cost"]["rows"] == runs * len(PROMPTS)


@pytest.mark.parametrize("metric", ["kl_from_base", "kl_divergence", "log_probability", "logit_difference"])
@pytest.mark.parametrize("asks", [True, False])
def test_logits_of_other_tokens_do_not_matter(metric, asks, monkeypatch):
    """Runs whose prompts end at different columns, of models that compute all logits or those that are asked for."""
    pairs, rule = PROMPTS + SHORT, "eap-ig"
    wanted = cp.attribute_edges(experiment_of("gpt2", pairs, metric=metric), steps=2, rule=rule)
    if not asks:
        monkeypatch.setattr(room, "few_of", lambda job, gauge: Few())
    for side in ("left", "right"):
        experiment = experiment_of("gpt2", pairs, metric=metric, padding_side=side)
        found = cp.attribute_edges(experiment, steps=2, rule=rule)
        np.testing.assert_allclose(found.values, wanted.values, atol=1e-10)
        assert found.provenance["mean_base"] == pytest.approx(wanted.provenance["mean_base"], abs=1e-9)


@pytest.mark.parametrize("method", ["eap-ig", "clean-corrupted"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "olmo2"])
def test_both_directions_have_opposite_scores_and_the_same_circuit(family, method):
    denoise, noise = (
        cp.attribute_edges(experiment_of(family, direction=direction), method, steps=3)
        for direction in ("denoise", "noise")
    )
    np.testing.assert_allclose(noise.values, -denoise.values, atol=1e-12)
    np.testing.assert_allclose(noise.importance(), denoise.importance(), atol=1e-12)
    for n_edges in (10, 30):
        one, other = (cp.discover_circuit(scores, n_edges) for scores in (denoise, noise))
        np.testing.assert_array_equal(one.mask, other.mask)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_heads_behind_a_norm_send_what_the_norm_adds_more(family):
    """With more points the terms of a layer's heads sum to the difference behind the norm."""
    plain = EdgePlain(ungrouped(family) if family in GROUPED else tiny_model(family, kv_heads=4), family)
    clean, corrupt = PROMPTS[0]
    base, source = plain.run(corrupt), plain.run(clean)
    whole = plain.added(1, source.z[1]) - plain.added(1, base.z[1])
    first = 1 + plain.n_heads + 1
    errors = []
    for steps in (2, 4, 8):
        deltas = plain.deltas(base, source, [(k + 0.5) / steps for k in range(steps)])
        errors.append(float((deltas[first : first + plain.n_heads].sum(0) - whole).abs().max() / whole.abs().max()))
    assert errors[0] / errors[1] > 3
    assert errors[1] / errors[2] > 3
    assert errors[2] < 0.01


class Int8(nn.Module):
    """A projection whose weight is kept in eight bits."""

    def __init__(self, of: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = of.in_features, of.out_features, of.bias
        scale = of.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale.detach())
        self.register_buffer("weight", (of.weight / scale).round().to(torch.int8).detach())

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_gradients_flow_through_quantised_projections():
    kept, plain = tiny_model("llama", kv_heads=2), tiny_model("llama", kv_heads=2)
    for quantised, same in zip(kept.model.layers, plain.model.layers, strict=True):
        for part in ("self_attn", "mlp"):
            projections = dict(getattr(quantised, part).named_children())
            for name in (name for name in projections if name.endswith("_proj")):
                module = Int8(projections[name])
                setattr(getattr(quantised, part), name, module)
                with torch.no_grad():
                    getattr(getattr(same, part), name).weight.copy_(module.weight.double() * module.scale)
    assert sum(isinstance(module, Int8) for module in kept.modules()) == 7 * len(kept.model.layers)
    found, wanted = (
        cp.attribute_edges(cp.Experiment(cp.open_model(module), prompts(*PROMPTS)), "eap").values
        for module in (kept, plain)
    )
    np.testing.assert_allclose(found, wanted, atol=1e-10 * np.nanmax(np.abs(wanted)))


class OtherNorm(nn.Module):
    """A norm of no known kind: by the mean magnitude."""

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + 0.1)


def test_a_norm_of_an_unknown_kind_goes_through_autograd():
    module = tiny_model("gpt2")
    for block in module.transformer.h:
        block.ln_1 = OtherNorm()
    experiment = cp.Experiment(cp.open_model(module), prompts(*PROMPTS[:1]))
    scores = cp.attribute_edges(experiment, "eap")
    plain = EdgePlain(module, "gpt2")
    clean, corrupt = PROMPTS[0]
    deltas = plain.deltas(plain.run(corrupt), plain.run(clean))
    wanted = plain.slopes(corrupt, deltas, lambda logits: logits[-1, 5] - logits[-1, 6]).sum(-1).numpy()
    close(scores.values[scores.graph.exists], wanted[scores.graph.exists])


def test_weights_stay_as_they_were_and_no_hook_is_left():
    module = tiny_model("gpt2")
    module.transformer.h[0].attn.c_attn.weight.requires_grad_(requires_grad=False)
    before = [parameter.requires_grad for parameter in module.parameters()]
    experiment = cp.Experiment(cp.open_model(module), prompts(*PROMPTS))
    with torch.no_grad():
        scores = cp.attribute_edges(experiment, "eap")
    assert np.nanmax(np.abs(scores.values)) > 0
    assert [parameter.requires_grad for parameter in module.parameters()] == before
    assert all(parameter.grad is None for parameter in module.parameters())
    assert hooks_of(module) == 0


def test_few_bits_are_contracted_in_float32_and_the_record_says_so():
    scores = {
        dtype: cp.attribute_edges(
            cp.Experiment(cp.open_model(tiny_model("llama", kv_heads=2, dtype=dtype)), prompts(*PROMPTS)), "eap"
        )
        for dtype in (torch.bfloat16, torch.float32)
    }
    few, full = scores[torch.bfloat16], scores[torch.float32]
    assert few.provenance["contraction"] == "float32"
    assert few.provenance["model"]["dtype"] == "bfloat16"
    nodes = cp.attribute(
        cp.Experiment(cp.open_model(tiny_model("llama", dtype=torch.bfloat16)), prompts(*PROMPTS)), "z"
    )
    assert nodes.provenance["contraction"] == "float32"
    exists = few.graph.exists
    assert np.corrcoef(few.values[exists], full.values[exists])[0, 1] > 0.99


def linear_model():
    """Return a GPT-2 whose parts multiply the stream by 2, 3, 1 and .5 on prompts of one token."""
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=2, n_layer=2, n_head=1, n_inner=2)
    config.activation_function, config.tie_word_embeddings = "linear", False
    module = GPT2LMHeadModel(config).double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.transformer.wte.weight.copy_(torch.arange(16).reshape(8, 2) / 8)
        module.lm_head.weight[5] = torch.tensor([1.0, 0.0])
        module.lm_head.weight[6] = torch.tensor([0.0, 1.0])
        for block, heads, mlp in zip(module.transformer.h, (2.0, 1.0), (3.0, 0.5), strict=True):
            block.ln_1, block.ln_2 = nn.Identity(), nn.Identity()
            block.attn.c_attn.weight[:, 4:] = torch.eye(2)
            block.attn.c_proj.weight.copy_(heads * torch.eye(2))
            block.mlp.c_fc.weight.copy_(torch.eye(2))
            block.mlp.c_proj.weight.copy_(mlp * torch.eye(2))
        module.transformer.ln_f = nn.Identity()
        module.transformer.wte.weight[1] = torch.tensor([2.0, -1.0])
        module.transformer.wte.weight[2] = torch.tensor([1.0, 1.0])
    return module


# By hand, in units of the embeddings' difference: what an edge adds, times what all behind it make of that.
BY_HAND = {
    "embed -> a0.h0<v>": 24.0,
    "embed -> m0": 9.0,
    "embed -> a1.h0<v>": 1.5,
    "embed -> m1": 0.5,
    "embed -> logits": 1.0,
    "a0.h0 -> m0": 18.0,
    "a0.h0 -> a1.h0<v>": 3.0,
    "a0.h0 -> m1": 1.0,
    "a0.h0 -> logits": 2.0,
    "m0 -> a1.h0<v>": 13.5,
    "m0 -> m1": 4.5,
    "m0 -> logits": 9.0,
    "a1.h0 -> m1": 6.0,
    "a1.h0 -> logits": 12.0,
    "m1 -> logits": 12.0,
}


def test_on_a_linear_model_scores_are_effects_and_both_are_the_hand_numbers():
    experiment = cp.Experiment(cp.open_model(linear_model()), prompts(([1], [2])))
    scores = cp.attribute_edges(experiment, "eap")
    gap = float(experiment.baseline.clean[0, 0] - experiment.baseline.corrupt[0, 0])
    assert gap == pytest.approx(36 * 3)  # the difference of the embeddings is (1, -2), read as 1 - (-2)
    exact = cp.patch_edges(experiment, list(BY_HAND)).effect().values
    for (edge, share), effect in zip(BY_HAND.items(), exact, strict=True):
        assert scores[edge] == pytest.approx(3 * share, abs=1e-9)
        assert effect == pytest.approx(3 * share, abs=1e-9)
    assert np.nansum(np.abs(scores.values)) == pytest.approx(3 * sum(BY_HAND.values()))
    assert np.nansum(scores.values[0]) == pytest.approx(gap, abs=1e-6)  # out of the embedding
    assert np.nansum(scores.values[:, -1]) == pytest.approx(gap, abs=1e-6)  # into the logits
    nodes = cp.attribute(experiment, "mlp_out", over="layer")
    np.testing.assert_allclose(nodes.score(), cp.sweep(experiment, "mlp_out", over="layer").effect(), atol=1e-9)


def test_scores_are_saved_and_read_and_listed(tmp_path):
    scores = cp.attribute_edges(experiment_of("gpt2"), "eap")
    read = cp.EdgeScores.load(scores.save(tmp_path / "edges.npz"))
    np.testing.assert_array_equal(read.values, scores.values)
    assert read.graph == scores.graph
    assert read.provenance == scores.provenance
    table = scores.to_dataframe()
    assert len(table) == scores.graph.n_edges == np.isfinite(scores.values).sum()
    top = scores.top(3)
    assert list(top["score"].abs()) == sorted(table["score"].abs(), reverse=True)[:3]
    assert list(scores.top(2, by="importance")["importance"]) == sorted(table["importance"], reverse=True)[:2]
    assert top["score"][0] == pytest.approx(scores[top["edge"][0]])
    assert float(scores.score().sel(sender="m0", receiver="logits")) == scores["m0 -> logits"]
