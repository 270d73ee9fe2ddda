"""Sites: one grammar, loss-free both ways, and errors that say what would have been right."""

import dataclasses
import pickle

import pytest
from hypothesis import given, strategies as st

from causalpatch.base.axes import AXES
from causalpatch.base.errors import SiteNotFound, SiteSyntaxError
from causalpatch.sites.index import EVERY, Range, Span
from causalpatch.sites.module_ref import ModuleRef
from causalpatch.sites.names import FEATURE_SITES, NAMES
from causalpatch.sites.site import Site, SiteSet, parse

small = st.integers(0, 4000)
ends = st.one_of(st.none(), small)
ranges = st.builds(Range, ends, ends)
selections = st.one_of(st.none(), st.just(EVERY), small, ranges, st.lists(small, min_size=1, max_size=4).map(tuple))
signed = st.integers(-500, 500)
spans = st.from_regex(r"\A[^\W\d][\w.\-]{0,8}\Z").map(Span)
positions = st.one_of(
    st.none(),
    st.just(EVERY),
    signed,
    spans,
    st.builds(Range, st.one_of(st.none(), signed), st.one_of(st.none(), signed)),
)
axis_names = st.lists(st.sampled_from([axis for axis in AXES if axis != "pair"]), unique=True, max_size=3).map(tuple)
path_characters = st.characters(exclude_characters="()*", exclude_categories=["Z", "C"])
paths = st.text(path_characters, max_size=12)
dictionaries = st.sampled_from(["sae", "res-jb.v1", "gpt2_8x", "a:b*", "módulo"])
items = st.lists(st.one_of(signed, st.text(max_size=5)), max_size=3).map(tuple)


@st.composite
def modules(draw, path=paths):
    return ModuleRef(draw(path), draw(st.sampled_from(["input", "output"])), draw(items), draw(axis_names))


@st.composite
def sites(draw):
    info = draw(st.sampled_from(list(NAMES.values())))
    if info.name == "module":
        module = draw(modules())
        unit = draw(st.one_of(st.none(), small)) if module.unit_axis else None
        return Site("module", unit=unit, position=draw(positions), module=module)
    return Site(
        info.name,
        layer=draw(small) if info.has_layer else None,
        unit=draw(small) if info.unit_axis else None,
        position=draw(positions),
        stream=draw(st.sampled_from([None, "encoder", "decoder"])),
        dictionary=draw(dictionaries) if info.name in FEATURE_SITES else None,
    )


@st.composite
def site_sets(draw):
    info = draw(st.sampled_from([entry for entry in NAMES.values() if entry.has_layer or entry.name == "module"]))
    if info.name == "module":
        module = draw(modules(st.tuples(paths, paths).map("*".join)))
        unit = draw(selections) if module.unit_axis else None
        return SiteSet("module", unit=unit, position=draw(positions), module=module)
    layer, unit = draw(selections), draw(selections) if info.unit_axis else None
    if isinstance(layer, tuple) and len(set(layer)) == 1:
        layer = EVERY
    if isinstance(layer, int) and (info.unit_axis is None or isinstance(unit, int | tuple)):
        layer = Range(layer, None)
    dictionary = draw(dictionaries) if info.name in FEATURE_SITES else None
    stream = draw(st.sampled_from([None, "encoder", "decoder"]))
    return SiteSet(info.name, layer, unit, draw(positions), stream, dictionary=dictionary)


@given(sites())
def test_a_site_is_read_back_from_its_text(site):
    assert parse(str(site)) == site
    assert Site.parse(str(site)) == site
    assert hash(parse(str(site))) == hash(site)


@given(site_sets())
def test_a_set_is_read_back_from_its_text(site_set):
    assert parse(str(site_set)) == site_set
    assert isinstance(parse(str(site_set)), SiteSet)


@given(st.one_of(sites(), site_sets()), positions)
def test_at_moves_the_position_and_nothing_else(site, position):
    moved = site.at(position)
    assert moved.at(site.position) == site
    assert dataclasses.replace(site, position=position) == moved


