"""Claims held to other checkpoints, double dissociations, and plans."""

import dataclasses

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, PairError, SettingError, SiteNotFound, StoreCorrupt
from causalpatch.pairs import Pairs
from causalpatch.statistics.power import power_with
from causalpatch.testing.known_shares import world

NONE = cp.Checks.none()
SHARES = [0.4, 0.25, 0.0, -0.3]


@pytest.fixture(scope="module")
def made():
    return world(SHARES, 40)


@pytest.fixture(scope="module")
def changed():
    """The same tokens in a model where the first head does nothing any more."""
    return world([0.0, 0.25, 0.0, -0.3], 40)


def claimed(made, heads):
    return cp.confirm(made.experiment(), [made.sites[n] for n in heads], checks=NONE)


def test_a_claim_holds_in_the_model_that_it_was_made_of(made, tmp_path):
    path = claimed(made, [0, 2, 3]).save(tmp_path / "claim.json")
    found = cp.recheck(cp.Claim.load(path), made.model)
    assert found.holds
    assert found.exit_code == 0
    assert [row["change"] for row in found.rows] == pytest.approx([0.0] * 4, abs=1e-12)
    assert all(reason.startswith("again: ") for reason in found.reasons)


def test_a_claim_does_not_hold_where_a_component_has_stopped(made, changed):
    claim = claimed(made, [0, 1])
    found = cp.recheck(claim, changed.model)
    assert not found.holds
    assert found.exit_code == 1
    assert found.reasons[0].startswith("not again supported: z.0.0@-1 restores")
    assert len(found.reasons) == 1
    first, second, _ = found.rows
    assert (first["verdict"], first["verdict_now"]) == ("supported", "absent up to delta")
    assert first["change"] == pytest.approx(
        (changed.effects[0].sum() - made.effects[0].sum()) / made.gap.sum(), abs=1e-9
    )
    assert first["high"] < 0
    assert second["low"] <= 0 <= second["high"]
    assert "does not hold in" in str(found)


def test_an_effect_that_appears_breaks_a_claim_of_absence(made):
    grown = world([0.4, 0.25, 0.2, -0.3], 40)
    claim = claimed(made, [2])
    assert cp.recheck(claim, made.model).holds
    assert not cp.recheck(claim, grown.model).holds


def test_an_effect_on_the_other_side_is_not_the_same(made):
    turned = world([0.4, 0.25, 0.0, 0.3], 40)
    found = cp.recheck(claimed(made, [3]), turned.model)
    assert found.rows[0]["verdict_now"] == "supported"
    assert not found.holds


def test_a_behaviour_that_is_gone_is_told_apart_from_a_component_that_is(made):
    silent = world(SHARES, 40)
    silent.model.module.get_parameter("lm_head.weight").data.zero_()
    found = cp.recheck(claimed(made, [0]), silent.model)
    assert not found.holds
    assert "the behaviour itself is gone" in found.reasons[0]


def test_a_claim_that_says_nothing_is_not_rechecked(made, tmp_path):
    book = tmp_path / "openings.jsonl"
    cp.confirm(made.experiment(), made.sites[0], checks=NONE, ledger=book)
    again = cp.confirm(made.experiment(), made.sites[0], checks=NONE, ledger=book)
    with pytest.raises(SettingError, match="an inconclusive claim says nothing"):
        cp.recheck(again, made.model)


def test_pairs_and_components_must_be_those_of_the_claim(made):
    claim = claimed(made, [0])
    with pytest.raises(StoreCorrupt, match="not the pairs of the claim"):
        cp.recheck(claim, made.model, pairs=made.pairs[:20])
    with pytest.raises(SettingError, match="does not hold its pairs"):
        cp.recheck(dataclasses.replace(claim, held_out=None), made.model)
    assert cp.recheck(dataclasses.replace(claim, held_out=None), made.model, pairs=made.pairs).holds
    far = dataclasses.replace(claim, spec={**claim.spec, "components": ["z.5.0@-1"]})
    with pytest.raises(SiteNotFound):
        cp.recheck(far, made.model)


