"""The minimum-effect test against brute force and simulation, its intervals, and the power that is promised."""

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy import stats

from causalpatch.base.errors import SettingError
from causalpatch.statistics.intervals import ratio_intervals
from causalpatch.statistics.permutation import max_t, shifted_max_t, sign_flip, smallest_p
from causalpatch.statistics.power import groups_for, power_with, spread_interval
from causalpatch.statistics.skewed import skew_limits
from causalpatch.statistics.verdicts import ABSENT, INCONCLUSIVE, SUPPORTED, minimum_effect


def plain_t(values, group):
    """The jackknife t statistic by plain loops; a million where groups agree exactly."""
    labels = np.unique(group)
    n = labels.size
    left_out = np.array([values[group != label].mean() for label in labels])
    spread = np.sqrt((n - 1) / n * ((left_out - values.mean()) ** 2).sum())
    return values.mean() / spread if spread > 1e-12 else 1e6 * np.sign(values.mean())


def plain_p(effects, gap, group, delta):
    """p of every cell by trying all flips, cell by cell."""
    shifted = [np.sign(row.sum()) * row - delta * gap for row in effects]
    largest = []
    for signs in itertools.product([-1, 1], repeat=np.unique(group).size):
        flip = np.array(signs)[np.searchsorted(np.unique(group), group)]
        largest.append(max(abs(plain_t(row * flip, group)) for row in shifted))
    observed = [plain_t(row, group) for row in shifted]
    return [np.mean(np.array(largest) >= t * (1 - 1e-7)) if t > 0 else 1.0 for t in observed]


@given(st.integers(0, 10**6), st.integers(3, 6), st.sampled_from([0.0, 0.1, 0.5]))
def test_p_at_the_shifted_null_is_that_of_all_flips(seed, n_groups, delta):
    random = np.random.default_rng(seed)
    group = np.concatenate([np.arange(n_groups), random.integers(0, n_groups, random.integers(0, 5))])
    gap = random.normal(2, 0.3, group.size)
    effects = random.normal(0, 1, (3, 1)) * gap + random.normal(0, 0.3, (3, group.size))
    found = shifted_max_t(effects, gap, group, delta)
    np.testing.assert_allclose(found, plain_p(effects, gap, group, delta), atol=1e-12)
    assert (found >= smallest_p(n_groups) - 1e-15).all()


def test_without_a_delta_one_cell_is_the_sign_flip_test():
    random = np.random.default_rng(0)
    effects = random.normal(0.3, 1, (1, 9))
    np.testing.assert_allclose(shifted_max_t(effects, np.ones(9), range(9), 0.0), sign_flip(effects, range(9)))


def test_random_flips_come_near_to_all_of_them():
    random = np.random.default_rng(1)
    gap = random.normal(1, 0.1, 12)
    effects = np.array([0.14, 0.13])[:, None] * gap + random.normal(0, 0.05, (2, 12))
    exact = shifted_max_t(effects, gap, range(12), 0.1)
    drawn = shifted_max_t(effects, gap, range(12), 0.1, n_draws=2000)
    assert 0.001 < exact.min() < 0.5
    np.testing.assert_allclose(drawn, exact, atol=0.03)


def test_a_share_within_delta_has_p_1_and_one_without_pairs_has_none():
    p = shifted_max_t([[0.5, 0.6, 0.4], [0.05, 0.04, 0.06], [np.nan] * 3], [1.0, 1.0, 1.0], range(3), 0.1)
    assert p[1] == 1.0
    assert np.isnan(p[2])


def made(shares, n_groups=40, spread=0.05, seed=0):
    random = np.random.default_rng(seed)
    gap = random.normal(1, 0.1, n_groups)
    return np.asarray(shares)[:, None] * gap + random.normal(0, spread, (len(shares), n_groups)), gap


