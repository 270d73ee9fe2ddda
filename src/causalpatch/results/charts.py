"""Charts of effects: a heat map over two axes, and bars with intervals for the largest cells.

Layers go up the y axis with 0 at the bottom; every place of the x axis is named by its index and token, so that a
repeated token keeps each of its places. Colours are red to blue, centred at 0 with limits symmetric about it, positive
blue (ColorBrewer RdBu, readable for the colour-blind). A dark outline marks a cell whose adjusted p is below .05;
hatching marks one without a number, which is never drawn as 0.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results.captions import LINE_SIZE, TITLE_SIZE, Caption, on_labels, on_marks, wrapped
from causalpatch.results.labels import VARIES, axis_text, cell_text
from causalpatch.results.layout import label_name
from causalpatch.results.notes import ALPHA, on_disagreement
from causalpatch.results.pictures import Picture

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.top import TopTable

alt = lazy("altair")

# A heat map beyond this many places on an axis has no readable labels; such sweeps are drawn as bars.
MOST_PLACES = 512
# Beyond this a description of every cell for screen readers makes the file several times as large.
MOST_SPOKEN_CELLS = 2_000
BLUE, RED, INK, FAINT = "#2166ac", "#b2182b", "#1a1a1a", "#9a9a9a"
MUTED = "#6b6b6b"  # for texts: contrast 5.3 on white
FONT = "Arial, Helvetica, Liberation Sans, DejaVu Sans, sans-serif"
_TICK = 11  # font size of axis labels, px
_LIMITS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
_INSET = 3.5  # px by which an outline is smaller than its cell
_HATCH_GAP = 5.0  # px between two lines of a hatched cell
_LETTER = 0.62  # width of a letter per px of its size, on the wide side
_BESIDE = 150  # px that the axis and the legend of a heat map take beside it
_WIDEST_LYING = 560  # px up to which columns are widened until their labels lie flat
_BARS = 420  # px, width of the bars' scale


def heat_map(frame: pd.DataFrame, axes: Sequence[str], value: str, caption: Caption) -> Picture:
    """Draw one number per cell over two axes.

    Args:
        frame: A row per cell: the axes, their labels, the value, ``p_bh`` and the rest of the summary.
        axes: The vertical axis, then the horizontal one.
        value: The column to draw.
        caption: What stands above.

    Returns:
        The picture.
    """
    sheet: Sheet = {}
    chart = heat_layers(sheet, frame, axes, value, caption)
    width, _ = chart_size(frame, axes)
    outlined = any(_is_significant(row) and row[value] is not None for row in records(frame))
    lines = [*on_labels(axes[1], frame, caption.base), *on_marks(frame, outlined=outlined, value=value)]
    chart = finished(chart, caption, lines, width + _BESIDE)
    if len(frame) > MOST_SPOKEN_CELLS:
        chart = chart.configure_mark(aria=False)
    return Picture(chart, frame, sheet)


def heat_layers(
    sheet: Sheet,
    frame: pd.DataFrame,
    axes: Sequence[str],
    value: str,
    caption: Caption,
    *,
    name: str = "",
    limit: float | None = None,
) -> Any:
    """Return the layers of a heat map without its heading.

    Args:
        sheet: Filled with the rows of each layer.
        frame: As for ``heat_map``.
        axes: The vertical axis, then the horizontal one.
        value: The column to draw.
        caption: For the titles of scale and numbers.
        name: Put before the names of the layers, where several charts share a sheet.
        limit: End of the colour scale; by the largest value unless given.
    """
    vertical, horizontal = axes
    told = _told(frame, value)
    ups, alongs = _places(frame, axes)
    rows = [
        {"y": _name(row, vertical), "x": _name(row, horizontal), **{key: plain(row[key]) for key in told}}
        for row in records(frame)
    ]
    width, height = _column(alongs), _step(len(ups), wide=False)
    known = [row for row in rows if row[value] is not None]
    blank = [row for row in rows if row[value] is None]
    outlined = [row for row in known if _is_significant(row)]

    places = {"sort": None, "title": horizontal, "scale": alt.Scale(domain=alongs, padding=0)}
    x = alt.X("x:N", **places, axis=_axis(alongs, width))
    places = {"sort": None, "title": vertical, "scale": alt.Scale(domain=ups, padding=0)}
    y = alt.Y("y:N", **places, axis=_axis(ups, None))
    colour = _colours(frame[value].to_numpy(), value, caption, height * len(ups), limit)
    tooltip = [alt.Tooltip("y:N", title=vertical), alt.Tooltip("x:N", title=horizontal)]
    tooltip += _tooltip(told, caption)
    cells = layer_of(sheet, f"{name}known", known).mark_rect(stroke="#e4e4e4", strokeWidth=0.5)
    layers = [cells.encode(x=x, y=y, color=colour, tooltip=tooltip)]
    if blank:
        ground = layer_of(sheet, f"{name}blank", blank).mark_rect(fill="white", stroke="#c8c8c8", strokeWidth=0.5)
        hatch = layer_of(sheet, f"{name}blank", blank).mark_point(
            shape=_hatch(width, height), size=4, stroke=FAINT, strokeWidth=0.8
        )
        layers += [ground.encode(x=x, y=y), hatch.encode(x=x, y=y, tooltip=tooltip)]
    if outlined:
        # Drawn inside the cell: where neighbours shared a line, a cell among outlined ones would look outlined too.
        inside = {"width": {"band": 1 - _INSET / width}, "height": {"band": 1 - _INSET / height}}
        box = layer_of(sheet, f"{name}outlined", outlined).mark_rect(fill=None, stroke=INK, strokeWidth=1.2, **inside)
        layers.append(box.encode(x=x, y=y, tooltip=tooltip))
    return alt.layer(*layers).properties(width=width * len(alongs), height=height * len(ups))


def chart_size(frame: pd.DataFrame, axes: Sequence[str]) -> tuple[int, int]:
    """Return the width and height of a heat map's cells together, px."""
    ups, alongs = _places(frame, axes)
    return _column(alongs) * len(alongs), _step(len(ups), wide=False) * len(ups)


