"""Tests by flipping the signs of whole groups of pairs.

If a site had no effect on average, the effect of every independent group could as well have had the other sign. All
cells are flipped by the same draws, so that what they share is kept.

1. Sums ``U_g`` of the values by group as in ``clusters`` (centred for ``max_t``), and a sign ``s_g`` for each group:
   every combination where there are no more than ``n_draws`` of them up to a common sign, else ``n_draws`` random ones.
2. For each draw the jackknife t statistic of ``s_g * U_g``. With ``w_g = 1 / (n - n_g) ** 2`` it needs two products
   only, ``A = sum(s_g * U_g)`` and ``B = sum(s_g * w_g * n_g * U_g)``, since its variance is
   ``(G - 1) / G * (sum(w_g * U_g ** 2) - 2 * A * B / n + A ** 2 * sum(w_g * n_g ** 2) / n ** 2)``.
   Where groups have one size, B is a multiple of A and t grows with A.
3. ``sign_flip`` counts the draws whose ``|t|`` reaches the observed one; ``max_t`` takes a quantile of the largest
   ``|t|`` over all cells.
4. ``shifted_max_t`` asks whether a share is larger than ``delta``: at that null ``V = s * effect - delta * gap`` has
   mean 0 (s the sign of the mean effect), so the groups of V are flipped, and each cell's t is held against the largest
   of all cells in each draw. A cell whose true share is smaller has a mean of V below 0 and is rejected less often.

A p value cannot be smaller than ``2 ** (1 - G)``: with 5 groups nothing is ever below .0625.

References:
    Canay, Romano and Shaikh (2017), Randomization tests under an approximate symmetry assumption, Econometrica 85.
    Westfall and Young (1993), Resampling-based multiple testing (the maximum over all cells).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.seeds import generator
from causalpatch.statistics.clusters import FloatArray, GroupSums, group_sums
from causalpatch.statistics.intervals import MIN_GROUPS

if TYPE_CHECKING:
    from scipy import special
else:
    special = lazy("scipy.special")

_AT_ONCE: Final = 1_000_000  # numbers in one block of draws times cells: 8 MB, what a cache holds
_TIE: Final = 1e-9  # statistics that differ by less than this share are the same
_ROUNDING: Final = 1e-12  # of sums of squares over groups


@dataclass(frozen=True, eq=False)
class _Flips:
    """What the t statistic of flipped group sums needs, a row per cell; each part scaled to the variance of A.

    The share ``t ** 2 / (1 + t ** 2)`` of a draw is 1 where its groups agree exactly and 0 for all zeros. Where all
    groups of a cell have one size, B is a multiple of A, so that the share grows with ``|A|`` alone.

    Args:
        sums: Group sums ``U_g``, (cell, group).
        leverage: ``2 * w_g * n_g * U_g / n``, (cell, group); not used where groups are even.
        spread: ``sum(w_g * U_g ** 2)``, (cell,).
        pull: ``sum(w_g * n_g ** 2) / n ** 2``, (cell,).
        bend: The share is ``A ** 2 / (spread + bend * A ** 2)`` where groups are even, (cell,).
        is_even: Whether all measured groups of every cell have one size.
    """

    sums: FloatArray
    leverage: FloatArray
    spread: FloatArray
    pull: FloatArray
    bend: FloatArray
    is_even: bool

    @classmethod
    def of(cls, data: GroupSums) -> "_Flips":
        (sums,), counts, n_pairs = data.sums, data.counts, data.n_pairs[:, None]
        weight = np.where(counts > 0, 1 / np.maximum(n_pairs - counts, 1) ** 2, 0.0)
        weight *= ((data.n_groups - 1) / data.n_groups)[:, None] * n_pairs**2
        largest = counts.max(axis=1, keepdims=True)
        is_even = bool(((counts == 0) | (counts == largest)).all())
        pull = np.einsum("cg,cg,cg->c", weight, counts, counts) / n_pairs[:, 0] ** 2
        return cls(
            sums=sums,
            leverage=sums if is_even else 2 * weight * counts / n_pairs * sums,
            spread=np.einsum("cg,cg,cg->c", weight, sums, sums),
            pull=pull,
            bend=1 + pull - 2 * weight.max(axis=1) * largest[:, 0] / n_pairs[:, 0],
            is_even=is_even,
        )

    def share_reaching(self, signs: FloatArray) -> FloatArray:
        """Return the share of draws whose ``|t|`` reaches the observed one, (cell,).

        Args:
            signs: Sign of each group in each draw, (group, draw).
        """
        total = self.sums.sum(axis=1)
        if self.is_even:
            other = self.sums
            least = np.abs(total) - _TIE * np.abs(self.sums).sum(axis=1)
        else:
            # share >= observed, multiplied out: A * (A * (1 - observed * (1 + pull)) + observed * B) is large enough.
            squared = total**2
            whole = squared + np.maximum(self.spread + total * (self.pull * total - self.leverage.sum(axis=1)), 0.0)
            observed = np.divide(squared, whole, out=np.zeros_like(whole), where=whole > 0) * (1 - _TIE)
            other = self.sums * (1 - observed * (1 + self.pull))[:, None] + self.leverage * observed[:, None]
            least = (observed - _ROUNDING) * self.spread
        reached = np.empty(total.size)
        for cells, flipped in _products(self.sums, signs):
            if self.is_even:
                np.abs(flipped, out=flipped)
            else:
                flipped *= other[cells] @ signs
            reached[cells] = np.count_nonzero(flipped >= least[cells, None], axis=1)
        return np.asarray(reached / signs.shape[1])

    def largest_share(self, signs: FloatArray) -> FloatArray:
        """Return the largest share over cells of every draw, (draw,).

        Args:
            signs: Sign of each group in each draw, (group, draw).
        """
        largest = np.zeros(signs.shape[1])
        if self.is_even and np.ptp(self.bend) < _TIE:  # the share grows with |A| / sqrt(spread) in all cells alike
            for _, flipped in _products(self.sums / np.sqrt(self.spread)[:, None], signs):
                np.abs(flipped, out=flipped)
                np.maximum(largest, flipped.max(axis=0), out=largest)
            return np.asarray(largest**2 / (1 + float(self.bend[0]) * largest**2))
        for cells, flipped in _products(self.sums, signs):
            if self.is_even:
                np.square(flipped, out=flipped)
                whole = self.bend[cells, None] * flipped
                whole += self.spread[cells, None]
            else:
                whole = self.leverage[cells] @ signs
                np.subtract(self.pull[cells, None] * flipped, whole, out=whole)
                whole *= flipped
                whole += self.spread[cells, None]
                np.maximum(whole, 0.0, out=whole)
                np.square(flipped, out=flipped)
                whole += flipped
            whole[whole == 0] = 1.0
            flipped /= whole
            np.maximum(largest, flipped.max(axis=0), out=largest)
        return largest


def smallest_p(n_groups: int) -> float:
    """Return the smallest p value that flipping whole groups can give, ``2 ** (1 - n_groups)``.

    Args:
        n_groups: Independent groups.

    Examples:
        >>> smallest_p(5)
        0.0625
    """
    return float(2.0 ** (1 - max(int(n_groups), 1)))


def sign_flip(values: npt.ArrayLike, group: npt.ArrayLike, *, n_draws: int = 9999, seed: int = 0) -> FloatArray:
    """Return two-sided p values of the mean over pairs being 0, by flipping whole groups.

    Args:
        values: Values, (cell, pair); NaN where a pair was not measured.
        group: Number of the independent group of each pair, (pair,).
        n_draws: Draws where there are too many combinations to try them all; then each p value counts the observed
            signs as one more draw. The default resolves p values of .0001.
        seed: Seed of the draws; all cells share them.

    Returns:
        A p value per cell, (cell,): exact where ``2 ** (G - 1) <= n_draws``. 1 where every value is 0; NaN where fewer
        than 2 groups were measured.

    Raises:
        SettingError: Values and groups do not stand for the same pairs, or ``n_draws`` is less than 1.
        NotFinite: A value is infinite.

    Examples:
        >>> sign_flip([[1.0, 2.0, 3.0, 4.0, 5.0]], [0, 1, 2, 3, 4]).tolist()
        [0.0625]

    Cost:
        Draws times cells times groups: half a second for 5,000 cells of 200 groups, two seconds for 36,864 of 100, on
        one core.
    """
    _check_draws(n_draws)
    data = group_sums((np.atleast_2d(np.asarray(values, dtype=np.float64)),), group)
    n_groups = data.n_groups
    p = np.full(n_groups.size, np.nan)
    exact = 2.0 ** (n_groups - 1) <= n_draws
    for count in np.unique(n_groups[exact & (n_groups > 1)]):
        cells = n_groups == count
        p[cells] = _Flips.of(_measured(data, cells, count)).share_reaching(_all_signs(count))
    rest = ~exact
    if rest.any():
        kept = GroupSums((data.sums[0][rest],), data.counts[rest])
        signs = _random_signs(n_draws, kept.counts.shape[1], seed)
        p[rest] = (n_draws * _Flips.of(kept).share_reaching(signs) + 1) / (n_draws + 1)
    return p


def max_t(
    values: npt.ArrayLike, group: npt.ArrayLike, *, n_draws: int = 9999, seed: int = 0, level: float = 0.95
) -> float:
    """Return the critical value of ``|t|`` that makes the intervals of all cells hold at once.

    The ``level`` quantile of the largest ``|t|`` over cells when the centred sums of whole groups are flipped. Give it
    to ``ratio_intervals`` as ``critical``.

    Args:
        values: Values, (cell, pair); NaN where a pair was not measured. Their means do not matter. For intervals of
            ratios these are ``numerator - ratio * denominator`` of each cell, at its estimated ratio.
        group: Number of the independent group of each pair, (pair,).
        n_draws: Draws where there are too many combinations to try them all.
        seed: Seed of the draws.
        level: Probability that all intervals hold.

    Returns:
        The critical value, over the cells that have enough groups for an interval (over all where none has). It lies
        between Student's t for a single interval and Bonferroni's for all of them. Infinite where there are so few
        groups that ``2 ** (1 - G)`` exceeds ``1 - level``; NaN where no cell varies between at least 2 groups.
        It keeps the level where groups are symmetric about their mean (normal values: .95 of 20 cells with 12, 25 and
        80 groups); for skewed ones ``simulated_family_coverage`` says how often all intervals hold.

    Raises:
        SettingError: Values and groups do not stand for the same pairs, ``n_draws`` is less than 1, or the level is
            not between 0 and 1.
        NotFinite: A value is infinite.

    Cost:
        Draws times cells times groups: half a second for 5,000 cells of 200 groups, two seconds for 36,864 of 100, on
        one core.
    """
    _check_draws(n_draws)
    if not 0 < level < 1:
        raise SettingError(f"the level {level!r} is not between 0 and 1", fix="level=0.95")
    data = group_sums((np.atleast_2d(np.asarray(values, dtype=np.float64)),), group)
    (sums,), (mean,), (moves,) = data.sums, data.means(), data.moves()
    spread = np.sqrt((moves**2).sum(axis=1))
    size = np.abs(sums).sum(axis=1) / np.maximum(data.n_pairs, 1)
    varies = (data.n_groups > 1) & (spread > _TIE * size)
    if not varies.any():
        return float("nan")
    if (varies & (data.n_groups >= MIN_GROUPS)).any():
        varies &= data.n_groups >= MIN_GROUPS
    centred = (sums - mean[:, None] * data.counts)[varies]
    kept = GroupSums((centred,), data.counts[varies])
    n_groups = int(kept.n_groups.max())
    if smallest_p(n_groups) > 1 - level:
        return float("inf")
    n_all = kept.counts.shape[1]
    is_exact = smallest_p(n_all) * n_draws >= 1
    signs = _all_signs(n_all) if is_exact else _random_signs(n_draws, n_all, seed)
    largest = _Flips.of(kept).largest_share(signs)
    rank = int(np.ceil(level * (largest.size + (0 if is_exact else 1)) - _TIE))
    share = float(np.sort(largest)[rank - 1]) if rank <= largest.size else 1.0
    alpha, freedom = (1 - level) / 2, int(kept.n_groups.min()) - 1
    single, bonferroni = special.stdtrit(freedom, [1 - alpha, 1 - alpha / kept.counts.shape[0]])
    flipped = np.sqrt(share / (1 - share)) if share < 1 else np.inf
    return float(np.clip(flipped, single, bonferroni))


def shifted_max_t(
    effects: npt.ArrayLike,
    gap: npt.ArrayLike,
    group: npt.ArrayLike,
    delta: float,
    *,
    n_draws: int = 9999,
    seed: int = 0,
) -> FloatArray:
    """Return p of each cell's share of the gap being no larger than ``delta``, adjusted for all cells together.

    The share is ``mean(effects) / mean(gap)``; the null is ``|share| <= delta``. A cell with p of at most alpha lies
    beyond ``delta``; that this is said of even one cell where it is not so has probability alpha at most, as far as
    groups are symmetric about their mean.

    Args:
        effects: Effects in the direction of the gap, (cell, pair); NaN where a pair was not measured.
        gap: Gap of each pair, (pair,); its mean is above 0.
        group: Number of the independent group of each pair, (pair,).
        delta: Share of the gap that does not count yet, 0 or more.
        n_draws: Draws where there are too many combinations to try them all; then each p counts the observed signs as
            one more draw.
        seed: Seed of the draws; all cells share them.

    Returns:
        A p value per cell, (cell,): exact where ``2 ** (G - 1) <= n_draws``, never below ``smallest_p``. 1 where the
        share is within ``delta``, NaN where fewer than 2 groups were measured.

    Raises:
        SettingError: Values and groups do not stand for the same pairs, or ``n_draws`` is less than 1.
        NotFinite: A value is infinite.

    Examples:
        >>> effects, gap = [[3.0, 4.0, 5.0, 4.0, 3.5, 4.5], [0.1, 0.3, 0.2, 0.1, 0.2, 0.0]], [5.0] * 6
        >>> shifted_max_t(effects, gap, range(6), 0.1).tolist()
        [0.03125, 1.0]

    Cost:
        As ``max_t``.

    References:
        Westfall and Young (1993), Resampling-based multiple testing; Canay, Romano and Shaikh (2017) as above.
    """
    _check_draws(n_draws)
    tops = np.atleast_2d(np.asarray(effects, dtype=np.float64))
    sign = np.where(np.nansum(tops, axis=1) < 0, -1.0, 1.0)
    data = group_sums((sign[:, None] * tops - delta * np.asarray(gap, dtype=np.float64),), group)
    p = np.full(len(tops), np.nan)
    tested = data.n_groups > 1
    if not tested.any():
        return p
    kept = GroupSums((data.sums[0][tested],), data.counts[tested])
    (mean,), (moves,) = kept.means(), kept.moves()
    squared, variance = mean**2, (moves**2).sum(axis=1)
    whole = squared + variance
    observed = np.divide(squared, whole, out=np.zeros_like(whole), where=whole > 0)
    flips = _Flips.of(kept)
    moving = flips.spread > 0
    n_all = kept.counts.shape[1]
    is_exact = smallest_p(n_all) * n_draws >= 1
    signs = _all_signs(n_all) if is_exact else _random_signs(n_draws, n_all, seed)
    largest = np.zeros(signs.shape[1])
    if moving.any():
        some = GroupSums((kept.sums[0][moving],), kept.counts[moving])
        largest = np.sort(_Flips.of(some).largest_share(signs))
    reached = largest.size - np.searchsorted(largest, observed * (1 - _TIE))
    share = reached / largest.size if is_exact else (reached + 1) / (largest.size + 1)
    p[tested] = np.where(moving & (mean > 0), share, 1.0)
    return p


def _measured(data: GroupSums, cells: npt.NDArray[np.bool_], count: int) -> GroupSums:
    """Return some cells with only the ``count`` groups that each of them measured, whichever these are."""
    here = data.counts[cells] > 0
    shape = (here.shape[0], int(count))
    return GroupSums((data.sums[0][cells][here].reshape(shape),), data.counts[cells][here].reshape(shape))


def _products(sums: FloatArray, signs: FloatArray) -> Iterator[tuple[slice, FloatArray]]:
    """Yield blocks of cells with ``A`` of their draws, (cell, draw), in one array that may be written to."""
    n_cells, n_draws = sums.shape[0], signs.shape[1]
    step = max(1, _AT_ONCE // n_draws)
    kept = np.empty((min(step, n_cells), n_draws))
    for start in range(0, n_cells, step):
        some = sums[start : start + step]
        yield slice(start, start + step), np.matmul(some, signs, out=kept[: len(some)])


def _all_signs(n_groups: int) -> FloatArray:
    """Return every combination of signs up to a common one, (group, draw), the observed one first."""
    codes = np.arange(2 ** (int(n_groups) - 1)) >> np.arange(int(n_groups))[:, None]
    return np.where(codes & 1, -1.0, 1.0)


def _random_signs(n_draws: int, n_groups: int, seed: int) -> FloatArray:
    drawn = generator(seed, "sign-flip").integers(0, 2, (n_draws, n_groups), dtype=np.int8)
    return np.where(np.ascontiguousarray(drawn.T), -1.0, 1.0)


def _check_draws(n_draws: int) -> None:
    if n_draws < 1:
        raise SettingError(f"n_draws is {n_draws}; at least 1 is needed", fix="n_draws=9999")
