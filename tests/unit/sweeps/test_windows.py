"""Windows of layers and sets of sites: what is patched together is what the interventions say, no more and no less."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PatchError, SettingError, SiteUnsupported
from causalpatch.sweeps.grid import layers_around
from toys import prompts
from worlds import tiny_world, unchecked

PAIRS = prompts(([3, 4, 5, 6], [3, 9, 5, 7]), ([8, 4, 1, 2], [2, 4, 6, 2]), answer=1, wrong=2)


@pytest.fixture(scope="module")
def model():
    return tiny_world("llama", (3, 3, 1, 1))[0]


def experiment(model, direction="denoise", **settings):
    return cp.Experiment(model, PAIRS, direction=direction, **settings)


def texts(sites):
    return [str(site) for site in sites]


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_windows_are_those_of_causal_tracing(size):
    for layer in range(48):
        # The expression of Meng et al.'s code, cut off at both ends as there.
        theirs = list(range(max(0, layer - size // 2), min(48, layer - (-size // 2))))
        assert [each for each in layers_around(layer, size) if 0 <= each < 48] == theirs


def test_a_window_names_the_sites_of_its_layers(model):
    assert texts(cp.window(model, "mlp_out", 0, 3)) == ["mlp_out.0", "mlp_out.1"]
    assert texts(cp.window(model, "z.*.2@-1", 2, 2)) == ["z.1.2@-1", "z.2.2@-1"]
    assert texts(cp.window(model, "attn_out@subject", 1, 9)) == [f"attn_out.{layer}@subject" for layer in range(3)]


@pytest.mark.parametrize(("site", "over"), [("mlp_out", None), ("attn_out@-1", None), ("z@1", ("layer",)), ("z", None)])
def test_a_sweep_of_windows_patches_each_window_in_one_run(model, site, over):
    with unchecked():
        swept = cp.sweep(experiment(model), site, over, window=2)
    assert swept.axes[0] == "layer"
    assert swept.provenance["site"].endswith("in windows of 2")
    for cell in np.ndindex(swept.effect().shape):
        at = dict(zip(swept.axes, cell, strict=True))
        parsed = cp.parse(site)
        chosen = cp.window(model, site, at["layer"], 2)
        if "head" in at:
            chosen = [each for each in chosen if each.unit == at["head"]]
        patches = [cp.Patch(each, column=at.get("position")) for each in chosen]
        assert len({each.layer for each in chosen}) == (1 if at["layer"] == 0 else 2)
        assert parsed.position == chosen[0].position
        with unchecked():
            alone = experiment(model).run([patches]).effect().values[0]
        assert swept.effect().values[cell] == pytest.approx(alone, abs=1e-10)


def test_a_window_of_one_layer_is_the_layer(model):
    with unchecked():
        first, second = (cp.sweep(experiment(model), "resid_post", window=size) for size in (1, None))
    np.testing.assert_array_equal(first.effect().values, second.effect().values)


def test_a_plan_of_windows_counts_them(model):
    assert "3 on 2 pairs" in str(cp.plan_sweep(experiment(model), "mlp_out@-1", window=2))


def test_a_set_is_one_intervention(model):
    together = cp.together(["z.0.1", cp.Site("mlp_out", 1)], "zero", "both")
    assert (str(together), len(together.patches)) == ("both", 2)
    assert all(patch.value == cp.Zero() for patch in together.patches)
    with pytest.raises(PatchError, match="without patches"):
        cp.together([])


def test_the_complement_and_the_set_are_everything(model):
    for named, of in ((["z.1.0", "z.2"], None), (["z.0.1@-1"], ["z", "mlp_out"]), (["mlp_out.1@subject"], None)):
        others = cp.everything_but(model, named, of)
        mine = [site for text in named for site in cp.sites.expand(cp.parse(text), model.shape)]
        kinds = of or list({site.name for site in mine})
        whole = [site for kind in kinds for site in cp.sites.expand(cp.parse(kind).at(mine[0].position), model.shape)]
        assert not set(mine) & set(others)
        assert sorted(texts([*mine, *others])) == sorted(texts(whole))


@pytest.mark.parametrize(
    ("named", "of", "why"),
    [
        (["z.0.1@-1", "z.0.2"], None, "at 2 positions"),
        ([], None, "at 0 positions"),
        (["z"], None, "is nothing"),
        (["mlp_out.0"], ["z"], "not among"),
    ],
)
def test_a_complement_that_is_not_one_set_is_refused(model, named, of, why):
    with pytest.raises(SettingError, match=why):
        cp.everything_but(model, named, of)


def test_ablating_a_found_set_and_its_complement_together_ablates_everything(model):
    with unchecked():
        effects = cp.joint(experiment(model, "noise", metric="answer_logit"), ["z.1.0", "z.2.1"], "zero")
        everything = experiment(model, "noise", metric="answer_logit").run([[cp.Patch("z", "zero")]])
        pair = experiment(model, "noise", metric="answer_logit").run(
            [cp.Patch("z.1.0", "zero"), [cp.Patch("z.1.0", "zero"), cp.Patch("z.2.1", "zero")]]
        )
    names = effects.to_xarray()["intervention"].values.tolist()
    assert names == ["z.1.0", "z.2.1", "together", "everything but"]
    reference = effects.to_xarray()["baseline_reference"].values
    np.testing.assert_allclose(reference, everything.to_xarray()["metric"].values[0], rtol=0, atol=1e-10)
    np.testing.assert_allclose(effects.effect().values[[0, 2]], pair.effect().values, rtol=0, atol=1e-10)


def test_the_largest_cells_of_a_sweep_are_sites_again(model):
    with unchecked():
        heads = cp.sweep(experiment(model, metric="kl_divergence"), "z@-1")
        layers = cp.sweep(experiment(model, metric="kl_divergence"), "mlp_out@1")
    share = np.abs(heads.recovered().values)
    best = np.unravel_index(share.argmax(), share.shape)
    assert str(cp.sites_of(heads, 2)[0]) == f"z.{best[0]}.{best[1]}@-1"
    assert [site.name for site in cp.sites_of(layers, 3)] == ["mlp_out"] * 3
    with unchecked(), pytest.raises(SettingError, match="are no single sites"):
        cp.sites_of(cp.sweep(experiment(model, metric="kl_divergence"), "resid_pre"), 2)


@pytest.mark.parametrize(
    ("call", "why"),
    [
        (lambda model: cp.window(model, "embed", 0, 3), "has no layers"),
        (lambda model: cp.window(model, "mlp_out", 7, 3), "no window around layer 7"),
        (lambda model: cp.window(model, "mlp_out", 1, 0), "holds nothing"),
        (lambda model: cp.sweep(experiment(model), "mlp_out", window=0), "holds nothing"),
        (lambda model: cp.sweep(experiment(model), "embed", window=2), "need the axis 'layer'"),
        (lambda model: cp.sweep(experiment(model), "mlp_out.1@-1", "layer", window=2), None),
    ],
)
def test_windows_that_mean_nothing_are_refused(model, call, why):
    if why is None:
        assert call(model).axes == ("layer",)
        return
    with pytest.raises(SettingError, match=why):
        call(model)


def test_parallel_blocks_have_windows_of_what_they_have():
    model = tiny_world("gpt_neox", (2, 4, 2, 0))[0]
    assert len(cp.window(model, "attn_out", 0, 5)) == 2
    with pytest.raises(SiteUnsupported):
        cp.window(model, "resid_mid", 0, 5)
