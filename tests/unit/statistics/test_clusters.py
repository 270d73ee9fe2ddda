"""Group sums and the jackknife variance, against leaving groups out one by one."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from causalpatch.base.errors import NotFinite, SettingError
from causalpatch.statistics.clusters import group_sums


@given(st.integers(0, 10**6))
def test_the_moves_are_what_leaving_a_group_out_does(seed):
    random = np.random.default_rng(seed)
    n_pairs = int(random.integers(6, 30))
    group = random.integers(0, 4, n_pairs) * 3 - 1
    group[:2] = (-1, 2)
    values = random.normal(size=(2, n_pairs)) * 10.0 ** random.integers(-6, 6)
    data = group_sums((values,), group)
    for row, moves in zip(values, data.moves()[0], strict=True):
        labels = np.unique(group)
        left_out = np.array([row[group != label].mean() for label in labels])
        n_groups = labels.size
        expected = np.sqrt((n_groups - 1) / n_groups) * np.abs(left_out - row.mean())
        np.testing.assert_allclose(np.abs(moves), expected, atol=1e-12 * np.abs(row).max())


def test_equal_groups_have_the_usual_variance_of_their_means():
    random = np.random.default_rng(0)
    values, group = random.normal(size=(1, 60)), np.repeat(np.arange(20), 3)
    own = values.reshape(20, 3).mean(axis=1)
    (moves,) = group_sums((values,), group).moves()
    np.testing.assert_allclose((moves**2).sum(), own.var(ddof=1) / 20)


def test_a_pair_missing_in_one_value_is_left_out_of_all_values_of_that_cell():
    top = np.array([[1.0, np.nan, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    bottom = np.array([1.0, 10.0, 100.0, np.nan])
    data = group_sums((top, bottom), [0, 0, 1, 2])
    assert data.sums[0].tolist() == [[1, 3, 0], [3, 3, 0]]
    assert data.sums[1].tolist() == [[1, 100, 0], [11, 100, 0]]
    assert data.counts.tolist() == [[1, 1, 0], [2, 1, 0]]
    assert data.n_pairs.tolist() == [2, 3]
    assert data.n_groups.tolist() == [2, 2]


@pytest.mark.parametrize(("values", "group"), [([1.0, 2.0], [0]), ([], []), ([[[1.0]]], [0]), ([1.0, 2.0], [[0, 1]])])
def test_values_and_groups_of_different_pairs_are_refused(values, group):
    with pytest.raises(SettingError, match="do not stand for the same pairs"):
        group_sums((values,), group)


def test_an_infinite_value_is_refused():
    with pytest.raises(NotFinite, match="a value is infinite"):
        group_sums(([1.0, np.inf],), [0, 1])
