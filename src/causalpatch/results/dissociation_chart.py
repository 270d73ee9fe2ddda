"""A double dissociation as a picture: what each component does for each behaviour, and below it the one contrast.

Above, a row for each behaviour, in which each component has its share of the gap with an interval of its own; the grey
band is ``-delta`` to ``delta``. Below, the interaction contrast with its interval, against a band of twice that width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, FAINT, INK, Sheet, finished, layer_of, plain
from causalpatch.results.pictures import Picture

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

alt = lazy("altair")

_WIDTH, _ROW, _LINE = 420, 54, 34  # px: of the scale, of a behaviour, of the contrast
_ORANGE: Final = "#b35806"
_SHAPES: Final = ("circle", "diamond")


def draw(
    rows: Sequence[Mapping[str, Any]], contrast: Mapping[str, float], delta: float, *, title: str, lines: Sequence[str]
) -> Picture:
    """Draw a double dissociation.

    Args:
        rows: ``behaviour``, ``component``, ``share``, ``low`` and ``high`` of each component in each behaviour.
        contrast: ``contrast`` with ``low`` and ``high``.
        delta: Share that does not count.
        title: What stands above.
        lines: Smaller lines below the title.
    """
    frame = pd.DataFrame([dict(row) for row in rows])
    sheet: Sheet = {}
    shown = [{key: plain(value) for key, value in row.items()} for row in rows]
    names = list(dict.fromkeys(row["component"] for row in shown))
    behaviours = list(dict.fromkeys(row["behaviour"] for row in shown))
    held = {"domain": names, "range": [BLUE, _ORANGE]}
    colour = alt.Color("component:N", title="component", scale=alt.Scale(**held))
    shape = alt.Shape("component:N", title="component", scale=alt.Scale(domain=names, range=list(_SHAPES)))
    y = alt.Y("behaviour:N", sort=None, scale=alt.Scale(domain=behaviours), axis=_axis())
    beside = alt.YOffset("component:N", scale=alt.Scale(domain=names))
    layers = _ground(sheet, "shares", delta)
    layers.append(
        layer_of(sheet, "shares", shown)
        .mark_rule(strokeWidth=1.8)
        .encode(x="low:Q", x2="high:Q", y=y, yOffset=beside, color=colour)
    )
    point = layer_of(sheet, "shares", shown).mark_point(filled=True, size=90, opacity=1)
    told = ["behaviour:N", "component:N", "share:Q", "low:Q", "high:Q"]
    x = alt.X("share:Q", title="share of the gap", axis=alt.Axis(format=".3~g", tickCount=6))
    layers.append(point.encode(x=x, y=y, yOffset=beside, color=colour, shape=shape, tooltip=told))
    above = alt.layer(*layers).properties(width=_WIDTH, height=_ROW * len(behaviours))

    one = [{"name": "contrast", **{key: plain(value) for key, value in contrast.items()}}]
    y = alt.Y("name:N", axis=_axis())
    layers = _ground(sheet, "contrast", 2 * delta)
    span = layer_of(sheet, "contrast", one)
    layers.append(span.mark_rule(strokeWidth=1.8, color=INK).encode(x="low:Q", x2="high:Q", y=y))
    point = span.mark_point(filled=True, size=90, opacity=1, color=INK)
    x = alt.X("contrast:Q", title="interaction contrast, a share of the gap", axis=alt.Axis(format=".3~g", tickCount=6))
    layers.append(point.encode(x=x, y=y, tooltip=["contrast:Q", "low:Q", "high:Q"]))
    below = alt.layer(*layers).properties(width=_WIDTH, height=_LINE)
    whole = alt.vconcat(above, below, spacing=18)
    return Picture(finished(whole, Caption(title), lines, _WIDTH + 190), frame, sheet)


def _axis() -> Any:
    return alt.Axis(title=None, labelLimit=0, labelOverlap=False, ticks=False)


def _ground(sheet: Sheet, name: str, delta: float) -> list[Any]:
    """Return the band of what does not count, and a line at 0."""
    band = layer_of(sheet, f"{name}-delta", [{"low": -delta, "high": delta}])
    nought = layer_of(sheet, f"{name}-nought", [{"at": 0.0}])
    return [
        band.mark_rect(color=FAINT, opacity=0.22).encode(x=alt.X("low:Q"), x2="high:Q"),
        nought.mark_rule(color=INK, strokeWidth=1).encode(x=alt.X("at:Q")),
    ]
