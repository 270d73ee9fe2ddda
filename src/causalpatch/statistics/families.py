"""Many tests at once: p values adjusted for the family they stand in."""

import numpy as np
import numpy.typing as npt

from causalpatch.base.errors import SettingError
from causalpatch.statistics.clusters import FloatArray


def benjamini_hochberg(p: npt.ArrayLike) -> FloatArray:
    """Return p values adjusted so that those below q have a false discovery rate of at most q.

    The smallest ``p_(j) * n / j`` over all ``j >= i``. For effects that share pairs, as those of a sweep do, the
    guarantee is a heuristic: use it to screen.

    Args:
        p: p values of one family, in any shape; NaN where there is none, which does not count in the family.

    Returns:
        Adjusted p values in the same shape; NaN where p is NaN.

    Raises:
        SettingError: A value lies outside 0 to 1.

    Examples:
        >>> benjamini_hochberg([0.01, 0.02, 0.5]).tolist()
        [0.03, 0.03, 0.5]

    References:
        Benjamini and Hochberg (1995), Journal of the Royal Statistical Society B 57.
    """
    values, known = _family(p)
    order = np.argsort(values[known], kind="stable")
    n_tests = order.size
    stepped = values[known][order] * n_tests / np.arange(1, n_tests + 1)
    return _put_back(np.minimum.accumulate(stepped[::-1])[::-1], order, values, known)


def holm(p: npt.ArrayLike) -> FloatArray:
    """Return p values adjusted so that those below alpha hold together with probability ``1 - alpha``.

    The largest ``p_(j) * (n - j + 1)`` over all ``j <= i``; valid whatever the dependence between the tests.

    Args:
        p: p values of one family, in any shape; NaN where there is none, which does not count in the family.

    Returns:
        Adjusted p values in the same shape; NaN where p is NaN.

    Raises:
        SettingError: A value lies outside 0 to 1.

    Examples:
        >>> holm([0.01, 0.02, 0.5]).tolist()
        [0.03, 0.04, 0.5]

    References:
        Holm (1979), Scandinavian Journal of Statistics 6.
    """
    values, known = _family(p)
    order = np.argsort(values[known], kind="stable")
    stepped = values[known][order] * np.arange(order.size, 0, -1)
    return _put_back(np.maximum.accumulate(stepped), order, values, known)


def _family(p: npt.ArrayLike) -> tuple[FloatArray, npt.NDArray[np.bool_]]:
    values = np.asarray(p, dtype=np.float64)
    known = ~np.isnan(values)
    outside = values[known & ~((values >= 0) & (values <= 1))]
    if outside.size:
        raise SettingError(
            f"{outside.flat[0]} is not a p value",
            facts=[("allowed", "0 to 1, or NaN where there is none")],
            fix="give p values, such as those of sign_flip",
        )
    return values, known


def _put_back(
    adjusted: FloatArray, order: npt.NDArray[np.int64], values: FloatArray, known: npt.NDArray[np.bool_]
) -> FloatArray:
    unsorted = np.empty_like(adjusted)
    unsorted[order] = np.minimum(adjusted, 1.0)
    result = np.full_like(values, np.nan)
    result[known] = unsorted
    return result
