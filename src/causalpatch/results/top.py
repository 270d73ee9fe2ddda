"""The largest cells of a sweep as a table that says what it is, and tables as short texts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.extras import lazy
from causalpatch.results.labels import visible

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")


class TopTable:
    """The largest cells of a sweep, marked exploratory; everything a ``DataFrame`` can be asked, it answers.

    Args:
        frame: A row per cell, largest |recovered| first.
        words: The line above the table.
        meaning: The line below it: what the shares are shares of.
        notes: The lines below the table.
        by_component: Share of every independent component, axes row and component, where these are too few for an
            interval.
        axes: Axes of the sweep, whose coordinates are columns of the table.
        provenance: How the numbers came to be: what was swept, on which pairs.
    """

    label = "exploratory"

    def __init__(
        self,
        frame: pd.DataFrame,
        words: str,
        meaning: str,
        notes: Sequence[str],
        by_component: np.ndarray | None = None,
        *,
        axes: Sequence[str] = (),
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.words = words
        self.meaning = meaning
        self.notes = list(notes)
        self.by_component = by_component
        self.axes = tuple(axes)
        self.provenance = dict(provenance or {})
        self._frame = frame

    def to_dataframe(self) -> pd.DataFrame:
        """Return a copy of the table, with the notes in ``attrs``."""
        return self._frame.copy()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._frame, name)

    def __getitem__(self, key: Any) -> Any:
        return self._frame[key]

    def __len__(self) -> int:
        return len(self._frame)

    def __str__(self) -> str:
        notes = [f"note: {note}" for note in self.notes]
        table = readable(self._shown()).to_string(index=False)
        return "\n".join([self.words, self.meaning, table, *notes])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        table = readable(self._shown()).to_html(index=False, border=0)
        notes = "".join(f"<div>{html.escape(note)}</div>" for note in self.notes)
        heading = f"<b>{html.escape(self.words)}</b><div>{html.escape(self.meaning)}</div>"
        return f"<div>{heading}{table}<small>{notes}</small></div>"

    def _shown(self) -> pd.DataFrame:
        shown = self._frame
        if self.by_component is not None:
            texts = [" ".join(_number(value, 2) for value in row) for row in self.by_component]
            shown = shown.drop(columns=["low", "high"]).assign(each_component=texts)
        return shown


def readable(frame: pd.DataFrame) -> pd.DataFrame:
    """Return a table of short texts: three places, tokens with their spaces visible, a dash for what is not there."""
    shown = {}
    for name in frame.columns:
        column = frame[name]
        if name in ("p", "p_bh"):
            shown[name] = [_number(value, 4) for value in column]
        elif column.dtype.kind == "f":
            shown[name] = [_number(value, 3) for value in column]
        elif name.endswith("token"):
            shown[name] = [visible(text) for text in column]
        else:
            shown[name] = [str(value) for value in column]
    return pd.DataFrame(shown)


def _number(value: float, places: int) -> str:
    return f"{value:.{places}f}" if np.isfinite(value) else "-"