def test_verdicts_follow_from_intervals_and_p():
    effects, gap = made([0.4, -0.3, 0.0, 0.1])
    found = minimum_effect(effects, gap, range(40), 0.1)
    assert found.verdicts == [SUPPORTED, SUPPORTED, ABSENT, INCONCLUSIVE]
    for place, verdict in enumerate(found.verdicts):
        beyond = found.low[place] > 0.1 or found.high[place] < -0.1
        assert (verdict == SUPPORTED) == (beyond and found.p[place] <= 0.05)
        within = found.low_inner[place] >= -0.1 and found.high_inner[place] <= 0.1
        assert (verdict == ABSENT) == within
        assert found.low[place] <= found.low_inner[place] <= found.share[place] <= found.high_inner[place]


def test_both_the_interval_and_p_must_agree():
    effects, gap = made([0.4])
    found = minimum_effect(effects, gap, range(40), 0.1, alpha=0.05)
    assert found.verdicts == [SUPPORTED]
    object.__setattr__(found, "p", np.array([0.06]))
    assert found.verdicts == [INCONCLUSIVE]


def test_ends_are_moved_outwards_only_and_by_the_skew():
    random = np.random.default_rng(3)
    gap = np.ones(40)
    effects = 0.3 + 0.1 * np.stack([1 - random.exponential(size=40), random.exponential(size=40) - 1])
    found = minimum_effect(effects, gap, range(40), 0.1)
    plain = ratio_intervals(effects, gap, range(40), critical=found.critical)
    for place, interval in enumerate(plain):
        assert found.low[place] <= interval.low + 1e-12
        assert found.high[place] >= interval.high - 1e-12
    left, right = found.skew
    assert left < -0.5 < 0.5 < right
    assert plain[0].low - found.low[0] > 0.005 > found.high[0] - plain[0].high
    assert found.high[1] - plain[1].high > 0.005 > plain[1].low - found.low[1]


@given(st.floats(-2, 2), st.integers(30, 200), st.floats(1, 5))
def test_the_moved_critical_values_undo_halls_transformation(skew, n, critical):
    low, high = (float(each[0]) for each in skew_limits(critical, np.array([skew]), np.array([n])))
    a = skew * np.sqrt(n * (n - 1)) / (n - 2) / np.sqrt(n)

    def bent(t):
        return t + a * t**2 / 3 + a**2 * t**3 / 27 + a / 6

    assert low == 0 or bent(low) == pytest.approx(critical, rel=1e-4, abs=1e-4)
    assert high == 0 or bent(-high) == pytest.approx(-critical, rel=1e-4, abs=1e-4)


def test_few_groups_move_both_ends_though_they_do_not_look_skewed():
    low, high = skew_limits(3.0, np.zeros(2), np.array([29, 30]))
    assert min(low[0], high[0]) > 3.0
    assert low[1] == pytest.approx(3.0) == high[1]


def test_groups_that_agree_exactly_have_a_point():
    found = minimum_effect([[0.5] * 12, [0.0] * 12], [1.0] * 12, range(12), 0.1)
    assert (found.low[0], found.high[0]) == pytest.approx((0.5, 0.5))
    assert found.p[0] == smallest_p(12)
    assert found.verdicts == [SUPPORTED, ABSENT]


def test_fewer_than_ten_groups_have_no_verdict():
    effects, gap = made([0.9, 0.0], n_groups=9)
    found = minimum_effect(effects, gap, range(9), 0.1)
    assert found.verdicts == [INCONCLUSIVE, INCONCLUSIVE]
    assert np.isnan(found.low).all()
    assert found.is_approximate.all()


def test_a_gap_that_is_not_told_from_nothing_has_no_interval():
    random = np.random.default_rng(0)
    found = minimum_effect(random.normal(0, 1, (1, 20)), random.normal(0.01, 1, 20), range(20), 0.1)
    assert np.isnan(found.low).all()
    assert found.verdicts == [INCONCLUSIVE]


