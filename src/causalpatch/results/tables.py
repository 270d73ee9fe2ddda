"""Tables of effects: every cell with its interval and p, and the largest cells, marked exploratory.

1. A cell's share is a ratio of means, with a Fieller interval by independent component (``ratio_intervals``).
2. ``p`` flips the sign of whole components: screening only, against 0. In a deterministic network nearly every
   component has some effect, so a small p says that the effect is not 0, not that it matters.
3. ``p_bh`` is Benjamini-Hochberg over all cells of the sweep, a heuristic.
4. ``top`` chooses and estimates on the same pairs. Its intervals are widened to hold together over *all* cells that
   could have been chosen (max-T), and it says *exploratory*. Where that holds only approximately, it says how often all
   of them hold in simulation.

With fewer than 10 independent components there is no interval, and the value of each component is shown instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.results import notes
from causalpatch.results.inference import Inference, Spans
from causalpatch.results.layout import label_name
from causalpatch.results.shares import Numbers, component_sums
from causalpatch.results.status import Status, describe_cells
from causalpatch.results.top import TopTable
from causalpatch.results.words import counted, own_notes, share_words

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd = lazy("pandas")


def summarise(data: xr.Dataset, inference: Inference, provenance: Mapping[str, Any], *, level: float) -> pd.DataFrame:
    """Return a row per cell, in the order of the axes, and in ``attrs["notes"]`` what must be said with it.

    Args:
        data: One metric's labelled array.
        inference: What follows from it.
        provenance: How the numbers came to be.
        level: Of the intervals, each by itself.

    Raises:
        NoGap: Clean and reference runs do not differ enough.
    """
    inference.numbers.require_gap()
    spans = inference.alone(level)
    frame = _cells(data, inference, spans)
    meaning = share_words(provenance, inference.numbers.metric)
    frame.attrs["notes"] = [meaning, *_notes(data, inference, spans), *own_notes(provenance)]
    return frame


def effects_only(data: xr.Dataset, inference: Inference) -> pd.DataFrame:
    """Return a row per cell without anything that needs a gap: the effect and its p, in the metric's unit."""
    numbers = inference.numbers
    columns: dict[str, Any] = {
        **cell_columns(data),
        "effect": numbers.mean_effect(),
        "p": inference.p,
        "p_bh": inference.p_bh,
        "n_pairs": numbers.n_pairs,
        "n_components": numbers.n_components,
        "status": describe_cells(_status(data)),
    }
    return pd.DataFrame(columns)


def largest(data: xr.Dataset, inference: Inference, provenance: Mapping[str, Any], *, k: int, level: float) -> TopTable:
    """Return the ``k`` cells with the largest |recovered|, with intervals that hold over all cells together."""
    numbers = inference.numbers
    numbers.require_gap()
    spans = inference.together(level)
    size = np.abs(numbers.recovered())
    order = np.argsort(-size, kind="stable")[: max(k, 0)]
    order = order[np.isfinite(size[order])]
    frame = _cells(data, inference, spans, order)
    cells = counted(int(inference.found.sum()), "cell")
    words = f"exploratory: the {len(order)} largest of {cells}, chosen and estimated on the same pairs"
    together = []
    if frame["low"].notna().any():
        trust = inference.trust(level)
        words += f"; {notes.holding(level, trust)}"
        together = [*notes.on_together(trust), *notes.on_disagreement(frame)]
    meaning = share_words(provenance, numbers.metric)
    said = [*_notes(data, inference, spans), *together, *own_notes(provenance)]
    frame.attrs.update(label="exploratory", notes=[meaning, *said])
    each = None if inference.has_intervals else share_by_component(numbers)[order]
    axes = [str(name) for name in data["status"].dims[:-1]]
    return TopTable(frame, words, meaning, said, each, axes=axes, provenance=provenance)


def cell_columns(data: xr.Dataset) -> dict[str, np.ndarray]:
    """Return the coordinates of every cell, in the order of the axes: a column per axis and per axis's labels."""
    axes = [str(name) for name in data["status"].dims[:-1]]
    shape = tuple(data.sizes[axis] for axis in axes)
    places = np.unravel_index(np.arange(int(np.prod(shape))), shape) if axes else ()
    columns: dict[str, np.ndarray] = {}
    for axis, place in zip(axes, places, strict=True):
        columns[axis] = data[axis].values[place]
        if label_name(axis) in data.coords:
            columns[label_name(axis)] = data[label_name(axis)].values[place]
    return columns


