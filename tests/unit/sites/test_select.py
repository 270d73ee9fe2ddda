"""Members of a set in one model, and what is said of those that are not there."""

import doctest
from dataclasses import replace

import pytest
from hypothesis import given, strategies as st

import causalpatch.sites.select
import causalpatch.sites.site
from causalpatch.base.errors import SiteNotFound, SiteUnsupported
from causalpatch.sites.select import ModelShape, check, expand
from causalpatch.sites.site import Site, SiteSet, parse

SHAPE = ModelShape(
    "gpt2",
    12,
    units={"head": 12, "kv_head": 4, "neuron": 3072},
    module_paths=("", "h", "h.0", "h.0.attn", "h.0.attn.c", "h.1", "h.1.attn", "h.1.attn.c", "ln_f"),
)
DECODER = ModelShape("t5", 1, units={"head": 1})
BOTH = replace(DECODER, parts={"encoder": ModelShape("t5", 2, units={"head": 2}), "decoder": DECODER})
GENERIC = ModelShape("cnn", 0, refused={"z": "it has no attention that we know"}, module_paths=("", "conv1", "conv2"))


def texts(text, shape=SHAPE):
    return [str(site) for site in expand(parse(text), shape)]


def test_a_site_stands_for_itself():
    assert texts("z.3.7@-1") == ["z.3.7@-1"]
    assert texts("embed") == ["embed"]


def test_members_come_by_layer_and_then_by_unit():
    assert texts("k.2:4.3,0@subject") == ["k.2.0@subject", "k.2.3@subject", "k.3.0@subject", "k.3.3@subject"]


def test_stars_and_missing_indices_reach_all_layers_and_units():
    assert len(texts("z")) == 144
    assert len(texts("v")) == 48
    assert texts("resid_pre") == [f"resid_pre.{layer}" for layer in range(12)]
    assert texts("z.10:.11:") == ["z.10.11", "z.11.11"]
    assert texts("z.:2.:1") == ["z.0.0", "z.1.0"]


def test_a_star_in_a_path_stands_for_one_part_of_it():
    assert texts("module(h.*.attn).output[0]") == ["module(h.0.attn).output[0]", "module(h.1.attn).output[0]"]
    assert texts("module(h.*).output") == ["module(h.0).output", "module(h.1).output"]
    assert texts("module(ln*).input") == ["module(ln_f).input"]
    assert texts("module(*).output", GENERIC) == ["module(conv1).output", "module(conv2).output"]


def test_the_units_of_a_module_are_listed_by_module_and_then_by_unit():
    axes = "output axes=(channel,height)"
    assert texts(f"module(conv*).{axes}#0:2", GENERIC) == [
        f"module(conv{layer}).{axes}#{unit}" for layer in (1, 2) for unit in (0, 1)
    ]


@given(st.integers(0, 11), st.integers(0, 11))
def test_every_member_of_a_set_is_in_the_model(start, stop):
    site_set = parse(f"z.{start}:{stop}")
    if start >= stop:
        with pytest.raises(SiteNotFound, match="no site named"):
            expand(site_set, SHAPE)
        return
    members = expand(site_set, SHAPE)
    assert [(site.layer, site.unit) for site in members] == [(a, b) for a in range(start, stop) for b in range(12)]
    for member in members:
        check(member, SHAPE)


def refusal(text, shape=SHAPE):
    with pytest.raises((SiteNotFound, SiteUnsupported)) as caught:
        expand(parse(text), shape)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_a_head_out_of_range_is_told_the_heads_there_are():
    assert refusal("z.3.14") == (
        "SiteNotFound: no site named 'z.3.14' in 'gpt2'\n"
        "  head  14 was asked for; this model has heads 0 to 11\n"
        "  fix: list the sites with: causalpatch doctor gpt2"
    )


def test_a_layer_out_of_range_is_told_the_layers_there_are():
    assert "layer  12 was asked for; this model has layers 0 to 11" in refusal("resid_pre.12")
    assert "layer  12 was asked for" in refusal("resid_pre.10:14")


@pytest.mark.parametrize(("head", "serves"), [(4, 1), (5, 1), (6, 2), (11, 3)])
def test_a_query_head_asked_of_the_keys_is_told_the_kv_head_that_serves_it(head, serves):
    assert refusal(f"k.3.{head}") == (
        f"SiteNotFound: no site named 'k.3.{head}' in 'gpt2'\n"
        f"  kv_head  {head} was asked for; this model has kv_heads 0 to 3\n"
        f"  head     {head} is served by kv_head {serves}\n"
        f"  fix: write k.3.{serves}"
    )


