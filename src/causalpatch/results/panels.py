"""Several heat maps in one figure, on one colour scale: the same cells measured in several ways.

Panels stand in rows and columns, each with its own heading; the scale is symmetric about 0 and the same for all, so
that colours can be compared between them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results import captions, charts, tables
from causalpatch.results.captions import Caption, on_labels, on_marks
from causalpatch.results.effects import Effects
from causalpatch.results.notes import ALPHA
from causalpatch.results.pictures import Picture

alt = lazy("altair")
pd = lazy("pandas")

_BETWEEN = 70  # px between two panels and for the axis of each
_PANEL_TITLE = 12  # px


def panels(
    effects: Mapping[tuple[str, str], Effects],
    *,
    title: str,
    lines: Sequence[str] = (),
    quantity: str = "recovered",
    starred: Collection[int] = (),
    base: str | None = None,
) -> Picture:
    """Draw effects over two axes beside and below each other.

    Args:
        effects: The effects of each panel, by the name of its row and that of its column.
        title: What stands above the figure.
        lines: Smaller lines below the title.
        quantity: ``"recovered"``, or ``"effect"`` in the metric's unit.
        starred: Positions whose tokens are marked with a star.
        base: Whose prompt the tokens are from, where it is not the base run's of the first panel.

    Raises:
        SettingError: Effects do not have two axes that a heat map can show.
        NoGap: Clean and reference runs of a panel do not differ enough, so a share means nothing.
    """
    shown = {place: each.over_draws() for place, each in effects.items()}
    frames, axes = {}, {}
    for place, each in shown.items():
        fitting = charts.choose_axes({axis: int(each._data.sizes[axis]) for axis in each.axes})
        if fitting is None:
            raise SettingError(
                f"panel {', '.join(place)} has no two axes for a heat map",
                facts=[("axes", ", ".join(each.axes))],
                fix="draw it by itself: effects.plot('bars')",
            )
        axes[place] = fitting
        frames[place] = tables.effects_only(each._data, each._inference) if quantity == "effect" else each.summary()
        if starred and "token" in frames[place]:
            stars = frames[place]["position"].isin(list(starred)).map({True: "*", False: ""})
            frames[place]["token"] = frames[place]["token"].astype(str) + stars
    everything = np.concatenate([frame[quantity].to_numpy() for frame in frames.values()])
    limit = charts.symmetric_limit(everything)
    first = next(iter(shown.values()))
    caption = captions.describe(first.provenance, first.metrics[0], quantity, first._pairs_text())
    sheet: charts.Sheet = {}
    rows = list(dict.fromkeys(row for row, _ in shown))
    drawn = []
    for row in rows:
        line = []
        for place in (each for each in shown if each[0] == row):
            name = f"{'-'.join(place)}-"
            chart = charts.heat_layers(sheet, frames[place], axes[place], quantity, caption, name=name, limit=limit)
            heading = alt.TitleParams(", ".join(filter(None, place)), anchor="start", fontSize=_PANEL_TITLE, offset=6)
            line.append(chart.properties(title=heading))
        drawn.append(alt.hconcat(*line, spacing=30))
    whole = alt.vconcat(*drawn, spacing=30).resolve_scale(color="shared")
    sizes = {place: charts.chart_size(frames[place], axes[place])[0] + _BETWEEN for place in shown}
    width = max(sum(size for place, size in sizes.items() if place[0] == row) for row in rows) + _BETWEEN
    frame = pd.concat([one.assign(row=place[0], column=place[1]) for place, one in frames.items()], ignore_index=True)
    said = [
        *lines,
        *on_labels(next(iter(axes.values()))[1], frame, base or caption.base),
        *on_marks(frame, outlined=_has_outlines(frame), value=quantity),
    ]
    return Picture(charts.finished(whole, Caption(title), said, width), frame, sheet)


def _has_outlines(frame: Any) -> bool:
    return bool((frame["p_bh"] < ALPHA).any())
