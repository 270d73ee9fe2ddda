"""Controls and further looks, each on a model in which the answer is known."""

import dataclasses

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PairError
from causalpatch.pairs import Pairs
from causalpatch.testing.known_shares import world
from causalpatch.validation.bench import Bench
from causalpatch.validation.components import members_of
from causalpatch.validation.controls import matched_sets

NONE = cp.Checks.none()
clipped = cp.metric(lambda outputs, pairs: outputs.distribution[:, 1].clamp(max=0.5), name="clipped")
late = cp.metric(lambda outputs, pairs: (outputs.distribution[:, 1] - 0.5).clamp(min=0), name="late")
EXACT = {"gap_spread": 0.0, "spread": 0.0}


@pytest.fixture(scope="module")
def made():
    return world([0.4, 0.2, 0.04, 0.0, -0.3], 40)


def claim_of(experiment, components, **changed):
    return cp.confirm(experiment, components, checks=dataclasses.replace(NONE, **changed))


def test_all_sets_that_are_like_it_are_measured_where_there_are_few(made):
    claim = claim_of(made.experiment(), made.sites[0], n_matched=99)
    rows, about = claim.table("matched sets"), claim.check("matched sets").about
    assert about["is_all"]
    assert about["reach"] == 2  # the three others of its layer allow no p of .05
    assert set(rows["members"]) == {f"z.{layer}.{head}@-1" for layer in (0, 1) for head in range(4)} - {"z.0.0@-1"}
    exact = dict(zip(made.sites, made.effects.sum(1) / made.gap.sum(), strict=True))
    for row in rows.to_dict("records"):
        assert row["share"] == pytest.approx(exact.get(row["members"], 0.0), abs=1e-9)
    assert about["p"] == about["smallest_p"] == pytest.approx(1 / 8)
    weaker = claim_of(made.experiment(), made.sites[1], n_matched=99).check("matched sets").about
    assert weaker["p"] == pytest.approx(3 / 8)  # of the seven, .4 and -.3 are larger


def test_of_many_sets_some_are_drawn_without_replacement():
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model), show_progress=False)
    members = members_of(["mlp_post.1.3@-1", "mlp_post.1.4@-1", "mlp_post.2.9@-1"], model)
    sets, reach, is_all = matched_sets(members, experiment, 120)
    assert (len(sets), len(set(map(frozenset, sets))), reach, is_all) == (120, 120, 0, False)
    for one in sets:
        assert sorted(member.site.layer for member in one) == [1, 1, 2]
        assert not set(one) & set(members)
        assert len(set(one)) == 3
    assert matched_sets(members, experiment, 120)[0] == sets
    other = cp.Experiment(model, experiment.pairs, seed=1, show_progress=False)
    assert matched_sets(members, other, 120)[0] != sets


def test_identity_does_nothing_and_the_whole_source_everything(made):
    claim = claim_of(made.experiment(), made.sites[:2], doses=(0.5,))
    assert claim.table("identity")["share"].max() < 1e-9
    assert claim.table("whole source")["share"][0] == pytest.approx(1.0)


def test_an_effect_of_twice_delta_is_planted_into_each_components_own_spread(made):
    narrow = claim_of(made.experiment(), made.sites[3])
    assert narrow.table("planted effect")["verdict"].tolist() == ["supported"]
    wide = world([0.3], 12, spread=0.4)
    assert claim_of(wide.experiment(), wide.sites).table("planted effect")["verdict"].tolist() == ["inconclusive"]


def test_values_of_other_pairs_restore_what_is_common_to_all_pairs(made):
    """Here every clean token says the same, so that another pair's value does as well; in 'ioi' it does not."""
    claim = claim_of(made.experiment(), made.sites[0], doses=(0.5,))
    assert claim.table("shuffled pairs")["share"][0] == pytest.approx(claim.findings[0].share, abs=0.05)
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model), show_progress=False)
    names = claim_of(experiment, "z.3.2@-1", doses=(0.5,))
    assert names.table("shuffled pairs")["share"][0] < names.findings[0].share - 0.1


