"""A search from coarse to fine as one figure: a panel for each level, from left to right.

In the first panel layers go up and each has its sublayers; in each further one a row is a part that was opened, and its
columns are what it is made of. All panels share one colour scale. What was found has a dark outline, what was not
measured has no cell. A panel below may show how often each part is selected again on resampled pairs.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, INK, RED, Sheet, finished, layer_of, plain, records, symmetric_limit
from causalpatch.results.pictures import Picture
from causalpatch.results.selection import bars

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.selection import SelectionStability

alt = lazy("altair")

_MOST_COLUMNS, _MOST_ROWS = 24, 40  # places of a panel; those with the largest effects are drawn
_CELL = 26, 20  # px
_WIDE = 6.2  # px of a letter of a label
_LEGEND = 130  # px
_OFTEN, _MOST_BARS = 320, 24  # px, width of the scale of frequencies; how many are drawn
_ORDER = ("sublayer", "module", "position", "head", "expert", "neuron", "feature", "channel")
_SHORT = {"attn_out": "attention", "mlp_out": "MLP"}


def draw(
    frame: pd.DataFrame,
    *,
    title: str,
    lines: Sequence[str],
    word: str,
    stability: SelectionStability | None = None,
) -> Picture:
    """Draw all parts that were measured in the search.

    Args:
        frame: A row per part, as ``Localization.to_dataframe`` returns.
        title: What stands above.
        lines: Smaller lines below the title.
        word: What effects do to the gap: restored or removed.
        stability: How often parts are selected again.
    """
    rows = [{key: plain(value) for key, value in row.items()} for row in records(frame)]
    names = [str(row["name"]) for row in rows]
    for row in rows:
        above = names[row["above"]] if row["above"] >= 0 else ""
        row["y"], row["x"] = _place(row, above)
        row["panel"] = (
            f"{row['level']}s" if row["above"] < 0 or row["level"] != rows[row["above"]]["level"] else "where"
        )
    limit = symmetric_limit(frame["effect"].to_numpy(dtype=float))
    order = [f"{level}s" for level in _ORDER] + ["where"]
    names = sorted({row["panel"] for row in rows}, key=order.index)
    sheet: Sheet = {}
    panels, width = [], 40.0
    for name in names:
        is_last = name == names[-1]
        colour = _colours(limit, word, has_legend=is_last)
        chart, taken = _panel(sheet, name, [row for row in rows if row["panel"] == name], colour)
        panels.append(chart)
        width += taken + (_LEGEND if is_last else 0)
    whole = alt.hconcat(*panels, spacing=24).resolve_scale(color="independent")
    said = ["from left to right: what parts are made of · outlined: found"]
    if stability is not None:
        often = stability.to_dataframe().head(_MOST_BARS)
        heading = alt.TitleParams("how often parts are selected again", anchor="start", fontSize=12, offset=6)
        below = bars(sheet, often, stability.threshold, width=_OFTEN, step=_CELL[1]).properties(title=heading)
        whole = alt.vconcat(whole, below, spacing=26).resolve_scale(color="independent")
        said += [*stability.lines, stability.on_line]
        left_out = len(stability.to_dataframe()) - len(often)
        said += [f"{left_out} parts that are selected less often are not drawn"] if left_out else []
    return Picture(finished(whole, Caption(title), [*lines, *said], max(width, 560.0)), frame, sheet)


def _colours(limit: float, word: str, *, has_legend: bool) -> Any:
    legend = alt.Legend(gradientLength=110, gradientThickness=14, format=".3~g", values=[-limit, 0, limit])
    return alt.Color(
        "effect:Q",
        title=["share of the gap", word],
        scale=alt.Scale(domain=[-limit, 0, limit], range=[RED, "#f7f7f7", BLUE]),
        legend=legend if has_legend else None,
    )


def _panel(sheet: Sheet, name: str, rows: list[dict[str, Any]], colour: Any) -> tuple[Any, float]:
    """Return the chart of one level and its width, px."""
    ups = _largest(rows, "y", _MOST_ROWS)
    alongs = _largest([row for row in rows if row["y"] in ups], "x", _MOST_COLUMNS)
    shown = [row for row in rows if row["y"] in ups and row["x"] in alongs]
    left_out = len(rows) - len(shown)
    x = alt.X("x:N", sort=None, title=None, scale=alt.Scale(domain=alongs), axis=alt.Axis(labelLimit=0, labelAngle=-90))
    y = alt.Y("y:N", sort=None, title=None, scale=alt.Scale(domain=ups), axis=alt.Axis(labelLimit=0))
    told = [alt.Tooltip("name:N"), alt.Tooltip("effect:Q", format=".4f"), alt.Tooltip("opened:N")]
    cells = layer_of(sheet, name, shown).mark_rect(stroke="#e4e4e4", strokeWidth=0.5)
    layers = [cells.encode(x=x, y=y, color=colour, tooltip=told)]
    found = [row for row in shown if row["is_component"]]
    if found:
        box = layer_of(sheet, f"{name}-found", found).mark_rect(fill=None, stroke=INK, strokeWidth=1.6)
        layers.append(box.encode(x=x, y=y, tooltip=told))
    size = _CELL[0] * len(alongs), _CELL[1] * len(ups)
    heading = f"{name} ({left_out} smaller not drawn)" if left_out else name
    title = alt.TitleParams(heading, anchor="start", fontSize=12, offset=6)
    beside = _WIDE * max(map(len, ups), default=0) + 24  # labels of the rows, and the space between panels
    return alt.layer(*layers).properties(width=size[0], height=size[1], title=title), size[0] + beside


def _largest(rows: list[dict[str, Any]], key: str, most: int) -> list[str]:
    """Return the places of an axis in their order, those with the largest |effect| where there are too many."""
    size: dict[str, float] = {}
    for row in rows:
        size[row[key]] = max(size.get(row[key], 0.0), abs(row["effect"] or 0.0))
    kept = set(sorted(size, key=lambda place: -size[place])[:most])
    kinds = list(_SHORT.values())
    is_kind = kept <= set(kinds)
    ordered = sorted((place for place in size if place in kept), key=kinds.index if is_kind else _natural)
    return ordered[::-1] if key == "y" else ordered


def _natural(text: str) -> list[tuple[int, int, str]]:
    """Return what sorts numbers in a text by their size, those counted from the end behind the others."""
    parts = re.findall(r"-?\d+|\D+", text)
    return [
        (int(part.startswith("-")), int(part), "") if re.fullmatch(r"-?\d+", part) else (2, 0, part) for part in parts
    ]


def _place(row: dict[str, Any], above: str) -> tuple[str, str]:
    """Return the row and the column of a part."""
    name = str(row["name"])
    base, _, position = name.partition("@")
    if row["level"] == "sublayer":
        kind, _, layer = base.partition(".")
        return f"layer {layer}", _SHORT.get(kind, kind)
    if row["level"] == "position" or (position and above == base):
        return above, f"@{position}"
    if row["level"] == "module":
        return above or "model", base.removeprefix("module(").partition(")")[0].rpartition(".")[2]
    return above or "sample", re.split(r"[.#]", base)[-1]
