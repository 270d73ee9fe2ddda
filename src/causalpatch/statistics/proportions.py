"""Shares of yes and no: an interval that is honest where all agree.

A mean that never varies has a cluster-t interval of no width. Of 20 hits in 20 draws a share of .86 is still possible,
which the exact interval of a binomial share says.

References:
    Clopper & Pearson (1934), The use of confidence or fiducial limits illustrated in the case of the binomial,
    Biometrika 26.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from causalpatch.base.extras import lazy
from causalpatch.statistics.intervals import Interval, mean_interval

if TYPE_CHECKING:
    from scipy import special
else:
    special = lazy("scipy.special")


def share_interval(values: npt.ArrayLike, group: npt.ArrayLike, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the interval of a share of pairs.

    Args:
        values: 1 or 0 of each pair, (pair,); NaN where it was not measured.
        group: Number of the independent group of each pair, (pair,).
        level: Nominal coverage.
        seed: Seed of the simulated coverage.

    Returns:
        Clopper and Pearson's interval where each pair is a group of its own, and where all groups have one and the same
        share of 0 or 1, which then count as one draw each; else the cluster-t interval, cut off at 0 and 1.

    Raises:
        SettingError: Values and groups do not stand for the same pairs, or the level is not between 0 and 1.

    Examples:
        >>> found = share_interval([1.0] * 20, range(20))
        >>> f"{found.estimate:.2f} [{found.low:.2f}, {found.high:.2f}]"
        '1.00 [0.83, 1.00]'
    """
    found = mean_interval(values, group, level=level, seed=seed)
    is_unanimous = found.estimate in (0.0, 1.0)
    if not found.n_groups or not (is_unanimous or found.n_groups == found.n_pairs):
        return replace(found, low=max(0.0, found.low), high=min(1.0, found.high)) if found.is_bounded else found
    n = found.n_groups
    k = round(found.estimate * n)
    tail = (1 - level) / 2
    low = float(special.betaincinv(k, n - k + 1, tail)) if k else 0.0
    high = float(special.betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0
    note = f"Clopper-Pearson, {n} independent groups"
    return replace(found, low=low, high=high, status="exact", note=note, coverage=None, group_values=())


def commonest_share(values: npt.ArrayLike) -> float:
    """Return the share of the commonest of some values: what always giving one and the same answer gets.

    Examples:
        >>> commonest_share([3, 5, 3, 8])
        0.5
    """
    return float(np.unique(np.asarray(values), return_counts=True)[1].max() / np.size(values))
