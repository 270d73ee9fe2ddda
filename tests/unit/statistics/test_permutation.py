"""Sign-flip tests against brute force, and their size in simulation."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from causalpatch.base.errors import SettingError
from causalpatch.statistics.intervals import mean_interval
from causalpatch.statistics.permutation import max_t, sign_flip, smallest_p


def absolute_t(values, group):
    """The jackknife t statistic by plain loops; infinite where groups agree, 0 for zeros."""
    labels = np.unique(group)
    n = labels.size
    left_out = np.array([values[group != label].mean() for label in labels])
    spread = np.sqrt((n - 1) / n * ((left_out - values.mean()) ** 2).sum())
    if spread <= 1e-12 * np.abs(values).max():
        return np.inf if np.abs(values.mean()) > 1e-12 * np.abs(values).max() else 0.0
    return abs(values.mean()) / spread


def all_flips(group):
    labels = np.unique(group)
    for signs in itertools.product([-1, 1], repeat=labels.size):
        yield np.array(signs)[np.searchsorted(labels, group)]


def draw(seed, n_groups, n_cells=3):
    random = np.random.default_rng(seed)
    group = np.concatenate([np.arange(n_groups), random.integers(0, n_groups, random.integers(0, 8))])
    whole = random.random() < 0.3
    values = random.integers(-2, 3, (n_cells, group.size)) if whole else random.normal(0.5, 1, (n_cells, group.size))
    return values.astype(float), group


@given(st.integers(0, 10**6), st.integers(2, 7))
def test_the_exact_p_equals_brute_force(seed, n_groups):
    values, group = draw(seed, n_groups)
    for row, p in zip(values, sign_flip(values, group), strict=True):
        observed = absolute_t(row, group)
        drawn = np.array([absolute_t(row * signs, group) for signs in all_flips(group)])
        near = np.isclose(drawn, observed, rtol=1e-6)
        assert p == pytest.approx(np.mean((drawn >= observed) | near))
        assert p >= smallest_p(n_groups)


@given(st.integers(0, 10**6))
def test_missing_pairs_are_left_out_of_their_cell_only(seed):
    values, group = draw(seed, 6, n_cells=5)
    random = np.random.default_rng(seed)
    values[random.random(values.shape) < 0.4] = np.nan
    for row, p in zip(values, sign_flip(values, group), strict=True):
        kept = ~np.isnan(row)
        if np.unique(group[kept]).size < 2:
            assert np.isnan(p)
        else:
            assert p == sign_flip(row[kept], group[kept])[0]


def test_draws_approach_the_exact_p_and_count_the_observed_one():
    random = np.random.default_rng(0)
    group = np.repeat(np.arange(11), random.integers(1, 4, 11))
    values = random.normal(0.4, 1, (20, group.size))
    exact, drawn = sign_flip(values, group, n_draws=1024), sign_flip(values, group, n_draws=1023)
    assert (exact * 1024 % 1 == 0).all()
    assert (np.round(drawn * 1024, 6) % 1 == 0).all()
    assert not (exact == drawn).all()
    assert np.abs(exact - drawn).max() < 0.06
    assert drawn.min() >= 1 / 1024
    strong = sign_flip(np.full((1, 40), 1.0) + 0.01 * random.normal(size=40), np.arange(40), n_draws=999)
    assert strong.tolist() == [0.001]


def test_draws_handle_missing_pairs_and_unequal_groups_as_exact_enumeration_does():
    random = np.random.default_rng(1)
    group = np.repeat(np.arange(13), random.integers(1, 6, 13))
    values = random.normal(0.3, 1, (10, group.size))
    values[random.random(values.shape) < 0.2] = np.nan
    exact, drawn = sign_flip(values, group, n_draws=4096), sign_flip(values, group, n_draws=4000)
    assert np.abs(exact - drawn).max() < 0.04


def test_the_same_seed_gives_the_same_p_and_another_seed_another():
    values = np.random.default_rng(0).normal(0.2, 1, (5, 40))
    assert (sign_flip(values, range(40)) == sign_flip(values, range(40))).all()
    assert (sign_flip(values, range(40)) != sign_flip(values, range(40), seed=1)).any()


def test_all_cells_share_the_draws():
    values = np.random.default_rng(0).normal(0.2, 1, (3, 40))
    np.testing.assert_array_equal(sign_flip(values, range(40)), sign_flip(values[::-1], range(40))[::-1])
    np.testing.assert_array_equal(sign_flip(values, range(40))[1:2], sign_flip(values[1], range(40)))


def test_constant_cells_have_the_smallest_p_and_zeros_have_one():
    values = np.array([np.full(12, 0.1), np.zeros(12), np.full(12, -7.0)])
    assert sign_flip(values, np.arange(12) // 2).tolist() == [smallest_p(6), 1.0, smallest_p(6)]


def test_a_single_group_has_no_p():
    assert np.isnan(sign_flip([[1.0, 2.0]], [3, 3])).all()


def test_flipping_keeps_its_size_where_pairs_of_a_group_are_alike():
    """200 pairs in 20 unequal groups and no mean effect: p below .05 in about 5 of 100 cells, not in half of them."""
    random = np.random.default_rng(4)
    group = np.repeat(np.arange(20), random.integers(2, 18, 20))
    own = random.normal(size=(2000, 20))[:, group]
    p = sign_flip(own + 0.2 * random.normal(size=(2000, group.size)), group, n_draws=999)
    assert 0.03 < (p < 0.05).mean() < 0.07
    naive = stats.ttest_1samp(own, 0, axis=1).pvalue
    assert (naive < 0.05).mean() > 0.3


@pytest.mark.parametrize(("n_groups", "p"), [(1, 1.0), (2, 0.5), (5, 0.0625), (10, 2.0**-9)])
def test_the_smallest_p_halves_with_every_group(n_groups, p):
    assert smallest_p(n_groups) == p


@given(st.integers(0, 10**6), st.integers(6, 8), st.sampled_from([0.8, 0.9]))
def test_the_critical_value_equals_brute_force(seed, n_groups, level):
    random = np.random.default_rng(seed)
    group = np.concatenate([np.arange(n_groups), random.integers(0, n_groups, random.integers(0, 8))])
    values = random.normal(2, 1, (4, group.size))
    centred = values - values.mean(axis=1, keepdims=True)
    # deviations of whole groups are flipped: put each group's deviation evenly on its pairs
    sizes = np.bincount(group)
    sums = np.array([np.bincount(group, row) for row in centred])
    spread = (sums / sizes)[:, group]
    largest = np.sort([max(absolute_t(row * signs, group) for row in spread) for signs in all_flips(group)])
    expected = largest[int(np.ceil(level * largest.size)) - 1]
    single, bonferroni = stats.t.ppf([(1 + level) / 2, 1 - (1 - level) / 8], n_groups - 1)
    assert max_t(values, group, level=level) == pytest.approx(np.clip(expected, single, bonferroni), rel=1e-6)


@pytest.mark.parametrize("n_missing", [0, 4])
def test_even_groups_take_a_shorter_way_to_the_same_statistics(n_missing):
    random = np.random.default_rng(n_missing)
    values, group = random.normal(0.4, 1, 20) + random.normal(0, 0.5, (4, 20)), np.repeat(np.arange(10), 2)
    values[0, 20 - n_missing :] = np.nan
    largest = np.zeros(2**10)
    for row, p in zip(values, sign_flip(values, group), strict=True):
        here = ~np.isnan(row)
        observed = absolute_t(row[here], group[here])
        drawn = [absolute_t(row[here] * signs, group[here]) for signs in all_flips(group[here])]
        assert p == pytest.approx(np.mean(np.array(drawn) >= observed * (1 - 1e-9)))
        if here.all():
            centred = (row - row.mean()).reshape(10, 2).mean(axis=1)[group]
            largest = np.maximum(largest, [absolute_t(centred * signs, group) for signs in all_flips(group)])
    # the cell with 8 groups has no interval, and so no part in the critical value
    level, tested = 0.9, 4 if n_missing == 0 else 3
    expected = np.sort(largest)[int(np.ceil(level * largest.size)) - 1]
    single, bonferroni = stats.t.ppf([0.95, 1 - 0.05 / tested], 9)
    assert single < expected < bonferroni
    assert max_t(values, group, level=level) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("sizes", [[2] * 12, [3, 1] * 6])
def test_cells_that_miss_pairs_have_their_part_in_the_critical_value(sizes):
    """A cell that misses a whole group is judged as the same cell without that group would be."""
    group = np.repeat(np.arange(12), sizes)
    values = np.random.default_rng(1).normal(size=(6, group.size))
    values[0, group == 11] = np.nan
    signs = np.random.default_rng(2).choice([-1.0, 1.0], (400, 12))
    centred = values - np.nanmean(values, axis=1, keepdims=True)
    sums = np.array([np.bincount(group, np.nan_to_num(row)) for row in centred])
    spread = np.where(np.isnan(values), np.nan, (sums / np.array(sizes))[:, group])
    drawn = [
        max(absolute_t((row * draw[group])[~np.isnan(row)], group[~np.isnan(row)]) for row in spread) for draw in signs
    ]
    assert max_t(values, group, level=0.9) == pytest.approx(np.quantile(drawn, 0.9), rel=0.1)


def test_simultaneous_intervals_hold_all_at_once():
    """30 cells that share half of their variance, 25 groups, 400 runs: all intervals hold in about 95 of 100 runs."""
    random, held, held_single = np.random.default_rng(7), 0, 0
    truth = np.linspace(-1, 1, 30)
    for run in range(400):
        noise = random.normal(size=(30, 25)) + random.normal(size=25)
        values = truth[:, None] + noise
        critical = max_t(values, np.arange(25), n_draws=499, seed=run)
        distance = np.abs(values.mean(axis=1) - truth) / (values.std(axis=1, ddof=1) / 5)
        held += (distance <= critical).all()
        held_single += (distance <= stats.t.ppf(0.975, 24)).all()
    assert 0.92 < held / 400 <= 0.985
    assert held_single / 400 < 0.7


def test_one_cell_has_the_critical_value_of_a_single_interval():
    values = np.random.default_rng(0).normal(size=(1, 40))
    assert max_t(values, range(40)) == pytest.approx(stats.t.ppf(0.975, 39), rel=0.05)


def test_the_critical_value_lies_between_student_for_one_cell_and_bonferroni_for_all():
    lonely = np.zeros((1, 12))
    lonely[0, 0] = 100.0
    assert max_t(lonely, range(12)) == pytest.approx(stats.t.ppf(0.975, 11))
    halves = [signs for signs in itertools.product([-1.0, 1.0], repeat=10) if sum(signs) == 0]
    assert max_t(halves, range(10)) == pytest.approx(stats.t.ppf(1 - 0.025 / len(halves), 9))


def test_the_critical_value_does_not_depend_on_means_or_units():
    random = np.random.default_rng(0)
    values, group = random.normal(size=(6, 30)), np.arange(30) // 2
    other = (values + np.arange(6)[:, None]) * 10.0 ** np.arange(6)[:, None]
    assert max_t(other, group) == pytest.approx(max_t(values, group), rel=1e-9)


def test_constant_and_scarcely_measured_cells_do_not_stretch_the_critical_value():
    values = np.random.default_rng(0).normal(size=(6, 30))
    scarce = np.full((1, 30), np.nan)
    scarce[0, :3] = (1.0, 2.0, 4.0)
    more = np.concatenate([values, np.full((1, 30), 0.1), np.zeros((1, 30)), scarce])
    assert max_t(more, range(30)) == max_t(values, range(30))


def test_too_few_groups_have_an_infinite_critical_value_and_constants_have_none():
    values = np.random.default_rng(0).normal(size=(3, 5))
    assert max_t(values, range(5)) == np.inf
    assert max_t(values, range(5), level=0.9) < np.inf
    assert np.isnan(max_t(np.ones((2, 12)), range(12)))


def test_the_pivot_of_the_interval_is_the_one_that_is_flipped():
    random = np.random.default_rng(2)
    values, group = random.normal(0.3, 1, 30), np.repeat(np.arange(12), random.integers(1, 5, 12))[:30]
    group = np.concatenate([group, np.full(30 - group.size, 11)])
    found = mean_interval(values, group)
    half_width = (found.high - found.low) / 2
    critical = stats.t.ppf(0.975, found.n_groups - 1)
    assert absolute_t(values, group) == pytest.approx(abs(found.estimate) / (half_width / critical))


@pytest.mark.parametrize("call", [sign_flip, max_t])
def test_at_least_one_draw_is_needed(call):
    with pytest.raises(SettingError, match="n_draws is 0"):
        call([[1.0, 2.0]], [0, 1], n_draws=0)


def test_five_thousand_cells_take_about_a_second():
    values = np.random.default_rng(0).normal(size=(5000, 200))
    start = time.perf_counter()
    sign_flip(values, np.arange(200))
    assert time.perf_counter() - start < 15  # 0.5 s alone on one core; room for a busy machine
