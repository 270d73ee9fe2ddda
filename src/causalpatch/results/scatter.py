"""Exact effects over scores, a dot for each component: on the diagonal both are one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, FAINT, RED, Sheet, finished, layer_of, plain, records
from causalpatch.results.pictures import Picture
from causalpatch.results.words import percent

if TYPE_CHECKING:
    import pandas as pd

alt = lazy("altair")

_SIDE = 360  # px
_PARTS = {"top": (BLUE, "circle"), "sample": (RED, "triangle-up")}


def against(frame: pd.DataFrame, *, title: str, lines: Sequence[str], delta: float, is_signed: bool) -> Picture:
    """Draw exact effects over scores.

    Args:
        frame: A row per component: ``component``, ``score``, ``effect`` and ``part`` (top or sample).
        title: What stands above.
        lines: Smaller lines below the title.
        delta: Half the height of the band of effects that do not matter.
        is_signed: Whether scores have a sign; else they meet the magnitude of effects.
    """
    effects = frame["effect"] if is_signed else frame["effect"].abs()
    rows = [
        {**{key: plain(value) for key, value in row.items()}, "shown": plain(shown)}
        for row, shown in zip(records(frame), effects.tolist(), strict=True)
    ]
    ends = [float(function([*frame["score"], *effects, 0.0])) for function in (min, max)]
    sheet: Sheet = {}
    drawn = {"scale": alt.Scale(nice=True), "axis": alt.Axis(format=".3~g", tickCount=6)}
    x = alt.X("score:Q", title="score, share of the gap", **drawn)
    y = alt.Y("shown:Q", title="exact effect, share of the gap", **drawn)
    band = layer_of(sheet, "band", [{"low": -delta if is_signed else 0.0, "high": delta}])
    one = layer_of(sheet, "diagonal", [{"score": end, "shown": end} for end in ends])
    parts = [part for part in _PARTS if (frame["part"] == part).any()]
    colour = alt.Color(
        "part:N", title="measured", scale=alt.Scale(domain=parts, range=[_PARTS[part][0] for part in parts])
    )
    shape = alt.Shape("part:N", title="measured", scale=alt.Scale(domain=parts, range=[_PARTS[p][1] for p in parts]))
    told = ["component:N", "score:Q", "effect:Q", "part:N"]
    layers = [
        band.mark_rect(color=FAINT, opacity=0.2).encode(y=alt.Y("low:Q"), y2="high:Q"),
        one.mark_line(color=FAINT, strokeDash=[4, 3]).encode(x=x, y=y),
        layer_of(sheet, "components", rows)
        .mark_point(filled=True, size=34, opacity=0.75)
        .encode(x=x, y=y, color=colour, shape=shape, tooltip=told),
    ]
    said = f"grey: up to {percent(delta)} of the gap · dashed: score and effect are one"
    chart = alt.layer(*layers).properties(width=_SIDE, height=_SIDE)
    return Picture(finished(chart, Caption(title), [*lines, said], _SIDE + 130), frame, sheet)
