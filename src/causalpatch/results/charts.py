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
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results.labels import SPACE, axis_text, cell_text
from causalpatch.results.layout import label_name
from causalpatch.results.pictures import Picture
from causalpatch.results.tables import ALPHA, TopTable
from causalpatch.statistics.permutation import smallest_p

if TYPE_CHECKING:
    import pandas as pd

alt = lazy("altair")

# A heat map beyond this many places on an axis has no readable labels; such sweeps are drawn as bars.
MOST_PLACES = 512
# Beyond this a description of every cell for screen readers makes the file several times as large.
MOST_SPOKEN_CELLS = 2_000
BLUE, RED, INK, FAINT = "#2166ac", "#b2182b", "#1a1a1a", "#9a9a9a"
FONT = "Arial, Helvetica, Liberation Sans, DejaVu Sans, sans-serif"
_TICK = 11  # font size of axis labels, px
_LIMITS = (1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0)
_INSET = 3.5  # px by which an outline is smaller than its cell
_HATCH_GAP = 5.0  # px between two lines of a hatched cell


@dataclass(frozen=True)
class Caption:
    """What stands above a picture.

    Args:
        title: One line.
        lines: Smaller lines below it: what was measured, and how to read the marks.
        legend: Title of the colour scale, or of the bars' axis.
        base: Whose prompt the tokens are from.
    """

    title: str
    lines: Sequence[str] = field(default_factory=tuple)
    legend: str = "recovered"
    base: str = "corrupted"


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
    vertical, horizontal = axes
    rows = [
        {
            "y": axis_text(row[vertical], row.get(label_name(vertical))),
            "x": axis_text(row[horizontal], row.get(label_name(horizontal))),
            **{name: _plain(row[name]) for name in _told(frame, value)},
        }
        for row in _records(frame)
    ]
    ups, alongs = list(dict.fromkeys(row["y"] for row in rows)), list(dict.fromkeys(row["x"] for row in rows))
    if vertical == "layer":
        ups = ups[::-1]
    width, height = _step(len(alongs), wide=True), _step(len(ups), wide=False)
    limit = symmetric_limit(frame[value].to_numpy())
    known = [row for row in rows if row[value] is not None]
    blank = [row for row in rows if row[value] is None]
    outlined = [row for row in known if row.get("p_bh") is not None and row["p_bh"] < ALPHA]

    x = alt.X("x:N", sort=None, scale=alt.Scale(domain=alongs, padding=0), axis=_axis(horizontal, alongs, width))
    y = alt.Y("y:N", sort=None, scale=alt.Scale(domain=ups, padding=0), axis=_axis(vertical, ups, None))
    colour = alt.Color(
        f"{value}:Q",
        scale=alt.Scale(scheme="redblue", domain=[-limit, limit], domainMid=0),
        legend=alt.Legend(
            title=textwrap.wrap(caption.legend, 22),
            values=[-limit, -limit / 2, 0, limit / 2, limit],
            format=".3~g",
            gradientLength=min(max(height * len(ups), 110), 220),
            gradientThickness=14,
        ),
    )
    tooltip = [alt.Tooltip("y:N", title=vertical), alt.Tooltip("x:N", title=horizontal)]
    tooltip += [alt.Tooltip(f"{name}:{'N' if name == 'status' else 'Q'}") for name in _told(frame, value)]
    layers = [
        _layer(known).mark_rect(stroke="#e4e4e4", strokeWidth=0.5).encode(x=x, y=y, color=colour, tooltip=tooltip)
    ]
    if blank:
        layers.append(_layer(blank).mark_rect(fill="white", stroke="#c8c8c8", strokeWidth=0.5).encode(x=x, y=y))
        hatch = _layer(blank).mark_point(shape=_hatch(width, height), size=4, stroke=FAINT, strokeWidth=0.8)
        layers.append(hatch.encode(x=x, y=y, tooltip=tooltip))
    if outlined:
        # Drawn inside the cell: where neighbours shared a line, a cell among outlined ones would look outlined too.
        inside = {"width": {"band": 1 - _INSET / width}, "height": {"band": 1 - _INSET / height}}
        box = _layer(outlined).mark_rect(fill=None, stroke=INK, strokeWidth=1.2, **inside)
        layers.append(box.encode(x=x, y=y, tooltip=tooltip))
    chart = alt.layer(*layers).properties(width=width * len(alongs), height=height * len(ups))
    lines = [*caption.lines, *_on_labels(horizontal, frame, caption.base)]
    lines += _how_to_read(frame, outlined=bool(outlined), value=value)
    return Picture(_finished(chart, caption.title, lines, width * len(alongs)), frame)


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
    names = [_cell_name(row, axes) for row in _records(frame)]
    told = _told(frame, "recovered")
    rows = [
        {"cell": name, **{key: _plain(row[key]) for key in told}}
        for name, row in zip(names, _records(frame), strict=True)
    ]
    y = alt.Y("cell:N", sort=None, scale=alt.Scale(domain=names), axis=alt.Axis(title=None, **_LABELS, ticks=False))
    x = alt.X(
        "recovered:Q",
        title=caption.legend,
        axis=alt.Axis(format=".3~g", tickCount=6, labelFontSize=_TICK, labelFlush=False),
    )
    tooltip = [alt.Tooltip(f"{key}:{'N' if key == 'status' else 'Q'}") for key in told]
    layers = []
    for paint, is_positive in ((BLUE, True), (RED, False)):
        for outlined in (False, True):
            same = [row for row in rows if (row["recovered"] >= 0) == is_positive]
            some = [row for row in same if _is_significant(row) == outlined]
            if some:
                edge = {"stroke": INK, "strokeWidth": 1.6} if outlined else {}
                bar = _layer(some).mark_bar(color=paint, fillOpacity=0.75, height=14, **edge)
                layers.append(bar.encode(y=y, x=x, tooltip=tooltip))
    zero = _layer([{"recovered": 0.0}]).mark_rule(color=INK, strokeWidth=1)
    layers.append(zero.encode(x=x))
    spans = [row for row in rows if row["low"] is not None and row["high"] is not None]
    if spans:
        rule = _layer(spans).mark_rule(color=INK, strokeWidth=1.4)
        layers.append(rule.encode(y=y, x=alt.X("low:Q"), x2="high:Q"))
        for end in ("low", "high"):
            cap = _layer(spans).mark_tick(color=INK, thickness=1.4, size=8, orient="vertical")
            layers.append(cap.encode(y=y, x=alt.X(f"{end}:Q")))
    if top.by_component is not None:
        dots = [
            {"cell": name, "recovered": float(value)}
            for name, values in zip(names, top.by_component, strict=True)
            for value in values[np.isfinite(values)]
        ]
        dot = _layer(dots).mark_point(filled=True, color="white", stroke=INK, strokeWidth=1, size=26, opacity=0.85)
        layers.append(dot.encode(y=y, x=x))
    chart = alt.layer(*layers).properties(width=420, height=24 * max(len(names), 1))
    marks = ["whiskers: interval"] if spans else []
    if top.by_component is not None:
        marks = ["dots: each independent group (too few for an interval)"]
    outlined = any(map(_is_significant, rows))
    lines = [top.words, *caption.lines, "; ".join([*marks, *_how_to_read(frame, outlined=outlined)])]
    return Picture(_finished(chart, caption.title, lines, 640), frame)


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


