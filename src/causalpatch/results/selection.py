"""How often parts of a model are selected again on resampled pairs: the stability of a localisation.

References:
    Meinshausen & Bühlmann 2010, "Stability selection", Journal of the Royal Statistical Society B 72 (thresholds of .6
    to .9 for the frequency of selection).
"""

from __future__ import annotations

from collections.abc import Mapping
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

_WIDTH, _ROW = 320, 22  # px
_MOST: Final = 40  # bars
FEWEST: Final = 4  # independent components below which resamples are nearly all alike
THRESHOLD: Final = 0.9  # the strict end of what Meinshausen & Bühlmann recommend


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
        threshold: Frequency from which a cell is called stable.
    """

    cells: tuple[Mapping[str, Any], ...]
    overlap: np.ndarray
    wanted: float
    n_unmeasured: int
    n_groups: int
    rule: str
    threshold: float = THRESHOLD

    @property
    def stable(self) -> list[str]:
        """Cells that are selected at least as often as the threshold says, the most frequent first."""
        frame = self.to_dataframe()
        return [str(name) for name in frame["cell"][frame["frequency"] >= self.threshold]]

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row for each cell that is ever selected, the most frequent first."""
        frame = pd.DataFrame([dict(row) for row in self.cells])
        ever = frame[(frame["frequency"] > 0) | frame["is_selected"]]
        return ever.sort_values("frequency", ascending=False, kind="stable").reset_index(drop=True)

    def plot(self) -> Picture:
        """Draw how often each cell is selected, dark where it is on all pairs."""
        frame = self.to_dataframe().head(_MOST)
        sheet: Sheet = {}
        chart = bars(sheet, frame, self.threshold, width=_WIDTH, step=_ROW)
        return Picture(
            finished(chart, Caption("How often cells are selected again"), [*self.lines, self.on_line], _WIDTH + 160),
            frame,
            sheet,
        )

    def __str__(self) -> str:
        frame = self.to_dataframe()
        rows = [f"  {row['cell']}: {row['frequency']:.2f}" for row in records(frame.head(_MOST))]
        left_out = len(frame) - len(rows)
        more = [f"  … and {left_out} more: stability.to_dataframe()"] if left_out else []
        return "\n".join([*self.lines, *rows, *more])

    @property
    def on_line(self) -> str:
        """What the dashed line of a picture is."""
        return f"dashed: {percent(self.threshold)} of the resamples"

    @property
    def lines(self) -> list[str]:
        """What is said above the frequencies: the rule, the overlap, and what they are conditional on."""
        low, middle = np.quantile(self.overlap, (0.05, 0.5)).tolist()
        lines = [
            f"{self.rule}, selected again on {counted(len(self.overlap), 'resample')} of {self.n_groups} independent "
            f"components: overlap {middle:.2f} (5 % quantile {low:.2f})",
        ]
        n_stable = len(self.stable)
        lines.append(f"{counted(n_stable, 'cell')} in {percent(self.threshold)} of the resamples or more")
        if not self.n_unmeasured:
            return [*lines, "every cell was measured"]
        known = "which of them resamples wanted is not known" if np.isnan(self.wanted) else ""
        known = known or f"{percent(round(self.wanted, 4))} of resamples wanted one of them"
        return [*lines, f"conditional on measured cells: {self.n_unmeasured:,} others never measured, {known}"]


def bars(sheet: Sheet, frame: pd.DataFrame, threshold: float, *, width: int, step: int) -> Any:
    """Return bars of how often cells are selected, with a line at the threshold.

    Args:
        sheet: Filled with the rows.
        frame: ``cell``, ``frequency``, ``share`` and ``is_selected``.
        threshold: Frequency from which a cell is called stable.
        width: Of the scale, px.
        step: Of a bar and what is between two, px.
    """
    rows = [
        {**{key: plain(value) for key, value in row.items()}, "on_all": _ON_ALL[bool(row["is_selected"])]}
        for row in records(frame)
    ]
    y = alt.Y("cell:N", sort=None, axis=alt.Axis(title=None, labelLimit=0, labelOverlap=False, ticks=False))
    scale, axis = alt.Scale(domain=[0, 1]), alt.Axis(format="%", values=[0, 0.25, 0.5, 0.75, 1])
    x = alt.X("frequency:Q", title="share of resamples that select it", scale=scale, axis=axis)
    looks = alt.Scale(domain=list(_ON_ALL.values()), range=[FAINT, BLUE])
    colour = alt.Color("on_all:N", title="on all pairs", scale=looks)
    bar = layer_of(sheet, "frequencies", rows).mark_bar(height=14)
    drawn = bar.encode(x=x, y=y, color=colour, tooltip=["cell:N", "frequency:Q", "share:Q"])
    rule = layer_of(sheet, "threshold", [{"at": threshold}]).mark_rule(color=INK, strokeDash=[4, 3], strokeWidth=1.2)
    return alt.layer(drawn, rule.encode(x="at:Q")).properties(width=width, height=step * max(len(rows), 1))


_ON_ALL: Final = {False: "not selected", True: "selected"}
