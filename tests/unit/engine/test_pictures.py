"""Models that are given pictures, held to raw hooks written by hand: every site, both directions, every engine."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine import prove
from causalpatch.sites import NAMES, Site
from causalpatch.sites.names import CROSS_SITES, FEATURE_SITES
from causalpatch.testing.pictures import tiny_seer
from oracle import Edit
from seeing import END_ID, PICTURE_ID, TWINS, gap, given, pairs_for, twins
from tiers import quickly

WITHOUT = CROSS_SITES | FEATURE_SITES | {"module", "router", "expert_out"}
CASES = list(TWINS)
SOME = ("resid_pre", "pos_embed", "z", "pattern", "mlp_post", "resid_post")


def sites_of(model, stream):
    """Return the sites that a stream has, each in its first and last layer, of the last unit."""
    model = model.reading("tokens" if stream == "text" else model.kind)
    shape = model.shape.parts.get(stream, model.shape)
    for name, info in NAMES.items():
        if name in WITHOUT or name in shape.refused or (name == "logits" and not is_text(model)):
            continue
        units = shape.units.get(info.unit_axis, 0)
        for layer in sorted({0, shape.n_layers - 1}) if info.has_layer else (None,):
            yield Site(name, layer, units - 1 if info.unit_axis else None)


def is_text(model):
    return model.family.name == "llama"


def text_of(site, stream):
    return f"{stream}/{site}" if stream else str(site)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_site_of_a_model_that_sees_is_proved(case):
    stream = case.partition("/")[2]
    model, _ = twins(case)
    model = model.reading("tokens" if stream == "text" else model.kind)
    prefix = "vision/" if case == "llava/vision" else ""
    for each in dict.fromkeys(site.name for site in sites_of(model, stream)):
        assert prove(model, prefix + each).failure is None, each


@pytest.mark.parametrize("case", ["vit", "clip/vision", "clip/text", "llava/vision"])
def test_a_patch_is_what_a_hook_written_by_hand_does(case):
    hold_to_hooks_by_hand(case, "denoise", SOME)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_a_patch_at_any_site_is_what_a_hook_written_by_hand_does(case, direction):
    hold_to_hooks_by_hand(case, direction, NAMES)


def hold_to_hooks_by_hand(case, direction, names):
    """Patch sites, one at all tokens and the next at one token, by the library and by raw hooks."""
    stream = case.partition("/")[2]
    model, twin = twins(case)
    pairs = pairs_for(model, case, 2)
    base, source = ("corrupt", "clean") if direction == "denoise" else ("clean", "corrupt")
    sites = [site for site in sites_of(model, stream) if site.name in names]
    n_tokens = len(twin.value(given(pairs, 0, base), ("resid_pre", 0, None)))
    at = [site if number % 2 else site.at(n_tokens - 2) for number, site in enumerate(sites)]
    wanted = np.zeros((len(at), len(pairs)))
    for number in range(len(pairs)):
        for row, site in enumerate(at):
            key = (site.name, site.layer, site.unit)
            value = twin.value(given(pairs, number, source), key)
            tokens = range(len(value)) if site.position is None else [site.position]
            edited = twin.logits(given(pairs, number, base), [Edit(key, tokens, value[list(tokens)])])
            wanted[row, number] = gap(edited, pairs[number])
    for engine in ("auto", "reference"):
        experiment = cp.Experiment(model, pairs, direction=direction, engine=engine)
        effects = experiment.run([text_of(site, stream) for site in at])
        np.testing.assert_allclose(effects.to_xarray()["metric"].values, wanted, rtol=0, atol=1e-10)
        assert not (effects.to_xarray()["status"] == "failed").any()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_writing_a_value_back_changes_nothing_bit_for_bit(case):
    stream = case.partition("/")[2]
    model, _ = twins(case)
    experiment = cp.Experiment(model, pairs_for(model, case), engine="reference")
    asked = [cp.Patch(text_of(site, stream), "identity") for site in sites_of(model, stream)]
    effects = experiment.run(asked)
    base = experiment.baseline.corrupt[0]
    plain = effects.to_xarray()["metric"].values
    inside = np.array([patch.site.name in ("q_rot", "k_rot", "scores", "pattern") for patch in asked])
    assert (effects.effect().values == 0).all()
    np.testing.assert_allclose(plain, np.broadcast_to(base, plain.shape), rtol=0, atol=1e-12)
    assert inside.any()


@pytest.mark.parametrize("case", quickly(CASES, "vit"))
def test_all_of_the_first_stream_from_the_source_gives_the_sources_answer(case):
    stream = case.partition("/")[2]
    model, twin = twins(case)
    pairs = pairs_for(model, case)
    experiment = cp.Experiment(model, pairs)
    found = experiment.run([text_of(Site("resid_pre", 0), stream)]).to_xarray()["metric"].values[0]
    wanted = [gap(twin.logits(given(pairs, number, "clean")), pairs[number]) for number in range(len(pairs))]
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", quickly(["restart", "rows", "graph"], "restart"))
def test_every_engine_gives_what_single_forwards_give(engine):
    model, _ = twins("vit")
    pairs = pairs_for(model, "vit")
    asked = ["resid_pre.1@0", "z.1.2@3", "mlp_post.0.4", ["z.0.1@-1", "mlp_out.1"], "final_norm@0", "embed@2"]
    got, wanted = (
        cp.Experiment(model, pairs, engine=each).run(asked).to_xarray()["metric"].values
        for each in (engine, "reference")
    )
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize(
    "value", ["zero", "mean", "resample", "noise", cp.Mean(over="positions"), "interpolate(0.5)"], ids=str
)
def test_values_are_put_into_patches_by_every_engine_alike(value):
    for case in ("vit", "llava/vision"):
        model, _ = twins(case)
        pairs = pairs_for(model, case)
        asked = [
            cp.Patch(text_of(site, case.partition("/")[2]), value)
            for site in (Site("mlp_out", 0, position=2), Site("z", 1, 1))
        ]
        got, wanted = (
            cp.Experiment(model, pairs, engine=each).run(asked).to_xarray()["metric"].values
            for each in ("auto", "reference")
        )
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)
        assert np.abs(wanted).max() > 0


def test_language_models_of_pictures_go_by_the_wavefront_and_their_towers_do_not():
    model, _ = twins("llava")
    pairs = pairs_for(model, "llava")
    language = cp.sweep(cp.Experiment(model, pairs), "resid_pre")
    assert language.provenance["engine"]["tier"] == "wavefront"
    assert language.to_xarray().sizes["position"] == 15
    seeing = pairs_for(model, "llava/vision")
    tower = cp.sweep(cp.Experiment(model, seeing), "vision/resid_pre")
    assert tower.provenance["engine"]["tier"] == "restart"
    assert tower.to_xarray().sizes["position"] == 10


def test_sweeps_walk_along_patches_and_name_them():
    model, _ = twins("vit")
    experiment = cp.Experiment(model, pairs_for(model, "vit"))
    effects = cp.sweep(experiment, "resid_pre")
    assert effects.dims == ("layer", "position", "pair")
    labels = list(effects.to_xarray()["token"].values)
    assert labels == ["CLS", *(f"patch {row},{column}" for row in range(3) for column in range(2))]
    heads = cp.sweep(experiment, "z")
    assert heads.dims == ("layer", "head", "pair")


def test_the_numbers_of_pictures_of_another_size_are_theirs():
    model, _ = twins("clip_vision")
    pictures = np.random.default_rng(0).normal(size=(2, 2, 3, 16, 12))
    pairs = cp.Pairs.from_arrays(*pictures, answer=[0, 1], wrong_answer=[1, 2])
    wider = cp.Experiment(model, pairs.with_common(interpolate_pos_encoding=True))
    assert cp.sweep(wider, "resid_post@3").dims == ("layer", "pair")
    assert len(wider.pairs.tokens("clean", 0)) == 1 + 4 * 3
    with pytest.raises(SiteUnsupported, match="positions are computed anew"):
        wider.run(["pos_embed@0"])


def test_text_goes_on_behind_the_same_picture():
    model, twin = twins("llava")
    pairs = pairs_for(model, "llava")
    texts = cp.generate(cp.Experiment(model, pairs, direction="noise"), "resid_pre.0", max_new_tokens=3)
    for number in range(len(pairs)):
        call, written = given(pairs, number, "clean"), []
        for _ in range(3):
            written.append(int(twin.logits(call)[-1].argmax()))
            call["input_ids"] = np.concatenate([call["input_ids"], [[written[-1]]]], axis=1)
        assert texts.ids.sel(intervention="base").values[number].tolist() == written


@pytest.mark.slow
@pytest.mark.parametrize(("name", "n_seen", "shape"), [("paligemma", 9, (3, 12, 12)), ("smolvlm", 4, (1, 3, 16, 16))])
def test_other_language_models_of_pictures_give_what_single_forwards_give(name, n_seen, shape):
    model = cp.open_model(tiny_seer(name))
    drawn = np.random.default_rng(2)
    texts = drawn.integers(1, 37, size=(2, 3, 4))
    rows = [
        {"clean": [0, *[PICTURE_ID] * n_seen, *one], "corrupt": [0, *[PICTURE_ID] * n_seen, *two], "answer_id": 3}
        for one, two in zip(*texts.tolist(), strict=True)
    ]
    pairs = cp.load_pairs(rows, model).with_beside(pixel_values=drawn.normal(size=(2, 3, *shape))[0])
    fast, slow = (cp.Experiment(model, pairs, cp.answer_logit, engine=engine) for engine in ("auto", "reference"))
    names = ["resid_pre", "z", *(["vision/resid_pre", "vision/z"] if "vision" in model.shape.parts else [])]
    for site in names:
        swept = cp.sweep(fast, site)
        wanted = cp.sweep(slow, site).to_xarray()["metric"].values
        np.testing.assert_allclose(swept.to_xarray()["metric"].values, wanted, rtol=0, atol=1e-10)
        # Tokens of PaliGemma's prompt see later ones: the wavefront's check finds out.
        assert swept.provenance["engine"]["tier"] == ("restart" if name == "paligemma" else "wavefront")


@pytest.mark.parametrize("case", ["siglip_text", "siglip/text", "clip_text", "clip/text"])
def test_texts_of_unequal_lengths_are_measured_as_if_each_were_run_alone(case):
    """What reads the last column would read a pad beside a longer text."""
    model, twin = twins(case)
    texts = np.random.default_rng(3).integers(1, END_ID, size=(2, 3, 6))
    texts[:, :, -1] = END_ID
    rows = [
        {"clean": one[-n:], "corrupt": two[-n:], "answer_id": 0, "wrong_answer_id": 1}
        for one, two, n in zip(*texts, (3, 6, 4), strict=True)
    ]
    pairs = cp.load_pairs(rows, model)
    if "/" in case:
        pairs = pairs.with_common(pixel_values=pairs_for(model, case).common["pixel_values"])
    stream = case.partition("/")[2]
    experiment = cp.Experiment(model, pairs, direction="noise")
    asked = [Site("resid_pre", 1, position=-2), Site("z", 0, 1, position=-1), Site("embed", position=0)]
    got = experiment.run([text_of(site, stream) for site in asked]).to_xarray()["metric"].values
    for number, pair in enumerate(pairs):
        runs = {role: given(pairs, number, role) for role in ("clean", "corrupt")}
        baseline = experiment.baseline.clean[0, number], experiment.baseline.corrupt[0, number]
        np.testing.assert_allclose(baseline, [gap(twin.logits(run), pair) for run in runs.values()], rtol=0, atol=1e-10)
        for site, found in zip(asked, got[:, number], strict=True):
            key, token = (site.name, site.layer, site.unit), site.position % len(pair.clean)
            edit = Edit(key, [token], twin.value(runs["corrupt"], key)[[token]])
            wanted = gap(twin.logits(runs["clean"], [edit]), pair)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-10)
