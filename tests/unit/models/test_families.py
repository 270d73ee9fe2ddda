"""Every fact of every family, held against the arithmetic of the unmodified modules of transformers."""

import itertools
import re
from dataclasses import replace

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.models import FAMILIES, Port
from causalpatch.sites import NAMES, Site, parse
from causalpatch.testing.pictures import TABLES
from causalpatch.testing.tiny import ENCODER_DECODERS, FAMILY_NAMES, tiny_model
from parts import BIASED, PARTS
from worlds import CAUSAL, FIRST, LACKS, OWN_ATTENTION

SITES = (
    *("embed", "resid_pre.1", "resid_mid.1", "resid_post.0", "attn_out.1", "mlp_out.0", "q.1.3", "k.1.1", "v.1.0"),
    *("z.1.2", "head_out.1.1", "mlp_pre.0.5", "mlp_gate.1.3", "mlp_post.0.5", "final_norm", "logits"),
    *("pos_embed", "q_bias.1.1", "k_bias.1.0", "v_bias.1.1", "attn_bias.0", "mlp_bias.1"),
)
NORMS_BEHIND = ("opt_post_norm", "bert", "roberta")
POST_NORMS = ("gemma2", "gemma3", "gemma3n", "olmo2")


def having(*names):
    """Return the families that have some sites."""
    return [family for family in FAMILY_NAMES if not LACKS[family] & set(names)]


def cases():
    """Return families with each of their sites, the first families in the quick suite."""
    for family, site in itertools.product(FAMILY_NAMES, SITES):
        if site.partition(".")[0] not in LACKS[family]:
            site = site.replace(".1.1", ".1.0") if family in ("falcon", "gpt_bigcode") and site[0] in "kv" else site
            yield pytest.param(family, site, marks=() if family in FIRST else pytest.mark.slow)


CASES = list(cases())


def same(a, b, tolerance=1e-12):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def bend(value):
    """Change a value in a way that no norm takes out again, as it would a shift or a factor."""
    return value**2 + 1.5


def layer_of(found, layer=1):
    """Return a layer, found by its author's names."""
    parts = PARTS[found.family]
    return found.module.get_submodule(parts.body).get_submodule(parts.layers)[layer]


def added(found, made, norm):
    """Return what a layer adds of what a projection made."""
    layer = layer_of(found)
    made = layer.get_submodule(norm)(made) if found.family in POST_NORMS else made
    return made * layer.residual_multiplier if found.family == "granite" else made


def test_every_family_of_the_tables_has_a_tiny_model():
    named = [family.name for family in FAMILIES]
    assert set(named) <= {*FAMILY_NAMES, *ENCODER_DECODERS, *TABLES}
    assert len(named) == len(set(named))
    assert {*FAMILY_NAMES, *TABLES} <= set(named)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_configuration_decides_the_family(probe, family):
    model = probe(family).model
    assert model.family.name == family
    assert model.family_source == "config"
    assert not model.is_assumed


@pytest.mark.parametrize("family", having("z"))
def test_the_heads_side_by_side_through_the_output_projection_are_what_attention_adds(probe, family):
    found = probe(family)
    heads = [f"z.1.{head}" for head in range(found.model.n_heads)]
    *values, attn_out, _ = found.read(*heads, "attn_out.1")
    with torch.no_grad():
        made = layer_of(found).get_submodule(PARTS[family].heads)(torch.cat(values, -1))
        made = added(found, made, "post_attention_layernorm")
    assert same(made, attn_out)


@pytest.mark.parametrize("family", having("z"))
def test_the_shares_of_the_heads_and_the_bias_sum_to_the_output_of_the_projection(probe, family):
    found = probe(family)
    model, projection = found.model, layer_of(found).get_submodule(PARTS[family].heads)
    *shares, attn_out, _ = found.read(*[f"head_out.1.{head}" for head in range(model.n_heads)], "attn_out.1")
    output = found.tensor(Port(model.tap(parse("z.1.0")).port.path, "output"))
    bias = 0 if projection.bias is None else projection.bias.detach()
    assert same(sum(shares) + bias, output)
    assert all(share.shape[-1] == model.width for share in shares)
    assert same(output, attn_out) == (family not in (*POST_NORMS, "granite"))