def test_unrelated_behaviours_have_shares_of_their_own_gap():
    model = cp.open_model("zoo:stories")
    ioi, agreement = (
        cp.Experiment(model, cp.load_pairs(name, model), show_progress=False) for name in ("ioi", "agreement")
    )
    few = cp.Experiment(model, cp.load_pairs("ioi", model)[:5], show_progress=False)
    claim = cp.confirm(ioi, "z.3.2@-1", unrelated=[agreement, few], checks=NONE)
    first, second = claim.table("specificity").to_dict("records")
    alone = cp.sweep(agreement, "z.3.2@-1").recovered()
    assert first["share"] == pytest.approx(float(alone.values.reshape(-1)[0]), abs=1e-6)
    assert first["verdict"] == "absent up to delta"
    assert second["verdict"] == "too few independent groups"


def test_an_unrelated_behaviour_without_a_gap_says_so(made):
    flat = [dataclasses.replace(pair, corrupt=pair.clean) for pair in made.pairs]
    claim = cp.confirm(made.experiment(), made.sites[0], unrelated=[Pairs(flat, name="flat")], checks=NONE)
    assert "no gap" in claim.table("specificity")["problem"][0]
    assert "'flat': clean and reference runs have no gap" in str(claim)


@pytest.mark.parametrize(
    ("metric", "kind", "size"),
    [(clipped, "redundancy", -1.0), (late, "synergy", 1.0), ("logit_difference", "additive", 0)],
)
def test_what_two_components_do_together_is_told_from_what_they_add_up_to(metric, kind, size):
    pair = world([0.5, 0.5], 20, **EXACT)
    claim = claim_of(pair.experiment(metric=metric), pair.sites, most_interactions=8)
    (row,) = claim.table("interactions").to_dict("records")
    assert (row["kind"], row["share"]) == (kind, pytest.approx(size, abs=1e-9))


def test_above_some_members_no_pairs_are_measured(made):
    assert (
        "more than 3 components"
        in claim_of(made.experiment(), made.sites, most_interactions=3).check("interactions").skipped
    )


def test_a_component_that_stands_in_is_found_when_the_set_is_ablated():
    pair = world([0.5, 0.5, 0.0], 20, **EXACT)
    claim = claim_of(pair.experiment(metric=clipped), pair.sites[0], n_others=64)
    rows = claim.table("backup").set_index("component")
    assert rows.loc["z.0.1@-1", "is_backup"]
    assert rows.loc["z.0.1@-1", "alone"] == pytest.approx(0.0, abs=1e-9)
    assert rows.loc["z.0.1@-1", "growth"] == pytest.approx(1.0)
    assert not rows.loc[["z.0.2@-1", "z.0.3@-1"], "is_backup"].any()
    additive = claim_of(pair.experiment(), pair.sites[0], n_others=2)
    assert not additive.table("backup")["is_backup"].any()
    assert additive.check("backup").about == {"n": 2, "n_all": 3, "is_all": False}


def test_direct_effects_are_those_of_path_patching():
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model), show_progress=False)
    claim = cp.confirm(experiment, ["z.2.1@-1", "z.3.2@-1"], checks=dataclasses.replace(NONE, doses=(0.5,)))
    rows = claim.table("direct and indirect")
    direct = cp.direct_effect(experiment, ["head_out.2.1", "head_out.3.2"]).recovered().values
    np.testing.assert_allclose(rows["direct"], direct, atol=1e-5)
    np.testing.assert_allclose(
        rows["direct"] + rows["indirect"], [each.share for each in claim.findings[:2]], atol=1e-6
    )


@pytest.mark.parametrize("site", ["resid_pre.1@-1", "z.0.0@0"])
def test_effects_that_cannot_be_divided_say_why(made, site):
    claim = claim_of(made.experiment(), site, doses=(0.5,))
    assert claim.check("direct and indirect").skipped


