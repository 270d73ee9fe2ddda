"""Very many cells at once: the numbers are those of the intervals of few, whatever is missing or constant."""

import numpy as np
import pytest
from scipy import stats

from causalpatch.base.errors import NotFinite
from causalpatch.statistics.intervals import ratio_intervals
from causalpatch.statistics.many import ManyCells

N_CELLS, N_PAIRS = 60, 24


def drawn(seed=0, n_pairs=N_PAIRS):
    random = np.random.default_rng(seed)
    gap = 3 + random.normal(size=n_pairs)
    values = random.normal(size=(N_CELLS, 1)) * gap + random.normal(size=(N_CELLS, n_pairs)) * 0.3
    return values, gap


GROUPS = {
    "single": np.arange(N_PAIRS),
    "shuffled": np.random.default_rng(1).permutation(N_PAIRS),
    "unequal": np.repeat(np.arange(12), [1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 4, 4]),
    "mixed": np.random.default_rng(2).permutation(np.repeat(np.arange(12), 2)),
    "few": np.arange(N_PAIRS) % 6,
    "one": np.zeros(N_PAIRS, dtype=int),
}


def hold(values, gap, group, level=0.95):
    found = ManyCells(gap, group, level).columns(values)
    own = ratio_intervals(values, gap, group, level=level)
    for name, wanted in (("share", "estimate"), ("low", "low"), ("high", "high"), ("n_pairs", "n_pairs")):
        np.testing.assert_allclose(
            getattr(found, name), [getattr(each, wanted) for each in own], rtol=1e-9, atol=1e-12, err_msg=name
        )
    return found


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_cells_without_gaps_have_the_intervals_of_few_cells(group):
    hold(*drawn(), group)
    hold(*drawn(), group, level=0.8)


@pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
def test_a_pair_that_is_missing_is_missing_in_its_cell_alone(group):
    values, gap = drawn()
    values[3, 5] = values[7] = values[9, ::2] = np.nan
    found = hold(values, gap, group)
    assert found.n_pairs[[3, 7, 9]].tolist() == [N_PAIRS - 1, 0, N_PAIRS // 2]


def test_a_pair_without_a_gap_is_missing_everywhere():
    values, gap = drawn()
    gap[2] = np.nan
    assert set(hold(values, gap, GROUPS["single"]).n_pairs) == {N_PAIRS - 1}


def test_cells_that_are_constant_but_for_rounding_are_points():
    values, gap = drawn()
    values[0], values[1], values[2] = 0.0, gap * 0.3, gap * (1 / 3) * (1 + 1e-15)
    values[3] = gap * 0.3 + np.where(np.arange(N_PAIRS) == 0, 1e-10, 0.0)
    found = hold(values, gap, GROUPS["single"])
    assert found.p[0] == 1.0
    assert found.low[1] == found.high[1] == pytest.approx(0.3)


def test_a_gap_that_may_be_none_has_no_interval():
    values, gap = drawn()
    found = hold(values, gap - gap.mean() + 0.01, GROUPS["single"])
    assert np.isnan(found.low).all()


def test_p_is_that_of_a_t_test_where_each_pair_is_its_own_group():
    values, gap = drawn()
    found = ManyCells(gap, GROUPS["single"], 0.95).columns(values)
    np.testing.assert_allclose(found.p, stats.ttest_1samp(values, 0.0, axis=1).pvalue, rtol=1e-9)


def test_an_infinite_number_is_no_number():
    values, gap = drawn()
    values[4, 4] = np.inf
    with pytest.raises(NotFinite, match="infinite"):
        ManyCells(gap, GROUPS["single"], 0.95).columns(values)
