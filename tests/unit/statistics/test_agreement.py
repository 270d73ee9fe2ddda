"""The share of pairs that say the same as their mean; rankings against scipy, and of items that stand for several."""

import numpy as np
import pytest
from hypothesis import given, strategies as st
from hypothesis.extra.numpy import arrays
from scipy import stats

from causalpatch.statistics.agreement import kendall, recall_at, sign_agreement, spearman

values = arrays(np.float64, (3, 7), elements=st.one_of(st.integers(-3, 3).map(float), st.just(np.nan)))


@given(values)
def test_agreement_equals_counting_pair_by_pair(cells):
    for row, share in zip(cells, sign_agreement(cells), strict=True):
        measured = [x for x in row if x == x]
        if not measured:
            assert np.isnan(share)
            continue
        total = sum(measured)
        assert share == sum(x * total > 0 for x in measured) / len(measured)


@given(values)
def test_agreement_does_not_depend_on_sign_or_scale(cells):
    np.testing.assert_array_equal(sign_agreement(cells), sign_agreement(-4 * cells))


def test_zeros_agree_with_nothing():
    assert sign_agreement([[0.0, 0.0, 3.0, 1.0]]).tolist() == [0.5]
    assert sign_agreement([[1.0, -1.0]]).tolist() == [0.0]


def ranked(seed, n, ties):
    random = np.random.default_rng(seed)
    both = random.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], n).T
    return np.round(both, 1) if ties else both


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("n", [3, 40, 1300])
def test_rank_correlations_are_scipys(n, ties):
    x, y = ranked(0, n, ties)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic)


def test_an_item_that_stands_for_several_counts_as_if_it_were_several():
    x, y = ranked(1, 30, ties=True)
    times = np.random.default_rng(2).integers(1, 5, 30)
    for correlation in (spearman, kendall):
        assert correlation(x, y, times) == pytest.approx(correlation(np.repeat(x, times), np.repeat(y, times)))
        assert correlation(x, y, 0.5 * times) == pytest.approx(correlation(x, y, times))
        assert np.isnan(correlation(x, np.zeros(30), times))
        assert np.isnan(correlation([], []))


def test_recall_is_that_of_items_one_by_one():
    random = np.random.default_rng(3)
    sizes, taken, times = random.normal(size=20), random.random(20) < 0.5, random.integers(1, 4, 20)
    whole, which = np.repeat(sizes, times), np.repeat(taken, times)
    for k in (1, 5, 17, int(times.sum())):
        largest = np.argsort(-whole, kind="stable")[:k]
        assert recall_at(sizes, taken, k, times) == pytest.approx(which[largest].mean())