@given(st.one_of(sites(), site_sets()))
def test_sites_survive_pickling(site):
    assert pickle.loads(pickle.dumps(site)) == site


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("z", "z.*.*"),
        ("z.3", "z.3.*"),
        ("z.*", "z.*.*"),
        ("z.:", "z.*.*"),
        ("z.03.007@-01", "z.3.7@-1"),
        (" z.3.7 ", "z.3.7"),
        ("k.4,1,1.2", "k.1,4.2"),
        ("k.1,4.2,2", "k.1,4.2"),
        ("z.3,3.7", "z.3.7"),
        ("resid_pre@subject", "resid_pre.*@subject"),
        ("resid_pre.2:@:-1", "resid_pre.2:@:-1"),
        ("resid_pre.3@:", "resid_pre.3@*"),
        ("embed", "embed"),
        ("logits@-1", "logits@-1"),
        ("decoder/mlp_post.3.512", "decoder/mlp_post.3.512"),
        ("module(h.*.mlp).input", "module(h.*.mlp).input"),
        ("module().output['logits']", 'module().output["logits"]'),
        (
            'module(conv2).output[0]["key"]axes=(channel, height,column)#7@3',
            'module(conv2).output[0]["key"] axes=(channel,height,column)#7@3',
        ),
    ],
)
def test_the_text_is_canonical(text, canonical):
    assert str(parse(text)) == canonical


@pytest.mark.parametrize("text", ["z.3.7", "embed@2:4", "final_norm@subject", "module(a.b).output@-1"])
def test_a_text_with_all_its_indices_is_one_site(text):
    assert isinstance(parse(text), Site)


@pytest.mark.parametrize("text", ["z", "z.3", "z.3.*", "z.*.7", "z.3:4.7", "z.1,2.7", "resid_mid", "module(*).output"])
def test_a_missing_starred_listed_or_sliced_index_makes_a_set(text):
    assert isinstance(parse(text), SiteSet)
    with pytest.raises(SiteSyntaxError, match="it names several sites"):
        Site.parse(text)


def test_a_position_never_makes_a_set():
    assert parse("z.3.7@*") == Site("z", 3, 7, EVERY)
    assert parse("z.3.7@0:4") == Site("z", 3, 7, Range(0, 4))
    assert parse("z.3.7@a.b-c") == Site("z", 3, 7, Span("a.b-c"))


def test_the_unit_of_a_module_counts_on_its_first_axis_that_is_not_position():
    assert parse("module(mlp).output axes=(position,neuron)#7").unit_axis == "neuron"
    assert parse("module(conv).output axes=(channel,height)#7").unit_axis == "channel"
    assert parse("module(conv).output").unit_axis is None
    assert parse("k.1.2").unit_axis == "kv_head"


def test_whole_numbers_of_other_libraries_become_plain_ones():
    np = pytest.importorskip("numpy")
    site = Site("z", np.int64(3), np.int32(7), np.int64(-1))
    assert site == Site("z", 3, 7, -1)
    assert [type(value) for value in (site.layer, site.unit, site.position)] == [int, int, int]


def test_a_site_given_to_parse_comes_back():
    assert parse(parse("z.3.7")) is not None
    assert parse(parse("z")) == parse("z")


def message(call, *args, **kwargs):
    with pytest.raises((SiteSyntaxError, SiteNotFound)) as caught:
        call(*args, **kwargs)
    return f"{type(caught.value).__name__}: {caught.value}"


def test_an_unknown_name_lists_the_names_that_exist_the_closest_first():
    assert message(parse, "resid_prev.3") == (
        "SiteNotFound: no site named 'resid_prev.3'\n"
        "  name   'resid_prev'\n"
        "  names  resid_pre resid_post resid_mid embed pos_embed attn_out mlp_out q k v q_rot k_rot scores\n"
        "         pattern z head_out cross_q cross_k cross_v cross_scores cross_pattern cross_z\n"
        "         cross_head_out cross_attn_out mlp_pre mlp_gate mlp_post router expert_out q_bias k_bias\n"
        "         v_bias attn_bias mlp_bias final_norm logits feature feature_error module\n"
        "  fix: did you mean 'resid_pre'?"
    )


