"""Intervals against direct solutions, against simulation, and their refusals."""

import time

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import optimize, stats

from causalpatch.base.errors import SettingError
from causalpatch.statistics.coverage import effective_groups, simulated_coverage
from causalpatch.statistics.intervals import (
    NO_GAP,
    TOO_FEW,
    bca_interval,
    mean_interval,
    ratio_interval,
    ratio_intervals,
)


def t_statistic(values, group):
    """The jackknife t statistic by plain loops."""
    labels = np.unique(group)
    left_out = np.array([values[group != label].mean() for label in labels])
    n = labels.size
    return values.mean() / np.sqrt((n - 1) / n * ((left_out - values.mean()) ** 2).sum())


def draw(seed, n_groups=None, gap=3.0):
    random = np.random.default_rng(seed)
    n_groups = n_groups or int(random.integers(10, 40))
    sizes = random.integers(1, 5, n_groups)
    group = np.repeat(random.permutation(n_groups), sizes)
    own = random.normal(size=(2, n_groups))[:, group]
    noise = random.normal(size=(2, group.size))
    bottom = gap + own[0] + noise[0]
    return 0.4 * bottom + own[1] + noise[1], bottom, group


@given(st.integers(0, 10**6), st.sampled_from([0.9, 0.95, 0.99]))
def test_fieller_equals_a_direct_solution_of_its_quadratic(seed, level):
    top, bottom, group = draw(seed)
    labels, n_groups, n = np.unique(group), np.unique(group).size, group.size
    scale = (n_groups - 1) / n_groups

    def covariance(x, y):
        moves = [(x[group != g].mean() - x.mean()) * (y[group != g].mean() - y.mean()) for g in labels]
        return scale * sum(moves)

    squared = stats.t.ppf((1 + level) / 2, n_groups - 1) ** 2
    quadratic = (
        bottom.mean() ** 2 - squared * covariance(bottom, bottom),
        -2 * (top.mean() * bottom.mean() - squared * covariance(top, bottom)),
        top.mean() ** 2 - squared * covariance(top, top),
    )
    found = ratio_interval(top, bottom, group, level=level)
    assert found.estimate == pytest.approx(top.sum() / bottom.sum())
    assert (found.n_groups, found.n_pairs, found.n_missing) == (n_groups, n, 0)
    if quadratic[0] > 0:
        np.testing.assert_allclose(sorted(np.roots(quadratic)), [found.low, found.high], rtol=1e-6, atol=1e-9)
    else:
        assert (found.status, found.note) == ("none", NO_GAP)


@given(st.integers(0, 10**6))
def test_the_ends_are_the_ratios_that_a_t_test_just_does_not_reject(seed):
    top, bottom, group = draw(seed, gap=6.0)
    found = ratio_interval(top, bottom, group, critical=2.5)

    def excess(ratio):
        return abs(t_statistic(top - ratio * bottom, group)) - 2.5

    low = optimize.brentq(excess, found.estimate - 20 * (found.estimate - found.low), found.estimate)
    high = optimize.brentq(excess, found.estimate, found.estimate + 20 * (found.high - found.estimate))
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-8), pytest.approx(high, abs=1e-8))


@given(st.integers(0, 10**6))
def test_a_mean_of_equal_groups_has_students_interval(seed):
    random = np.random.default_rng(seed)
    own = random.normal(size=30)
    expected = stats.t.interval(0.95, 29, own.mean(), own.std(ddof=1) / np.sqrt(30))
    found = mean_interval(np.repeat(own, 2), np.repeat(np.arange(30), 2))
    assert (found.low, found.high) == (pytest.approx(expected[0]), pytest.approx(expected[1]))
    assert (found.status, found.note, found.coverage) == ("exact", "", None)


@given(st.integers(0, 10**6), st.floats(0.01, 100), st.sampled_from([-1.0, 1.0]))
def test_intervals_follow_a_change_of_unit(seed, scale, sign):
    top, bottom, group = draw(seed, gap=6.0)
    plain, other = ratio_interval(top, bottom, group), ratio_interval(sign * scale * top, scale * bottom, group)
    ends = (plain.low, plain.high) if sign > 0 else (-plain.high, -plain.low)
    np.testing.assert_allclose((other.low, other.high), ends, rtol=1e-9, atol=1e-12)