def caption(provenance: Mapping[str, Any], *, metric: str, quantity: str, pairs: str) -> Caption:
    """Return what stands above a picture, from how the numbers came to be.

    Args:
        provenance: Of the effects.
        metric: Name of the metric.
        quantity: ``"recovered"`` or ``"effect"``.
        pairs: How many pairs and components, in words.
    """
    denoise = provenance["direction"] == "denoise"
    site = str(provenance.get("site") or "effects")
    value = str(provenance.get("value") or "source")
    origin = f"{'clean' if denoise else 'corrupted'} values" if value == "source" else f"{value} values"
    run = "corrupted" if denoise else "clean"
    if quantity == "recovered":
        title, legend = f"{site}: share of the gap {'restored' if denoise else 'removed'} by patching", "recovered"
    else:
        title, legend = f"{site}: change of {metric} by patching", f"effect ({metric})"
    model, name = (_name_in(provenance.get(key)) for key in ("model", "pairs"))
    where = " · ".join(text for text in (model, name, pairs) if text)
    how = f"{provenance['direction']}: {origin} into the {run} run · {metric}"
    unfinished = "" if provenance.get("complete", True) else "the sweep was stopped before its end"
    return Caption(title, [where, how, unfinished], legend, run)


_LABELS = {"labelLimit": 0, "labelOverlap": False, "labelFontSize": _TICK, "labelPadding": 4}


