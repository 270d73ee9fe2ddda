"""Claims of ablations: shares of what the model loses where all attention and MLPs are ablated."""

import dataclasses

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PairError, SettingError
from causalpatch.testing.known_shares import world

NONE = cp.Checks.none()


@pytest.fixture(scope="module")
def made():
    """Heads that bring .6 of the gap together; the rest goes past all of them and is left by any ablation."""
    return world([0.4, 0.2, 0.0, 0.02], 60, name="made")


def test_zero_takes_a_share_of_what_is_lost_where_everything_is_zero(made):
    experiment = made.experiment(direction="noise")
    claim = cp.confirm(experiment, made.sites[:3], value="zero", checks=NONE)
    gap = made.effects.sum(0)
    np.testing.assert_allclose(claim.gap, gap, atol=1e-9)
    np.testing.assert_allclose(claim.effects[:3], made.effects[:3], atol=1e-9)
    expected = made.effects[:3].sum(1) / gap.sum()
    np.testing.assert_allclose([each.share for each in claim.findings[:3]], expected, atol=1e-9)
    assert claim.supported == made.sites[:2]
    assert claim.spec["reference"] == "zero at all 2 sublayers together"
    where = (
        "putting 'zero' into clean runs of 'GPT2LMHeadModel' (gap: clean run to the run with zero at all 2 sublayers"
    )
    assert where in claim.statement
    assert any("none of the model's own values" in limit for limit in claim.limits)


@pytest.mark.parametrize("side", ["clean", "corrupt"])
def test_means_are_those_of_the_discovery_pairs(made, side):
    """Discovery pairs are those in which heads bring least, so that even their clean mean takes something away."""
    order = np.argsort(made.effects.sum(0)).tolist()
    discovery, held_out = made.experiment(order[:20]), made.experiment(order[20:], direction="noise")
    value = cp.Mean("positions", side)
    claim = cp.confirm(held_out, made.sites[:2], value=value, found_on=discovery, checks=NONE)
    mean = made.effects[:, order[:20]].mean(1) if side == "clean" else np.zeros(4)
    moved = made.effects[:, order[20:]] - mean[:, None]
    np.testing.assert_allclose(claim.effects[:2], moved[:2], atol=1e-9)
    np.testing.assert_allclose(claim.gap, moved.sum(0), atol=1e-9)
    (fitted,) = {each["pairs_hash"] for each in claim.record["fitted"]}
    assert fitted == discovery.pairs.content_hash


def test_what_was_fitted_on_the_claims_own_pairs_is_refused(made):
    experiment = made.experiment(direction="noise")
    with pytest.raises(PairError, match="would be fitted on the pairs that shall confirm it"):
        cp.confirm(experiment, made.sites[0], value="mean", checks=NONE)
    with pytest.raises(PairError, match="would be fitted on the pairs that shall confirm it"):
        cp.confirm(experiment, made.sites[0], value="noise", checks=NONE)
    (own,) = experiment.fit([cp.Patch(made.sites[0], "mean")])
    with pytest.raises(SettingError, match="no claim is made of the value"):
        cp.confirm(experiment, made.sites[0], value=own.patches[0].value, checks=NONE)


def test_resampled_values_are_other_pairs_and_fitted_on_nothing(made):
    experiment = made.experiment(direction="noise")
    claim = cp.confirm(experiment, made.sites[:2], value=cp.Resample(side="corrupt"), checks=NONE)
    np.testing.assert_allclose(claim.effects[:2], made.effects[:2], atol=1e-9)  # all corrupted prompts hold nothing
    assert "resampled from the corrupt side at all 2 sublayers" in claim.spec["reference"]


def test_the_controls_of_a_claim_put_in_the_same_value(made):
    discovery, held_out = made.experiment(slice(0, 20)), made.experiment(slice(20, 60), direction="noise")
    other = world([0.4, 0.2, 0.0, 0.02], 60, name="made").experiment(slice(20, 60))
    checks = dataclasses.replace(cp.Checks(), corruptions=("zero",))
    claim = cp.confirm(held_out, made.sites[0], value="zero", found_on=discovery, unrelated=[other], checks=checks)
    matched = claim.table("matched sets").set_index("members")["share"]
    gap = made.effects[:, 20:].sum(0).sum()
    assert matched["z.0.1@-1"] == pytest.approx(made.effects[1, 20:].sum() / gap)
    assert "z.0.0@-1" not in matched
    alike = claim.table("specificity")["share"][0]
    assert alike == pytest.approx(claim.findings[0].share)
    assert "no source restores" in claim.check("whole source").skipped
    assert claim.table("other corruptions")["share"][0] == pytest.approx(
        made.effects[0, 20:].sum() / made.gap[20:].sum()
    )
    again = cp.recheck(claim, made.model)
    assert again.holds
    assert [row["change"] for row in again.rows] == pytest.approx([0.0], abs=1e-12)


def test_a_claim_of_a_fitted_value_cannot_be_measured_again_from_its_file(made):
    discovery, held_out = made.experiment(slice(0, 20)), made.experiment(slice(20, 60), direction="noise")
    claim = cp.confirm(held_out, made.sites[0], value="mean(positions)", found_on=discovery, checks=NONE)
    with pytest.raises(SettingError, match="cannot be measured again from its file"):
        cp.recheck(claim, made.model)
