"""The share of pairs that say the same as their mean."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from causalpatch.statistics.agreement import sign_agreement

values = arrays(np.float64, (3, 7), elements=st.one_of(st.integers(-3, 3).map(float), st.just(np.nan)))


@given(values)
def test_agreement_equals_counting_pair_by_pair(cells):
    for row, share in zip(cells, sign_agreement(cells), strict=True):
        measured = [x for x in row if x == x]
        if not measured:
            assert np.isnan(share)
            continue
        total = sum(measured)
        assert share == sum(x * total > 0 for x in measured) / len(measured)


@given(values)
def test_agreement_does_not_depend_on_sign_or_scale(cells):
    np.testing.assert_array_equal(sign_agreement(cells), sign_agreement(-4 * cells))


def test_zeros_agree_with_nothing():
    assert sign_agreement([[0.0, 0.0, 3.0, 1.0]]).tolist() == [0.5]
    assert sign_agreement([[1.0, -1.0]]).tolist() == [0.0]
