"""The chart of a tuning report: target success against retain damage, an arm a point.

The line joins arms that no other one beats in both (the Pareto front). Kinds have a colour and a shape each. Arms that
did not reach the target are hollow: their damage counts as infinite, and they are drawn at what they moved.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, FAINT, INK, MUTED, RED, Sheet, finished, layer_of, plain, records
from causalpatch.results.pictures import Picture
from causalpatch.results.words import counted, percent

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.tuning import TuningReport
else:
    pd = lazy("pandas")

alt = lazy("altair")

_WIDTH, _HEIGHT = 460, 300  # px
_LEAST: Final = 1e-5  # nat per token: below it nothing is told apart
_LOOKS: Final = {
    "base": (INK, "stroke"),
    "located": (BLUE, "circle"),
    "random": (FAINT, "circle"),
    "same layers": ("#8c6bb1", "square"),
    "lowest effect": ("#35978f", "diamond"),
    "spread": ("#bf812d", "triangle-up"),
    "full": (RED, "triangle-down"),
    "prefix": (MUTED, "cross"),
    "steering": ("#543005", "triangle-right"),
}


def draw(report: TuningReport) -> Picture:
    """Draw a report.

    Args:
        report: The report.
    """
    frame = report.to_dataframe()
    rows = []
    for each in records(frame):
        shown = max(float(each["moved"]), _LEAST)
        has = bool(np.isfinite(each["damage"]))
        rows.append({**{key: plain(value) for key, value in each.items()}, "x": shown, "hollow": not has})
    kinds = [kind for kind in _LOOKS if kind in set(frame["kind"])]
    sheet: Sheet = {}
    x = alt.X(
        "x:Q",
        title="retain damage: mean KL(base || tuned) per token, nats (logarithmic)",
        scale=alt.Scale(type="log", nice=True),
        axis=alt.Axis(format="~g", tickCount=6, labelOverlap=True),
    )
    y = alt.Y(
        "success:Q",
        title="target success on test pairs",
        scale=alt.Scale(domain=[0, 1.04], nice=False),
        axis=alt.Axis(format="%", values=[0, 0.2, 0.4, 0.6, 0.8, 1]),
    )
    colour = alt.Color("kind:N", title="arm", scale=_scale(kinds, 0), sort=kinds)
    shape = alt.Shape("kind:N", title="arm", scale=_scale(kinds, 1), sort=kinds)
    told = ["arm:N", "components:N", "success:Q", "moved:Q", "reached:N", "verdict:N"]
    layers: list[Any] = []
    bar = layer_of(sheet, "enough", [{"success": float(report.spec["schedule"]["enough"])}])
    layers.append(bar.mark_rule(color=FAINT, strokeDash=[4, 3]).encode(y=y))
    front = _front(rows)
    if len(front) > 1:
        line = layer_of(sheet, "front", front).mark_line(color=INK, strokeWidth=1, opacity=0.5)
        layers.append(line.encode(x=x, y=y, order=alt.Order("x:Q")))
    for hollow in (True, False):
        # The located arm is drawn last, over the others.
        some = sorted((each for each in rows if each["hollow"] == hollow), key=lambda one: one["kind"] == "located")
        if some:
            point = layer_of(sheet, "hollow" if hollow else "reached", some).mark_point(
                filled=not hollow, size=80, opacity=0.9, strokeWidth=1.6
            )
            layers.append(point.encode(x=x, y=y, color=colour, shape=shape, tooltip=told))
    enough = percent(float(report.spec["schedule"]["enough"]))
    lines = [
        f"'{report.spec['model']['name']}' · way '{report.spec['way']}' · {counted(len(rows), 'arm')}, mean of seeds",
        f"hollow: {enough} not reached on validation pairs, or test pairs show so; damage counts as infinite",
        f"dashed: {enough}; thin line: arms that none beats in both; up and left is better",
    ]
    chart = alt.layer(*layers).properties(width=_WIDTH, height=_HEIGHT)
    caption = Caption(f"{report.verdict}: target success against retain damage")
    return Picture(finished(chart, caption, lines, _WIDTH + 130), frame, sheet)


def _front(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the arms that no other one beats in both, from little damage to much."""
    found, best = [], -np.inf
    for each in sorted(rows, key=lambda one: (one["x"], -(one["success"] or 0.0))):
        if each["success"] is not None and each["success"] > best:
            best = each["success"]
            found.append(each)
    return found


def _scale(kinds: list[str], place: int) -> Any:
    return alt.Scale(domain=kinds, range=[_LOOKS[kind][place] for kind in kinds])
