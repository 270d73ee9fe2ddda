"""What scores have in common: their share of the gap, and what is said of them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from causalpatch.base.errors import NoGap, SettingError

UNSIGNED = "unsigned"
LEARNT = "learnt"
"""What a record calls how gates were learnt, which stand in the place of scores."""


def importance_of(values: np.ndarray, provenance: Mapping[str, Any], *, is_strict: bool = True) -> np.ndarray:
    """Return scores as shares of mean m(source) - mean m(base); gates that were learnt as they are.

    Args:
        values: The scores, in the metric's unit.
        provenance: Their record.
        is_strict: Whether it is an error that there are none; else they are NaN.

    Raises:
        NoGap: Both runs have the same mean.
        SettingError: Scores of this method have no sign.
    """
    if LEARNT in provenance:
        return values
    gap = float(provenance["mean_source"]) - float(provenance["mean_base"])
    if provenance.get(UNSIGNED):
        if is_strict:
            raise SettingError(
                f"scores by {provenance.get('method')!r} have no sign, so that importance is not defined",
                facts=[("why", "they are means of magnitudes")],
                fix='rank by scores.score(), or take method="atp"',
            )
        return np.full_like(values, np.nan)
    if gap == 0:
        if is_strict:
            raise NoGap(
                "base and source runs have the same mean metric, so that importance is not defined",
                facts=[("mean", f"{provenance['mean_base']:.6g}")],
                fix="use scores.score(), or pairs on which the metric differs",
            )
        return np.full_like(values, np.nan)
    return values / gap


def unit_of(provenance: Mapping[str, Any]) -> str:
    """Return what scores are, in words."""
    if LEARNT in provenance:
        return f"gate learnt by {provenance.get('method')}: 1 keeps the edge, 0 ablates it"
    (metric, *_) = provenance.get("metrics", ["metric"])
    return f"score: approximate change of {metric} when the source's value is put in ({provenance.get('direction')})"