def test_pairs_that_were_not_measured_are_left_out_of_their_cell_alone():
    effects, gap = made([0.4, 0.3])
    whole = minimum_effect(effects[1:], gap, range(40), 0.1)
    effects[0, :12] = np.nan
    found = minimum_effect(effects, gap, range(40), 0.1)
    assert found.n_groups.tolist() == [28, 40]
    assert found.share[0] == pytest.approx(effects[0, 12:].sum() / gap[12:].sum())
    assert found.share[1] == pytest.approx(whole.share[0])


@pytest.mark.parametrize(("delta", "alpha"), [(-0.1, 0.05), (np.nan, 0.05), (0.1, 0.0), (0.1, 0.5)])
def test_impossible_numbers_are_refused(delta, alpha):
    with pytest.raises(SettingError, match="no test of a share beyond"):
        minimum_effect([[1.0, 2.0]], [1.0, 2.0], range(2), delta, alpha=alpha)


def test_nulls_up_to_delta_are_not_claimed_although_all_of_them_differ_from_0():
    """Ten nulls, four of them at delta: of 200 studies few have a false claim, and all a small p against 0."""
    shares = np.array([0.1] * 4 + [0.08, 0.06, -0.05, 0.04, -0.03, 0.05])
    false = against_zero = 0
    for seed in range(200):
        effects, gap = made(shares, n_groups=25, spread=0.06, seed=seed)
        false += SUPPORTED in minimum_effect(effects, gap, range(25), 0.1, n_draws=499, seed=seed).verdicts
        against_zero += (shifted_max_t(effects, gap, range(25), 0.0, n_draws=499, seed=seed) <= 0.05).any()
    assert false <= 18  # .05 of 200 would be 10 +- 3
    assert against_zero == 200


def test_power_is_that_of_simulated_studies():
    n_groups, spread, margin = 20, 0.12, 0.1
    n_found = 0
    for seed in range(400):
        random = np.random.default_rng(seed)
        effects = 0.1 + margin + spread * random.standard_normal((4, n_groups))
        found = minimum_effect(effects, np.ones(n_groups), range(n_groups), 0.1, n_draws=499, seed=seed)
        n_found += found.verdicts[0] == SUPPORTED
    promised = power_with(spread, margin, n_groups, n_tests=4)
    assert 0.5 < promised < 0.9
    assert n_found / 400 == pytest.approx(promised, abs=0.08)


def test_as_many_groups_are_asked_for_as_the_power_needs():
    needed = groups_for(0.12, 0.1, 0.8, n_tests=4)
    assert power_with(0.12, 0.1, needed, n_tests=4) >= 0.8 > power_with(0.12, 0.1, needed - 1, n_tests=4)
    assert groups_for(0.0, 0.1, 0.8) == 10
    assert groups_for(1.0, 0.0, 0.8) is None
    assert groups_for(100.0, 0.01, 0.8) is None
    assert power_with(0.1, 1.0, 9) == 0.0
    assert power_with(0.1, 1.0, 12, alpha=1e-4) == 0.0


def test_the_interval_of_a_spread_holds_it_as_often_as_it_says():
    random = np.random.default_rng(0)
    spreads = random.normal(0, 2.0, (4000, 12)).std(1, ddof=1)
    ends = np.array([spread_interval(each, 12, 0.8) for each in spreads])
    assert np.mean((ends[:, 0] <= 2) & (ends[:, 1] >= 2)) == pytest.approx(0.8, abs=0.02)
    low, high = spread_interval(1.0, 12, 0.9)
    assert (1 / low**2, 1 / high**2) == pytest.approx(tuple(stats.chi2.ppf([0.95, 0.05], 11) / 11))


def test_the_critical_value_is_that_of_max_t():
    effects, gap = made([0.4, 0.2, 0.0])
    found = minimum_effect(effects, gap, range(40), 0.1)
    left = effects - found.share[:, None] * gap
    assert found.critical == max_t(left, range(40))
