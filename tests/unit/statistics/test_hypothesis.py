"""Tests of hypotheses on circuits: exact sums by hand, and how often true nulls are rejected."""

from math import comb

import numpy as np
import pytest

from causalpatch.statistics.hypothesis import dependence, non_equivalence


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
def test_non_equivalence_sums_what_is_as_far_from_half(epsilon):
    better, n = 9, 12
    circuit = np.concatenate([np.ones(better), -np.ones(n - better)])
    share = 0.5 + epsilon
    wanted = sum(
        comb(n, k) * share**k * (1 - share) ** (n - k) for k in range(n + 1) if abs(k - n / 2) >= abs(better - n / 2)
    )
    assert non_equivalence(circuit, np.zeros(n), range(n), epsilon=epsilon) == pytest.approx(wanted)
    assert non_equivalence(-circuit, np.zeros(n), range(n), epsilon=epsilon) == pytest.approx(wanted)


def test_groups_count_once_and_what_is_equal_not_at_all():
    group = np.repeat(np.arange(6), 2)
    circuit = np.tile([3.0, -1.0], 6)
    assert non_equivalence(circuit, np.zeros(12), group, epsilon=0) == pytest.approx(2 / 2**6)
    assert non_equivalence(np.zeros(4), np.zeros(4), range(4)) == 1.0


def test_dependence_is_seen_also_where_it_is_no_line_and_seldom_where_there_is_none():
    rng = np.random.default_rng(0)
    x = rng.normal(size=40)
    assert dependence(x**2, x, range(40), n_draws=199) == pytest.approx(1 / 200)
    p = [dependence(rng.normal(size=15), rng.normal(size=15), range(15), n_draws=49, seed=n) for n in range(60)]
    assert 0 < np.mean(np.array(p) <= 0.2) < 0.4
