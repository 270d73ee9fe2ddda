"""Tables of effects: every cell with its interval and p, and the largest cells, marked exploratory.

1. A cell's share is a ratio of means, with a Fieller interval by independent component (``ratio_intervals``).
2. ``p`` flips the sign of whole components: screening only, against 0. In a deterministic network nearly every
   component has some effect, so a small p says that the effect is not 0, not that it matters.
3. ``p_bh`` is Benjamini-Hochberg over all cells of the sweep, a heuristic.
4. ``top`` chooses and estimates on the same pairs. Its intervals are widened to hold together over *all* cells that
   could have been chosen (max-T), and it says *exploratory*.

With fewer than 10 independent components there is no interval, and the value of each component is shown instead.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.results.labels import visible
from causalpatch.results.layout import label_name
from causalpatch.results.shares import Numbers, component_sums
from causalpatch.results.status import Status, counts, describe_cells
from causalpatch.statistics.agreement import sign_agreement
from causalpatch.statistics.families import benjamini_hochberg
from causalpatch.statistics.intervals import MIN_GROUPS, Interval, ratio_intervals
from causalpatch.statistics.permutation import max_t, sign_flip, smallest_p

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd = lazy("pandas")

# With fewer groups, or more skewed ones, intervals that hold together are called approximate.
GROUPS_FOR_MAX_T = 20
LARGEST_SKEW = 1.0
ALPHA = 0.05


def summarise(
    data: xr.Dataset, numbers: Numbers, *, level: float, seed: int, critical: float | None = None
) -> pd.DataFrame:
    """Return a row per cell, in the order of the axes, and in ``attrs["notes"]`` what must be said with it.

    Args:
        data: One metric's labelled array.
        numbers: The same, cells flattened.
        level: Of the intervals.
        seed: Of the random sign flips.
        critical: Critical value of simultaneous intervals; each interval stands alone without it.

    Raises:
        NoGap: Clean and reference runs do not differ enough.
    """
    numbers.require_gap()
    found = numbers.n_pairs > 0
    share = numbers.recovered()
    n_cells = len(share)
    spread: list[Interval] = []
    low, high, p, agreement = (np.full(n_cells, np.nan) for _ in range(4))
    if found.any():
        tops = numbers.sign * numbers.effect[found]
        spread = ratio_intervals(tops, numbers.gap, numbers.group, level=level, critical=critical, seed=seed)
        bounded = np.array([interval.is_bounded for interval in spread]) & np.isfinite(share[found])
        low[found] = np.where(bounded, [interval.low for interval in spread], np.nan)
        high[found] = np.where(bounded, [interval.high for interval in spread], np.nan)
        p[found] = sign_flip(numbers.effect[found], numbers.group, seed=seed)
        agreement[found] = sign_agreement(numbers.effect[found])
    status = data["status"].values.reshape(n_cells, -1)
    columns: dict[str, Any] = {
        **cell_columns(data),
        "effect": numbers.mean_effect(),
        "recovered": share,
        "low": low,
        "high": high,
        "p": p,
        "p_bh": benjamini_hochberg(p),
        "agreement": agreement,
        "n_pairs": numbers.n_pairs,
        "n_components": numbers.n_components,
        "status": describe_cells(status),
    }
    notes = [
        *_notes_on_intervals(numbers, share, spread),
        *_notes_on_p(numbers, int(np.isfinite(p).sum())),
        *_notes_on_cells(numbers, status, share),
    ]
    frame = pd.DataFrame(columns)
    frame.attrs["notes"] = notes
    return frame


def effects_only(data: xr.Dataset, numbers: Numbers, *, seed: int) -> pd.DataFrame:
    """Return a row per cell without anything that needs a gap: the effect and its p, in the metric's unit."""
    found = numbers.n_pairs > 0
    p = np.full(len(found), np.nan)
    if found.any():
        p[found] = sign_flip(numbers.effect[found], numbers.group, seed=seed)
    columns: dict[str, Any] = {
        **cell_columns(data),
        "effect": numbers.mean_effect(),
        "p": p,
        "p_bh": benjamini_hochberg(p),
        "n_pairs": numbers.n_pairs,
        "n_components": numbers.n_components,
        "status": describe_cells(data["status"].values.reshape(len(found), -1)),
    }
    return pd.DataFrame(columns)


