"""Areas under curves of faithfulness, by hand."""

import numpy as np
import pytest

from causalpatch.statistics.areas import FRACTIONS, areas_under


def test_a_method_that_finds_nothing_has_a_quarter_and_three_quarters():
    found = areas_under(FRACTIONS, [0.0] * 9 + [1.0])
    assert found.cpr == pytest.approx(0.25)
    assert found.cmd == pytest.approx(0.75 - 0.001)
    # Only the last step, from half of the edges to all, has any area; it is a tenth of the way in logarithms.
    assert found.log_size == pytest.approx(np.log(2) / np.log(1000) / 2)


def test_a_method_that_finds_all_at_once_has_one_and_none():
    found = areas_under(FRACTIONS, [1.0] * 10)
    assert (found.cpr, found.cmd, found.log_size) == pytest.approx((0.999, 0, 1))


def test_a_curve_by_hand():
    # Trapezoids of f: .1 x (.5 + 1.5) / 2 + .8 x (1.5 + 1) / 2 = .1 + 1; of |1 - f|: .1 x .5 + .8 x .25.
    found = areas_under([0.1, 0.2, 1.0], [0.5, 1.5, 1.0])
    assert (found.cpr, found.cmd) == pytest.approx((1.1, 0.25))