def bars(top: TopTable, axes: Sequence[str], caption: Caption) -> Picture:
    """Draw the largest cells as bars with their intervals, or with the value of each independent component.

    Args:
        top: The largest cells.
        axes: Axes of the sweep, for the names of the bars.
        caption: What stands above.

    Returns:
        The picture.
    """
    frame = top.to_dataframe()
    names = [_cell_name(row, axes) for row in records(frame)]
    told = _told(frame, "recovered")
    rows = [
        {"cell": name, **{key: plain(row[key]) for key in told}}
        for name, row in zip(names, records(frame), strict=True)
    ]
    y = alt.Y("cell:N", sort=None, scale=alt.Scale(domain=names), axis=alt.Axis(title=None, **_LABELS, ticks=False))
    x = alt.X(
        "recovered:Q",
        title=caption.legend,
        axis=alt.Axis(format=".3~g", tickCount=6, labelFontSize=_TICK, labelFlush=False),
    )
    tooltip = _tooltip(told, caption)
    sheet: Sheet = {}
    layers = []
    for paint, sign in ((BLUE, "positive"), (RED, "negative")):
        for outlined in (False, True):
            same = [row for row in rows if (row["recovered"] >= 0) == (sign == "positive")]
            some = [row for row in same if _is_significant(row) == outlined]
            if some:
                edge = {"stroke": INK, "strokeWidth": 1.6} if outlined else {}
                bar = layer_of(sheet, sign + " outlined" * outlined, some)
                bar = bar.mark_bar(color=paint, fillOpacity=0.75, height=14, **edge)
                layers.append(bar.encode(y=y, x=x, tooltip=tooltip))
    layers.append(layer_of(sheet, "nought", [{"recovered": 0.0}]).mark_rule(color=INK, strokeWidth=1).encode(x=x))
    spans = [row for row in rows if row["low"] is not None and row["high"] is not None]
    marks = []
    if spans:
        layers += _whiskers(sheet, spans, y)
        marks.append("whiskers: interval")
    if top.by_component is not None:
        layers.append(_dots(sheet, names, top.by_component).encode(y=y, x=x))
        marks.append("dots: each independent group (too few for an interval)")
    chart = alt.layer(*layers).properties(width=_BARS, height=24 * max(len(names), 1))
    marks += on_marks(frame, outlined=any(map(_is_significant, rows)))
    width = _BARS + _length(names)
    shown = Caption(caption.title, [top.words, *caption.lines])
    return Picture(finished(chart, shown, ["; ".join(marks), *on_disagreement(frame, drawn=True)], width), frame, sheet)


def symmetric_limit(values: np.ndarray) -> float:
    """Return a round number that no |value| exceeds, for a scale from its negative to itself.

    Args:
        values: Any shape; NaN is passed over.
    """
    largest = float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0))
    if largest == 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(largest))
    return next(float(f"{step * power:.6g}") for step in _LIMITS if step * power >= largest * (1 - 1e-9))


