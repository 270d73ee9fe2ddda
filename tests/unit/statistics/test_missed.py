"""The bound on what a screen missed holds at its level, by exact enumeration and by simulation, and is what it says."""

import itertools

import numpy as np
import pytest
from scipy import stats

from causalpatch.statistics import clopper_pearson
from causalpatch.statistics.missed import divide, draw_stratified, most_missed, sample_for


def chances(size, drawn, matter):
    """The probability of each number that is found in one stratum."""
    return stats.hypergeom(size, matter, drawn).pmf(np.arange(drawn + 1))


def coverage(sizes, sampled, level):
    """The lowest probability that the bound is not below the number, over all ways in which components may matter."""
    every = list(itertools.product(*(range(drawn + 1) for drawn in sampled)))
    bounds = np.array([most_missed(sizes, sampled, found, level) for found in every])
    lowest = 1.0
    for matter in itertools.product(*(range(size + 1) for size in sizes)):
        parts = [chances(*each) for each in zip(sizes, sampled, matter, strict=True)]
        probability = np.array([np.prod([part[n] for part, n in zip(parts, found, strict=True)]) for found in every])
        assert probability.sum() == pytest.approx(1)
        lowest = min(lowest, float(probability[bounds >= sum(matter)].sum()))
    return lowest


@pytest.mark.parametrize("level", [0.8, 0.95])
@pytest.mark.parametrize(
    ("sizes", "sampled"),
    [
        ((30,), (6,)),
        ((30,), (25,)),
        ((12, 12), (3, 3)),
        ((10, 14), (8, 2)),
        ((6, 7, 8), (2, 2, 2)),
        ((5, 6, 9), (5, 1, 4)),
        ((8, 8), (4, 0)),
    ],
)
def test_the_bound_holds_at_its_level_wherever_what_matters_lies(sizes, sampled, level):
    """No draws: every population of such strata, every sample, by the probabilities of the hypergeometric."""
    assert coverage(sizes, sampled, level) >= level - 1e-12


def test_the_bound_holds_at_its_level_in_simulated_screens():
    """Scores that say nothing of effects, so that misses are many: of 2,000 screens at most 5 % bound too few."""
    random = np.random.default_rng(0)
    failures, shares = 0, []
    for _ in range(2000):
        n_components = int(random.integers(1000, 3000))
        effects, scores = random.exponential(0.02, n_components), random.normal(size=n_components)
        ranked = np.argsort(-np.abs(scores), kind="stable")[10:]
        sample = draw_stratified(ranked, 60, random)
        matters = effects > 0.05  # 8 % of them
        found = np.bincount(sample.stratum[matters[sample.chosen]], minlength=len(sample.sizes))
        bound = most_missed(sample.sizes, sample.sampled, found)
        failures += bound < matters[ranked].sum()
        shares.append(bound / len(ranked))
    assert 0 < failures <= 0.05 * 2000  # and it is not so large that it could never fail
    assert np.median(shares) < 0.2


def test_the_bound_holds_where_scores_rank_effects_well():
    """What is missed lies in the first strata: the bound is then larger than it need be, never smaller."""
    random = np.random.default_rng(1)
    failures = 0
    for _ in range(500):
        effects = random.exponential(0.02, 400)
        scores = effects * random.exponential(1.0, 400)
        ranked = np.argsort(-scores, kind="stable")[10:]
        sample = draw_stratified(ranked, 40, random)
        matters = effects > 0.06
        found = np.bincount(sample.stratum[matters[sample.chosen]], minlength=len(sample.sizes))
        failures += most_missed(sample.sizes, sample.sampled, found) < matters[ranked].sum()
    assert failures <= 0.05 * 500


def test_without_rounding_the_bound_is_clopper_and_pearsons():
    for found in (0, 1, 7):
        upper = clopper_pearson(found, 60, level=0.9)[1]
        parts = np.bincount(np.arange(found) % 3, minlength=3)
        assert most_missed([100] * 3, [20] * 3, parts, 0.95) == int(300 * upper)


def test_what_is_measured_whole_is_counted():
    assert most_missed([20, 30], [20, 30], [4, 0]) == 4
    assert most_missed([20, 30], [20, 6], [4, 0]) == 4 + most_missed([30], [6], [0])
    assert most_missed([20], [0], [0]) == 20
    assert most_missed([], [], []) == 0


def test_strata_are_neighbours_in_rank_and_sampled_alike():
    ranked = np.random.default_rng(1).permutation(437)
    sample = draw_stratified(ranked, 100, np.random.default_rng(2))
    assert sample.sizes.sum() == 437
    assert sample.sampled.tolist() == [10] * 10
    place = np.empty(437, dtype=int)
    place[ranked] = np.arange(437)
    ends = np.cumsum(sample.sizes)
    assert (np.searchsorted(ends, place[sample.chosen], side="right") == sample.stratum).all()
    assert len(set(sample.chosen.tolist())) == 100
    assert sample.weights.sum() == pytest.approx(437)


@pytest.mark.parametrize(("n_components", "n_drawn"), [(7, 3), (100, 63), (10, 10), (5, 50), (3, 0), (0, 4), (9, 8)])
def test_any_number_can_be_drawn_of_any(n_components, n_drawn):
    sizes, sampled = divide(n_components, n_drawn)
    assert (sizes.sum(), sampled.sum()) == (n_components, min(n_components, n_drawn))
    assert (sampled <= sizes).all()


def test_every_component_of_a_stratum_is_drawn_alike():
    times = np.zeros(30)
    for seed in range(3000):
        times[draw_stratified(np.arange(30), 10, np.random.default_rng(seed)).chosen] += 1
    assert np.abs(times / 3000 - 1 / 3).max() < 4 * np.sqrt(2 / 9 / 3000)


@pytest.mark.parametrize("at_most", [0, 3, 20, 400, 429, 1000])
def test_a_sample_is_as_large_as_a_bound_needs(at_most):
    n_drawn = sample_for(429, at_most)
    sizes, sampled = divide(429, n_drawn)
    assert most_missed(sizes, sampled, np.zeros_like(sampled)) <= at_most
    if n_drawn:
        sizes, sampled = divide(429, n_drawn - 1)
        assert most_missed(sizes, sampled, np.zeros_like(sampled)) > at_most