def test_an_index_beyond_the_query_heads_too_gets_no_such_advice():
    assert "is served by" not in refusal("v.3.12")


def test_an_empty_selection_is_refused():
    assert refusal("z.5:3") == (
        "SiteNotFound: no site named 'z.5:3.*' in 'gpt2'\n"
        "  selected  nothing\n"
        "  layers    0 to 11\n"
        "  heads     0 to 11\n"
        "  fix: list the sites with: causalpatch doctor gpt2"
    )
    assert "no module matches the path" in refusal("module(g.*).output")


def test_a_refused_site_gives_its_reason_before_anything_else():
    expected = (
        "SiteUnsupported: 'cnn' does not have the site 'z.99.*'\n"
        "  reason  it has no attention that we know\n"
        "  fix: list the sites with: causalpatch doctor cnn"
    )
    assert refusal("z.99", GENERIC) == expected
    assert refusal("z.99.1", GENERIC).splitlines()[1] == expected.splitlines()[1]


def test_a_model_without_numbered_layers_has_no_numbered_sites():
    assert refusal("resid_pre.0", GENERIC).startswith("SiteUnsupported")
    assert refusal("resid_pre", GENERIC).startswith("SiteUnsupported")


def test_units_that_the_model_cannot_count_are_refused():
    shape = ModelShape("odd", 2, units={"head": 2})
    assert "the number of neurons of this model is not known" in refusal("mlp_post.1.3", shape)
    assert refusal("mlp_post.1", shape).startswith("SiteUnsupported")


def test_a_stream_that_the_model_does_not_have_is_refused():
    assert "no stream 'encoder'" in refusal("encoder/z.3.1")
    assert texts("encoder/z.1", BOTH) == ["encoder/z.1.0", "encoder/z.1.1"]


def test_each_stream_has_layers_and_heads_of_its_own():
    assert texts("encoder/resid_pre", BOTH) == ["encoder/resid_pre.0", "encoder/resid_pre.1"]
    assert texts("decoder/z.0", BOTH) == ["decoder/z.0.0"]
    assert "layer 0 only" in refusal("decoder/z.1.0", BOTH)
    assert "head 0 only" in refusal("decoder/z.0.1", BOTH)


def test_what_stands_in_both_streams_needs_one_of_them():
    assert refusal("resid_pre.0@2", BOTH).endswith("fix: write 'encoder/resid_pre.0@2' or 'decoder/resid_pre.0@2'")
    assert refusal("z", BOTH).startswith("SiteNotFound")


def test_what_stands_in_a_model_once_goes_by_its_name_alone():
    assert texts("cross_z", BOTH) == texts("decoder/cross_z", BOTH) == ["cross_z.0.0"]
    assert texts("decoder/logits@-1", BOTH) == ["logits@-1"]
    assert "only the decoder has cross-attention" in refusal("encoder/cross_z.0.0", BOTH)
    assert "only the decoder gives logits" in refusal("encoder/logits", BOTH)


def test_a_module_path_that_is_not_there_is_answered_with_the_closest():
    said = refusal("module(h.1.atn).output")
    assert "no module 'h.1.atn'" in said
    assert "h.1.attn" in said


def test_all_units_of_a_module_cannot_be_counted_before_it_runs():
    said = refusal("module(conv1).output axes=(channel)#*", GENERIC)
    assert said.startswith("SiteUnsupported")
    assert "fix: say how many" in said


def test_a_position_on_axes_without_one_is_refused():
    assert "hold no position" in refusal("module(conv1).output axes=(channel)#1@3", GENERIC)
    assert texts("module(conv1).output axes=(position,width)@3", GENERIC)


def test_a_site_built_by_hand_is_expanded_like_its_text():
    assert expand(SiteSet("z", 3), SHAPE) == expand(parse("z.3"), SHAPE)
    assert expand(Site("z", 3, 1), SHAPE) == (Site("z", 3, 1),)


@pytest.mark.parametrize("module", [causalpatch.sites.site, causalpatch.sites.select])
def test_the_examples_in_the_docstrings_hold(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
