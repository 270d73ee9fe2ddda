"""Several random draws of one sweep: put side by side, averaged for each pair, and how far they lie apart.

Noise and resampled values are drawn, so one draw is one of many answers. Runs of different draws have the axis
``draw``. For shares, intervals and pictures each pair's numbers are averaged over its draws first: the pair stays the
unit of all statistics, and draws add no independent observations. The spread is the standard deviation, over draws, of
a cell's mean effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.results.layout import Parts
from causalpatch.results.status import Status, has_number

DRAW = "draw"


def stack(parts: Sequence[Parts], draws: Sequence[int]) -> Parts:
    """Put the parts of several runs side by side, each a draw; the axis ``draw`` is the last of the sweep's.

    Args:
        parts: Parts with the same axes, pairs and metrics.
        draws: The number of each draw.

    Raises:
        SettingError: They do not have the same axes, pairs and metrics.
    """
    first = parts[0]
    for other in parts[1:]:
        same = (dict(other.axes), list(other.pair_ids), list(other.metrics))
        if same != (dict(first.axes), list(first.pair_ids), list(first.metrics)):
            raise SettingError(
                "draws of different sweeps cannot stand side by side",
                facts=[("first", f"axes {', '.join(first.axes)}"), ("other", f"axes {', '.join(other.axes)}")],
                fix="run them with the same sites, pairs and metrics",
            )
    baselines = {}
    for role, kept in first.baselines.items():
        arrays = np.stack([each.baselines[role] for each in parts], axis=1)
        # Effects of a draw belong to the base run of that draw; the clean run is one and the same, but for rounding.
        differs = role in ("base", "reference") and bool((arrays != arrays[:, :1]).any())
        baselines[role] = arrays if differs else kept
    return replace(
        first,
        axes={**first.axes, DRAW: list(draws)},
        values=np.stack([each.values for each in parts], axis=-2),
        status=np.stack([each.status for each in parts], axis=-2),
        baselines=baselines,
    )


def average(parts: Parts, spread: np.ndarray) -> Parts:
    """Return the parts with each pair's numbers averaged over its draws; a pair that lacks a draw has no number.

    Args:
        parts: Parts with the axis ``draw``.
        spread: Standard deviation of each cell's mean effect over the draws, for the record.
    """
    axis = list(parts.axes).index(DRAW)
    status = np.asarray(parts.status)
    worst = np.where(has_number(status), -1, status.astype(np.int64)).max(axis)
    made = np.where(status == Status.DERIVED, -1, status.astype(np.int64)).max(axis)
    # A cell counts as derived where it is so in every draw, else as it was measured.
    made = np.where(made < 0, int(Status.DERIVED), made)
    n_draws = len(parts.axes[DRAW])
    return replace(
        parts,
        axes={name: values for name, values in parts.axes.items() if name != DRAW},
        labels={name: texts for name, texts in parts.labels.items() if name != DRAW},
        values=np.asarray(parts.values).mean(axis + 1),
        status=np.where(worst >= 0, worst, made).astype(np.uint8),
        baselines={
            role: array.mean(1) if array.ndim == 3 else array for role, array in as_arrays(parts.baselines).items()
        },
        provenance=_said(parts.provenance, n_draws, spread),
    )


def as_arrays(baselines: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return baselines as arrays."""
    return {role: np.asarray(array) for role, array in baselines.items()}


def _said(provenance: Mapping[str, Any], n_draws: int, spread: np.ndarray) -> dict[str, Any]:
    known = spread[np.isfinite(spread)]
    record: dict[str, Any] = {"n": n_draws}
    said = f"mean over {n_draws} draws" if n_draws > 1 else "one draw, whose spread is not known"
    if len(known):
        record |= {"median_spread": float(np.median(known)), "largest_spread": float(known.max())}
        said += f"; standard deviation of a cell's effect over draws: median {np.median(known):.3g}, "
        said += f"largest {known.max():.3g}"
    return {**provenance, "draws": record, "notes": [*(provenance.get("notes") or ()), said]}
