"""Critical values for skewed groups: how much further an interval must reach on the side where t errs.

Where groups are skewed to the left, their t is skewed to the right: it exceeds its critical value too often, and a
lower end lies too high. Hall's transformation takes that out:

1. ``g(t) = t + a t ** 2 / 3 + a ** 2 t ** 3 / 27 + a / 6`` with ``a = skewness / sqrt(G)``, which rises with t
   throughout, is nearly symmetric. The lower end is where ``g(t)`` is the critical value, the upper end where it is the
   negative of it.
2. The skewness is the bias-corrected one of the groups. Few groups do not show how skewed they are, above all those
   that happen to hold no far one. With fewer than 30 of them it is moved by half its standard error, for the lower end
   down and for the upper end up. (Half: the least multiple of a quarter by which no family of 20 exponential components
   in simulation, of 10 to 30 groups, exceeded .05; what it achieves stands in ``benchmarks/VALIDITY.md``.)

References:
    Hall (1992), On the removal of skewness by transformation, Journal of the Royal Statistical Society B 54.
"""

from typing import Final

import numpy as np

from causalpatch.statistics.clusters import FloatArray, IntArray
from causalpatch.statistics.intervals import ENOUGH_GROUPS

_CAUTION: Final = 0.5  # standard errors
_SMALL: Final = 1e-7  # of a: below, the transformation is the identity to six places, and its inverse rounding


def skew_limits(critical: float, skew: FloatArray, n_groups: IntArray) -> tuple[FloatArray, FloatArray]:
    """Return the critical values of ``|t|`` for the lower and for the upper end of each cell's interval.

    Args:
        critical: The critical value for symmetric groups.
        skew: Skewness of each cell between its groups, as ``group_skewness`` gives it, (cell,); NaN counts as 0.
        n_groups: Groups of each cell, (cell,).

    Returns:
        Both, (cell,); never below 0.

    Examples:
        >>> low, high = skew_limits(2.0, np.array([0.0, -1.0]), np.array([40, 40]))
        >>> low.round(2).tolist(), high.round(2).tolist()
        ([2.0, 2.31], [2.0, 1.79])
    """
    n = np.maximum(n_groups, 3).astype(np.float64)
    corrected = np.nan_to_num(skew) * np.sqrt(n * (n - 1)) / (n - 2)
    error = np.sqrt(6 * n * (n - 1) / ((n - 2) * (n + 1) * (n + 3)))
    moved = np.where(n < ENOUGH_GROUPS, _CAUTION * error, 0.0)
    low = _inverse(critical, (corrected - moved) / np.sqrt(n))
    high = -_inverse(-critical, (corrected + moved) / np.sqrt(n))
    return np.maximum(low, 0.0), np.maximum(high, 0.0)


def _inverse(value: float, a: FloatArray) -> FloatArray:
    """Return t with ``g(t) = value``."""
    is_straight = np.abs(a) < _SMALL
    bent = np.where(is_straight, 1.0, a)
    return np.asarray(np.where(is_straight, value, 3 / bent * (np.cbrt(1 + bent * (value - bent / 6)) - 1)))
