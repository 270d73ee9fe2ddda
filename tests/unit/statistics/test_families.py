"""Adjusted p values against other code and against their definitions."""

import itertools

import numpy as np
import pytest
from hypothesis import given, strategies as st
from scipy.stats import false_discovery_control

from causalpatch.base.errors import SettingError
from causalpatch.statistics.families import benjamini_hochberg, holm

shares = st.floats(0, 1)
families = st.lists(shares, min_size=1, max_size=30)
with_gaps = st.lists(st.one_of(shares, st.just(float("nan"))), min_size=1, max_size=30)


@given(families)
def test_benjamini_hochberg_equals_scipy(p):
    np.testing.assert_allclose(benjamini_hochberg(p), false_discovery_control(p, method="bh"), rtol=1e-12)


@given(st.lists(shares, min_size=1, max_size=5))
def test_holm_is_the_closed_test_with_bonferroni_on_every_intersection(p):
    indices = range(len(p))
    subsets = [s for size in range(1, len(p) + 1) for s in itertools.combinations(indices, size)]
    closed = [max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s) for i in indices]
    np.testing.assert_allclose(holm(p), closed, rtol=1e-12)


@pytest.mark.parametrize("adjust", [benjamini_hochberg, holm])
@given(with_gaps)
def test_missing_p_values_stay_missing_and_do_not_count(adjust, p):
    adjusted = adjust(p)
    known = ~np.isnan(p)
    assert np.isnan(adjusted[~known]).all()
    np.testing.assert_array_equal(adjusted[known], adjust(np.asarray(p)[known]))


@pytest.mark.parametrize("adjust", [benjamini_hochberg, holm])
@given(families, st.randoms(use_true_random=False))
def test_the_order_of_a_family_does_not_matter(adjust, p, random):
    order = list(range(len(p)))
    random.shuffle(order)
    np.testing.assert_array_equal(adjust(np.array(p)[order]), adjust(p)[order])


@pytest.mark.parametrize("adjust", [benjamini_hochberg, holm])
def test_the_shape_of_a_family_is_kept(adjust):
    p = np.array([[0.01, 0.5], [np.nan, 0.02]])
    assert adjust(p).shape == (2, 2)
    np.testing.assert_array_equal(adjust(p).ravel(), adjust(p.ravel()))
    assert adjust(np.empty(0)).shape == (0,)


@pytest.mark.parametrize("adjust", [benjamini_hochberg, holm])
@pytest.mark.parametrize("wrong", [-0.1, 1.5, float("inf")])
def test_a_number_that_is_no_p_value_is_refused(adjust, wrong):
    with pytest.raises(SettingError, match="is not a p value"):
        adjust([0.5, wrong])
