"""How many pairs say the same as their mean: heterogeneity is shown before a mean is claimed."""

import numpy as np
import numpy.typing as npt

from causalpatch.statistics.clusters import FloatArray


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