def test_a_model_with_other_tokens_is_refused():
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:12], show_progress=False)
    claim = cp.confirm(experiment, "z.3.2@-1", checks=NONE)
    assert cp.recheck(claim, model).holds
    other = {**claim.held_out, "tokens": ["other", *claim.held_out["tokens"][1:]]}
    with pytest.raises(ModelUnsupported, match="as other tokens"):
        cp.recheck(dataclasses.replace(claim, held_out=other), model)


def test_pairs_with_an_alignment_of_their_own_are_kept_with_it():
    model = cp.open_model("zoo:stories")
    pairs = cp.load_pairs("ioi", model)[:12].align("difference")
    claim = cp.confirm(cp.Experiment(model, pairs, show_progress=False), "resid_pre.2", checks=NONE)
    assert cp.recheck(claim, model).holds


def test_a_double_dissociation_is_one_contrast_of_two_claims():
    first, second = world([0.5, 0.02, 0.0], 40, name="one"), world([0.02, 0.6, 0.0], 30, seed=3, name="two")
    claims = [claimed(each, [0, 1]) for each in (first, second)]
    model = claims[0].spec["model"]  # they stand for one model, whose pairs have tokens of their own
    claims = [dataclasses.replace(one, spec={**one.spec, "model": model}, held_out=None) for one in claims]
    found = cp.dissociate(*claims, "z.0.0@-1", "z.0.1@-1")
    shares = [each.effects.sum(1) / each.gap.sum() for each in (first, second)]
    assert found.contrast == pytest.approx(shares[0][0] - shares[0][1] + shares[1][1] - shares[1][0])
    assert found.verdict == "supported"
    assert found.low > 0.2
    assert "'one': z.0.0@-1 0.5" in str(found)
    single = world([0.25, 0.1, 0.0], 30, seed=4, name="three")
    weak = claimed(single, [0, 1])
    weak = dataclasses.replace(weak, spec={**weak.spec, "model": model}, held_out=None)
    none = cp.dissociate(weak, claims[1], "z.0.1@-1", "z.0.0@-1")
    assert (none.verdict, none.why) == ("inconclusive", "the interval does not lie above 0.2")


def test_two_claims_of_one_component_each_are_contrasted_by_what_each_measured_on_the_others_pairs(tmp_path):
    """The two behaviours are halves of one world, so that each head does the same in both."""
    both = world([0.5, 0.1, 0.0], 60, name="both")
    rows = {"first": both.pairs.pairs[:30], "second": both.pairs.pairs[30:]}
    halves = [cp.Experiment(both.model, Pairs(held, name=name), show_progress=False) for name, held in rows.items()]
    alone = [
        cp.confirm(halves[n], f"z.0.{n}@-1", unrelated=[halves[1 - n]], checks=NONE, ledger=tmp_path / f"{n}.jsonl")
        for n in (0, 1)
    ]
    alone = [cp.Claim.load(claim.save(tmp_path / "claim.json")) for claim in alone]
    whole = [
        cp.confirm(half, both.sites[:2], checks=NONE, ledger=tmp_path / f"whole {n}.jsonl")
        for n, half in enumerate(halves)
    ]
    found, expected = (cp.dissociate(*claims, "z.0.0@-1", "z.0.1@-1") for claims in (alone, whole))
    assert found == expected
    with pytest.raises(SettingError, match=r"nothing says what 'z\.0\.2@-1' does on 'first'"):
        cp.dissociate(*alone, "z.0.0@-1", "z.0.2@-1")


def test_a_double_dissociation_is_drawn_with_its_intervals_and_twice_delta():
    claims = [claimed(world([0.5, 0.02], 40, name="one"), [0, 1]), claimed(world([0.02, 0.6], 30, seed=3), [0, 1])]
    claims[1] = dataclasses.replace(claims[1], spec={**claims[1].spec, "model": claims[0].spec["model"]}, held_out=None)
    found = cp.dissociate(*claims, "z.0.0@-1", "z.0.1@-1")
    picture = found.plot()
    sheet = picture.to_dict()["datasets"]
    assert [(row["behaviour"], row["component"]) for row in sheet["shares"]] == [
        (behaviour, name) for behaviour in found.shares for name in ("z.0.0@-1", "z.0.1@-1")
    ]
    for row in sheet["shares"]:
        assert row["low"] < row["share"] < row["high"]
        assert row["share"] == found.shares[row["behaviour"]][row["component"]]
    assert sheet["shares-delta"] == [{"low": -0.1, "high": 0.1}]
    assert sheet["contrast-delta"] == [{"low": -0.2, "high": 0.2}]
    assert [(row["low"], row["high"]) for row in sheet["contrast"]] == [(found.low, found.high)]
    for text in ("supported: double dissociation", "share of the gap", "interaction contrast", "z.0.1@-1"):
        assert text in picture.to_svg()