@given(st.integers(0, 10**6))
def test_the_order_of_pairs_and_the_names_of_groups_do_not_matter(seed):
    top, bottom, group = draw(seed, gap=6.0)
    order = np.random.default_rng(seed).permutation(group.size)
    a, b = ratio_interval(top, bottom, group), ratio_interval(top[order], bottom[order], 1000 - 7 * group[order])
    np.testing.assert_allclose((a.low, a.high), (b.low, b.high), rtol=1e-9)


@given(st.integers(0, 10**6))
def test_many_cells_at_once_equal_one_by_one(seed):
    random = np.random.default_rng(seed)
    _, bottom, group = draw(seed)
    cells = random.normal(1, 1, (6, group.size))
    cells[random.random(cells.shape) < 0.3] = np.nan
    cells[5] = np.nan
    together = ratio_intervals(cells, bottom, group)
    for row, found in zip(cells, together, strict=True):
        kept = ~np.isnan(row)
        assert found.n_pairs + found.n_missing == group.size
        if not kept.any():
            assert (found.status, found.n_groups) == ("none", 0)
            assert np.isnan(found.estimate)
            continue
        alone = ratio_interval(row[kept], bottom[kept], group[kept])
        assert (alone.status, alone.n_groups, alone.n_pairs) == (found.status, found.n_groups, found.n_pairs)
        np.testing.assert_allclose((alone.estimate, alone.low, alone.high), (found.estimate, found.low, found.high))
        if found.coverage is not None:
            assert found.coverage <= alone.coverage + 0.02


@pytest.mark.parametrize("n_groups", range(1, 10))
def test_under_ten_groups_there_is_no_interval_but_each_groups_own_value(n_groups):
    top, bottom, group = draw(1, n_groups)
    found = ratio_interval(top, bottom, group)
    assert (found.status, found.note, found.coverage) == ("none", TOO_FEW, None)
    assert np.isnan([found.low, found.high]).all()
    assert found.estimate == pytest.approx(top.mean() / bottom.mean())
    own = [top[group == g].mean() / bottom.mean() for g in range(n_groups)]
    np.testing.assert_allclose(found.group_values, own)
    assert found.holds(1e9)


@pytest.mark.parametrize("n_groups", [10, 29])
def test_ten_to_twenty_nine_groups_are_approximate_with_the_simulated_coverage(n_groups):
    values = np.random.default_rng(0).normal(size=n_groups)
    found = mean_interval(values, np.arange(n_groups))
    assert found.status == "approximate"
    assert found.coverage == simulated_coverage([1] * n_groups, stats.t.ppf(0.975, n_groups - 1))
    assert 0.85 < found.coverage < 0.95
    assert f"{n_groups} independent groups; coverage {found.coverage:.3f} in simulation" in found.note


