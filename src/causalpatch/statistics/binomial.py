"""Intervals of shares: how often something is so, with groups of pairs as the unit.

1. Where every group holds one observation, the number of those that are so is binomial: Clopper and Pearson's interval,
   exact for any share, also where all or none are so.
2. Where groups hold several, the cluster-t interval of ``mean_interval``, cut off at 0 and 1.
3. Where all groups agree, that interval would be a point, as if nothing could ever differ. Then whole groups count as
   the observations: of ``G`` independent groups all were so.

References:
    Clopper & Pearson 1934, "The use of confidence or fiducial limits illustrated in the case of the binomial",
    Biometrika 26.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.statistics.intervals import MIN_GROUPS, TOO_FEW, Interval, mean_interval

if TYPE_CHECKING:
    from scipy import special
else:
    special = lazy("scipy.special")


def share_interval(is_so: npt.ArrayLike, group: npt.ArrayLike, *, level: float = 0.95, seed: int = 0) -> Interval:
    """Return the interval of a share.

    Args:
        is_so: 1 or true where it is so, 0 where not, NaN where it was not measured, (pair,).
        group: Number of the independent group of each pair, (pair,).
        level: Nominal coverage.
        seed: Seed of the simulated coverage.

    Returns:
        The interval, within 0 and 1; status ``"none"`` under 10 groups.

    Raises:
        SettingError: Values are neither 0 nor 1, do not meet the groups, or the level is not between 0 and 1.

    Examples:
        >>> found = share_interval([1] * 40, range(40))
        >>> f"{found.estimate:.2f} [{found.low:.3f}, {found.high:.3f}]"
        '1.00 [0.912, 1.000]'
    """
    values, groups = np.asarray(is_so, dtype=np.float64), np.asarray(group)
    known = np.isfinite(values)
    strange = values[known & (values != 0) & (values != 1)]
    if len(strange):
        raise SettingError(f"{strange[0]:g} says neither yes nor no", fix="give 1 where it is so, 0 where not")
    found = mean_interval(values, groups, level=level, seed=seed)
    if found.n_groups < MIN_GROUPS:
        return replace(found, low=np.nan, high=np.nan, status="none", note=TOO_FEW)
    all_agree = found.estimate in (0.0, 1.0)
    if found.n_groups == int(known.sum()) or all_agree:
        n_so = round(found.estimate * found.n_groups)
        low, high = clopper_pearson(n_so, found.n_groups, level)
        note = "" if found.n_groups == int(known.sum()) else f"all {found.n_groups} groups agree"
        return replace(found, low=low, high=high, status="exact", note=note, coverage=None)
    return replace(found, low=max(0.0, found.low), high=min(1.0, found.high))


def clopper_pearson(n_so: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a binomial share.

    Args:
        n_so: How many are so.
        n: Of how many.
        level: Nominal coverage.
    """
    tail = (1 - level) / 2
    low = 0.0 if n_so == 0 else float(special.betaincinv(n_so, n - n_so + 1, tail))
    high = 1.0 if n_so == n else float(special.betaincinv(n_so + 1, n - n_so, 1 - tail))
    return low, high


def commonest_share(values: npt.ArrayLike) -> float:
    """Return the share of the commonest of some values: what always giving one and the same answer gets.

    Examples:
        >>> commonest_share([3, 5, 3, 8])
        0.5
    """
    return float(np.unique(np.asarray(values), return_counts=True)[1].max() / np.size(values))