@pytest.mark.parametrize("family", having("z", "v"))
def test_the_weights_of_attention_times_the_values_are_what_the_projection_is_given(probe, family):
    found = probe(family)
    model, config = found.model, found.module.config
    port = Port(f"{model.tap(parse('resid_pre.1')).port.path}.{PARTS[family].attention}", "output", (1,))
    before, config._attn_implementation = config._attn_implementation, "eager"
    try:
        heads = [f"z.1.{head}" for head in range(model.n_heads)]
        *read, _ = found.read(*heads, *[f"v.1.{head}" for head in range(model.n_kv_heads)])
        weights = found.tensor(port).double()
    finally:
        config._attn_implementation = before
    z, v = read[: model.n_heads], read[model.n_heads :]
    n_group = model.n_heads // model.n_kv_heads
    for head in range(model.n_heads):
        # The model's own plain attention takes its softmax in float32.
        assert same(weights[:, head] @ v[head // n_group], z[head], 1e-6)
    totals = weights.sum(-1)
    assert same(totals, torch.ones_like(totals), 1e-6) == (family != "gpt_oss")  # sinks take a share


@pytest.mark.parametrize("family", having("z"))
@pytest.mark.parametrize("layer", [0, 1])
def test_patterns_times_values_are_z_and_what_heads_give_adds_up_to_what_attention_adds(probe, family, layer):
    found = probe(family)
    model, parts = found.model, PARTS[family]
    own, shared = range(model.n_heads), range(model.n_kv_heads)
    names = {"pattern": own, "scores": own, "z": own, "head_out": own} | ({} if "v" in LACKS[family] else {"v": shared})
    read = values_in_one_run(found, [Site(name, layer, unit) for name, units in names.items() for unit in units])
    patterns, scores, z, shares = (read[name] for name in ("pattern", "scores", "z", "head_out"))
    # The last layer of this family takes its values from the one before.
    values = read["v"] if "v" in read else list(heard_by_attention(found)[0][2].unbind(2))
    assert all(same(patterns[h] @ values[h * len(shared) // len(own)], z[h]) for h in own)
    totals = torch.stack(patterns).sum(-1)
    # Sinks have a share in what the weights are divided by, and weights are never put back to a sum of 1.
    is_one = same(totals, torch.ones_like(totals))
    assert is_one == (family != "gpt_oss")
    softened = torch.stack(scores).softmax(-1)
    assert same(softened * totals[..., None], torch.stack(patterns))
    assert (totals < 1 - 1e-3).any() or is_one
    projection = layer_of(found, layer).get_submodule(parts.heads)
    with torch.no_grad():
        output = projection(torch.cat(z, -1))
    bias = 0 if projection.bias is None else projection.bias.detach()
    assert same(sum(shares) + bias, output)
    attn_out, _ = found.read(f"attn_out.{layer}")
    assert same(output, attn_out) == (family not in (*POST_NORMS, "granite"))


def values_in_one_run(found, sites):
    """Return the values of sites, lists of units by name, in one run in which attention is laid open."""
    model, ids = found.model, found.ids
    taps = [model.tap(site) for site in sites]
    places = torch.arange(ids.shape[1]).expand(ids.shape)
    inputs = model.inputs(ids, torch.ones_like(ids).bool(), places)
    _, kept = run_with_hooks(model, inputs, keep=[port for tap in taps for port in (tap.port, *tap.companions)])
    read = {}
    for tap in taps:
        value = tap.view.read(kept[tap.port], tuple(kept[port] for port in tap.companions))
        read.setdefault(tap.site.name, []).append(value.detach())
    return read


@pytest.mark.parametrize("family", having("mlp_post"))
def test_the_neurons_through_the_down_projection_are_what_the_mlp_adds(probe, family):
    found = probe(family)
    n_neurons = found.model.shape.units["neuron"]
    *neurons, mlp_out, _ = found.read(*[f"mlp_post.1.{each}" for each in range(n_neurons)], "mlp_out.1")
    with torch.no_grad():
        made = layer_of(found).get_submodule(PARTS[family].down)(torch.stack(neurons, -1))
        made = added(found, made, "post_feedforward_layernorm")
    assert same(made, mlp_out)


@pytest.mark.parametrize("family", having("mlp_post"))
def test_the_activation_function_of_what_is_before_it_gives_the_neurons(probe, family):
    found, parts = probe(family), PARTS[family]
    around = "intermediate" if "intermediate" in parts.up else parts.down.rpartition(".")[0]
    mlp = layer_of(found).get_submodule(around)
    act = next(part for name, part in mlp.named_children() if "act" in name or "gelu" in name)
    is_gated = bool(parts.gate_up) or hasattr(mlp, "gate_proj")
    assert is_gated == ("mlp_gate" not in found.model.shape.refused)
    steps = []
    for neuron in (0, 17, found.model.shape.units["neuron"] - 1):
        names = [f"{name}.1.{neuron}" for name in ("mlp_pre", "mlp_gate", "mlp_post") if is_gated or name != "mlp_gate"]
        pre, *gate, post, _ = found.read(*names)
        assert same(act(gate[0]) * pre if is_gated else act(pre), post)
        steps.append((pre - post).abs().mean())
    assert max(steps) > 0.05


def test_a_gate_that_is_thinned_out_gives_its_neurons_with_all_others(probe):
    found = probe("gemma3n")
    mlp, n_neurons = layer_of(found, 0).mlp, found.model.shape.units["neuron"]
    names = ("mlp_gate", "mlp_pre", "mlp_post")
    gate, pre, post = (
        torch.stack(found.read(*[f"{name}.0.{neuron}" for neuron in range(n_neurons)])[:-1], -1) for name in names
    )
    # The share .6 of a normal distribution lies below its mean and .2533 of its deviation.
    least = gate.mean(-1, keepdim=True) + 0.2533471 * gate.std(-1, keepdim=True, correction=0)
    assert same(mlp.act_fn((gate - least).clamp(min=0)) * pre, post, 1e-6)
    assert not same(mlp.act_fn(gate) * pre, post, 1e-2)


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if BIASED[name]])
def test_a_bias_is_what_a_projection_adds_to_its_product(probe, family):
    found = probe(family)
    module, refused = found.module, found.model.shape.refused
    assert {name for name in NAMES if name.endswith("_bias") and name not in refused} == {*BIASED[family]}
    for name in ("q_bias.1.1", "k_bias.0.0", "v_bias.1.0", "attn_bias.1", "mlp_bias.0"):
        if name.partition(".")[0] in refused:
            continue
        bias, _ = found.read(name)
        tap = found.model.tap(parse(name))
        assert bias.shape[:2] == found.ids.shape
        assert (bias == bias[0, 0]).all()
        assert bias.abs().max() > 0.05
        projection = module.get_submodule(tap.port.path)
        made, product = found.tensor(tap.port), found.tensor(replace(tap.port, side="input"))
        columns = slice(tap.view.start, tap.view.start + bias.shape[-1])
        with torch.no_grad():
            weight = projection.weight if isinstance(projection, Conv1D) else projection.weight.T
            assert same(made[..., columns] - product @ weight[:, columns], bias)


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if PARTS[name].positions])
def test_the_position_embedding_is_what_is_added_to_the_embedding(probe, family):
    found = probe(family)
    embed, positions, pre, _ = found.read("embed", "pos_embed", "resid_pre.0")
    if family == "opt_post_norm":
        with torch.no_grad():
            embed = found.module.model.decoder.project_in(embed)
    if family in ("bert", "roberta"):
        embeddings = found.module.get_submodule(f"{family}.embeddings")
        with torch.no_grad():
            assert same(embeddings.LayerNorm(embed + embeddings.token_type_embeddings.weight[0] + positions), pre)
        return
    assert same(embed + positions, pre)


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if not PARTS[name].positions])
def test_families_without_a_position_embedding_say_where_positions_enter(probe, family):
    reason = probe(family).model.shape.refused["pos_embed"]
    assert re.search(r"rotary|ALiBi|recurrences", reason)


