"""The ratio of means of very many cells: share, interval and p of each, as fast as memory is read.

The numbers are those of ``intervals.fieller`` and of the cluster t at 0, whose symbols stand in ``clusters``. Where
every cell has all pairs, the sums of what is below the line and the critical value are the same for all cells, so that
a cell costs a few passes over its groups:

1. Sums of its groups, their mean ``top``, and the jackknife moves ``R`` of that.
2. ``sum(R ** 2)``, its variance: t = top / sqrt of it.
3. Moves of the residual, ``r = R - share * b``; ``sum(r ** 2)`` and ``r . b`` are the quadratic of Fieller's set.

Cells of which a pair is missing, and those whose groups agree but for rounding, are given to the general code.

Cost: 0.1 microseconds a cell of 16 groups, in blocks that stay in the processor's cache.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from causalpatch.base.extras import lazy
from causalpatch.statistics.clusters import FloatArray, GroupSums, group_sums
from causalpatch.statistics.intervals import MIN_GROUPS, fieller

if TYPE_CHECKING:
    from scipy import special
else:
    special = lazy("scipy.special")

VALUES: Final = 2**17  # of a block: a megabyte
_ROUNDING: Final = 1e-12  # as in ``intervals``
_NEARLY: Final = 1e-9  # moves below this share of what they are made of are looked at by the general code


@dataclass(frozen=True, eq=False)
class Columns:
    """What is found of some cells, ``(cell,)`` each.

    Args:
        mean: Mean over pairs.
        share: The same as a share of the mean below the line.
        low: Lower end of the share's interval; NaN with fewer than 10 groups, or where there is none.
        high: Upper end.
        p: Of the cluster t at 0.
        n_pairs: Pairs that were measured.
    """

    mean: FloatArray
    share: FloatArray
    low: FloatArray
    high: FloatArray
    p: FloatArray
    n_pairs: npt.NDArray[np.int32]


class ManyCells:
    """Cells that share pairs and what is below the line.

    Args:
        below: Value of each pair below the line, ``(pair,)``, such as its gap.
        group: Number of the independent group of each pair, ``(pair,)``.
        level: Of the intervals, each by itself.
    """

    def __init__(self, below: npt.ArrayLike, group: npt.ArrayLike, level: float) -> None:
        self._below = np.asarray(below, dtype=np.float64)
        self._group, self._level = np.asarray(group), level
        order = np.argsort(self._group, kind="stable")
        _, self._starts = np.unique(self._group[order], return_index=True)
        self._order = None if bool((np.diff(order) == 1).all()) else order
        self._is_single = len(self._starts) == len(order)
        self._is_whole = bool(np.isfinite(self._below).all())
        data = group_sums((self._below, self._below), self._group) if self._is_whole else None
        if data is not None:
            n_groups = int(data.n_groups[0])
            self._counts, self._n = data.counts[0], float(data.n_pairs[0])
            self._bottom, self._moves = float(data.means()[0][0]), data.moves()[0][0]
            with np.errstate(invalid="ignore", divide="ignore"):
                self._scale = np.sqrt((n_groups - 1) / n_groups) / np.where(
                    self._n > self._counts, self._n - self._counts, np.nan
                )
            self._freedom = n_groups - 1

    def columns(self, values: FloatArray) -> Columns:
        """Return what is found of cells.

        Args:
            values: ``(cell, pair)``; NaN where there is none. As many as ``VALUES`` at once are fastest.

        Raises:
            NotFinite: A value is infinite.
        """
        if not self._is_whole or self._freedom < 1:
            return self._in_general(values)
        sums = values if self._order is None else values[:, self._order]
        sums = sums if self._is_single else np.add.reduceat(sums, self._starts, axis=1)
        with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
            top = sums.sum(axis=1) / self._n
            moves = sums - top[:, None] * self._counts
            moves *= self._scale
            variance = np.einsum("cg,cg->c", moves, moves)
            share = top / self._bottom if self._bottom != 0 else np.full(len(top), np.nan)
            moves -= share[:, None] * self._moves
            low, high, is_odd = self._interval(moves, variance, share)
            p = 2 * special.stdtr(self._freedom, -np.abs(top) / np.sqrt(variance))
        p[top == 0] = 1.0
        found = Columns(top, share, low, high, p, np.full(len(top), self._n, dtype=np.int32))
        again = np.flatnonzero(is_odd | ~np.isfinite(top))
        if again.size:
            self._put(found, again, self._in_general(values[again]))
        return found

    def _interval(
        self, residual: FloatArray, variance: FloatArray, share: FloatArray
    ) -> tuple[FloatArray, FloatArray, npt.NDArray[np.bool_]]:
        """Return the ends of each interval, and which cells may be constant but for rounding."""
        b, bottom = self._moves, self._bottom
        last = np.einsum("cg,cg->c", residual, residual)
        size = np.sqrt(variance) + np.abs(share) * (abs(bottom) + np.abs(b).max())
        is_odd = (last > 0) & (last <= (_NEARLY * size) ** 2)
        squared = self._squared
        leading = bottom**2 - squared * float(b @ b)
        if not leading > _ROUNDING * bottom**2:
            return np.full(len(share), np.nan), np.full(len(share), np.nan), is_odd
        middle = squared * (residual @ b)
        root = np.sqrt(middle**2 + leading * squared * last)
        return share - (root + middle) / leading, share + (root - middle) / leading, is_odd

    @property
    def _squared(self) -> float:
        """The critical value, squared; NaN with too few groups."""
        if self._freedom + 1 < MIN_GROUPS:
            return float("nan")
        return float(special.stdtrit(self._freedom, (1 + self._level) / 2)) ** 2

    def _in_general(self, values: FloatArray) -> Columns:
        """Return what is found of cells of any kind."""
        data = group_sums((values, self._below), self._group)
        top, bottom = data.means()
        (moves,) = GroupSums((data.sums[0],), data.counts).moves()
        n_groups = data.n_groups
        freedom = np.maximum(n_groups - 1, 1)
        limit = np.where(n_groups < MIN_GROUPS, np.nan, special.stdtrit(freedom, (1 + self._level) / 2))
        low, high = fieller(data, limit)
        with np.errstate(invalid="ignore", divide="ignore"):
            size = np.abs(top) / np.sqrt(np.einsum("cg,cg->c", moves, moves))
            p = np.where(n_groups < 2, np.nan, 2 * special.stdtr(freedom, -size))
            p = np.where((top == 0) & (n_groups >= 2), 1.0, p)
            share = np.where(bottom != 0, top / bottom, np.nan)
        return Columns(top, share, low, high, p, data.n_pairs.astype(np.int32))

    @staticmethod
    def _put(found: Columns, cells: npt.NDArray[np.int64], some: Columns) -> None:
        for name, column in vars(some).items():
            getattr(found, name)[cells] = column
