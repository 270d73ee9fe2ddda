"""Sums by independent group: what every interval and every test here is made of.

Pairs that share a prompt are not independent; whole groups of them (the connected components of the pair graph) are.
A mean over pairs is therefore judged by how much it moves from group to group:

1. With the sums ``U_g`` of a value and the numbers ``n_g`` of pairs in each of ``G`` groups, the mean over the
   ``n = sum(n_g)`` pairs is ``m = sum(U_g) / n``: every pair weighs the same, so a large group weighs more.
2. Its linearised group sums are ``e_g = U_g - m * n_g``; leaving group g out moves the mean by ``-e_g / (n - n_g)``.
3. The jackknife variance of the mean is ``(G - 1) / G * sum((e_g / (n - n_g)) ** 2)``. Among groups of equal size it is
   the usual ``G / (G - 1) * sum(e_g ** 2) / n ** 2``; among unequal ones it stays honest where that one does not (with
   one group of 100 pairs and 40 of one pair, a 95 % interval covers .93 instead of .19).

References:
    MacKinnon, Nielsen and Webb (2023), Fast and reliable jackknife and bootstrap methods for cluster-robust inference,
    Journal of Applied Econometrics 38: their CV3.
"""

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from causalpatch.base.errors import NotFinite, SettingError

FloatArray: TypeAlias = npt.NDArray[np.float64]
IntArray: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class GroupSums:
    """Sums of several values over the pairs of each group, a row per cell.

    Args:
        sums: The sums, one array (cell, group) per value.
        counts: Pairs measured in each group, as floats (cell, group); 0 where a cell has none there.
    """

    sums: tuple[FloatArray, ...]
    counts: FloatArray

    @property
    def n_pairs(self) -> FloatArray:
        """Measured pairs of each cell, (cell,)."""
        return np.asarray(self.counts.sum(axis=1))

    @property
    def n_groups(self) -> IntArray:
        """Groups with a measured pair, (cell,)."""
        return np.asarray((self.counts > 0).sum(axis=1), dtype=np.int64)

    def means(self) -> tuple[FloatArray, ...]:
        """Return the mean over pairs of each value, (cell,); NaN where nothing was measured."""
        with np.errstate(invalid="ignore"):
            return tuple(each.sum(axis=1) / self.n_pairs for each in self.sums)

    def moves(self) -> tuple[FloatArray, ...]:
        """Return how far each value's mean moves when a group is left out, (cell, group).

        The moves are scaled so that their sum of squares is the jackknife variance of the mean; a group without pairs
        moves nothing, and a cell with a single group has variance NaN.
        """
        rest = self.n_pairs[:, None] - self.counts
        n_groups = self.n_groups[:, None]
        moves = []
        with np.errstate(invalid="ignore", divide="ignore"):
            scale = np.sqrt((n_groups - 1) / n_groups) / np.where(rest > 0, rest, np.nan)
            scale[self.counts == 0] = 0.0
            for each, mean in zip(self.sums, self.means(), strict=True):
                moved = each - mean[:, None] * self.counts
                moved *= scale
                moves.append(moved)
        return tuple(moves)


def group_sums(values: tuple[npt.ArrayLike, ...], group: npt.ArrayLike) -> GroupSums:
    """Sum values over the pairs of each group.

    Args:
        values: Arrays (cell, pair) or (pair,), which stand for every cell. A pair that is NaN in one of them is left
            out of the cell altogether.
        group: Number of the independent group that each pair belongs to, (pair,).

    Returns:
        The sums and counts, (cell, group), groups in increasing order of their number.

    Raises:
        SettingError: The shapes do not fit each other, or there is no pair.
        NotFinite: A value is infinite.
    """
    arrays = [np.atleast_2d(np.asarray(value, dtype=np.float64)) for value in values]
    labels = np.asarray(group)
    n_pairs = labels.size
    if labels.ndim != 1 or n_pairs == 0 or any(array.ndim != 2 or array.shape[1] != n_pairs for array in arrays):
        raise SettingError(
            "values and groups do not stand for the same pairs",
            facts=[("values", " and ".join(str(np.shape(value)) for value in values)), ("group", labels.shape)],
            fix="give values as (cell, pair) and one group per pair",
        )
    if any(np.isinf(array).any() for array in arrays):
        raise NotFinite("a value is infinite, so it has no mean", fix="look at the metric of that pair")
    n_cells = max(array.shape[0] for array in arrays)
    order = np.argsort(labels, kind="stable")
    _, starts = np.unique(labels[order], return_index=True)
    is_sorted, is_single = bool((np.diff(order) == 1).all()), starts.size == n_pairs
    missing = np.zeros((1, n_pairs), dtype=bool)
    for array in arrays:
        absent = np.isnan(array)
        if absent.any():
            missing = missing | absent
    is_whole = not missing.any()

    def summed(array: FloatArray) -> FloatArray:
        kept = array if is_whole else np.where(missing, 0.0, array)
        kept = kept if is_sorted else kept[:, order]
        return np.broadcast_to(kept if is_single else np.add.reduceat(kept, starts, axis=1), (n_cells, starts.size))

    return GroupSums(tuple(map(summed, arrays)), summed(np.ones((1, n_pairs))))