def choose_axes(sizes: Mapping[str, int]) -> tuple[str, str] | None:
    """Return the vertical and the horizontal axis of a heat map, or nothing where bars say more.

    Args:
        sizes: Number of places on each axis of the sweep.
    """
    if len(sizes) != 2 or max(sizes.values()) > MOST_PLACES or "intervention" in sizes:
        return None
    first, second = sizes
    turned = first in ("position", "key_position") or second in ("layer", "query_position")
    return (second, first) if turned else (first, second)


def check_request(kind: str | None, quantity: str, sizes: Mapping[str, int]) -> str:
    """Return the kind of chart to draw.

    Args:
        kind: As asked, or nothing.
        quantity: As asked.
        sizes: Number of places on each axis of the sweep.

    Raises:
        SettingError: The kind or quantity does not exist, or does not fit the axes.
    """
    if quantity not in ("recovered", "effect"):
        raise SettingError(
            f"no quantity {quantity!r} to draw",
            facts=[("known", "recovered, effect")],
            fix='effects.plot(quantity="effect")',
        )
    fitting = choose_axes(sizes)
    if kind is None:
        kind = "heat" if fitting else "bars"
    if kind not in ("heat", "bars"):
        raise SettingError(f"no chart of kind {kind!r}", facts=[("known", "heat, bars")], fix="effects.plot()")
    axes = ", ".join(f"{axis} ({size})" for axis, size in sizes.items())
    if kind == "heat" and fitting is None:
        facts = [("axes", axes), ("needed", f"two axes of at most {MOST_PLACES} places")]
        raise SettingError("a heat map does not fit these axes", facts=facts, fix="effects.plot('bars')")
    if kind == "bars" and quantity == "effect":
        fix = "effects.plot('heat', quantity='effect')" if fitting else "effects.effect()"
        raise SettingError("bars show recovered shares, not effects", facts=[("axes", axes)], fix=fix)
    return kind


