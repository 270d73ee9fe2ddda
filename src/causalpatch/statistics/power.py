"""Power of the minimum-effect test, from how far independent groups of a pilot spread.

1. ``spread``: the standard deviation of a share from group to group, at equal group sizes ``sqrt(G) * standard error``.
2. With G groups t of ``share - delta`` is noncentral with ``(effect - delta) sqrt(G) / spread``; the test is passed
   where it exceeds Student's critical value for ``n_tests`` tests together (Bonferroni's, which max-T does not exceed),
   moved as for groups whose skewness is 0 (``skewed``).
3. The pilot's spread is itself uncertain: ``spread * sqrt(df / chi2)`` bounds it, and with it the groups needed.

Groups are supposed to be normal and equally large; skewed ones need more.
"""

from typing import TYPE_CHECKING, Final

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.statistics.intervals import MIN_GROUPS
from causalpatch.statistics.skewed import skew_limits

if TYPE_CHECKING:
    from scipy import special
else:
    special = lazy("scipy.special")

MOST_GROUPS: Final = 100_000
"""More groups than these are not asked for."""


def power_with(spread: float, margin: float, n_groups: int, *, n_tests: int = 1, alpha: float = 0.05) -> float:
    """Return the probability that a share is called supported.

    Args:
        spread: Standard deviation of the share from group to group.
        margin: How far the share lies beyond delta.
        n_groups: Independent groups.
        n_tests: Components that are tested together.
        alpha: Probability of even one wrong *supported*.

    Examples:
        >>> round(power_with(0.1, 0.1, 20, n_tests=5), 2)
        0.91
    """
    if n_groups < MIN_GROUPS or 2.0 ** (1 - n_groups) > alpha:
        return 0.0
    if spread <= 0:
        return 1.0
    freedom = n_groups - 1
    plain = float(special.stdtrit(freedom, 1 - alpha / (2 * n_tests)))
    limit = float(skew_limits(plain, np.zeros(1), np.array([n_groups]))[0][0])
    below = float(special.nctdtr(freedom, margin * np.sqrt(n_groups) / spread, max(plain, limit)))
    return 1.0 - below if np.isfinite(below) else float(margin * np.sqrt(n_groups) / spread > limit)


def groups_for(spread: float, margin: float, power: float, *, n_tests: int = 1, alpha: float = 0.05) -> int | None:
    """Return the fewest groups with which the power is reached; None where 100,000 do not.

    Args:
        spread: Standard deviation of the share from group to group.
        margin: How far the share lies beyond delta.
        power: The power.
        n_tests: Components that are tested together.
        alpha: Probability of even one wrong *supported*.

    Examples:
        >>> groups_for(0.1, 0.1, 0.8, n_tests=5)
        17
    """

    def reaches(n_groups: int) -> bool:
        return power_with(spread, margin, n_groups, n_tests=n_tests, alpha=alpha) >= power

    high = MIN_GROUPS
    while not reaches(high):
        if high >= MOST_GROUPS or margin <= 0:
            return None
        high = min(2 * high, MOST_GROUPS)
    low = max(high // 2, MIN_GROUPS - 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(middle) else (middle, high)
    return high


def spread_interval(spread: float, n_groups: int, level: float = 0.8) -> tuple[float, float]:
    """Return the interval of a spread that was estimated from some groups.

    Args:
        spread: The estimate.
        n_groups: Groups that it was estimated from, two at least.
        level: Nominal coverage, for normal groups.

    Examples:
        >>> [round(end, 2) for end in spread_interval(1.0, 20)]
        [0.84, 1.28]
    """
    freedom = n_groups - 1
    tails = special.chdtri(freedom, [(1 - level) / 2, (1 + level) / 2])
    low, high = (float(spread * np.sqrt(freedom / tail)) for tail in tails)
    return low, high
