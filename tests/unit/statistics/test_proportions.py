"""Shares have intervals that are honest where all agree."""

import numpy as np
import pytest
from scipy import stats

from causalpatch.statistics import commonest_share, share_interval


@pytest.mark.parametrize(("hits", "n"), [(0, 12), (12, 12), (5, 20), (199, 200)])
def test_independent_pairs_have_the_exact_binomial_interval(hits, n):
    found = share_interval([1.0] * hits + [0.0] * (n - hits), range(n))
    wanted = stats.binomtest(hits, n).proportion_ci(0.95, "exact")
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.estimate == hits / n


def test_groups_that_all_agree_count_once_each():
    found = share_interval([1.0] * 60, np.repeat(np.arange(12), 5))
    assert found.low == pytest.approx(stats.binomtest(12, 12).proportion_ci(0.95, "exact").low)


def test_groups_that_differ_have_the_cluster_interval_within_bounds():
    rng = np.random.default_rng(0)
    values = np.repeat(rng.random(20) < 0.9, 4) * 1.0
    values[0] = 1 - values[0]
    found = share_interval(values, np.repeat(np.arange(20), 4))
    assert 0 <= found.low < found.estimate < found.high <= 1
    assert found.n_groups == 20


def test_few_groups_that_differ_have_no_interval():
    assert not share_interval([1.0, 0.0, 1.0, 1.0], [0, 0, 1, 1]).is_bounded


def test_the_commonest_value_is_chance():
    assert commonest_share([4]) == 1.0
    assert commonest_share(np.array([1, 2, 2, 3])) == 0.5
