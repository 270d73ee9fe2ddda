"""How often parts of a model are selected again on resampled pairs: the stability of a localisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.results.captions import Caption
from causalpatch.results.charts import BLUE, FAINT, INK, Sheet, finished, layer_of, plain, records
from causalpatch.results.pictures import Picture
from causalpatch.results.words import counted, percent

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

alt = lazy("altair")

_WIDTH: Final = 320  # px
_MOST: Final = 40  # bars


@dataclass(frozen=True, eq=False)
class SelectionStability:
    """How often cells are selected again.

    Args:
        cells: For each measured cell its ``cell``, ``share``, whether it ``is_selected`` on all pairs, and the
            ``frequency`` of resamples that select it.
        overlap: For each resample, cells that both selections have over those that either has.
        wanted: Share of resamples that wanted a cell which was never measured; NaN where that cannot be known.
        n_unmeasured: Cells that were never measured.
        n_groups: Independent components of pairs that were resampled.
        rule: How cells are selected, in words.
    """

    cells: tuple[Mapping[str, Any], ...]
    overlap: np.ndarray
    wanted: float
    n_unmeasured: int
    n_groups: int
    rule: str

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row for each cell that is ever selected, the most frequent first."""
        frame = pd.DataFrame([dict(row) for row in self.cells])
        ever = frame[(frame["frequency"] > 0) | frame["is_selected"]]
        return ever.sort_values("frequency", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self) -> Picture:
        """Draw how often each cell is selected, dark where it is on all pairs."""
        frame = self.to_dataframe().head(_MOST)
        rows = [{key: plain(value) for key, value in row.items()} for row in records(frame)]
        sheet: Sheet = {}
        y = alt.Y("cell:N", sort=None, axis=alt.Axis(title=None, labelLimit=0, labelOverlap=False, ticks=False))
        x = alt.X("frequency:Q", title="share of resamples that select it", scale=alt.Scale(domain=[0, 1]))
        colour = alt.condition("datum.is_selected", alt.value(BLUE), alt.value(FAINT))
        bar = layer_of(sheet, "cells", rows).mark_bar(height=14, stroke=INK, strokeWidth=0.6)
        chart = bar.encode(x=x, y=y, color=colour, tooltip=["cell:N", "frequency:Q", "share:Q"])
        chart = chart.properties(width=_WIDTH, height=22 * max(len(rows), 1))
        lines = [*self._lines, "blue: selected on all pairs"]
        return Picture(
            finished(chart, Caption("How often cells are selected again"), lines, _WIDTH + 160), frame, sheet
        )

    def __str__(self) -> str:
        frame = self.to_dataframe()
        rows = [f"  {row['cell']}: {row['frequency']:.2f}" for row in records(frame.head(_MOST))]
        return "\n".join([*self._lines, *rows])

    @property
    def _lines(self) -> Sequence[str]:
        low, middle = np.quantile(self.overlap, (0.05, 0.5)).tolist()
        lines = [
            f"{self.rule}, selected again on {counted(len(self.overlap), 'resample')} of {self.n_groups} independent "
            f"components: overlap {middle:.2f} (5 % quantile {low:.2f})",
        ]
        if not self.n_unmeasured:
            return [*lines, "every cell was measured"]
        known = "which of them resamples wanted is not known" if np.isnan(self.wanted) else ""
        known = known or f"{percent(round(self.wanted, 4))} of resamples wanted one of them"
        return [*lines, f"conditional on measured cells: {counted(self.n_unmeasured, 'cell')} never measured, {known}"]
