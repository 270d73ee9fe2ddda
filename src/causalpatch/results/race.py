"""A race: which of many candidates have the largest effects, or effects above a threshold, and how sure that is.

Values are means over the pool of pairs that was raced on, which was drawn from without replacement; what they say of
other pairs is the affair of a confirmation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.results import arrays, race_chart
from causalpatch.results.words import counted, own_notes, percent, restored, restores

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.pictures import Picture
else:
    pd = lazy("pandas")

STATUS = ("not separable", "accepted", "dropped", "not separable")  # by the codes of ``statistics.racing``
_COLUMNS = ("status", "values", "low", "high", "n_pairs")
_SHOWN = 12


class Race(arrays.Saved):
    """How a race ended.

    Args:
        names: The candidates.
        columns: For each candidate, (candidate,): ``status`` (codes of ``statistics.racing``); ``values`` (mean over
            the components seen, in the metric's unit, positive towards the source); ``low`` and ``high`` (ends of
            intervals that hold for all candidates and at all times together); ``n_pairs`` that it was measured on.
        best: Numbers of those that were looked for, the largest first.
        provenance: The record of the runs, with ``looked_for``, ``above`` (the threshold, or None), ``alpha``,
            ``intervals`` (how they are made), ``gap`` (mean over the pairs seen, in the metric's unit), ``saved``
            (share of the full grid's runs) and ``runs``.
    """

    format = "causalpatch race"

    def __init__(
        self,
        names: Sequence[str],
        columns: Mapping[str, np.ndarray],
        best: np.ndarray,
        provenance: Mapping[str, Any],
    ) -> None:
        self.names = list(names)
        self.status, self.values, self.low, self.high, self.n_pairs = (columns[name] for name in _COLUMNS)
        self.best = best
        self.provenance = dict(provenance)

    @property
    def top(self) -> list[str]:
        """Names of what was looked for, the largest first; those that are not separable from others stand behind."""
        return [self.names[number] for number in self.best]

    @property
    def not_separable(self) -> list[str]:
        """Names of those that could not be told from the others, or from the threshold, on this pool."""
        return [name for name, code in zip(self.names, self.status, strict=True) if STATUS[code] == STATUS[0]]

    @property
    def saved(self) -> float:
        """Share of the runs of the full grid, candidates times pairs, that were not made."""
        return float(self.provenance["saved"])

    def summary(self) -> pd.DataFrame:
        """Return a row per candidate, those that were looked for first.

        Returns:
            ``candidate``, ``status``, ``effect`` with ``low`` and ``high`` in the metric's unit, positive towards the
            source, ``share`` of the gap, ``n_pairs``.
        """
        rest = [n for n in np.argsort(-np.abs(self.values), kind="stable") if n not in set(self.best.tolist())]
        rows = [
            {
                "candidate": self.names[n],
                "status": STATUS[self.status[n]],
                "effect": self.values[n],
                "low": self.low[n],
                "high": self.high[n],
                "share": self.values[n] / self.provenance["gap"],
                "n_pairs": int(self.n_pairs[n]),
            }
            for n in [*self.best.tolist(), *rest]
        ]
        return pd.DataFrame(rows)

    def plot(self) -> Picture:
        """Draw each candidate's share of the gap with its interval, and after how many pairs it was decided."""
        gap = self.provenance["gap"]
        frame = self.summary()
        frame = frame.assign(low=frame["low"] / gap, high=frame["high"] / gap)
        lines = [self._title, f"lines: {self._intervals}", self._saved_words, *own_notes(self.provenance)]
        above = self.provenance.get("above")
        lines += [] if above is None else [f"grey: up to {above:g} of the gap"]
        n_pairs = int(self.provenance["pairs"]["n"])
        return race_chart.draw(frame, n_pairs=n_pairs, above=above, lines=lines, word=restored(self.provenance))

    @property
    def _title(self) -> str:
        pairs = self.provenance["pairs"]
        of = f"{counted(len(self.names), 'candidate')} on '{pairs['name']}', {counted(pairs['n'], 'pair')}"
        return f"{self.provenance['looked_for']} of {of} (exploratory)"

    @property
    def _intervals(self) -> str:
        level = percent(1 - self.provenance["alpha"])
        return f"{self.provenance['intervals']}; all hold together with probability {level}"

    @property
    def _saved_words(self) -> str:
        made = f"({self.provenance['runs']:,} were)"
        return f"{percent(round(self.saved, 3))} of the full grid's runs were not made {made}"

    def __str__(self) -> str:
        record = self.provenance
        lines = [self._title]
        for row in self.summary().head(max(len(self.best), 1)).head(_SHOWN).to_dict("records"):
            ends = f"[{row['low']:.3g}, {row['high']:.3g}]"
            lines.append(
                f"  {row['candidate']}: {restores(record)} {row['share']:.3f} of the gap, {row['effect']:.3g} {ends} "
                f"after {row['n_pairs']} pairs: {row['status']}"
            )
        undecided = self.not_separable
        if undecided:
            names = ", ".join(undecided[:6]) + (f" and {len(undecided) - 6} more" if len(undecided) > 6 else "")
            lines.append(f"not separable on this pool: {names}")
        lines += [self._intervals, self._saved_words]
        lines += [f"note: {note}" for note in own_notes(record)]
        return "\n".join([*lines, "next: confirm what was found on pairs that this race never saw"])

    def __repr__(self) -> str:
        names = ", ".join(self.top[:4]) + (" …" if len(self.best) > 4 else "")
        return f"Race({names}; saved {percent(round(self.saved, 3))})"

    def _parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        held = {name: getattr(self, name) for name in (*_COLUMNS, "best")}
        return held, {"names": self.names, "provenance": self.provenance}

    @classmethod
    def _of_parts(cls, held: dict[str, np.ndarray], about: dict[str, Any]) -> Self:
        return cls(about["names"], held, held["best"], about["provenance"])
