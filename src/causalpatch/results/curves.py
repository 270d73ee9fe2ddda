"""A curve of faithfulness over the size of circuits, on a band of what random circuits of the same sizes keep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, FAINT, INK, RED, Sheet, finished, layer_of, plain, records
from causalpatch.results.pictures import Picture
from causalpatch.results.words import percent

if TYPE_CHECKING:
    import pandas as pd

alt = lazy("altair")

_WIDTH, _HEIGHT = 520, 320  # px
_COLOURS = (BLUE, RED, "#7b3294", "#1b7837", "#b35806", INK)
_KINDS = {"order": "N"}
_TOLD = ("order", "n_edges", "f", "low", "high", "complement", "random_low", "random_high", "off_p90")


def faithfulness(frame: pd.DataFrame, *, title: str, lines: Sequence[str], level: float) -> Picture:
    """Draw f over the share of edges that is kept.

    Args:
        frame: A row per circuit: ``order``, ``fraction``, ``f`` and the rest of the summary.
        title: What stands above.
        lines: Smaller lines below the title.
        level: Of the intervals.
    """
    shown = frame[frame["n_edges"] > 0]
    rows = [{key: plain(value) for key, value in row.items()} for row in records(shown)]
    sheet: Sheet = {}
    orders = list(dict.fromkeys(shown["order"]))
    colour = alt.Color(
        "order:N",
        title="circuits by",
        scale=alt.Scale(domain=orders, range=[_COLOURS[n % len(_COLOURS)] for n in range(len(orders))]),
        legend=alt.Legend(symbolType="stroke", symbolStrokeWidth=2.5),
    )
    ends = float(shown["fraction"].min()), float(shown["fraction"].max())
    scale = alt.Scale(type="log", domain=[ends[0], ends[1]] if ends[0] < ends[1] else [ends[0] / 2, ends[1] * 2])
    axis = alt.Axis(format="~%", values=sorted(set(shown["fraction"].tolist())), labelOverlap=True)
    x = alt.X("fraction:Q", title="share of the edges kept", scale=scale, axis=axis)
    y_title = "share of the gap kept (f)"
    tooltip = [
        alt.Tooltip("fraction:Q", format=".2~%"),
        *(alt.Tooltip(f"{name}:{_KINDS.get(name, 'Q')}") for name in _TOLD),
    ]
    whole = layer_of(sheet, "whole", [{"y": 1.0}, {"y": 0.0}])
    layers = [whole.mark_rule(color=FAINT, strokeDash=[2, 3]).encode(y=alt.Y("y:Q", title=y_title))]
    said = []
    if any(row["random_low"] is not None for row in rows):
        band = layer_of(sheet, "band", _of_sizes(rows))
        mark = band.mark_area(color=FAINT, opacity=0.3)
        layers.append(mark.encode(x=x, y=alt.Y("random_low:Q", title=y_title), y2="random_high:Q"))
        said.append("grey: least to most f of random circuits of the size")
    circuits = layer_of(sheet, "circuits", rows)
    held = [row for row in rows if row["low"] is not None]
    if held:
        spans = layer_of(sheet, "intervals", held).mark_rule(strokeWidth=1.5, opacity=0.7)
        layers.append(spans.encode(x=x, y=alt.Y("low:Q", title=y_title), y2="high:Q", color=colour))
        said.append(f"bars: {percent(level)} interval of each by itself")
    if any(row["complement"] is not None for row in rows):
        line = circuits.mark_line(strokeDash=[5, 4], strokeWidth=1.3, opacity=0.8)
        layers.append(line.encode(x=x, y=alt.Y("complement:Q", title=y_title), color=colour))
        said.append("dashed: complements (all other edges)")
    y = alt.Y("f:Q", title=y_title)
    layers.append(circuits.mark_line(strokeWidth=2.2).encode(x=x, y=y, color=colour))
    layers.append(circuits.mark_point(filled=True, size=46, opacity=1).encode(x=x, y=y, color=colour, tooltip=tooltip))
    chart = alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)
    return Picture(finished(chart, Caption(title), [*lines, " · ".join(said)], _WIDTH + 150), frame, sheet)


def _of_sizes(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one row per size."""
    return list({row["fraction"]: row for row in rows}.values())
