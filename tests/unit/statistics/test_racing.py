"""Races: intervals that hold at all times, and the right top for few runs."""

from functools import partial

import numpy as np
import pytest

from causalpatch.statistics.racing import ACCEPTED, DROPPED, TIED, Racing, asymptotic_width, rounds

N, K, TOP, APART = 400, 20, 3, 0.05
SPACED = APART * np.arange(K)[:, None]


def centred(values, means):
    """Return a pool with exactly these means, (candidate, group)."""
    return means + values - values.mean(1, keepdims=True)


def normal(rng):
    return centred(0.1 * rng.normal(size=(K, N)), SPACED)


def heavy(rng):
    """Student's t with 2.5 degrees of freedom: its fourth and third moments are infinite."""
    return centred(0.07 * rng.standard_t(2.5, size=(K, N)), SPACED)


def skewed(rng):
    return centred(0.07 * rng.lognormal(size=(K, N)), SPACED)


def bounded(rng):
    """Between -1 and 1."""
    share = 0.05 + 0.9 * (SPACED + 1) / 2
    return 2 * rng.beta(60 * share, 60 * (1 - share), size=(K, N)) - 1


def race(pool, rng, **asked):
    """Race a pool, (candidate, group), in rounds."""
    racing, order = Racing(len(pool), pool.shape[1], **asked), rng.permutation(pool.shape[1])
    for size in rounds(pool.shape[1]):
        if not len(racing.running):
            break
        racing.add(pool[np.ix_(racing.running, order[racing.seen : racing.seen + size])])
    racing.stop()
    return racing


def study(make, n_races, **asked):
    """Return how many of some races had another top than the pool, and the full grid's runs over those of all races."""
    rng, n_wrong, n_runs = np.random.default_rng(0), 0, 0
    for _ in range(n_races):
        pool = make(rng)
        found = race(pool, rng, k=TOP, **asked)
        n_wrong += set(found.best.tolist()) != set(np.argsort(-pool.mean(1))[:TOP].tolist())
        n_runs += int(found.n_seen.sum())
    return n_wrong, n_races * K * N / n_runs


@pytest.mark.parametrize("make", [normal, heavy, skewed])
def test_the_top_is_right_for_a_fifth_of_the_runs(make):
    n_wrong, saved = study(make, 500)
    assert n_wrong <= 0.05 * 500
    assert saved >= 5


def test_bounded_values_need_no_normal_distribution():
    n_wrong, saved = study(bounded, 8, bounds=(-1.0, 1.0))
    assert n_wrong == 0
    assert saved >= 3


@pytest.mark.slow
def test_the_top_of_bounded_values_is_right():
    n_wrong, saved = study(bounded, 500, bounds=(-1.0, 1.0))
    assert n_wrong <= 0.05 * 500
    assert saved >= 3


def test_near_ties_are_not_separable_and_cost_the_grid_at_most():
    rng = np.random.default_rng(0)
    pool = centred(0.1 * rng.normal(size=(K, N)), 0.3 + 1e-4 * np.arange(K)[:, None])
    found = race(pool, rng, k=TOP)
    assert (found.status == TIED).sum() >= K - 2
    assert found.n_seen.sum() <= 1.05 * K * N
    assert len(found.best) == TOP
    np.testing.assert_allclose(found.mean[found.status == TIED], pool.mean(1)[found.status == TIED])


def test_a_tie_that_does_not_matter_ends_the_race():
    rng = np.random.default_rng(0)
    pool = centred(0.01 * rng.normal(size=(4, N)), np.full((4, 1), 0.3))
    found = race(pool, rng, k=1, tie=0.05)
    assert (found.status == TIED).all()
    assert found.saved > 0.5


def misses(draw, n_studies, bounds=None):
    """Return how often an interval misses the pool's mean at any time."""
    rng, n_missed = np.random.default_rng(1), 0
    for _ in range(n_studies):
        pool = draw(rng)[None]
        racing, mean = Racing(1, pool.shape[1], above=-1e9, bounds=bounds), float(pool.mean())
        racing._decide = lambda: None
        held = True
        for size in rounds(pool.shape[1]):
            racing.add(pool[:, racing.seen : racing.seen + size])
            held &= bool(racing.low[0] - 1e-9 <= mean <= racing.high[0] + 1e-9)
        n_missed += not held
    return n_missed / n_studies


def test_intervals_hold_at_all_times():
    assert misses(lambda rng: rng.normal(size=200), 1000) <= 0.05
    beta = partial(misses, lambda rng: rng.beta(0.5, 2, size=200), 60)
    assert beta(bounds=(0.0, 1.0)) <= 0.05


def test_what_is_rare_needs_bounds():
    """One in fifty: an asymptotic interval that has not seen one yet is wrong about them, one by betting is not."""

    def rare(rng):
        return (rng.random(200) < 0.02).astype(float)

    assert misses(rare, 200) > 0.3
    assert misses(rare, 60, bounds=(0.0, 1.0)) <= 0.05


def test_intervals_end_in_the_mean_of_the_pool():
    pool = np.random.default_rng(0).normal(size=(3, 100))
    racing = Racing(3, 100, above=-1e9)
    racing._decide = lambda: None
    racing.add(pool)
    np.testing.assert_allclose(racing.low, pool.mean(1))
    np.testing.assert_allclose(racing.high, pool.mean(1))
    assert np.isinf(asymptotic_width(np.ones(1), 29, 100, 0.05)).all()


def test_a_threshold_is_met_from_both_sides_by_magnitude():
    rng = np.random.default_rng(0)
    pool = centred(0.05 * rng.normal(size=(4, N)), np.array([[0.4], [-0.4], [0.05], [0.0]]))
    found = race(pool, rng, above=0.1, by_magnitude=True)
    assert found.status.tolist() == [ACCEPTED, ACCEPTED, DROPPED, DROPPED]
    assert set(found.best.tolist()) == {0, 1}
    low, high = found.ends
    assert (low[:2] > 0.1).all()
    assert (high[2:] < 0.1).all()


def test_dropped_candidates_are_measured_no_more():
    rng = np.random.default_rng(0)
    found = race(centred(0.1 * rng.normal(size=(3, N)), np.array([[1.0], [0.97], [0.0]])), rng, k=1)
    assert found.n_seen[2] < found.n_seen[0]
    assert found.saved == pytest.approx(1 - found.n_seen.sum() / (3 * N))