def test_an_unknown_name_is_suggested_by_meaning_too():
    assert message(parse, "attention.3").endswith("fix: did you mean 'attn_out'?")
    assert message(parse, "neuron.3.5").endswith("fix: did you mean 'mlp_post'?")


def test_the_path_of_a_module_alone_is_pointed_to_the_module_sites():
    assert message(parse, "transformer.h.3.c_proj").endswith("written module(PATH).output")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "it has no name"),
        ("z.3.4.5", "3 indices follow the name"),
        ("z.-1.3", "layer -1 is negative"),
        ("z.3.1,-2", "head -2 is negative"),
        ("z.a", "'a' does not say which layer"),
        ("z.3.", "'' does not say which head"),
        ("k.3.x", "'x' does not say which kv_head"),
        ("embed.3", "embed has no layers"),
        ("resid_pre.3.2", "resid_pre has no units after its layer"),
        ("z.3.4@", "'' is not a position"),
        ("z.3.4@4x", "'4x' is not a position"),
        ("z.3@-:", "'-:' is not a range"),
        ("foo/z.3.1", "'foo' is not a stream"),
        ("module(conv).output#3", "a unit needs a named axis"),
        ("module(conv).output axes=(position)#3", "a unit needs a named axis"),
        ("module(conv).output axes=(chanel)", "'chanel' does not name an axis after the pair"),
        ("module(conv).output axes=(pair)", "'pair' does not name an axis after the pair"),
        ("module(conv).output axes=(channel,channel)", "names an axis twice"),
        ("module(conv)", "module(PATH).output|input"),
        ("module(conv).weight", "module(PATH).output|input"),
        ("module.3", "module(PATH).output|input"),
        ('module(conv).output["\\x"]', "is not a key of a module's items"),
    ],
)
def test_a_text_outside_the_grammar_is_refused_with_the_reason(text, problem):
    said = message(parse, text)
    assert said.startswith("SiteSyntaxError")
    assert repr(text) in said.splitlines()[0]
    assert problem in said
    assert len(said.splitlines()) <= 8


def test_the_whole_message_of_a_text_outside_the_grammar():
    assert message(parse, "resid_pre.3.2") == (
        "SiteSyntaxError: 'resid_pre.3.2' is not a site\n"
        "  problem  resid_pre has no units after its layer\n"
        "  grammar  [STREAM/]NAME[.LAYER[.UNIT]][@POSITION]\n"
        "  fix: write resid_pre.LAYER"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "z"},
        {"name": "z", "layer": 3},
        {"name": "z", "layer": EVERY, "unit": 2},
        {"name": "z", "layer": 3, "unit": (1, 2)},
        {"name": "z", "layer": 3, "unit": True},
        {"name": "z", "layer": 3.5, "unit": 1},
        {"name": "embed", "layer": 3},
        {"name": "z", "layer": 3, "unit": 1, "position": "subject"},
        {"name": "module"},
        {"name": "embed", "module": ModuleRef("a", "output")},
        {"name": "module", "module": ModuleRef("a.*", "output")},
        {"name": "module", "module": ModuleRef("a", "output"), "stream": "encoder"},
    ],
)
def test_a_site_built_by_hand_is_checked_like_a_text(fields):
    assert message(Site, **fields).startswith("SiteSyntaxError")


def test_a_set_of_one_is_a_site():
    assert "one target is a Site" in message(SiteSet, "z", 3, 7)
    assert "one target is a Site" in message(SiteSet, "embed")
    assert message(SiteSet, "z", ()).startswith("SiteSyntaxError: an empty list selects no layer")


@pytest.mark.parametrize("name", ["", "-1", "3", "a b", "a@b", "*", "1:2"])
def test_a_span_name_that_could_be_something_else_is_refused(name):
    assert "is not the name of a span" in message(Span, name)


@pytest.mark.parametrize(("path", "side"), [("a b", "output"), ("a(b)", "input"), ("a", "weight")])
def test_a_module_that_cannot_be_written_is_refused(path, side):
    assert message(ModuleRef, path, side).startswith("SiteSyntaxError")