@pytest.mark.parametrize("family", having("resid_pre", "attn_out"))
def test_what_the_sublayers_add_accounts_for_the_whole_stream(probe, family):
    found = probe(family)
    pre, attn_out, mlp_out, post, _ = found.read("resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1")
    if family == "opt_post_norm":
        layer = layer_of(found)
        with torch.no_grad():
            made = layer.final_layer_norm(layer.self_attn_layer_norm(pre + attn_out) + mlp_out)
        assert same(made, post)
    elif family in ("bert", "roberta"):
        layer = layer_of(found)
        with torch.no_grad():
            made = layer.output.LayerNorm(layer.attention.output.LayerNorm(pre + attn_out) + mlp_out)
        assert same(made, post)
    else:
        assert same(pre + attn_out + mlp_out, post)
    assert attn_out.abs().mean() > 0.05
    assert mlp_out.abs().mean() > 0.05


@pytest.mark.parametrize("family", [name for name in having("resid_mid") if name not in NORMS_BEHIND])
def test_the_middle_of_a_block_is_what_the_next_module_reads(probe, family):
    found = probe(family)
    reader = f"{found.model.tap(parse('resid_pre.1')).port.path}.{PARTS[family].reader}"
    pre, attn_out, mid, mlp_out, post, _ = found.read(
        "resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1"
    )
    read = found.tensor(Port(reader, "input")).reshape(mid.shape)
    assert torch.equal(mid, read) or family == "granite"
    assert same(mid, read)
    assert same(pre + attn_out, mid)
    assert same(mid + mlp_out, post)


