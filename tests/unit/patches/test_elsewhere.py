"""Values of elsewhere are plain data, with what they leave open filled by the site that is written."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PairError, PatchError, SettingError
from causalpatch.patches.value import as_value
from toys import prompts
from worlds import tiny_world

PAIRS = prompts(([3, 4, 5], [3, 9, 5]), ([8, 4, 1, 2], [2, 4, 6, 2]))
OTHERS = prompts(([7, 7], [6, 5]), ([1, 2, 3], [4, 4, 4]))


def test_they_are_spelt_printed_and_compared():
    assert as_value("from(resid_post.5@-1)") == cp.From("resid_post.5@-1")
    assert as_value("from(z.3.*@2, run=base)") == cp.From("z.3@2", "base")
    assert str(cp.Patch("z.1", "from(z.3.*@2)")) == "z.1.* <- z.3.*@2 of the source run"
    assert cp.From(cp.Site("z", 1, 2)) == cp.From("z.1.2")
    assert len({cp.From("z.1.2"), cp.From("z.1.2", "base"), cp.From("z.1.2", prompts=cp.OtherPrompts.one([1, 2]))}) == 3


def test_what_is_open_is_that_of_the_written_site():
    assert cp.From("z@-1").into(cp.Site("z", 2, 3)).site == "z.2.3@-1"
    assert cp.From("z.0").into(cp.Site("z", 2, 3)).site == "z.0.3"
    assert cp.From("resid_post").into(cp.Site("resid_pre", 1, position=0)).site == "resid_post.1"
    for value in ("v@-1", "z.1:3", "resid_post.1,2"):
        with pytest.raises(PatchError, match="cannot be given all of"):
            cp.From(value).into(cp.Site("z", 2, 3))


def test_other_prompts_belong_to_their_pairs():
    some = cp.OtherPrompts.of(PAIRS, OTHERS, "corrupt")
    assert [some.ids[some.number(pair)] for pair in reversed(PAIRS)] == [(4, 4, 4), (6, 5)]
    assert some.number(OTHERS[0]) is None
    one = cp.OtherPrompts.one([1, 2, 3], spans={"x": (1, 3)})
    assert one.number(PAIRS[1]) == 0
    assert one.as_pair(0).spans == {"x": ((1, 3), (1, 3))}
    with pytest.raises(PairError, match="one prompt for each pair"):
        cp.OtherPrompts.of(PAIRS, OTHERS.take([0]))
    for wrong in (((),), ((1,), (2,)), ()):
        with pytest.raises(PatchError, match="one for all pairs, or one for each"):
            cp.OtherPrompts(wrong)


def test_they_are_saved_and_read_back(tmp_path):
    values = [
        cp.From("resid_post.1@-1", "base"),
        cp.From("resid_post.1@x", prompts=cp.OtherPrompts.one([1, 2, 3], spans={"x": (1, 3)})),
        cp.From("resid_post.0", prompts=cp.OtherPrompts.of(PAIRS, OTHERS)),
        cp.Subspace(np.eye(16)[:2], cp.From("resid_post.0@1")),
    ]
    asked = [cp.Intervention.of(cp.Patch("resid_pre.1@-1", value)) for value in values]
    assert cp.load_interventions(cp.save_interventions(tmp_path / "far.json", asked)) == asked


def test_fitting_leaves_them_as_they_are():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    asked = [cp.Patch("resid_pre.1@-1", cp.From("resid_post@0")), cp.Patch("z.0.1", "mean")]
    fitted = cp.Experiment(model, PAIRS).fit([asked])
    assert fitted[0].patches[0].value == cp.From("resid_post.1@0")
    assert isinstance(fitted[0].patches[1].value, cp.Fitted)


def test_a_token_read_for_several_is_said_how():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, PAIRS)
    value = cp.From("resid_post.0@1")
    with pytest.raises(PairError, match="3 and 1 tokens"):
        experiment.run([cp.Patch("resid_pre.1", value)])
    spread = experiment.run([cp.Patch("resid_pre.1", value, align="mean")])
    assert np.isfinite(spread.effect().values).all()


def test_rows_over_keys_sites_of_other_axes_and_unknown_ones_are_refused():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, PAIRS)
    for target, value, kind, text in [
        ("resid_pre.1@0", "from(pattern.0.1@-1)", PatchError, "row over keys"),
        ("pattern.0.1@-1", "from(pattern.1.1@-1)", PatchError, "another number"),
        ("resid_pre.1@0", "from(z.0.1@-1)", PatchError, "their axes differ"),
        ("resid_pre.1@0", "from(resid_post.5@-1)", cp.RequestError, "resid_post.5"),
        ("resid_pre.1@0", "from(resid_post.0@9)", PairError, "lies outside"),
    ]:
        with pytest.raises(kind, match=text):
            experiment.run([cp.Patch(target, value)])


def test_a_turned_value_of_another_token_is_warned_of():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, PAIRS)
    with pytest.warns(UserWarning, match="whose rotation they keep"):
        experiment.run([cp.Patch("q_rot.1.0@0", "from(q_rot.0.0@-1)")])


def test_layers_that_are_read_are_an_axis_of_a_sweep():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, PAIRS)
    grid = cp.sweep(experiment, "resid_pre@-1", "layer,source_layer", value=cp.From("resid_post@0"))
    assert grid.dims == ("layer", "source_layer", "pair")
    for layer in (0, 1):
        alone = experiment.run([cp.Patch(f"resid_pre.{layer}@-1", f"from(resid_post.{n}@0)") for n in (0, 1)])
        assert np.allclose(grid.effect().sel(layer=layer).values, alone.effect().values, atol=1e-9)
    heads = cp.sweep(experiment, "z.1@-1", "source_layer,head", value=cp.From("z@-1"))
    assert heads.effect().shape == (2, 4)
    plan = cp.plan_sweep(experiment, "z.1@-1", "source_layer,head", value=cp.From("z@-1"))
    assert plan.n_interventions == 8
    with pytest.raises(SettingError, match="no axis 'source_layer'"):
        cp.sweep(experiment, "z@-1", "source_layer,head", value="zero")


def test_shares_are_of_the_gap_only_where_the_value_is_the_source_s():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    experiment = cp.Experiment(model, PAIRS)
    values = {"source": cp.From("resid_post.0@-1"), "base": cp.From("resid_post.0@-1", "base")}
    said = {
        name: experiment.run([cp.Patch("resid_pre.1@0", value)]).provenance["no_share"]
        for name, value in values.items()
    }
    assert said["source"] == ""
    assert "does not move a run" in said["base"]
