"""The simulation of claims: its studies hold the truth that they say, and its page says what was missed."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks import validity


@pytest.mark.parametrize("kind", list(validity.DRAWS))
@pytest.mark.parametrize("pairs", list(validity.SHARED))
def test_studies_hold_the_shares_and_the_spread_that_they_say(kind, pairs):
    effects, gap, group = next(validity.studies(kind, pairs, 4000, 1))
    np.testing.assert_allclose(effects.mean(1) / gap.mean(), validity.SHARES, atol=0.01)
    left = effects - validity.SHARES[:, None] * gap
    assert left.std(1) == pytest.approx(validity.SPREAD, rel=0.1)
    assert gap.std() == pytest.approx(validity.GAP_SPREAD, rel=0.1)
    skew = (left**3).mean() / left.std() ** 3
    assert np.sign(round(skew, 1)) == {"symmetric": 0, "skewed for": 1, "skewed against": -1}[kind]
    means = left[0].reshape(-1, validity.PAIRS_EACH).mean(1)
    alike = (means.var() / left[0].var() - 0.25) / 0.75  # share of the variance that a component's pairs share
    assert alike == pytest.approx(validity.SHARED[pairs], abs=0.1)
    assert len(np.unique(group)) == 4000


def test_a_family_is_decided_and_a_missed_target_is_said_to_be(tmp_path):
    few = validity.family("symmetric", "clustered", 10, 12)
    assert few.power < validity.LEAST_POWER
    many = validity.family("symmetric", "independent", 40, 12)
    assert (many.power, many.n_refused) == (1.0, 0)
    covers = [validity.cover("symmetric", "independent", n, 500) for n in (10, 40)]
    assert all(0.9 < each.plain <= each.of_claims < 1 for each in covers)
    page = validity.report([few, many], covers, validity.whole(2), 1.0)
    assert "| symmetric | clustered | 10 |" in page
    assert "missed: power |" in page
    assert "approximate, 0." in page
    assert "False claims in 0 studies" in page


def test_a_false_claim_is_counted(monkeypatch):
    """A test that does not shift its null claims what lies within delta."""
    plain = validity.minimum_effect
    monkeypatch.setattr(
        validity, "minimum_effect", lambda effects, gap, group, delta, **how: plain(effects, gap, group, 0.0, **how)
    )
    naive = validity.family("symmetric", "independent", 30, 10)
    assert naive.false == 1.0
    assert not naive.keeps
