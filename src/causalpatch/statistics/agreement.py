"""Agreement: of pairs with their mean, and of one ranking with another, also of samples that stand for more.

Where each item stands for ``w`` items, a rank is the weight below it and half of the weight beside it, and every sum
over items or over pairs of items is weighted. With equal weights these are Spearman's and Kendall's coefficients.
"""

import numpy as np
import numpy.typing as npt

from causalpatch.statistics.clusters import FloatArray

_BLOCK = 512  # items whose pairs with all others are held at once


def sign_agreement(values: npt.ArrayLike) -> FloatArray:
    """Return the share of pairs whose sign is that of the mean over pairs.

    Args:
        values: Values, (cell, pair); NaN where a pair was not measured.

    Returns:
        A share per cell, (cell,). A value of 0 agrees with nothing, and nothing agrees with a mean of 0; NaN where no
        pair was measured.

    Examples:
        >>> sign_agreement([[1.0, 2.0, -0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]).tolist()
        [0.5, 0.0]
    """
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    measured = (~np.isnan(array)).sum(axis=1)
    sign = np.sign(np.nansum(array, axis=1))
    agreeing = ((np.sign(array) == sign[:, None]) & (array != 0)).sum(axis=1)
    return np.asarray(np.divide(agreeing, measured, out=np.full(measured.shape, np.nan), where=measured > 0))


def spearman(x: npt.ArrayLike, y: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Return Spearman's rank correlation, ties at the middle of their ranks.

    Args:
        x: Values, (item,).
        y: Other values of the same items, (item,).
        weights: How many items each stands for, (item,); one unless given.

    Returns:
        The correlation; NaN where one of both does not vary.

    Examples:
        >>> round(spearman([1, 2, 3, 4], [1, 3, 2, 4]), 3)
        0.8
    """
    first, second, weight = _items(x, y, weights)
    one, other = (_centred(_ranks(each, weight), weight) for each in (first, second))
    scale = np.sqrt((weight * one**2).sum() * (weight * other**2).sum())
    return float((weight * one * other).sum() / scale) if scale > 0 else np.nan


def kendall(x: npt.ArrayLike, y: npt.ArrayLike, weights: npt.ArrayLike | None = None) -> float:
    """Return Kendall's tau-b.

    Args:
        x: Values, (item,).
        y: Other values of the same items, (item,).
        weights: How many items each stands for, (item,); one unless given.

    Returns:
        The coefficient; NaN where one of both does not vary.

    Examples:
        >>> round(kendall([1, 2, 3, 4], [1, 3, 2, 4]), 3)
        0.667

    Cost:
        All pairs of items.
    """
    first, second, weight = _items(x, y, weights)
    sums = np.zeros(3)
    for begin in range(0, len(weight), _BLOCK):
        some = slice(begin, begin + _BLOCK)
        one, other = (np.sign(each[some, None] - each) for each in (first, second))
        both = weight[some, None] * weight
        sums += [(both * part).sum() for part in (one * other, one**2, other**2)]
    agree, of_first, of_second = sums
    scale = np.sqrt(of_first * of_second)
    return float(agree / scale) if scale > 0 else np.nan


def recall_at(sizes: npt.ArrayLike, is_taken: npt.ArrayLike, k: float, weights: npt.ArrayLike | None = None) -> float:
    """Return the share of the ``k`` largest items that were taken.

    Args:
        sizes: The size of each item, (item,).
        is_taken: Which items were taken, (item,).
        k: How many are looked at.
        weights: How many items each stands for, (item,); one unless given.

    Examples:
        >>> recall_at([5.0, 4.0, 3.0, 2.0], [True, False, True, True], 3)
        0.6666666666666666
        >>> recall_at([5.0, 4.0, 3.0], [True, False, True], 3, [1, 2, 1])  # the second stands for two
        0.3333333333333333
    """
    size, taken, weight = _items(sizes, is_taken, weights)
    order = np.argsort(-size, kind="stable")
    before = np.cumsum(weight[order]) - weight[order]
    counted = np.clip(k - before, 0.0, weight[order])
    total = counted.sum()
    return float((counted * taken[order]).sum() / total) if total > 0 else np.nan


def _items(x: npt.ArrayLike, y: npt.ArrayLike, weights: npt.ArrayLike | None) -> tuple[FloatArray, ...]:
    first, second = (np.asarray(each, dtype=np.float64) for each in (x, y))
    return first, second, np.ones(len(first)) if weights is None else np.asarray(weights, dtype=np.float64)


def _ranks(values: FloatArray, weights: FloatArray) -> FloatArray:
    """Return the weight below each value and half of that beside it."""
    _, place = np.unique(values, return_inverse=True)
    of_levels = np.bincount(place, weights=weights)
    return np.asarray((np.cumsum(of_levels) - of_levels / 2)[place])


def _centred(values: FloatArray, weights: FloatArray) -> FloatArray:
    return values - (weights * values).sum() / weights.sum() if weights.sum() > 0 else values