def test_other_metrics_read_the_same_runs(made):
    experiment = made.experiment(metric=["logit_difference", "answer_logit"])
    claim = cp.confirm(experiment, made.sites[:2], checks=dataclasses.replace(NONE, metrics=("probability",)))
    rows = claim.table("other metrics")
    assert list(dict.fromkeys(rows["metric"])) == ["answer_logit", "probability"]
    same = rows[rows["metric"] == "answer_logit"]["share"]
    np.testing.assert_allclose(same, [each.share for each in claim.findings], atol=1e-9)
    assert claim.record["n_runs"] == 3 * 40


def test_a_metric_without_a_gap_says_so(made):
    constant = cp.metric(lambda outputs, pairs: 0 * outputs.distribution[:, 1], name="constant")
    claim = claim_of(made.experiment(), made.sites[0], metrics=(constant,))
    assert "no gap in 'constant'" in claim.table("other metrics")["problem"][0]


def test_ablations_are_measured_in_clean_runs_with_means_of_the_discovery_pairs():
    made = world([0.4, 0.2], 60)
    discovery, held_out = made.experiment(slice(0, 20)), made.experiment(slice(20, 60))
    asked = dataclasses.replace(NONE, corruptions=("zero", cp.Mean(side="clean")))
    claim = cp.confirm(held_out, made.sites[0], found_on=discovery, checks=asked)
    rows = claim.table("other corruptions").set_index("value")
    effects, gap = made.effects[0], made.gap
    assert rows.loc["zero", "share"] == pytest.approx(effects[20:].sum() / gap[20:].sum(), abs=1e-9)
    fitted = (effects[20:] - effects[:20].mean()).sum() / gap[20:].sum()
    assert rows.loc["mean over pairs of the clean side", "share"] == pytest.approx(fitted, abs=1e-9)


def test_a_mean_is_not_fitted_on_the_pairs_that_it_is_measured_on(made):
    with pytest.raises(PairError, match="would be fitted on the pairs that shall confirm it"):
        claim_of(made.experiment(), made.sites[0], corruptions=("mean",))
    (fitted,) = made.experiment(direction="noise").fit([cp.Patch("z.0.0@-1", "mean")])
    with pytest.raises(PairError, match="was fitted on the pairs that shall confirm it"):
        claim_of(made.experiment(), made.sites[0], corruptions=(fitted.patches[0].value,))


def test_by_default_means_are_taken_where_there_are_pairs_to_fit_them_on():
    made = world([0.4], 60)
    asked = dataclasses.replace(NONE, corruptions=None)
    without = cp.confirm(made.experiment(slice(0, 20)), made.sites, checks=asked).table("other corruptions")
    assert list(without["value"]) == ["resampled from the corrupt side"]
    beside = cp.confirm(made.experiment(slice(20, 60)), made.sites, found_on=made.pairs[:20], checks=asked)
    assert len(beside.table("other corruptions")) == 2


def test_half_the_way_gives_half_of_the_effect_in_a_linear_model(made):
    claim = claim_of(made.experiment(), made.sites[:2], doses=(0.25, 0.5))
    rows = claim.table("dose")
    for name, each in rows.groupby("component"):
        share = next(found.share for found in claim.findings if found.component == name)
        np.testing.assert_allclose(each["share"], share * each["dose"], atol=1e-9)
        assert list(each["dose"]) == [0.25, 0.5, 1.0]


def test_checks_that_were_left_out_stand_in_the_limits(made):
    claim = cp.confirm(made.experiment(), made.sites[0], checks=NONE)
    (text,) = [text for text in claim.limits if text.startswith("not made")]
    assert all(name in text for name in ("matched sets", "backup", "dose", "specificity"))


def test_the_bench_measures_in_full_precision():
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model), precision="screen", show_progress=False)
    assert Bench(experiment).experiment.precision is None
    assert experiment.precision == "screen"
