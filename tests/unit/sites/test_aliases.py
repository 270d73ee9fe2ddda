"""TransformerLens hook names mean sites."""

import pytest

from causalpatch.base.errors import SiteNotFound, SiteUnsupported
from causalpatch.sites.aliases import ALIASES, translate
from causalpatch.sites.names import NAMES
from causalpatch.sites.select import ModelShape, check, expand
from causalpatch.sites.site import parse


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("hook_embed", "embed"),
        ("blocks.9.attn.hook_z", "z.9.*"),
        ("blocks.9.attn.hook_z.6@-1", "z.9.6@-1"),
        ("blocks.3.hook_resid_pre", "resid_pre.3"),
        ("blocks.3.hook_resid_mid@2", "resid_mid.3@2"),
        ("blocks.3.hook_resid_post", "resid_post.3"),
        ("blocks.3.hook_attn_out", "attn_out.3"),
        ("blocks.3.hook_mlp_out", "mlp_out.3"),
        ("blocks.*.attn.hook_k", "k.*.*"),
        ("blocks.0:4.attn.hook_q", "q.0:4.*"),
        ("blocks.1.attn.hook_v", "v.1.*"),
        ("blocks.1.attn.hook_result", "head_out.1.*"),
        ("blocks.1.mlp.hook_post.17", "mlp_post.1.17"),
        ("blocks.1.mlp.hook_pre.17@-1", "mlp_pre.1.17@-1"),
        ("blocks.1.mlp.hook_pre_linear", "mlp_pre.1.*"),
        ("blocks.1.attn.hook_pattern.2", "pattern.1.2"),
        ("blocks.1.attn.hook_attn_scores.2@-1", "scores.1.2@-1"),
        ("blocks.1.attn.hook_rot_q.2", "q_rot.1.2"),
        ("blocks.1.attn.hook_rot_k.2", "k_rot.1.2"),
        ("hook_pos_embed", "pos_embed"),
        ("blocks.2.hook_in", "resid_pre.2"),
        ("blocks.2.hook_out", "resid_post.2"),
        ("embed.hook_out", "embed"),
        ("ln_final.hook_normalized", "final_norm"),
        ("ln_final.hook_out", "final_norm"),
        ("unembed.hook_out", "logits"),
    ],
)
def test_a_hook_name_is_translated(hook, site):
    assert str(parse(hook)) == site


@pytest.mark.parametrize("text", [str(parse(name)) for name in NAMES if name != "module"])
def test_a_site_is_not_taken_for_a_hook_name(text):
    assert translate(text) == text


def test_what_goes_into_the_activation_function_is_the_gate_in_gated_mlps_and_is_not_translated_wrongly():
    ungated = ModelShape("m", 2, {"neuron": 8}, {"mlp_gate": "no gate"})
    gated = ModelShape("m", 2, {"neuron": 8})
    for text in ("blocks.1.mlp.hook_pre.3@-1", "blocks.1.mlp.hook_pre@-1", "blocks.*.mlp.hook_pre.3"):
        site = parse(text)
        assert expand(site, ungated) == expand(parse(str(site)), ungated)
        with pytest.raises(SiteUnsupported, match="does not have the site") as caught:
            expand(site, gated)
        assert caught.value.fix == f"write {str(site).replace('pre', 'gate')!r}"
        assert expand(parse(str(site)), gated)  # by its own name there is no doubt
    with pytest.raises(SiteUnsupported):
        check(parse("blocks.1.mlp.hook_pre.3").at(2), gated)
    assert expand(parse("blocks.1.mlp.hook_pre_linear.3"), gated) == (parse("mlp_pre.1.3"),)


def test_an_unknown_hook_name_is_refused():
    with pytest.raises(SiteNotFound, match=r"blocks\.2\.attn\.hook_nothing"):
        parse("blocks.2.attn.hook_nothing")


@pytest.mark.parametrize("hook", ALIASES)
def test_every_line_of_the_table_reads_as_a_site(hook):
    assert translate(hook.replace("LAYER", "3")).partition(".")[0] in NAMES
