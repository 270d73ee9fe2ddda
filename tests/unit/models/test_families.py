"""Every fact of every family, held against the arithmetic of the unmodified modules of transformers."""

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from causalpatch.base.errors import SiteUnsupported
from causalpatch.models import FAMILIES, Port
from causalpatch.sites import parse
from causalpatch.testing.tiny import FAMILY_NAMES

SECOND_NORM = {  # the norm that reads the stream between attention and MLP
    "gpt2": "transformer.h.1.ln_2",
    "gemma2": "model.layers.1.pre_feedforward_layernorm",
    "gpt_neox": None,
    "gpt_neox_sequential": "gpt_neox.layers.1.post_attention_layernorm",
}
SITES = (
    *("embed", "resid_pre.1", "resid_mid.1", "resid_post.0", "attn_out.1", "mlp_out.0", "q.1.3", "k.1.1", "v.1.0"),
    *("z.1.2", "head_out.1.1", "mlp_pre.0.5", "mlp_gate.1.3", "mlp_post.0.5", "final_norm", "logits"),
    *("pos_embed", "q_bias.1.1", "k_bias.1.0", "v_bias.1.1", "attn_bias.0", "mlp_bias.1"),
)
BIASED = {"gpt2": {"q", "k", "v", "attn", "mlp"}, "qwen2": {"q", "k", "v"}}
BIASED |= dict.fromkeys(("gpt_neox", "gpt_neox_sequential"), BIASED["gpt2"])


def has(family, site):
    name = site.partition(".")[0]
    if name.endswith("_bias"):
        return name.removesuffix("_bias") in BIASED.get(family, ())
    only = {"pos_embed": family == "gpt2", "mlp_gate": "gpt" not in family, "resid_mid": family != "gpt_neox"}
    return only.get(name, True)


CASES = [(family, site) for family in FAMILY_NAMES for site in SITES if has(family, site)]


def same(a, b, tolerance=1e-12):
    return a.shape == b.shape and (a - b).abs().max() <= tolerance * (1 + b.abs().max())


def bend(value):
    """Change a value in a way that no norm takes out again, as it would a shift or a factor."""
    return value**2 + 1.5


def parts(probe, family):
    """The layer, its output projection and its down projection."""
    found = probe(family)
    path = found.model.tap(parse("resid_pre.1")).port.path
    z, neuron = (found.model.tap(parse(text)).port.path for text in ("z.1.0", "mlp_post.1.0"))
    return tuple(found.module.get_submodule(each) for each in (path, z, neuron))


def test_every_family_of_the_tables_has_a_tiny_model():
    assert sorted(family.name for family in FAMILIES) == sorted(FAMILY_NAMES)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_configuration_decides_the_family(probe, family):
    model = probe(family).model
    assert model.family.name == family
    assert model.family_source == "config"
    assert not model.is_assumed


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_heads_side_by_side_through_the_output_projection_are_what_attention_adds(probe, family):
    layer, projection, _ = parts(probe, family)
    heads = [f"z.1.{head}" for head in range(probe(family).model.n_heads)]
    *values, attn_out, _ = probe(family).read(*heads, "attn_out.1")
    with torch.no_grad():
        made = projection(torch.cat(values, -1))
        made = layer.post_attention_layernorm(made) if family == "gemma2" else made
    assert same(made, attn_out)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_shares_of_the_heads_and_the_bias_sum_to_the_output_of_the_projection(probe, family):
    _, projection, _ = parts(probe, family)
    model = probe(family).model
    *shares, _ = probe(family).read(*[f"head_out.1.{head}" for head in range(model.n_heads)])
    output = probe(family).tensor(Port(model.tap(parse("z.1.0")).port.path, "output"))
    bias = 0 if projection.bias is None else projection.bias.detach()
    assert same(sum(shares) + bias, output)
    assert all(share.shape[-1] == model.width for share in shares)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_neurons_through_the_down_projection_are_what_the_mlp_adds(probe, family):
    layer, _, down = parts(probe, family)
    n_neurons = probe(family).model.shape.units["neuron"]
    *neurons, mlp_out, _ = probe(family).read(*[f"mlp_post.1.{each}" for each in range(n_neurons)], "mlp_out.1")
    with torch.no_grad():
        made = down(torch.stack(neurons, -1))
        made = layer.post_feedforward_layernorm(made) if family == "gemma2" else made
    assert same(made, mlp_out)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_activation_function_of_what_is_before_it_gives_the_neurons(probe, family):
    found = probe(family)
    mlp = found.module.get_submodule(found.model.tap(parse("mlp_post.1.0")).port.path.rpartition(".")[0])
    is_gated = "mlp_gate" not in found.model.shape.refused
    assert is_gated == (family not in ("gpt2", "gpt_neox", "gpt_neox_sequential"))
    for neuron in (0, 17, found.model.shape.units["neuron"] - 1):
        names = [f"{name}.1.{neuron}" for name in ("mlp_pre", "mlp_gate", "mlp_post") if is_gated or name != "mlp_gate"]
        pre, *gate, post, _ = found.read(*names)
        act = mlp.act_fn if is_gated else mlp.act
        assert same(act(gate[0]) * pre if is_gated else act(pre), post)
        assert (pre - post).abs().mean() > 0.05


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gpt_neox", "gpt_neox_sequential"])
def test_a_bias_is_what_a_projection_adds_to_its_product(probe, family):
    found = probe(family)
    module, ids = found.module, found.ids
    for name in ("q_bias.1.1", "k_bias.0.1", "v_bias.1.0", "attn_bias.1", "mlp_bias.0"):
        if name.partition(".")[0] in found.model.shape.refused:
            continue
        bias, _ = found.read(name)
        tap = found.model.tap(parse(name))
        assert bias.shape[:2] == ids.shape
        assert (bias == bias[0, 0]).all()
        assert bias.abs().max() > 0.05
        projection = module.get_submodule(tap.port.path)
        made, product = found.tensor(tap.port), found.tensor(Port(tap.port.path, "input"))
        columns = slice(tap.view.start, tap.view.start + bias.shape[-1])
        with torch.no_grad():
            weight = projection.weight if family == "gpt2" else projection.weight.T
            assert same(made[..., columns] - product @ weight[:, columns], bias)


