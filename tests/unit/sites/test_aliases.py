"""TransformerLens hook names mean sites."""

import pytest

from causalpatch.base.errors import SiteNotFound
from causalpatch.sites.aliases import ALIASES, translate
from causalpatch.sites.names import NAMES, PLANNED
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


def test_a_hook_whose_site_is_planned_is_answered_with_the_site_that_was_meant():
    with pytest.raises(SiteNotFound, match=r"the site 'blocks\.2\.attn\.hook_pattern' is known") as caught:
        parse("blocks.2.attn.hook_pattern")
    assert caught.value.facts[0][0] == "pattern"
    assert caught.value.fix == "use 'z.2'"


def test_an_unknown_hook_name_is_refused():
    with pytest.raises(SiteNotFound, match=r"blocks\.2\.attn\.hook_nothing"):
        parse("blocks.2.attn.hook_nothing")


@pytest.mark.parametrize("hook", ALIASES)
def test_every_line_of_the_table_reads_as_a_site_or_names_a_planned_one(hook):
    assert translate(hook.replace("LAYER", "3")).partition(".")[0] in {*NAMES, *PLANNED}
