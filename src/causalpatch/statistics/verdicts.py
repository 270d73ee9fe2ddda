"""The minimum-effect test: which components of a family have a share of the gap beyond delta, and which have not.

In a deterministic network nearly every component has some effect, so that with enough pairs all of them differ from 0.
What is tested is therefore whether a share is *larger than delta*, for all components of the family together.

1. Simultaneous intervals: Fieller's, with the critical value of ``max_t`` at ``1 - alpha``, and at ``1 - 2 alpha``.
   Each end is moved outwards where skewed groups ask for it (``skewed``); it is never moved inwards.
2. p of ``shifted_max_t``: groups flipped at the null ``|share| = delta``, held against the largest t of all components.
3. *supported*: the ``1 - alpha`` interval lies wholly beyond ``delta`` on one side, and p is at most alpha.
   *absent up to delta*: the ``1 - 2 alpha`` interval lies within ``-delta`` and ``delta`` (two one-sided tests).
   *inconclusive*: neither.

Both intervals hold for all components at once, so that neither verdict is given wrongly to even one of them more often
than alpha allows, as far as groups are symmetric about their mean. With fewer than 20 groups, or skewed ones, that is
called approximate; ``benchmarks/VALIDITY.md`` says what was achieved in simulation.

References:
    Murphy and Myors (1999), Testing the hypothesis that treatments have negligible effects: minimum-effect tests,
    Journal of Applied Psychology 84; Schuirmann (1987), A comparison of the two one-sided tests procedure and the power
    approach.
"""

from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from causalpatch.base.errors import SettingError
from causalpatch.statistics.clusters import FloatArray, GroupSums, IntArray, group_sums
from causalpatch.statistics.intervals import MIN_GROUPS, fieller
from causalpatch.statistics.permutation import max_t, shifted_max_t, smallest_p
from causalpatch.statistics.skewed import skew_limits
from causalpatch.statistics.together import group_skewness

Verdict = Literal["supported", "absent up to delta", "inconclusive"]
SUPPORTED: Final = "supported"
ABSENT: Final = "absent up to delta"
INCONCLUSIVE: Final = "inconclusive"

GROUPS_FOR_MAX_T: Final = 20  # fewer: approximate
LARGEST_SKEW: Final = 1.0  # more skewed between groups: approximate
_FARTHEST: Final = 0.9  # of the t at which the gap is not distinguishable from 0


@dataclass(frozen=True, eq=False)
class MinimumEffect:
    """What is said of a family of shares.

    Args:
        share: Ratio of means, (cell,).
        low: Lower end of the simultaneous ``1 - alpha`` interval, (cell,); NaN where there is none.
        high: Upper end, likewise.
        low_inner: Lower end of the simultaneous ``1 - 2 alpha`` interval, (cell,).
        high_inner: Upper end, likewise.
        p: p of the share being within ``delta``, adjusted over the family, (cell,).
        n_groups: Groups measured in each cell.
        skew: Skewness of each cell between groups; NaN where groups do not differ.
        critical: Critical value of ``|t|`` for the ``1 - alpha`` intervals; NaN where no cell varies.
        delta: Share that does not count yet.
        alpha: Probability of even one wrong *supported*.
    """

    share: FloatArray
    low: FloatArray
    high: FloatArray
    low_inner: FloatArray
    high_inner: FloatArray
    p: FloatArray
    n_groups: IntArray
    skew: FloatArray
    critical: float
    delta: float
    alpha: float

    @property
    def smallest_p(self) -> float:
        """The smallest p that flipping the groups of the cell that has fewest can give."""
        return smallest_p(int(self.n_groups.min()))

    @property
    def is_approximate(self) -> npt.NDArray[np.bool_]:
        """Which cells have few groups, or groups that are skewed, (cell,)."""
        few = self.n_groups < GROUPS_FOR_MAX_T
        return np.asarray(few | (np.abs(np.nan_to_num(self.skew)) > LARGEST_SKEW))

    @property
    def verdicts(self) -> list[Verdict]:
        """The verdict on each cell."""
        beyond = ((self.low > self.delta) | (self.high < -self.delta)) & (self.p <= self.alpha)
        within = (self.low_inner >= -self.delta) & (self.high_inner <= self.delta)
        return [
            SUPPORTED if one else ABSENT if other else INCONCLUSIVE for one, other in zip(beyond, within, strict=True)
        ]