def test_the_position_embedding_is_what_is_added_to_the_embedding(probe):
    embed, positions, pre, _ = probe("gpt2").read("embed", "pos_embed", "resid_pre.0")
    assert same(embed + positions, pre)
    assert all("rotary" in probe(name).model.shape.refused["pos_embed"] for name in FAMILY_NAMES if name != "gpt2")


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_what_the_sublayers_add_accounts_for_the_whole_stream(probe, family):
    pre, attn_out, mlp_out, post, _ = probe(family).read("resid_pre.1", "attn_out.1", "mlp_out.1", "resid_post.1")
    assert same(pre + attn_out + mlp_out, post)
    assert attn_out.abs().mean() > 0.05
    assert mlp_out.abs().mean() > 0.05


@pytest.mark.parametrize("family", [name for name in FAMILY_NAMES if name != "gpt_neox"])
def test_the_middle_of_a_block_is_what_its_second_norm_reads(probe, family):
    norm = SECOND_NORM.get(family, "model.layers.1.post_attention_layernorm")
    pre, attn_out, mid, mlp_out, post, _ = probe(family).read(
        "resid_pre.1", "attn_out.1", "resid_mid.1", "mlp_out.1", "resid_post.1"
    )
    assert torch.equal(mid, probe(family).tensor(Port(norm, "input")))
    assert same(pre + attn_out, mid)
    assert same(mid + mlp_out, post)


def test_parallel_blocks_refuse_the_middle_with_the_reason(probe):
    with pytest.raises(SiteUnsupported, match="parallel blocks"):
        probe("gpt_neox").model.tap(parse("resid_mid.0"))


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_stream_out_of_a_layer_is_the_stream_into_the_next(probe, family):
    post, pre, _ = probe(family).read("resid_post.0", "resid_pre.1")
    assert torch.equal(post, pre)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_embedding_is_the_output_of_its_module(probe, family):
    found = probe(family)
    embed, pre, _ = found.read("embed", "resid_pre.0")
    assert torch.equal(embed, found.module.get_input_embeddings()(found.ids).detach())
    if family == "gpt2":
        assert same(embed + found.module.transformer.wpe.weight[: found.ids.shape[1]].detach(), pre)
    else:
        assert torch.equal(embed, pre)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_the_final_norm_through_the_head_gives_the_logits(probe, family):
    found = probe(family)
    normed, post, logits_site, logits = found.read("final_norm", "resid_post.1", "logits")
    with torch.no_grad():
        made = found.module.lm_head(normed)
        made = 30 * torch.tanh(made / 30) if family == "gemma2" else made
    assert same(made, logits)
    assert torch.equal(logits_site, logits)
    assert not same(normed, post, 1e-3)


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


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_queries_keys_and_values_are_those_that_attention_is_given(probe, family):
    found = probe(family)
    model = found.model
    queries, keys, values = heard_by_attention(found)[0]  # layer 0, before the listener could change anything
    assert keys.shape[2] == model.n_kv_heads
    for name, heads, given in (("q", model.n_heads, queries), ("k", model.n_kv_heads, keys)):
        *read, _ = found.read(*[f"{name}.0.{head}" for head in range(heads)])
        read = torch.stack(read, 2)
        if family == "qwen3":  # the norm of each head comes between
            attention = found.module.model.layers[0].self_attn
            read = (attention.q_norm if name == "q" else attention.k_norm)(read).detach()
        # The rotary embedding turns by nothing at position 0; GPT-2 has none, NeoX leaves six of eight columns alone.
        assert same(read[:, 0], given[:, 0])
        if family == "gpt2":
            assert same(read, given)
        elif family.startswith("gpt_neox"):
            assert same(read[..., 2:], given[..., 2:])
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
    assert change[0, :2].max() < 1e-9
    assert change[0, 2] > 1e-6
    assert change[1, 0] < 1e-9
    assert change[1, 1] > 1e-6


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_a_head_that_is_written_leaves_the_other_heads_as_they_are(probe, family):
    found = probe(family)
    for name in ("q", "k", "v", "z"):
        count = found.model.n_heads if name in "qz" else found.model.n_kv_heads
        tap = found.model.tap(parse(f"{name}.1.{count - 1}"))
        tensor = found.tensor(tap.port)
        changed = tensor.clone()
        tap.view.write(changed, (), (torch.arange(2),), torch.zeros(2, 7, found.model.head_width, dtype=tensor.dtype))
        others = [found.model.tap(parse(f"{name}.1.{head}")) for head in range(count - 1)]
        assert all(torch.equal(other.view.read(changed, ()), other.view.read(tensor, ())) for other in others)
        assert (changed != tensor).sum() == 2 * 7 * found.model.head_width
        assert not tap.view.read(changed, ()).any()


def test_the_width_of_a_head_need_not_be_the_width_over_the_heads(probe):
    model = probe("qwen3").model
    assert (model.width, model.n_heads, model.head_width, model.n_kv_heads) == (24, 4, 8, 2)
