"""What stands above a picture: what was measured on what, what a share is a share of, and how to read the marks."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from causalpatch.results import notes
from causalpatch.results.labels import SPACE, VARIES
from causalpatch.results.layout import label_name
from causalpatch.results.status import Status
from causalpatch.results.words import change, counted, own_notes, recovered, reference_run, restored
from causalpatch.statistics.permutation import smallest_p

if TYPE_CHECKING:
    import pandas as pd

TITLE_SIZE, LINE_SIZE = 14, 11  # px
# A letter is about this wide per px of its size, on the wide side: bold in the title, plain below it.
_BOLD, _PLAIN = 0.58, 0.51
_NARROWEST = 400  # px: a heading over a chart of a few cells is no narrower, or it would be a column of words


@dataclass(frozen=True)
class Caption:
    """What stands above a picture.

    Args:
        title: The heading.
        lines: Smaller lines below it: what was measured, and how to read the marks.
        legend: Title of the colour scale, or of the bars' axis.
        word: What a share is called when pointed at: recovered or removed.
        base: Whose prompt the tokens are from.
    """

    title: str
    lines: Sequence[str] = field(default_factory=tuple)
    legend: str = "share of the gap recovered"
    word: str = "recovered"
    base: str = "corrupted"


def describe(provenance: Mapping[str, Any], metric: str, quantity: str, pairs: str) -> Caption:
    """Return what stands above a picture, from how the numbers came to be.

    Args:
        provenance: Of the effects.
        metric: Name of the metric.
        quantity: ``"recovered"`` or ``"effect"``.
        pairs: How many pairs and components, in words.
    """
    site = str(provenance.get("site") or "effects")
    word = recovered(provenance)
    how = f"{provenance['direction']}: {change(provenance, site=False)}"
    if quantity == "recovered":
        title, legend = f"{site}: share of the gap {restored(provenance)} by patching", f"share of the gap {word}"
        what = f"gap: {metric}, clean run to {reference_run(provenance)}"
    else:
        title, legend = f"{site}: change of {metric} by patching", f"effect ({metric})"
        what = f"change of {metric}, patched less unpatched"
    model, name = (_name_in(provenance.get(key)) for key in ("model", "pairs"))
    where = " · ".join(text for text in (model, name, pairs) if text)
    unfinished = "" if provenance.get("complete", True) else "the sweep was stopped before its end"
    base = "corrupted" if provenance["direction"] == "denoise" else "clean"
    lines = [where, f"{how} · {what}", unfinished, *own_notes(provenance)]
    return Caption(title, [line for line in lines if line], legend, word, base)


def wrapped(title: str, lines: Sequence[str], width: float) -> tuple[list[str], list[str]]:
    """Break a heading and the lines below it where they would be wider than the picture.

    Args:
        title: The heading.
        lines: What stands below it.
        width: Of the picture, px.
    """
    width = max(width, _NARROWEST)
    heading = _broken(title, int(width / (TITLE_SIZE * _BOLD)))
    columns = int(width / (LINE_SIZE * _PLAIN))
    return heading, [part for line in lines for part in textwrap.wrap(line, columns)]


def on_labels(axis: str, frame: pd.DataFrame, base: str) -> list[str]:
    """Say whose tokens stand on the axis, and what the marks in them are."""
    if axis not in ("position", "key_position") or label_name(axis) not in frame.columns:
        return []
    tokens = set(frame[label_name(axis)])
    said = [f"tokens: of the {base} prompt"]
    if VARIES in tokens:
        said.append(f"{VARIES}: not the same in all pairs")
    if any(text.startswith(" ") or text.endswith(" ") or "  " in text for text in tokens):
        said.append(f"{SPACE} is a space")
    return ["; ".join(said)]


def on_marks(frame: pd.DataFrame, *, outlined: bool, value: str | None = None) -> list[str]:
    """Say what an outline and a hatched cell are, where there are any, and why there are no outlines.

    Args:
        frame: The cells shown.
        outlined: Whether there is an outline.
        value: The column that is drawn in colour.
    """
    n_groups = int(frame["n_components"].max()) if len(frame) else 0
    lines = []
    if outlined:
        lines.append("outlined: adjusted p below .05 (against 0, screening only)")
    elif n_groups < 2:
        lines.append(f"no outlines: {notes.no_test(n_groups).removeprefix('no p: ')}" if n_groups else "")
    elif smallest_p(n_groups) >= notes.ALPHA:
        lines.append(f"no outlines: with {counted(n_groups, 'independent group')} p cannot be below .05")
    else:
        lines.append("no outlines: no adjusted p below .05")
    n_screened = int(frame["status"].str.contains(Status.SCREENED.text).sum())
    if n_screened:
        lines.append(f"screened: {n_screened} of {counted(len(frame), 'cell')}, measured in reduced precision")
    if value is not None and frame[value].isna().any():
        blank = frame.loc[frame[value].isna()]
        texts = blank.loc[blank["n_pairs"] == 0, "status"]
        reasons = sorted({part.lstrip("0123456789 ") for text in texts for part in text.split("; ")})
        without = ["measured, but its pairs have no gap"] if (blank["n_pairs"] > 0).any() else []
        measured = [f"not measured ({', '.join(reasons)})"] if reasons else []
        lines.append("hatched: " + "; ".join(measured + without))
    return [line for line in lines if line]


def _broken(title: str, columns: int) -> list[str]:
    """Break a title between words, and within the path of a module after a dot."""
    lines = [""]
    for part in re.split(r"(?<=\s)|(?<=\.)(?=[A-Za-z])", title):
        if len(lines[-1]) + len(part.rstrip()) > columns:
            lines.append("")
        lines[-1] += part
    return [short for line in lines for short in textwrap.wrap(line, columns)]


def _name_in(value: Any) -> str:
    return str(value.get("name") or "") if isinstance(value, Mapping) else str(value or "")
