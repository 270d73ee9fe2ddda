"""Intervals of shares against scipy's exact ones and by simulation."""

import numpy as np
import pytest
from scipy import stats

from causalpatch.base.errors import SettingError
from causalpatch.statistics import commonest_share, mean_interval, share_interval


@pytest.mark.parametrize(("n_so", "n"), [(0, 12), (3, 20), (50, 50), (199, 200)])
def test_single_observations_have_the_exact_binomial_interval(n_so, n):
    found = share_interval([1] * n_so + [0] * (n - n_so), range(n))
    wanted = stats.binomtest(n_so, n).proportion_ci(method="exact")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high), abs=1e-12)
    assert found.estimate == n_so / n


def test_groups_that_all_agree_count_as_one_observation_each():
    found = share_interval(np.ones(60), np.repeat(range(20), 3))
    assert (found.low, found.high) == pytest.approx(stats.binomtest(20, 20).proportion_ci(method="exact"))
    assert found.note == "all 20 groups agree"


def test_larger_groups_have_the_cluster_interval_cut_off_at_the_ends():
    rng = np.random.default_rng(0)
    group = np.repeat(range(40), 2)
    values = (rng.random(80) < 0.97).astype(float)
    found, plain = share_interval(values, group), mean_interval(values, group)
    assert (found.low, found.high) == (plain.low, min(1.0, plain.high))


def test_too_few_groups_have_no_interval_and_what_is_missing_is_left_out():
    assert share_interval([1] * 9, range(9)).status == "none"
    found = share_interval([1.0, np.nan] * 20, range(40))
    assert (found.estimate, found.n_pairs, found.n_missing) == (1.0, 20, 20)
    assert found.is_bounded


def test_anything_but_yes_and_no_is_refused():
    with pytest.raises(SettingError, match=r"0\.5 says neither"):
        share_interval([0.5] * 20, range(20))


def test_the_commonest_value_is_chance():
    assert commonest_share([4]) == 1.0
    assert commonest_share(np.array([1, 2, 2, 3])) == 0.5