def largest(data: xr.Dataset, numbers: Numbers, *, k: int, level: float, seed: int) -> TopTable:
    """Return the ``k`` cells with the largest |recovered|, with intervals that hold over all cells together."""
    numbers.require_gap()
    found = numbers.n_pairs > 0
    critical, left = None, np.empty((0, numbers.group.size))
    few = len(np.unique(numbers.group)) < MIN_GROUPS
    if found.any() and not few:
        # What the ratio's own t looks at: the effect left over when the cell's share of the gap is taken off.
        share = np.nan_to_num(numbers.recovered())[:, None]
        left = numbers.sign * numbers.effect - share * numbers.gap
        largest_t = max_t(left[found], numbers.group, seed=seed, level=level)
        # NaN: no cell varies between groups, so that each interval is a point whatever the critical value.
        critical = None if np.isnan(largest_t) else largest_t
    table = summarise(data, numbers, level=level, seed=seed, critical=critical)
    size = table["recovered"].abs()
    order = size.dropna().sort_values(ascending=False, kind="stable").index[: max(k, 0)].to_numpy(dtype=np.int64)
    frame = table.loc[order].reset_index(drop=True)
    words = f"exploratory: the {len(order)} largest of {int(found.sum())} cells, chosen and estimated on the same pairs"
    if not few:
        words += f"; the {level:.0%} intervals hold for all cells together"
    notes = table.attrs["notes"] if few else [*table.attrs["notes"], *_notes_on_together(left[order], numbers.group)]
    frame.attrs.update(label="exploratory", notes=notes)
    each = share_by_component(numbers)[order] if few else None
    return TopTable(frame, words, notes, each)