@pytest.mark.parametrize(
    "family",
    ["gpt_neox", "falcon", "falcon_grouped", "falcon_grouped_one_norm", "gptj", "phi", "stablelm_parallel", "cohere"],
)
def test_parallel_blocks_refuse_the_middle_with_the_reason(probe, family):
    with pytest.raises(SiteUnsupported, match="parallel blocks"):
        probe(family).model.tap(parse("resid_mid.0"))


@pytest.mark.parametrize("family", OWN_ATTENTION)
def test_attention_of_a_models_own_shows_no_queries_and_keys_as_it_compares_them(probe, family):
    for text in ("q_rot.0.0", "k_rot.1.0"):
        with pytest.raises(
            SiteUnsupported, match=r"nothing turns the queries|attention is computed by the model's own"
        ):
            probe(family).model.tap(parse(text))


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba"])
def test_models_that_carry_a_state_refuse_heads_and_name_the_recurrence(probe, family):
    for text in ("z.0.0", "attn_out.0", "q.1.1", "q_rot.0.0", "scores.0.0", "pattern.1.1", "v_bias.0.0"):
        with pytest.raises(SiteUnsupported, match="recurrence"):
            probe(family).model.tap(parse(text))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_mixtures_of_experts_refuse_neurons_with_the_reason(probe, family):
    for text in ("mlp_pre.0.0", "mlp_gate.1.1", "mlp_post.0.0", "mlp_bias.0"):
        with pytest.raises(SiteUnsupported, match="weights of the experts are fused"):
            probe(family).model.tap(parse(text))


def test_values_and_queries_of_latent_attention_have_widths_of_their_own(probe):
    found = probe("deepseek_v3")
    q, v, z, _ = found.read("q.1.2", "v.1.2", "z.1.2")
    assert (q.shape[-1], v.shape[-1], z.shape[-1]) == (10, 5, 5)
    rows = {row.name: row.shape for row in found.model.site_rows()}
    assert rows["q"] == "2 x 4 x position x 10"
    assert rows["v"] == rows["z"] == "2 x 4 x position x 5"
    with pytest.raises(SiteUnsupported, match="all heads share"):
        found.model.tap(parse("k.0.0"))
    read = values_in_one_run(found, [Site(name, 1, 3) for name in ("q_rot", "k_rot", "z")])
    assert [read[name][0].shape[-1] for name in ("q_rot", "k_rot", "z")] == [10, 10, 5]
    assert (rows["q_rot"], rows["k_rot"]) == ("2 x 4 x position x 10", "2 x 4 x position x 10")
    keys = values_in_one_run(found, [Site("k_rot", 1, head) for head in range(4)])["k_rot"]
    assert all(torch.equal(key[..., 6:], keys[0][..., 6:]) for key in keys)  # one rotary part for all heads
    assert not same(keys[1][..., :6], keys[0][..., :6], 1e-2)