def minimum_effect(
    effects: npt.ArrayLike,
    gap: npt.ArrayLike,
    group: npt.ArrayLike,
    delta: float,
    *,
    alpha: float = 0.05,
    n_draws: int = 9999,
    seed: int = 0,
) -> MinimumEffect:
    """Test which shares of a family lie beyond ``delta``, and which within.

    Args:
        effects: Effects in the direction of the gap, (cell, pair); NaN where a pair was not measured.
        gap: Gap of each pair, (pair,); its mean is above 0.
        group: Number of the independent group of each pair, (pair,).
        delta: Share of the gap that does not count yet, 0 or more.
        alpha: Probability of even one wrong *supported*.
        n_draws: Random flips where there are too many combinations to try them all.
        seed: Of the flips.

    Returns:
        Shares, intervals, p and verdicts. A cell with fewer than 10 groups, or whose gap is not distinguishable from
        0, has no interval and is inconclusive; one whose groups agree exactly has a point.

    Raises:
        SettingError: ``delta`` or ``alpha`` is impossible, or values and groups do not stand for the same pairs.
        NotFinite: A value is infinite.

    Examples:
        >>> draw = np.random.default_rng(0)
        >>> gap = draw.normal(5, 0.5, 40)
        >>> effects = np.array([0.6, 0.02, 0.11])[:, None] * gap + draw.normal(0, 0.3, (3, 40))
        >>> minimum_effect(effects, gap, range(40), 0.1).verdicts
        ['supported', 'absent up to delta', 'inconclusive']

    Cost:
        Three times ``max_t``.
    """
    if not delta >= 0 or not 0 < alpha < 0.5:
        raise SettingError(
            f"no test of a share beyond {delta!r} at alpha {alpha!r}",
            facts=[("delta", "0 or more, a share of the gap"), ("alpha", "between 0 and .5")],
            fix="delta=0.1, alpha=0.05",
        )
    tops = np.atleast_2d(np.asarray(effects, dtype=np.float64))
    bottom = np.asarray(gap, dtype=np.float64)
    data = group_sums((tops, bottom), group)
    over, under = data.means()
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.where(under != 0, over / under, np.nan)
    left = tops - np.nan_to_num(share)[:, None] * bottom
    skew = group_skewness(left, group)
    ends, criticals = [], []
    for level in (1 - alpha, 1 - 2 * alpha):
        critical = max_t(left, group, n_draws=n_draws, seed=seed, level=level)
        ends.append(interval_ends(data, critical, skew))
        criticals.append(critical)
    return MinimumEffect(
        share=np.asarray(share),
        low=ends[0][0],
        high=ends[0][1],
        low_inner=ends[1][0],
        high_inner=ends[1][1],
        p=shifted_max_t(tops, bottom, group, delta, n_draws=n_draws, seed=seed),
        n_groups=data.n_groups,
        skew=skew,
        critical=criticals[0],
        delta=float(delta),
        alpha=float(alpha),
    )


def interval_ends(data: GroupSums, critical: float, skew: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the ends of every cell's interval, moved outwards where groups are skewed; NaN where there is none.

    Args:
        data: Sums of the numerator and of the denominator.
        critical: Critical value of ``|t|``; NaN where no cell varies between groups.
        skew: Skewness of each cell between groups, (cell,).
    """
    # NaN: no cell varies between groups, so that each interval is a point whatever the critical value.
    value = 0.0 if np.isnan(critical) else critical
    has_interval = (data.n_groups >= MIN_GROUPS) & np.isfinite(value)
    plain = np.where(has_interval, value if np.isfinite(value) else 0.0, np.nan)
    low, high = fieller(data, plain)
    if value > 0 and np.isfinite(value):
        # An end that is moved to where the gap itself is not told from 0 would be nowhere; it is moved nearly there.
        most = np.maximum(_FARTHEST * _t_of_gap(data), value)
        lower, upper = (np.minimum(limit, most) for limit in skew_limits(value, skew, data.n_groups))
        low = np.minimum(low, fieller(data, np.where(has_interval, lower, np.nan))[0])
        high = np.maximum(high, fieller(data, np.where(has_interval, upper, np.nan))[1])
    return np.asarray(low), np.asarray(high)


def _t_of_gap(data: GroupSums) -> FloatArray:
    """Return ``|t|`` of the mean of the denominator, (cell,); infinite where groups agree exactly."""
    bottom, moves = data.means()[1], data.moves()[1]
    spread = np.sqrt((moves**2).sum(axis=1))
    return np.asarray(np.divide(np.abs(bottom), spread, out=np.full_like(spread, np.inf), where=spread > 0))
