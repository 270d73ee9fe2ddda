"""The simulated family coverage against whole simulated sweeps, and skewness between groups."""

import time

import numpy as np
import pytest
from scipy import stats

from causalpatch.statistics.intervals import ratio_intervals
from causalpatch.statistics.permutation import max_t
from causalpatch.statistics.together import MOST_CELLS, group_skewness, simulated_family_coverage


def held_together(draw, n_cells, n_groups, n_sweeps):
    """Return how often all intervals of a sweep hold the mean 0, sweep by sweep through the functions of a table."""
    held = 0
    for sweep in range(n_sweeps):
        values = draw((n_cells, n_groups))
        critical = max_t(values, np.arange(n_groups), n_draws=199, seed=sweep)
        found = ratio_intervals(values, np.ones(n_groups), np.arange(n_groups), critical=critical)
        held += all(interval.holds(0.0) for interval in found)
    return held / n_sweeps


@pytest.mark.parametrize(
    ("n_groups", "n_cells"), [(12, 5), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in ((25, 20), (80, 20)))]
)
def test_the_simulated_family_coverage_is_that_of_whole_sweeps_of_skewed_values(n_groups, n_cells):
    random = np.random.default_rng(n_groups)
    held = held_together(lambda shape: random.exponential(size=shape) - 1, n_cells, n_groups, 300)
    assert simulated_family_coverage([1] * n_groups, n_cells) == pytest.approx(held, abs=0.09)


@pytest.mark.slow
@pytest.mark.parametrize("n_groups", [12, 25, 80])
def test_intervals_of_normal_values_hold_together_as_often_as_they_say(n_groups):
    """20 independent cells, 1,200 sweeps: three standard errors are .02."""
    random = np.random.default_rng(n_groups)
    assert held_together(lambda shape: random.normal(size=shape), 20, n_groups, 1200) == pytest.approx(0.95, abs=0.02)


def test_more_groups_hold_together_more_often_and_more_cells_less_often():
    by_groups = [simulated_family_coverage([1] * count, 20) for count in (10, 25, 100, 400)]
    by_cells = [simulated_family_coverage([1] * 25, count) for count in (1, 5, 20, 144)]
    assert by_groups == sorted(by_groups)
    assert by_cells == sorted(by_cells, reverse=True)
    assert by_cells[0] > 0.9
    assert by_cells[-1] < 0.5
    assert simulated_family_coverage([1] * 25, 36864) == simulated_family_coverage([1] * 25, MOST_CELLS)


def test_groups_of_unequal_size_hold_together_less_often():
    unequal, equal = (simulated_family_coverage(sizes, 50) for sizes in ([100] + [1] * 40, [3] * 41))
    assert unequal < equal - 0.05


def test_the_level_and_the_seed_count():
    assert simulated_family_coverage([1] * 12, 5, level=0.99) > simulated_family_coverage([1] * 12, 5) + 0.05
    assert simulated_family_coverage([1] * 12, 5, seed=1) == pytest.approx(
        simulated_family_coverage([1] * 12, 5), abs=0.03
    )


def test_the_family_coverage_is_simulated_once_and_quickly():
    start = time.perf_counter()
    first = simulated_family_coverage([1] * 101, 101)
    once = time.perf_counter() - start
    start = time.perf_counter()
    assert simulated_family_coverage([1] * 101, 101) == first
    assert time.perf_counter() - start < once / 10
    assert once < 10  # 0.3 s alone on one core; room for a busy machine


def test_skewness_is_that_of_the_groups_means_where_each_group_is_a_pair():
    values = np.random.default_rng(0).exponential(size=(5, 60))
    np.testing.assert_allclose(group_skewness(values, np.arange(60)), stats.skew(values, axis=1))
    np.testing.assert_allclose(group_skewness(-values, np.arange(60)), -stats.skew(values, axis=1))


def test_skewness_looks_at_groups_and_not_at_pairs():
    values = np.random.default_rng(0).exponential(size=(1, 60))
    sums = values.reshape(20, 3).sum(axis=1)
    assert group_skewness(values, np.repeat(np.arange(20), 3)) == pytest.approx(stats.skew(sums))


def test_skewness_leaves_out_missing_pairs_and_cells_without_differences_have_none():
    values = np.random.default_rng(0).exponential(size=(4, 30))
    values[0, 20:] = np.nan
    values[1], values[2], values[3] = 0.1, 0.0, np.nan
    found = group_skewness(values, np.arange(30))
    assert found[0] == pytest.approx(stats.skew(values[0, :20]))
    assert np.isnan(found[1:]).all()