def test_a_multiplier_that_is_changed_later_counts(probe_of):
    module = tiny_model("granite", seed=4)
    ids = torch.arange(3, 10)[None]
    before, _ = probe_of(module, ids).read("attn_out.0")
    module.model.layers[0].residual_multiplier = 0.3
    after, _ = probe_of(module, ids).read("attn_out.0")
    assert same(after, before / 2)


@pytest.mark.parametrize("family", having("resid_pre"))
def test_the_stream_out_of_a_layer_is_the_stream_into_the_next(probe, family):
    post, pre, _ = probe(family).read("resid_post.0", "resid_pre.1")
    assert torch.equal(post, pre)


@pytest.mark.parametrize("family", having("resid_pre"))
def test_the_embedding_is_the_output_of_its_module(probe, family):
    found = probe(family)
    embed, pre, _ = found.read("embed", "resid_pre.0")
    body, n_tokens = found.module.get_submodule(PARTS[family].body), found.ids.shape[1]
    assert torch.equal(embed, found.module.get_input_embeddings()(found.ids).detach())
    with torch.no_grad():
        if family in ("gpt2", "gpt_neo", "gpt_bigcode"):
            embed = embed + body.wpe.weight[:n_tokens]
        elif family.startswith("opt"):
            embed = body.project_in(embed) if family == "opt_post_norm" else embed
            embed = embed + body.embed_positions.weight[2 : 2 + n_tokens]  # the first two are not used
        elif family == "bloom":
            embed = body.word_embeddings_layernorm(embed)
        elif family in ("bert", "roberta"):
            first = 0 if family == "bert" else 3  # behind the id of padding
            places = body.embeddings.position_embeddings.weight[first : first + n_tokens]
            embed = body.embeddings.LayerNorm(embed + body.embeddings.token_type_embeddings.weight[0] + places)
        elif family == "modernbert":
            embed = body.embeddings.norm(embed)
        elif family == "granite":
            embed = embed * 1.5
    assert same(embed, pre)


@pytest.mark.parametrize("family", having("final_norm"))
def test_the_final_norm_through_the_head_gives_the_logits(probe, family):
    found = probe(family)
    normed, logits_site, logits = found.read("final_norm", "logits")
    with torch.no_grad():
        head = found.module.get_submodule(found.model.family.head)
        made = head(found.module.head(normed) if family == "modernbert" else normed)
        made = 30 * torch.tanh(made / 30) if family in ("gemma2", "gemma3n") else made
        made = made * {"granite": 0.5, "cohere": 0.5, "cohere2": 0.5}.get(family, 1.0)
    assert same(made, logits)
    assert torch.equal(logits_site, logits)
    if family != "gemma3n":
        last, _ = found.read("resid_post.1")
        assert not same(normed, last, 1e-3)


def heard_by_attention(found):
    """The queries, keys and values that each call of the attention function is given, axes (row, position, …)."""
    heard = []

    def listen(module, query, key, value, mask, **rest):
        heard.append([x.transpose(1, 2).clone() for x in (query, key, value)])
        groups = query.shape[1] // key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1), is_causal=True
        )
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("listen", listen)
    AttentionMaskInterface.register("listen", eager_mask)
    before = found.module.config._attn_implementation
    found.module.config._attn_implementation = "listen"
    try:
        found.run()
    finally:
        found.module.config._attn_implementation = before
    return heard


def normed_heads(found, name, read):
    """Apply the norm that some families have between projection and rotary; axes (row, position, head, width)."""
    attention = layer_of(found, 0).self_attn if hasattr(layer_of(found, 0), "self_attn") else None
    norm = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_layernorm", None)
    if norm is None:
        return read
    with torch.no_grad():
        if found.family == "olmo2":
            return norm(read.flatten(2)).view(read.shape)
        if found.family == "stablelm":
            return norm(read.transpose(1, 2)).transpose(1, 2)
        return norm(read)