def share_by_component(numbers: Numbers) -> np.ndarray:
    """Return each component's own ratio of means, axes cell and component; NaN where its gap is too small."""
    measured = numbers.measured
    effect = component_sums(np.where(measured, numbers.effect, 0.0), numbers.group)
    gap = component_sums(measured * numbers.gap, numbers.group)
    size = component_sums(measured.astype(np.float64), numbers.group)
    share = np.full(effect.shape, np.nan)
    np.divide(effect, gap, out=share, where=(size > 0) & (np.abs(gap) >= numbers.smallest_gap * size))
    return numbers.sign * share


def component_table(data: xr.Dataset, numbers: Numbers) -> pd.DataFrame:
    """Return a row per cell and independent component: its pairs, mean effect, mean gap and share."""
    names = np.unique(numbers.group)
    size = component_sums(numbers.measured.astype(np.float64), numbers.group)
    effect = component_sums(np.where(numbers.measured, numbers.effect, 0.0), numbers.group)
    gap = component_sums(numbers.measured * numbers.gap, numbers.group)
    columns = {name: np.repeat(values, len(names)) for name, values in cell_columns(data).items()}
    columns |= {
        "component": np.tile(names, len(size)),
        "n_pairs": size.astype(np.int64).ravel(),
        "effect": _mean(effect, size).ravel(),
        "gap": _mean(gap, size).ravel(),
        "recovered": share_by_component(numbers).ravel(),
    }
    return pd.DataFrame(columns)


def long_table(data: xr.Dataset) -> pd.DataFrame:
    """Return a row per metric, cell and pair, with the statuses in words."""
    names = np.atleast_1d(data["metric_name"].values)
    several = "metric_name" in data.dims
    n_pairs = data.sizes["pair"]
    status = data["status"].values.reshape(-1, n_pairs)
    n_cells = len(status)
    words = np.array([code.text for code in Status], dtype=object)
    frames = []
    for place, name in enumerate(names):
        one = data.isel(metric_name=place) if several else data
        columns = {key: np.repeat(values, n_pairs) for key, values in cell_columns(data).items()}
        base = one["baseline_base"].broadcast_like(one["metric"]).transpose(*one["metric"].dims).values
        columns |= {
            "pair": np.tile(data["pair"].values, n_cells),
            "component": np.tile(data["component"].values, n_cells),
            "metric_name": np.full(n_cells * n_pairs, name, dtype=object),
            "metric": one["metric"].values.ravel(),
            "base": base.ravel(),
            "effect": (one["metric"].values - base).ravel(),
            "status": words[status.ravel()],
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _mean(total: np.ndarray, size: np.ndarray) -> np.ndarray:
    mean = np.full(total.shape, np.nan)
    np.divide(total, size, out=mean, where=size > 0)
    return mean


def _cells(data: xr.Dataset, inference: Inference, spans: Spans, chosen: np.ndarray | None = None) -> pd.DataFrame:
    """Return a row per chosen cell, or per cell: its coordinates and all its numbers."""
    numbers = inference.numbers
    columns: dict[str, Any] = {
        **cell_columns(data),
        "effect": numbers.mean_effect(),
        "recovered": numbers.recovered(),
        "low": spans.low,
        "high": spans.high,
        "p": inference.p,
        "p_bh": inference.p_bh,
        "agreement": inference.agreement,
        "n_pairs": numbers.n_pairs,
        "n_components": numbers.n_components,
    }
    status = _status(data)
    if chosen is not None:
        columns, status = {name: values[chosen] for name, values in columns.items()}, status[chosen]
    return pd.DataFrame(columns | {"status": describe_cells(status)})


def _notes(data: xr.Dataset, inference: Inference, spans: Spans) -> list[str]:
    on_cells = notes.on_cells(inference.numbers, _status(data))
    return [*notes.on_intervals(inference, spans), *notes.on_p(inference), *on_cells]


def _status(data: xr.Dataset) -> np.ndarray:
    status: np.ndarray = data["status"].values
    return status.reshape(-1, data.sizes["pair"])
