"""Areas under curves of faithfulness over the size of a circuit."""

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from causalpatch.base.errors import SettingError

FRACTIONS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Shares of the edges at which circuits are compared (Mueller et al. 2025)."""


@dataclass(frozen=True)
class Areas:
    """Areas under f and under its distance from 1.

    Args:
        cpr: Integral of f over the share of edges, by trapezoids. A method that finds nothing has .25 over the usual
            sizes; above 1, parts that work against the behaviour were left out, which does not make a circuit better.
        cmd: Integral of |1 - f| over the share of edges. A method that finds nothing has .75.
        log_size: Mean of f over the logarithm of the share of edges, where small circuits weigh as much as large ones.
    """

    cpr: float
    cmd: float
    log_size: float


def areas_under(fractions: npt.ArrayLike, f: npt.ArrayLike) -> Areas:
    """Return the areas under a curve of f.

    Args:
        fractions: Shares of the edges, rising.
        f: Faithfulness at each.

    Raises:
        SettingError: There are fewer than two sizes, or they do not rise.

    Examples:
        >>> nothing = areas_under(FRACTIONS, [0.0] * 9 + [1.0])
        >>> round(nothing.cpr, 3), round(nothing.cmd, 3)
        (0.25, 0.749)

    References:
        Mueller et al. 2025, "MIB: A Mechanistic Interpretability Benchmark", 2504.13151.
    """
    x, y = np.asarray(fractions, dtype=np.float64), np.asarray(f, dtype=np.float64)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 2 or not (np.diff(x) > 0).all() or not x[0] > 0:
        raise SettingError(
            "an area needs the curve of one method at two sizes or more, which rise",
            facts=[("sizes", ", ".join(f"{each:g}" for each in np.ravel(x)))],
            fix="evaluate the scores that circuits are taken from: evaluate_circuit(experiment, scores)",
        )
    log = np.log(x)
    return Areas(
        float(np.trapezoid(y, x)),
        float(np.trapezoid(np.abs(1 - y), x)),
        float(np.trapezoid(y, log) / (log[-1] - log[0])),
    )