def _axis(name: str, texts: Sequence[str], step: int | None) -> Any:
    """Return an axis that shows every label whole; upright where the labels are wider than a column."""
    angle: dict[str, Any] = {}
    if step is not None:
        fits = max(map(len, texts), default=0) * _TICK * 0.62 < step - 2
        angle = {"labelAngle": 0} if fits else {"labelAngle": -90, "labelAlign": "right", "labelBaseline": "middle"}
    return alt.Axis(title=name, **_LABELS, **angle, ticks=False, domain=False)


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


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    columns = [str(name) for name in frame.columns]
    return [dict(zip(columns, row, strict=True)) for row in frame.itertuples(index=False, name=None)]


def _layer(rows: Sequence[Mapping[str, Any]]) -> Any:
    # Rows given as values stay out of Altair's table transformers, whose limit of 5,000 rows is a global setting.
    return alt.Chart(alt.InlineData(values=list(rows)))


def _told(frame: pd.DataFrame, value: str) -> list[str]:
    wanted = [value, "effect", "low", "high", "p_bh", "agreement", "n_pairs", "n_components", "status"]
    return list(dict.fromkeys(name for name in wanted if name in frame.columns))


def _plain(value: Any) -> Any:
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _is_significant(row: Mapping[str, Any]) -> bool:
    return row.get("p_bh") is not None and row["p_bh"] < ALPHA


def _cell_name(row: Mapping[str, Any], axes: Sequence[str]) -> str:
    labels = {axis: row[label_name(axis)] for axis in axes if label_name(axis) in row}
    return cell_text({axis: row[axis] for axis in axes}, labels)


def _on_labels(axis: str, frame: pd.DataFrame, base: str) -> list[str]:
    """Say whose tokens stand on the axis, and what a dot in them is."""
    if axis not in ("position", "key_position") or label_name(axis) not in frame.columns:
        return []
    spaces = any(text.startswith(" ") or text.endswith(" ") or "  " in text for text in frame[label_name(axis)])
    return [f"tokens: of the {base} prompt" + (f"; {SPACE} is a space" if spaces else "")]


def _how_to_read(frame: pd.DataFrame, *, outlined: bool, value: str | None = None) -> list[str]:
    lines = []
    if outlined:
        lines.append("outlined: adjusted p below .05 (against 0, screening only)")
    elif smallest_p(n_groups := int(frame["n_components"].max())) >= ALPHA:
        lines.append(f"no outlines: with {n_groups} independent groups p cannot be below .05")
    else:
        lines.append("no outlines: no adjusted p below .05")
    if value is not None and frame[value].isna().any():
        blank = frame.loc[frame[value].isna()]
        texts = blank.loc[blank["n_pairs"] == 0, "status"]
        reasons = sorted({part.lstrip("0123456789 ") for text in texts for part in text.split("; ")})
        without = ["measured, but its pairs have no gap"] if (blank["n_pairs"] > 0).any() else []
        measured = [f"not measured ({', '.join(reasons)})"] if reasons else []
        lines.append("hatched: " + "; ".join(measured + without))
    return lines


def _name_in(value: Any) -> str:
    return str(value.get("name") or "") if isinstance(value, Mapping) else str(value or "")


def _finished(chart: Any, title: str, lines: Sequence[str], width: float) -> Any:
    columns = max(int(width / 5.5), 76)
    wrapped = [part for line in lines if line for part in textwrap.wrap(line, columns)]
    heading = alt.TitleParams(title, subtitle=wrapped, anchor="start", frame="bounds", offset=12)
    return (
        chart.properties(title=heading, padding=14)
        .configure(font=FONT, background="white")
        .configure_title(fontSize=14, subtitleFontSize=11, subtitleColor="#555555", fontWeight=600)
        .configure_axis(titleFontSize=12, titleFontWeight="normal", grid=False, titlePadding=8)
        .configure_legend(titleFontSize=11, labelFontSize=10, titleFontWeight="normal", titleLimit=0)
        .configure_view(stroke=None)
    )