class TopTable:
    """The largest cells of a sweep, marked exploratory; everything a ``DataFrame`` can be asked, it answers.

    Args:
        frame: A row per cell, largest |recovered| first.
        words: The line above the table.
        notes: The lines below.
        by_component: Share of every independent component, axes row and component, where these are too few for an
            interval.
    """

    label = "exploratory"

    def __init__(
        self, frame: pd.DataFrame, words: str, notes: Sequence[str], by_component: np.ndarray | None = None
    ) -> None:
        self.words = words
        self.notes = list(notes)
        self.by_component = by_component
        self._frame = frame

    def to_dataframe(self) -> pd.DataFrame:
        """Return a copy of the table, with the notes in ``attrs``."""
        return self._frame.copy()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._frame, name)

    def __getitem__(self, key: Any) -> Any:
        return self._frame[key]

    def __len__(self) -> int:
        return len(self._frame)

    def __str__(self) -> str:
        notes = [f"note: {note}" for note in self.notes]
        return "\n".join([self.words, readable(self._shown()).to_string(index=False), *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = readable(self._shown()).to_html(index=False, border=0)
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        return f"<div><b>{html.escape(self.words)}</b>{table}<small>{notes}</small></div>"

    def _shown(self) -> pd.DataFrame:
        shown = self._frame
        if self.by_component is not None:
            texts = [" ".join(_number(value, 2) for value in row) for row in self.by_component]
            shown = shown.drop(columns=["low", "high"]).assign(each_component=texts)
        return shown


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table of short texts: three places, tokens with their spaces visible, a dash for what is not there."""
    shown = {}
    for name in frame.columns:
        column = frame[name]
        if name in ("p", "p_bh"):
            shown[name] = [_number(value, 4) for value in column]
        elif column.dtype.kind == "f":
            shown[name] = [_number(value, 3) for value in column]
        elif name.endswith("token"):
            shown[name] = [visible(text) for text in column]
        else:
            shown[name] = [str(value) for value in column]
    return pd.DataFrame(shown)


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
        columns |= {
            "pair": np.tile(data["pair"].values, n_cells),
            "component": np.tile(data["component"].values, n_cells),
            "metric_name": np.full(n_cells * n_pairs, name, dtype=object),
            "metric": one["metric"].values.ravel(),
            "base": np.tile(one["baseline_base"].values, n_cells),
            "effect": (one["metric"].values - one["baseline_base"].values).ravel(),
            "status": words[status.ravel()],
        }
        frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True)


def _mean(total: np.ndarray, size: np.ndarray) -> np.ndarray:
    mean = np.full(total.shape, np.nan)
    np.divide(total, size, out=mean, where=size > 0)
    return mean


def _notes_on_intervals(numbers: Numbers, share: np.ndarray, found: list[Interval]) -> list[str]:
    n_components = len(np.unique(numbers.group))
    if n_components < MIN_GROUPS:
        few = f"too few independent groups: {n_components} (an interval needs {MIN_GROUPS})"
        return [f"{few}; the value of each: effects.by_component()"]
    notes = []
    rough = [interval for interval in found if interval.coverage is not None]
    if rough:
        worst = min(rough, key=lambda interval: interval.coverage or 0.0)
        notes.append(f"{len(rough)} of {len(found)} intervals are {worst.note}")
    reasons: dict[str, int] = {}
    for interval in found:
        if interval.status == "none" and interval.note:
            reasons[interval.note] = reasons.get(interval.note, 0) + 1
    notes += [f"no interval in {number} of {len(share)} cells: {note}" for note, number in reasons.items()]
    return notes


def _notes_on_together(left: np.ndarray, group: np.ndarray) -> list[str]:
    """Say where intervals that hold together are approximate.

    Args:
        left: Effect less the cell's share of the gap, of the cells shown, axes cell and pair.
        group: Independent component of each pair.
    """
    n_groups = len(np.unique(group))
    if n_groups < GROUPS_FOR_MAX_T:
        return [f"holding together is approximate: {n_groups} independent groups, fewer than {GROUPS_FOR_MAX_T}"]
    sums = component_sums(np.nan_to_num(left), group)
    sums = sums - sums.mean(axis=1, keepdims=True)
    spread = np.sqrt((sums**2).mean(axis=1))
    skew = np.divide((sums**3).mean(axis=1), spread**3, out=np.zeros_like(spread), where=spread > 0)
    skewed = int((np.abs(skew) > LARGEST_SKEW).sum())
    return [f"holding together is approximate: {skewed} of these cells are skewed between groups"] if skewed else []


def _notes_on_p(numbers: Numbers, n_tested: int) -> list[str]:
    notes = [f"p: screening only, against 0; p_bh: Benjamini-Hochberg over {n_tested} cells, a heuristic"]
    least = float(smallest_p(len(np.unique(numbers.group))))
    if least > ALPHA / 10:
        notes.append(f"smallest attainable p with so few independent groups: {least:.3g}")
    return notes


def _notes_on_cells(numbers: Numbers, status: np.ndarray, share: np.ndarray) -> list[str]:
    notes = []
    n_cells, n_pairs = status.shape
    empty = numbers.n_pairs == 0
    if empty.any():
        reasons = [f"{number} {code.text}" for code, number in counts(status[empty]).items()]
        notes.append(f"{int(empty.sum())} of {n_cells} cells were not measured (runs: {', '.join(reasons)})")
    partial = ~empty & (numbers.n_pairs < n_pairs)
    if partial.any():
        notes.append(f"{int(partial.sum())} cells rest on some of the {n_pairs} pairs, their gap on the same ones")
    derived = int((status == Status.DERIVED).sum())
    if derived:
        notes.append(f"{derived} of {status.size} runs were not made because another run has the same result")
    without = int((~empty & ~np.isfinite(share)).sum())
    if without:
        notes.append(f"{without} cells have no recovered share: their own pairs have no gap")
    return notes


def _number(value: float, places: int) -> str:
    return f"{value:.{places}f}" if np.isfinite(value) else "-"