def test_thirty_equal_groups_are_enough_and_thirty_unequal_ones_are_not():
    values = np.random.default_rng(0).normal(size=60)
    assert mean_interval(values, np.arange(60) // 2).status == "exact"
    unequal = np.concatenate([np.zeros(30, int), np.arange(1, 31)])
    found = mean_interval(values, unequal)
    assert (found.status, found.n_groups) == ("approximate", 31)
    assert found.coverage < 0.95


def test_an_unbounded_set_says_that_the_gap_is_not_distinguishable_from_zero():
    random = np.random.default_rng(3)
    found = ratio_interval(random.normal(5, 1, 40), random.normal(0, 1, 40), range(40))
    assert (found.status, found.note, found.is_bounded) == ("none", NO_GAP, False)
    assert np.isnan([found.low, found.high]).all()


@given(st.integers(0, 10**6), st.floats(-1, 1))
def test_the_set_is_bounded_exactly_where_the_interval_of_the_gap_leaves_zero_out(seed, gap):
    top, bottom, group = draw(seed, gap=gap)
    assert ratio_interval(top, bottom, group).is_bounded != mean_interval(bottom, group).holds(0.0)


@pytest.mark.parametrize("top", [0.0, 0.1, -3.0])
def test_constant_cells_have_a_degenerate_interval(top):
    found = ratio_interval(np.full(36, top), np.full(36, 0.3), np.arange(36))
    assert found.low == found.high == found.estimate == pytest.approx(top / 0.3)
    assert found.status == "exact"
    bottom = np.random.default_rng(0).normal(3, 1, 36)
    same_share = ratio_interval(top * bottom, bottom, np.arange(36))
    assert same_share.low == same_share.high == same_share.estimate


def test_tiny_differences_between_groups_are_not_taken_for_none():
    top = 1 + 1e-9 * np.random.default_rng(0).normal(size=40)
    found = mean_interval(top, np.arange(40))
    assert found.low < found.estimate < found.high


def test_a_denominator_of_zero_gives_no_ratio():
    found = ratio_interval(np.ones(30), np.zeros(30), np.arange(30))
    assert (found.status, found.note) == ("none", NO_GAP)
    assert np.isnan(found.estimate)


def test_a_critical_value_widens_the_interval_and_an_infinite_one_removes_it():
    top, bottom, group = draw(0, 40, gap=6.0)
    usual, wide = ratio_interval(top, bottom, group), ratio_interval(top, bottom, group, critical=3.5)
    assert wide.low < usual.low < usual.high < wide.high
    assert ratio_interval(top, bottom, group, critical=float("inf")).note == TOO_FEW


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_outside_zero_to_one_is_refused(level):
    for interval in (ratio_interval, bca_interval):
        with pytest.raises(SettingError, match="is not between 0 and 1"):
            interval([1.0], [1.0], [0], level=level)


def test_the_ratio_interval_covers_in_simulation():
    """40 groups of 1 to 4 pairs that share most of their value: the truth is held in about 95 of 100 runs."""
    random, n_runs, truth = np.random.default_rng(5), 1500, 0.4
    group = np.repeat(np.arange(40), random.integers(1, 5, 40))
    covered = 0
    for _ in range(n_runs):
        own = random.normal(size=(2, 40))[:, group]
        bottom = 2 + own[0] + 0.3 * random.normal(size=group.size)
        top = truth * bottom + own[1] + 0.3 * random.normal(size=group.size)
        covered += ratio_interval(top, bottom, group).holds(truth)
    assert 0.93 < covered / n_runs < 0.97


def test_one_giant_group_does_not_make_the_interval_too_narrow():
    """The usual cluster-robust variance would cover .19 here."""
    assert simulated_coverage([100] + [1] * 40, stats.t.ppf(0.975, 40)) > 0.9


def test_groups_count_as_many_as_their_sizes_allow():
    assert effective_groups(np.array([[1.0, 1, 1, 1], [3, 3, 0, 0], [0, 0, 0, 0]])).tolist() == [4, 2, 0]


def test_the_simulated_coverage_is_the_nominal_one_at_best_and_repeats():
    critical = stats.t.ppf(0.975, 99)
    assert simulated_coverage([2] * 100, critical) == simulated_coverage([2] * 100, critical) < 0.955
    assert simulated_coverage([1] * 10, 2.262) < simulated_coverage([1] * 100, critical)
    assert simulated_coverage([1] * 10, 2.262) < simulated_coverage([1] * 10, 3.0)


def test_bca_is_near_fieller_for_many_groups_and_refused_for_few():
    top, bottom, group = draw(2, 100, gap=6.0)
    bca, fieller = bca_interval(top, bottom, group), ratio_interval(top, bottom, group)
    assert (bca.status, bca.n_groups, bca.estimate) == ("exact", 100, pytest.approx(fieller.estimate))
    width = fieller.high - fieller.low
    assert abs(bca.low - fieller.low) < 0.15 * width
    assert abs(bca.high - fieller.high) < 0.15 * width
    assert bca_interval(top, bottom, group) == bca
    assert bca_interval(top, bottom, np.arange(group.size) % 29).note == TOO_FEW


def test_bca_equals_scipy_for_pairs_that_are_their_own_groups():
    values = np.random.default_rng(1).exponential(size=60)
    ours = bca_interval(values, np.ones(60), np.arange(60), n_draws=20000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=20000, rng=np.random.default_rng(0)).confidence_interval
    np.testing.assert_allclose((ours.low, ours.high), theirs, atol=0.02)


def test_bca_of_equal_groups_is_a_point_and_without_a_gap_there_is_none():
    same = bca_interval(np.full(40, 0.2), np.full(40, 0.4), np.arange(40))
    assert same.low == same.high == same.estimate == 0.5
    random = np.random.default_rng(3)
    assert bca_interval(random.normal(5, 1, 40), random.normal(0, 1, 40), np.arange(40)).note == NO_GAP


def test_five_thousand_cells_take_about_a_second_whatever_is_missing():
    random = np.random.default_rng(0)
    cells, bottom = random.normal(size=(5000, 200)), random.normal(3, 1, 200)
    cells[random.random(cells.shape) < 0.1] = np.nan
    group = random.integers(0, 30, 200)
    start = time.perf_counter()
    found = ratio_intervals(cells, bottom, group)
    assert time.perf_counter() - start < 5  # 0.1 s alone on one core; room for a busy machine
    assert {interval.status for interval in found} == {"approximate"}