def test_the_interval_of_a_contrast_holds_it_as_often_as_it_says():
    template = claimed(world([0.5, 0.1], 20), [0, 1])
    held = 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        claims = []
        for n in (20, 35):
            gap = random.normal(1, 0.1, n)
            effects = np.array([[0.5], [0.1]]) * gap + random.normal(0, 0.1, (2, n))
            spec = {**template.spec, "pairs": {**template.spec["pairs"], "hash": str(n)}}
            claims.append(
                dataclasses.replace(template, effects=effects, gap=gap, group=np.arange(n), spec=spec, held_out=None)
            )
        found = cp.dissociate(*claims, "z.0.0@-1", "z.0.1@-1")
        held += found.low <= 0.0 <= found.high
    assert held / 400 == pytest.approx(0.95, abs=0.035)


def test_claims_that_do_not_belong_together_are_not_contrasted(made):
    claim = claimed(made, [0, 1])
    with pytest.raises(PairError, match="share pairs"):
        cp.dissociate(claim, claim, made.sites[0], made.sites[1])
    with pytest.raises(SettingError, match="one component twice"):
        cp.dissociate(claim, claim, made.sites[0], made.sites[0])
    other = dataclasses.replace(claim, spec={**claim.spec, "delta": 0.2})
    with pytest.raises(SettingError, match="different deltas"):
        cp.dissociate(claim, other, made.sites[0], made.sites[1])


def test_power_comes_from_the_spread_of_the_pilot_and_its_uncertainty(made):
    pilot = cp.sweep(made.experiment(slice(0, 16)), "z@-1")
    plan = cp.power(pilot, effect=0.25, delta=0.1, n_components=2)
    assert [row["component"] for row in plan.rows] == ["layer 0, head 0", "layer 0, head 3"]
    effects, gap = made.effects[0][:16], made.gap[:16]
    left = effects - effects.sum() / gap.sum() * gap + 0.15 * (gap - gap.mean())
    assert plan.rows[0]["spread"] == pytest.approx(left.std(ddof=1) / gap.mean(), rel=1e-6)
    row = plan.rows[0]
    assert row["low"] < row["spread"] < row["high"]
    assert row["needed_low"] <= row["needed"] <= row["needed_high"]
    assert power_with(row["spread"], 0.15, row["needed"], n_tests=3) >= 0.8
    assert plan.needed <= plan.needed_at_most
    assert "80% bounds from 16 of 'made'" in str(plan)


def test_the_spread_counts_independent_components_not_pairs():
    random = np.random.default_rng(0)
    noise = np.repeat(0.2 * random.standard_normal((1, 15)), 4, axis=1)
    alike = world([0.4], 60, noise=noise, n_each=4, gap_spread=0.0)
    plan = cp.power(cp.sweep(alike.experiment(), "z.0@-1"), n_components=1)
    assert plan.rows[0]["spread"] == pytest.approx(noise[0, ::4].std(ddof=1), rel=0.05)
    assert plan.pilot["n_components"] == 15


def test_a_claim_is_a_pilot_for_the_next_one(made):
    claim = claimed(made, [0, 1])
    plan = cp.power(claim, target=0.9)
    assert [row["component"] for row in plan.rows] == claim.components
    assert (plan.effect, plan.delta) == (0.2, 0.1)


def test_plans_that_cannot_be_made_are_refused(made):
    pilot = cp.sweep(made.experiment(slice(0, 2)), "z@-1")
    with pytest.raises(PairError, match="a pilot of 2 independent components"):
        cp.power(pilot)
    with pytest.raises(SettingError, match="no number of pairs finds that"):
        cp.power(pilot, effect=0.1, delta=0.1)
