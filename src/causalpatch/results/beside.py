"""Patching effects beside what untouched runs say: direct logit attribution and the logit lens, in one figure.

The panels have colour scales of their own: a causal effect, a share of the logits and a metric are not one quantity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results import captions, charts, tables
from causalpatch.results.captions import Caption, on_marks
from causalpatch.results.effects import Effects
from causalpatch.results.notes import ALPHA
from causalpatch.results.pictures import Picture

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd = lazy("pandas")

alt = lazy("altair")

_BETWEEN = 190  # px between two panels: an axis and a colour scale
_PANEL_TITLE = 12  # px


def beside(effects: Effects, *, attribution: xr.DataArray | None = None, lens: xr.Dataset | None = None) -> Picture:
    """Draw effects over two axes, direct logit attribution and the logit lens beside each other.

    Args:
        effects: A sweep over two axes, such as layers and heads; drawn in the metric's unit.
        attribution: What ``direct_logit_attribution`` returned, by layer or by head; means over pairs.
        lens: What ``logit_lens`` returned; means over pairs, of the first metric.

    Raises:
        SettingError: The effects do not have two axes that a heat map can show, or there is nothing beside them.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
        >>> heads = cp.direct_logit_attribution(experiment, "head")
        >>> path = beside(cp.sweep(experiment, "z@-1"), attribution=heads).save("beside.svg")
    """
    shown = effects.over_draws()
    axes = charts.choose_axes({axis: int(shown._data.sizes[axis]) for axis in shown.axes})
    if axes is None or (attribution is None and lens is None):
        raise SettingError(
            "there is nothing to draw beside each other" if axes else "these effects have no two axes for a heat map",
            facts=[("axes", ", ".join(shown.axes))],
            fix='beside(sweep(experiment, "z"), attribution=direct_logit_attribution(experiment, "head"))',
        )
    metric = shown.metrics[0]
    caption = captions.describe(shown.provenance, metric, "effect", shown._pairs_text())
    drawn = [("patching", tables.effects_only(shown._data, shown._inference), axes, caption.legend)]
    if attribution is not None:
        drawn.append((f"direct logit attribution, {attribution.attrs['side']} runs", *_of_senders(attribution)))
    if lens is not None:
        drawn.append(("logit lens", *_of_layers(lens, metric)))
    sheet: charts.Sheet = {}
    panels = []
    for title, frame, along, legend in drawn:
        own = Caption(title, legend=legend, base=caption.base)
        limit = charts.symmetric_limit(frame["effect"].to_numpy())
        chart = charts.heat_layers(sheet, frame, along, "effect", own, name=f"{title}-", limit=limit)
        heading = alt.TitleParams(title, anchor="start", fontSize=_PANEL_TITLE, offset=6)
        panels.append(chart.properties(title=heading))
    whole = alt.hconcat(*panels, spacing=40).resolve_scale(color="independent")
    width = sum(charts.chart_size(frame, along)[0] + _BETWEEN for _, frame, along, _ in drawn)
    table = pd.concat([frame.assign(panel=title) for title, frame, _, _ in drawn], ignore_index=True)
    first = drawn[0][1]
    said = [
        *caption.lines,
        "attribution and lens read untouched runs: what is written straight to the logits, no causal evidence",
        *on_marks(first, outlined=bool((first["p_bh"] < ALPHA).any()), value="effect"),
    ]
    return Picture(charts.finished(whole, Caption(caption.title), said, width), table, sheet)


def _of_senders(attribution: xr.DataArray) -> tuple[pd.DataFrame, tuple[str, str], str]:
    """Return a cell for each head, or for attention and MLP of each layer; its axes, and what the numbers are."""
    means = attribution.mean("pair")
    by_head = bool((attribution["head"].values >= 0).any())
    rows: list[dict[str, Any]] = []
    for sender, layer, head, value in zip(
        means["sender"].values, means["layer"].values, means["head"].values, means.values, strict=True
    ):
        if (head >= 0) if by_head else (layer >= 0):
            place = {"head": int(head)} if by_head else {"sender": str(sender).split(".")[0]}
            rows.append({"layer": int(layer), **place, "effect": float(value)})
    frame = pd.DataFrame(rows).assign(p_bh=np.nan, status="measured")
    return frame, ("layer", "head" if by_head else "sender"), "logits, scale of the final norm frozen"


def _of_layers(lens: xr.Dataset, metric: str) -> tuple[pd.DataFrame, tuple[str, str], str]:
    """Return a cell for each layer and side, its axes, and what the numbers are."""
    rows = []
    for side, word in (("clean", "clean"), ("corrupt", "corrupted")):
        found = lens[side].sel(metric_name=metric) if "metric_name" in lens[side].dims else lens[side]
        means = found.mean("pair")
        rows += [
            {"layer": int(layer), "run": word, "effect": float(value)}
            for layer, value in zip(means["layer"].values, means.values, strict=True)
        ]
    frame = pd.DataFrame(rows).assign(p_bh=np.nan, status="measured")
    return frame, ("layer", "run"), f"{metric} behind the layer"
