"""Effects: a labelled array of which intervention, which pair, what number, and how it was obtained."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import ResultsNotFound, SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.suggest import closest
from causalpatch.results import captions, charts, describe, draws, store, tables
from causalpatch.results.inference import Inference
from causalpatch.results.layout import Parts, assemble, take_apart
from causalpatch.results.shares import Numbers
from causalpatch.results.words import counted, reference_run

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from causalpatch.results.pictures import Picture
    from causalpatch.results.top import TopTable
else:
    xr = lazy("xarray")


class Effects:
    """What a sweep measured, every pair kept.

    An effect is the change of the metric against the unpatched base run; ``recovered`` is that change as a share of
    the gap between clean and reference runs. Where a sweep fed several metrics, methods read the first one;
    ``effects.metric(name)`` gives another.

    Args:
        data: The labelled array, in the layout of ``causalpatch.results.layout``.
        provenance: How the numbers came to be: model, pairs, site, value, direction, engine, cost.
    """

    def __init__(self, data: xr.Dataset, provenance: Mapping[str, Any]) -> None:
        self._data = data
        self.provenance = dict(provenance)
        self._of_metric: dict[str, Effects] = {}

    @classmethod
    def build(  # noqa: PLR0913 - the parts of the layout, each under its own name
        cls,
        *,
        axes: Mapping[str, Sequence[Any]],
        pair_ids: Sequence[str],
        groups: np.ndarray,
        metrics: Sequence[str],
        values: np.ndarray,
        status: np.ndarray,
        baselines: Mapping[str, np.ndarray],
        labels: Mapping[str, Sequence[str]] | None = None,
        positions: np.ndarray | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> Effects:
        """Put measured numbers into the layout.

        Args:
            axes: Name of each axis of the sweep and its coordinate values, in order.
            pair_ids: Id of each pair.
            groups: Independent component of each pair.
            metrics: Names of the metrics.
            values: Metric of the patched runs, axes metric, the sweep's, pair; what stands where no run was made is
                replaced by NaN.
            status: Codes of ``Status``, axes the sweep's, pair.
            baselines: Metric of the unpatched runs (clean, corrupt, base, source, reference), axes metric, pair, or
                metric, draw, pair where the sweep has the axis ``draw`` and draws differ in it. The
                base follows from the direction and the reference is the corrupted run unless they are given.
            labels: Labels along an axis, such as the tokens along ``position``.
            positions: Position of every aligned column in base and source, axes pair, position, 2; -1 where none.
            provenance: How the numbers came to be, as plain data; ``direction`` is ``"denoise"`` unless it says
                otherwise, and ``higher_is_better`` may say per metric that a smaller value is better.

        Raises:
            SettingError: Two parts do not fit together.
            NotFinite: A run that was made has NaN or infinity for a metric.
        """
        parts = Parts(
            axes, pair_ids, groups, metrics, values, status, baselines, labels or {}, positions, provenance or {}
        )
        return cls(*assemble(parts))

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that the sweep fed."""
        return [str(name) for name in np.atleast_1d(self._data["metric_name"].values)]

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the sweep, without the pair."""
        return tuple(str(name) for name in self._data["status"].dims[:-1])

    @property
    def dims(self) -> tuple[str, ...]:
        """Axes of one metric's numbers: those of the sweep, then ``pair``."""
        return (*self.axes, "pair")

    @property
    def direction(self) -> str:
        """``"denoise"``: clean values into the corrupted run; ``"noise"``: the other way round."""
        return str(self.provenance["direction"])

    @property
    def pair_ids(self) -> list[str]:
        """Id of each pair."""
        return [str(name) for name in self._data["pair"].values]

    @property
    def n_components(self) -> int:
        """Number of independent components among the pairs."""
        return len(np.unique(self._data["component"].values))

    @property
    def is_complete(self) -> bool:
        """Whether the sweep ran to its end."""
        return bool(self.provenance.get("complete", True))

    @property
    def smallest_gap(self) -> float:
        """Default of the smallest gap of a pair whose own ratio is given, in the metric's unit: 1e-3 of mean |gap|."""
        return self._numbers.smallest_gap

    def metric(self, name: str) -> Effects:
        """Return the effects on one metric.

        Args:
            name: One of ``effects.metrics``.

        Raises:
            ResultsNotFound: The sweep did not measure this metric.
        """
        if name not in self.metrics:
            facts = [("measured", ", ".join(self.metrics))]
            near = closest(name, self.metrics, count=1)
            fix = f"effects.metric({near[0]!r})" if near else "measure it: Experiment(..., metric=[...])"
            raise ResultsNotFound(f"no metric named {name!r} in these effects", facts=facts, fix=fix)
        if "metric_name" not in self._data.dims:
            return self
        if name not in self._of_metric:
            one = self._data.isel(metric_name=self.metrics.index(name))
            self._of_metric[name] = Effects(one, self.provenance)
        return self._of_metric[name]

    def to_xarray(self) -> xr.Dataset:
        """Return a copy of the labelled array; its layout stands in ``causalpatch.results.layout``."""
        data = self._data.copy(deep=True)
        data.attrs["direction"] = self.direction
        data.attrs["provenance"] = json.dumps(self.provenance, sort_keys=True)
        return data

    def effect(self, *, per_pair: bool = False) -> xr.DataArray:
        """Return m(patched) - m(base), in the metric's unit.

        Args:
            per_pair: Keep the pair axis instead of averaging over the pairs measured in each cell.

        Returns:
            Axes of the sweep, and pair if asked; NaN where nothing was measured.
        """
        numbers = self._numbers
        values = numbers.effect if per_pair else numbers.mean_effect()
        return self._labelled("effect", values, per_pair=per_pair)

    def recovered(self, *, per_pair: bool = False, smallest_gap: float | None = None) -> xr.DataArray:
        """Return the effect as a share of the gap: restored by denoising, removed by noising.

        ``recovered = mean effect / mean gap`` (its negative for noise), both means over the pairs measured in that
        cell: a ratio of means, not a mean of ratios. Values below 0 and above 1 are kept.

        Args:
            per_pair: Give each pair's own ratio instead. Those whose gap is below ``smallest_gap`` are NaN, and
                counted in ``attrs["n_small_gap"]``.
            smallest_gap: In the metric's unit; 1e-3 of the mean |gap| unless given.

        Returns:
            Axes of the sweep, and pair if asked; NaN where nothing was measured or the cell's own pairs have no gap.

        Raises:
            NoGap: Clean and reference runs do not differ enough, so a share means nothing.
        """
        numbers = self._numbers
        numbers.require_gap()
        facts: dict[str, Any] = {"mean_gap": float(numbers.gap.mean()), "reference": reference_run(self.provenance)}
        if per_pair:
            least = numbers.smallest_gap if smallest_gap is None else smallest_gap
            facts |= {"smallest_gap": least, "n_small_gap": int((np.abs(numbers.gap) < least).sum())}
            values = numbers.recovered_per_pair(least)
        else:
            values = numbers.recovered()
        return self._labelled("recovered", values, per_pair=per_pair, **facts)

    def summary(self, *, level: float = 0.95) -> pd.DataFrame:
        """Return a row per cell: its effect, recovered share with interval, p, and how many pairs agree.

        ``low`` and ``high`` bound ``recovered`` (Fieller by independent component; NaN with fewer than 10 of them, or
        where the gap is not distinguishable from 0). ``p`` tests against 0 and is for screening only; ``p_bh`` is
        adjusted over all cells (Benjamini-Hochberg). ``agreement`` is the share of pairs whose effect has the sign of
        the mean. ``effect`` is in the metric's unit. What ``recovered`` is a share of, and all else that must be said
        with the numbers, stands in ``attrs["notes"]``.

        Args:
            level: Of the intervals, each by itself.

        Raises:
            NoGap: Clean and reference runs do not differ enough, so a share means nothing.

        Cost:
            Three seconds for 36,864 cells of 100 pairs on one core, as ``top`` takes; both keep what they computed, so
            that tables and pictures after the first take a fraction of a second.
        """
        one = self._first()
        return tables.summarise(one._data, one._inference, self.provenance, level=level)

    def top(self, k: int = 10, metric: str | None = None, *, level: float = 0.95) -> TopTable:
        """Return the cells with the largest |recovered|, marked exploratory.

        The cells are chosen and estimated on the same pairs, so the largest are too large; confirm them on others.
        The intervals are made to hold for all cells of the sweep together; where few or skewed groups make that
        approximate, the table says in how many simulated sweeps they do. ``notes`` holds what must be said with it.

        Args:
            k: How many.
            metric: One of ``effects.metrics``; the first unless given.
            level: Of the intervals, together.

        Raises:
            NoGap: Clean and reference runs do not differ enough, so a share means nothing.
            ResultsNotFound: The sweep did not measure this metric.
        """
        one = self._first() if metric is None else self.metric(metric)
        return tables.largest(one._data, one._inference, self.provenance, k=k, level=level)

    def by_component(self) -> pd.DataFrame:
        """Return a row per cell and independent component: the values behind an interval, or instead of one."""
        one = self._first()
        return tables.component_table(one._data, one._numbers)

    def over_draws(self) -> Effects:
        """Return the effects with each pair's numbers averaged over its draws; the draws' spread is noted.

        Without the axis ``draw`` these are the effects themselves.
        """
        if draws.DRAW not in self.axes:
            return self
        spread = self.spread().values if self._data.sizes[draws.DRAW] > 1 else np.zeros(0)
        return Effects(*assemble(draws.average(take_apart(self._data, self.provenance), spread)))

    def spread(self) -> xr.DataArray:
        """Return how far draws lie apart: the standard deviation of each cell's mean effect over the axis ``draw``.

        Returns:
            The sweep's axes without ``draw``, in the first metric's unit; NaN for a single draw.

        Raises:
            SettingError: There is no axis ``draw``.
        """
        if draws.DRAW not in self.axes:
            raise SettingError(
                "these effects are of one draw, or nothing was drawn",
                facts=[("axes", ", ".join(self.axes))],
                fix="measure several: sweep(…, value=Noise(), draws=5)",
            )
        return self.effect().std(draws.DRAW, ddof=1).rename("spread")

    def to_dataframe(self) -> pd.DataFrame:
        """Return the long form: a row per metric, cell and pair, statuses in words."""
        return tables.long_table(self._data)

    def plot(self, kind: str | None = None, *, quantity: str = "recovered", k: int = 10) -> Picture:
        """Draw the effects; the picture shows itself in a notebook and saves as SVG, PNG, HTML or CSV.

        Args:
            kind: ``"heat"`` for two axes, ``"bars"`` for the largest cells with intervals; by the axes unless given.
            quantity: ``"recovered"``, or ``"effect"`` in the metric's unit, which a heat map shows without a gap too.
            k: How many bars.

        Raises:
            NoGap: Clean and reference runs do not differ enough, so a share means nothing.
            SettingError: The kind or quantity does not exist, or does not fit the axes.
        """
        if draws.DRAW in self.axes:
            return self.over_draws().plot(kind, quantity=quantity, k=k)
        one = self._first()
        sizes = {axis: int(self._data.sizes[axis]) for axis in self.axes}
        kind = charts.check_request(kind, quantity, sizes)
        caption = captions.describe(one.provenance, one.metrics[0], quantity, self._pairs_text())
        if kind == "bars":
            return charts.bars(one.top(k), self.axes, caption)
        frame = tables.effects_only(one._data, one._inference) if quantity == "effect" else one.summary()
        return charts.heat_map(frame, charts.choose_axes(sizes) or self.axes, quantity, caption)

    def save(self, folder: str | Path) -> Path:
        """Write parquet shards and a JSON manifest with their checksums into a folder.

        The manifest is put in place last and in one step: a save that was cut short leaves what was there before.

        Args:
            folder: Made where it is missing; other files in it are left alone.

        Returns:
            The folder.
        """
        return store.write(take_apart(self._data, self.provenance), Path(folder))

    @classmethod
    def of_draws(cls, effects: Sequence[Effects], numbers: Sequence[int]) -> Effects:
        """Put runs of different draws side by side, along the axis ``draw``.

        Args:
            effects: Effects with the same axes, pairs and metrics.
            numbers: The number of each draw.

        Raises:
            SettingError: They do not fit together.
        """
        parts = [take_apart(each._data, each.provenance) for each in effects]
        return cls(*assemble(draws.stack(parts, numbers)))

    @classmethod
    def load(cls, folder: str | Path) -> Effects:
        """Read effects that ``save`` wrote, bit for bit.

        Raises:
            ResultsNotFound: The folder has no manifest.
            StoreCorrupt: A file is missing or was changed since.
        """
        return cls(*assemble(store.read(Path(folder))))

    def __repr__(self) -> str:
        return "\n".join(describe.describe(self._data, self.provenance, self._numbers, self._pairs_text()))

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(repr(self))}</pre>"

    def _first(self) -> Effects:
        return self.metric(self.metrics[0])

    @cached_property
    def _inference(self) -> Inference:
        """What follows from the first metric's numbers, each thing computed when it is first asked for."""
        return Inference(self._numbers, int(self.provenance.get("seed") or 0))

    @cached_property
    def _numbers(self) -> Numbers:
        """The first metric's numbers with cells flattened."""
        data, name = self._first()._data, self.metrics[0]
        n_pairs = data.sizes["pair"]
        runs = {role: _per_pair(data[f"baseline_{role}"]) for role in ("clean", "reference")}
        rising = self.provenance.get("higher_is_better", True)
        if isinstance(rising, Mapping):
            rising = rising.get(name, True)
        return Numbers(
            metric=name,
            effect=(data["metric"] - data["baseline_base"]).transpose(*data["metric"].dims).values.reshape(-1, n_pairs),
            gap=runs["clean"] - runs["reference"],
            clean=runs["clean"],
            reference=runs["reference"],
            group=data["component"].values,
            sign=1 if self.direction == "denoise" else -1,
            rising=1 if rising else -1,
            no_share=str(self.provenance.get("no_share") or ""),
        )

    def _pairs_text(self) -> str:
        n_pairs = self._data.sizes["pair"]
        return f"{counted(n_pairs, 'pair')}, {counted(self.n_components, 'independent group')}"

    def _labelled(self, name: str, values: np.ndarray, *, per_pair: bool, **facts: Any) -> xr.DataArray:
        dims = self.dims if per_pair else self.axes
        coords = {key: array for key, array in self._data.coords.items() if set(array.dims) <= set(dims)}
        shape = tuple(self._data.sizes[axis] for axis in dims)
        attrs = {"metric": self.metrics[0], "direction": self.direction, **facts}
        # A copy: the numbers are kept, and what is handed out may be written to.
        return xr.DataArray(values.reshape(shape).copy(), dims=dims, coords=coords, name=name, attrs=attrs)


def _per_pair(baseline: xr.DataArray) -> np.ndarray:
    """Return the metric of an unpatched run of each pair, averaged over draws where they differ in it."""
    values: np.ndarray = baseline.mean(draws.DRAW).values if draws.DRAW in baseline.dims else baseline.values
    return values
