"""Scores of edges held against edges that are known to be true: areas under two curves, and counts.

Edges are taken from the highest score to the lowest, those of equal scores together. Of what is taken,

- the *ROC curve* shows the share of the true edges that were found against the share of the false ones, from (0, 0) to
  (1, 1). A step of equal scores is a straight line, so that of a true and a false edge of equal scores half is won
  (mid-ranks, as Mann and Whitney have it).
- the *precision-recall curve* shows the share of true ones among what was taken against the share of the true edges
  that were found. Its area is that under steps: each step weighs by the true edges that it adds, at the precision with
  all of the step taken (average precision).

An edge without a score (NaN) was not found: it comes behind all that have one, as the last step of the ROC curve. In
the precision-recall curve a missed true edge adds no area.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from causalpatch.base.errors import SettingError


@dataclass(frozen=True)
class Against:
    """How scores agree with what is known.

    Args:
        auroc: Area under the ROC curve: 1 where every true edge scores higher than every false one, 0.5 by chance. NaN
            where there is no true edge, or no false one.
        auprc: Area under the precision-recall curve; by chance about the share of true edges. NaN where none is true.
        n_true: True edges.
        n_false: False edges.
        n_missed: True edges without a score.
    """

    auroc: float
    auprc: float
    n_true: int
    n_false: int
    n_missed: int


def hold_against(is_true: ArrayLike, scores: ArrayLike, *, floor: float = 0.0) -> Against:
    """Hold scores against what is known.

    Args:
        is_true: For each edge whether it is true.
        scores: For each edge its score, higher for what is more likely true; NaN where there is none. Signed scores are
            to be given by their size.
        floor: Scores below this share of the largest one are ties at 0: smaller ones are rounding.

    Raises:
        SettingError: There are not as many scores as edges.

    Examples:
        >>> found = hold_against([True, True, False, False], [3.0, 1.0, 2.0, 0.0])
        >>> found.auroc, round(found.auprc, 3)
        (0.75, 0.833)
    """
    truth = np.asarray(is_true, dtype=bool)
    given = np.asarray(scores, dtype=float)
    if truth.shape != given.shape or truth.ndim != 1:
        raise SettingError(
            "scores do not belong to the edges",
            facts=[("edges", truth.shape), ("scores", given.shape)],
            fix="give one score for each edge, NaN where there is none",
        )
    given = np.where(np.abs(given) < floor * np.nanmax(np.abs(np.append(given, 0.0))), 0.0, given)
    n_true, n_false = int(truth.sum()), int((~truth).sum())
    hits, misses = _steps(truth, given)
    found, wrong = np.cumsum(hits), np.cumsum(misses)
    roc = prc = np.nan
    if n_true and n_false:
        tpr, fpr = np.append(found, n_true) / n_true, np.append(wrong, n_false) / n_false
        roc = float(np.trapezoid(np.insert(tpr, 0, 0.0), np.insert(fpr, 0, 0.0)))
    if n_true:
        prc = float(np.sum(hits * found / np.maximum(found + wrong, 1)) / n_true)
    return Against(roc, prc, n_true, n_false, int((truth & np.isnan(given)).sum()))


def count_found(is_true: ArrayLike, is_taken: ArrayLike) -> tuple[int, int]:
    """Return how many true and how many false edges a set of edges holds.

    Examples:
        >>> count_found([True, True, False], [True, False, True])
        (1, 1)
    """
    truth, taken = np.asarray(is_true, dtype=bool), np.asarray(is_taken, dtype=bool)
    return int((truth & taken).sum()), int((~truth & taken).sum())


def _steps(truth: NDArray[np.bool_], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return how many true and false edges each step takes, from the highest score down; those without one are left."""
    has = ~np.isnan(scores)
    levels, place = np.unique(-scores[has], return_inverse=True)
    hits, misses = (np.bincount(place, weights=each[has], minlength=len(levels)) for each in (truth, ~truth))
    return hits.astype(np.float64), misses.astype(np.float64)