@pytest.mark.parametrize("family", [name for name in having("z", "v") if name not in OWN_ATTENTION])
def test_queries_keys_and_values_are_those_that_attention_is_given(probe, family):
    found = probe(family)
    model = found.model
    queries, keys, values = heard_by_attention(found)[0]  # layer 0, before the listener could change anything
    assert keys.shape[2] == model.n_kv_heads
    for name, heads, given in (("q", model.n_heads, queries), ("k", model.n_kv_heads, keys)):
        if name in model.shape.refused:
            continue
        *read, _ = found.read(*[f"{name}.0.{head}" for head in range(heads)])
        read = normed_heads(found, name, torch.stack(read, 2))
        if family.startswith("opt") and name == "q":
            read = read * 8**-0.5
        if family == "deepseek_v3":  # pairs of columns are put apart on the way
            read = read[..., [0, 1, 2, 3, 4, 5, 6, 8, 7, 9]]
        if family == "gpt_oss":
            read = read * found.module.model.rotary_emb.attention_scaling
        # The rotary embedding turns by nothing at position 0; some have none, or leave columns alone.
        assert same(read[:, 0], given[:, 0], 1e-6 if family == "gpt_oss" else 1e-12)
        if family in ("gpt2", "gpt_bigcode", "opt", "opt_post_norm", "bert", "roberta"):
            assert same(read, given)
        elif family in ("gpt_neox", "gpt_neox_sequential", "phi", "stablelm", "stablelm_parallel"):
            assert same(read[..., 4:], given[..., 4:])
            assert not same(read, given, 1e-3)
        elif family.startswith("deepseek"):
            assert same(read[..., :6], given[..., :6])
            assert not same(read, given, 1e-3)
    *read, _ = found.read(*[f"v.0.{head}" for head in range(model.n_kv_heads)])
    assert same(torch.stack(read, 2), values)


@pytest.mark.parametrize(("family", "site"), CASES)
def test_writing_back_what_was_read_changes_nothing(probe, family, site):
    *_, logits = probe(family).read("embed")
    _, _, written = probe(family).write(site, lambda value: value)
    assert torch.equal(logits, written)


@pytest.mark.parametrize(("family", "site"), CASES)
def test_a_written_value_is_read_back_where_it_was_written_and_nowhere_else(probe, family, site):
    found = probe(family)
    *_, logits = found.read("embed")
    output = found.tensor(found.model.tap(parse(site)).port)
    before, after, written = found.write(site, bend, places=([0, 1, 1], [2, 1, 5]))
    moved = torch.zeros(before.shape[:2], dtype=torch.bool)
    moved[[0, 1, 1], [2, 1, 5]] = True
    wanted = torch.where(moved.reshape(*moved.shape, *[1] * (before.dim() - 2)), bend(before), before)
    if site.startswith("head_out"):  # a share is not stored: the sum that it is part of changes by as much
        assert same(after, output + wanted - before)
    elif "_bias" in site:  # nor is a bias
        columns = slice(found.model.tap(parse(site)).view.start, None)
        changed = output.clone()
        changed[..., columns][..., : before.shape[-1]] += wanted - before
        assert same(after, changed)
    else:
        assert same(after, wanted)
    change = (written - logits).abs().amax(-1)
    if family in CAUSAL:
        assert change[0, :2].max() < 1e-11
        assert change[1, 0] < 1e-11
    assert change[0, 2] > 1e-9
    assert change[1, 1] > 1e-9


@pytest.mark.parametrize("family", having("z"))
def test_a_head_that_is_written_leaves_the_other_heads_as_they_are(probe, family):
    found = probe(family)
    for name in (name for name in ("q", "k", "v", "z") if name not in LACKS[family]):
        count = found.model.n_heads if name in "qz" else found.model.n_kv_heads
        tap = found.model.tap(parse(f"{name}.1.{count - 1}"))
        tensor = found.tensor(tap.port)
        changed = tensor.clone()
        zeros = torch.zeros_like(tap.view.read(tensor, ()))
        tap.view.write(changed, (), (torch.arange(2),), zeros)
        others = [found.model.tap(parse(f"{name}.1.{head}")) for head in range(count - 1)]
        assert all(torch.equal(other.view.read(changed, ()), other.view.read(tensor, ())) for other in others)
        assert (changed != tensor).sum() == zeros.numel()
        assert not tap.view.read(changed, ()).any()


def test_the_width_of_a_head_need_not_be_the_width_over_the_heads(probe):
    model = probe("qwen3").model
    assert (model.width, model.n_heads, model.head_width, model.n_kv_heads) == (24, 4, 8, 2)