def _places(frame: pd.DataFrame, axes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the names of the places on the vertical axis, from the top down, and on the horizontal one."""
    ups, alongs = (list(dict.fromkeys(_name(row, axis) for row in records(frame))) for axis in axes)
    return (ups[::-1] if axes[0] == "layer" else ups), alongs


def _name(row: Mapping[str, Any], axis: str) -> str:
    return axis_text(row[axis], row.get(label_name(axis)))


_LABELS = {"labelLimit": 0, "labelOverlap": False, "labelFontSize": _TICK, "labelPadding": 4}
Sheet = dict[
    str, Sequence[Mapping[str, Any]]
]  # the rows of each layer, by the name under which the chart refers to them


def _colours(values: np.ndarray, name: str, caption: Caption, height: int, limit: float | None) -> Any:
    """Return the colour scale: symmetric about 0, positive blue."""
    limit = symmetric_limit(values) if limit is None else limit
    return alt.Color(
        f"{name}:Q",
        title=_titles(caption).get(name, name),
        scale=alt.Scale(scheme="redblue", domain=[-limit, limit], domainMid=0),
        legend=alt.Legend(
            title=textwrap.wrap(caption.legend, 22),
            values=[-limit, -limit / 2, 0, limit / 2, limit],
            format=".3~g",
            gradientLength=min(max(height, 110), 220),
            gradientThickness=14,
        ),
    )


def _whiskers(sheet: Sheet, spans: Sequence[Mapping[str, Any]], y: Any) -> list[Any]:
    """Return a line from end to end of each interval, and a tick at both ends."""
    rule = layer_of(sheet, "spans", spans).mark_rule(color=INK, strokeWidth=1.4)
    layers = [rule.encode(y=y, x=alt.X("low:Q"), x2="high:Q")]
    for end in ("low", "high"):
        cap = layer_of(sheet, "spans", spans).mark_tick(color=INK, thickness=1.4, size=8, orient="vertical")
        layers.append(cap.encode(y=y, x=alt.X(f"{end}:Q")))
    return layers


def _dots(sheet: Sheet, names: Sequence[str], by_component: np.ndarray) -> Any:
    dots = [
        {"cell": name, "recovered": float(value)}
        for name, values in zip(names, by_component, strict=True)
        for value in values[np.isfinite(values)]
    ]
    style = {"color": "white", "stroke": INK, "strokeWidth": 1, "size": 26, "opacity": 0.85}
    return layer_of(sheet, "dots", dots).mark_point(filled=True, **style)


def _axis(texts: Sequence[str], step: int | None) -> Any:
    """Return an axis that shows every label whole; upright where the labels are wider than a column."""
    angle: dict[str, Any] = {}
    if step is not None:
        lies = _length(texts) < step - 2
        angle = {"labelAngle": 0} if lies else {"labelAngle": -90, "labelAlign": "right", "labelBaseline": "middle"}
    # Fainter where pairs differ, so that the tokens that all of them share stand out.
    varies = {"test": f"indexof(datum.value, ' {VARIES}') > 0", "value": MUTED}
    colour = {"labelColor": {"condition": varies, "value": INK}} if any(map(_varies, texts)) else {}
    return alt.Axis(**_LABELS, **angle, **colour, ticks=False, domain=False)


def _varies(text: str) -> bool:
    return text.endswith(f" {VARIES}")


def _column(texts: Sequence[str]) -> int:
    """Return the width of a column, px: wide enough for labels that lie flat where the picture stays small."""
    step, lying = _step(len(texts), wide=True), math.ceil(_length(texts)) + 6
    return max(step, lying) if lying * len(texts) <= _WIDEST_LYING else step


def _length(texts: Sequence[str]) -> float:
    """Return about how wide the widest label is, px."""
    return max(map(len, texts), default=0) * _TICK * _LETTER


def _step(places: int, *, wide: bool) -> int:
    """Return the size of a cell along an axis, px: never less than a line of text needs."""
    for most, size in ((6, 34 if wide else 28), (16, 28 if wide else 24), (32, 22 if wide else 18), (64, 17)):
        if places <= most:
            return size if wide else min(size, 28)
    return 14


def _hatch(width: float, height: float) -> str:
    """Return diagonal lines over a cell as a path around its middle, px."""
    lines = []
    offset = -(width + height) / 2 + _HATCH_GAP / 2
    while offset < (width + height) / 2:
        # The line y = offset - x, cut to the cell.
        left, right = max(-width / 2, offset - height / 2), min(width / 2, offset + height / 2)
        if right > left:
            lines.append(f"M{left:.2f},{offset - left:.2f}L{right:.2f},{offset - right:.2f}")
        offset += _HATCH_GAP
    return "".join(lines)


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table by the names of its columns."""
    columns = [str(name) for name in frame.columns]
    return [dict(zip(columns, row, strict=True)) for row in frame.itertuples(index=False, name=None)]


def layer_of(sheet: Sheet, name: str, rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return a chart of some rows, which it knows by a name in the sheet alone."""
    # Altair copies and checks its data many times over and refuses more than 5,000 rows by a global setting; so its
    # chart knows them by name only, and the picture puts them in.
    sheet[name] = rows
    return alt.Chart(alt.NamedData(name=name))


def _tooltip(told: Sequence[str], caption: Caption) -> list[Any]:
    titles = _titles(caption)
    kinds = {"status": "N"}
    return [alt.Tooltip(f"{name}:{kinds.get(name, 'Q')}", title=titles.get(name, name)) for name in told]


def _titles(caption: Caption) -> dict[str, str]:
    return {"recovered": caption.word}


def _told(frame: pd.DataFrame, value: str) -> list[str]:
    wanted = [value, "effect", "low", "high", "p_bh", "agreement", "n_pairs", "n_components", "status"]
    return list(dict.fromkeys(name for name in wanted if name in frame.columns))


def plain(value: Any) -> Any:
    """Return a value as JSON has it: what is not finite is missing."""
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_significant(row: Mapping[str, Any]) -> bool:
    return row.get("p_bh") is not None and row["p_bh"] < ALPHA


def _cell_name(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    labels = {axis: row[label_name(axis)] for axis in axes if label_name(axis) in row}
    return cell_text({axis: row[axis] for axis in axes}, labels)


def finished(chart: Any, caption: Caption, lines: Sequence[str], width: float) -> Any:
    """Return a chart with its heading and the house's fonts and colours.

    Args:
        chart: The chart.
        caption: What stands above.
        lines: Further lines below the heading.
        width: Of the picture, px.
    """
    heading, below = wrapped(caption.title, [*caption.lines, *lines], width)
    title = alt.TitleParams(heading, subtitle=below, anchor="start", frame="bounds", offset=12)
    return (
        chart.properties(title=title, padding=14)
        .configure(font=FONT, background="white")
        .configure_title(fontSize=TITLE_SIZE, subtitleFontSize=LINE_SIZE, subtitleColor="#555555", fontWeight=600)
        .configure_axis(titleFontSize=12, titleFontWeight="normal", grid=False, titlePadding=8)
        .configure_legend(titleFontSize=11, labelFontSize=10, titleFontWeight="normal", titleLimit=0)
        .configure_view(stroke=None)
    )
