"""A race as a picture: each candidate's share with its interval at the end, and beside it the pairs that this took.

Intervals hold for all candidates and at all times together. Colour and shape say how each left the race.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, FAINT, INK, Sheet, finished, layer_of, plain, records
from causalpatch.results.pictures import Picture

if TYPE_CHECKING:
    import pandas as pd

alt = lazy("altair")

_WIDTH, _PAIRS, _ROW = 380, 130, 22  # px
_MOST: Final = 40  # candidates
_LOOKS: Final = {"accepted": (BLUE, "circle"), "dropped": ("#6b6b6b", "square"), "not separable": ("#b35806", "cross")}


def draw(frame: pd.DataFrame, *, n_pairs: int, above: float | None, lines: Sequence[str], word: str) -> Picture:
    """Draw a race.

    Args:
        frame: A row per candidate: ``candidate``, ``status``, ``share`` with ``low`` and ``high``, ``n_pairs``.
        n_pairs: Pairs of the pool.
        above: The threshold, a share of the gap, where one was asked for.
        lines: Smaller lines below the title.
        word: What effects do to the gap: restored or removed.
    """
    shown = frame.head(_MOST)
    rows = [{key: plain(value) for key, value in row.items()} for row in records(shown)]
    names = [row["candidate"] for row in rows]
    sheet: Sheet = {}
    y = alt.Y("candidate:N", sort=None, scale=alt.Scale(domain=names), axis=alt.Axis(title=None, labelLimit=0))
    layers = [layer_of(sheet, "nought", [{"at": 0.0}]).mark_rule(color=INK, strokeWidth=1).encode(x=alt.X("at:Q"))]
    if above is not None:
        band = layer_of(sheet, "threshold", [{"low": -above, "high": above}]).mark_rect(color=FAINT, opacity=0.22)
        layers.insert(0, band.encode(x=alt.X("low:Q"), x2="high:Q"))
    spans = [row for row in rows if row["low"] is not None and row["high"] is not None]
    rule = layer_of(sheet, "spans", spans).mark_rule(color=INK, strokeWidth=1.6)
    layers.append(rule.encode(y=y, x=alt.X("low:Q"), x2="high:Q"))
    used = [status for status in _LOOKS if status in set(shown["status"])]
    colour, shape = (alt.Scale(domain=used, range=[_LOOKS[status][place] for status in used]) for place in (0, 1))
    told = ["candidate:N", "share:Q", "low:Q", "high:Q", "n_pairs:Q", "status:N"]
    point = layer_of(sheet, "candidates", rows).mark_point(filled=True, size=70, opacity=1)
    x = alt.X("share:Q", title=f"share of the gap {word}", axis=alt.Axis(format=".3~g", tickCount=6))
    looks = {"color": alt.Color("status:N", scale=colour), "shape": alt.Shape("status:N", scale=shape)}
    layers.append(point.encode(x=x, y=y, tooltip=told, **looks))
    size = {"height": _ROW * max(len(rows), 2)}
    left = alt.layer(*layers).properties(width=_WIDTH, **size)
    bar = layer_of(sheet, "candidates", rows).mark_bar(height=10, color=FAINT)
    scale = alt.Scale(domain=[0, n_pairs])
    x = alt.X("n_pairs:Q", title="pairs until it was decided", scale=scale, axis=alt.Axis(tickCount=4))
    bare = alt.Y("candidate:N", sort=None, scale=alt.Scale(domain=names), axis=None)
    right = bar.encode(x=x, y=bare, tooltip=told).properties(width=_PAIRS, **size)
    more = [f"{len(frame) - len(rows)} smaller candidates are not drawn"] if len(frame) > len(rows) else []
    whole = alt.hconcat(left, right, spacing=16)
    return Picture(finished(whole, Caption(lines[0]), [*lines[1:], *more], _WIDTH + _PAIRS + 200), frame, sheet)
