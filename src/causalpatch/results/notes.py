"""What must be said with a table of effects: how its intervals and p values may be read, and what was not measured."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from causalpatch.results.inference import GROUPS_FOR_MAX_T, LARGEST_SKEW, Inference, Spans, Together
from causalpatch.results.shares import Numbers
from causalpatch.results.status import Status, counts
from causalpatch.results.words import counted, joined, percent
from causalpatch.statistics.intervals import MIN_GROUPS
from causalpatch.statistics.permutation import smallest_p
from causalpatch.statistics.together import MOST_CELLS

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05


def on_intervals(inference: Inference, spans: Spans) -> list[str]:
    """Say which intervals are missing or approximate."""
    numbers = inference.numbers
    if not inference.has_intervals:
        few = f"too few independent groups: {numbers.n_groups} (an interval needs {MIN_GROUPS})"
        return [f"{few}; the value of each: effects.by_component()"]
    notes = []
    if spans.n_rough:
        notes.append(f"{spans.n_rough} of {counted(int(inference.found.sum()), 'interval')} are {spans.rough_note}")
    n_cells = counted(len(inference.found), "cell")
    return notes + [f"no interval in {number} of {n_cells}: {note}" for note, number in spans.refused.items()]


def on_p(inference: Inference) -> list[str]:
    """Say what p is for, or why there is none."""
    n_tested, n_groups = int(np.isfinite(inference.p).sum()), inference.numbers.n_groups
    if not n_tested:
        return [no_test(n_groups)] if inference.found.any() else []
    cells = counted(n_tested, "cell")
    notes = [f"p: screening only, against 0; p_bh: Benjamini-Hochberg over {cells}, a heuristic"]
    least = smallest_p(n_groups)
    if least > ALPHA / 10:
        notes.append(f"smallest attainable p with so few independent groups: {least:.3g}")
    return notes


def no_test(n_groups: int) -> str:
    """Say why there is no p at all."""
    what = "one independent group" if n_groups == 1 else "one independent group in each cell"
    return f"no p: no test is possible with {what}"


def on_cells(numbers: Numbers, status: np.ndarray) -> list[str]:
    """Say what was not measured.

    Args:
        numbers: The numbers.
        status: Codes of ``Status``, axes cell and pair.
    """
    notes = []
    n_cells, n_pairs = status.shape
    empty = numbers.n_pairs == 0
    if empty.any():
        reasons = [f"{number} {code.text}" for code, number in counts(status[empty]).items()]
        cells = counted(n_cells, "cell")
        notes.append(f"not measured: {int(empty.sum())} of {cells} (runs: {', '.join(reasons)})")
    partial = int((~empty & (numbers.n_pairs < n_pairs)).sum())
    if partial:
        rest = "rests" if partial == 1 else "rest"
        notes.append(f"{counted(partial, 'cell')} {rest} on some of the {n_pairs} pairs, the gap on the same ones")
    derived = int((status == Status.DERIVED).sum())
    if derived:
        notes.append(f"derived: {derived} of {counted(status.size, 'run')}, because another run has the same result")
    screened = int((status == Status.SCREENED).sum())
    if screened:
        notes.append(f"screened: {screened} of {counted(status.size, 'run')}, measured in reduced precision")
    without = int((~empty & ~np.isfinite(numbers.recovered())).sum())
    if without:
        notes.append(f"no recovered share in {counted(without, 'cell')}: no gap among the pairs measured there")
    return notes


def holding(level: float, trust: Together) -> str:
    """Return the words of a heading that say how far the intervals hold for all cells together."""
    if trust.coverage is None:
        return f"the {percent(level)} intervals hold for all cells together"
    share = "under 1%" if trust.coverage < 0.01 else f"{trust.coverage:.0%}"
    few = "" if trust.coverage < 0.01 else "at most " if trust.n_cells > MOST_CELLS else "as few as "
    return f"the {percent(level)} intervals are approximate: all hold together in {few}{share} of simulated sweeps"


def on_together(trust: Together) -> list[str]:
    """Say why intervals hold together only approximately, and what was simulated."""
    if trust.coverage is None:
        return []
    reasons = []
    if trust.n_groups < GROUPS_FOR_MAX_T:
        reasons.append(f"{trust.n_groups} independent groups are fewer than {GROUPS_FOR_MAX_T}")
    if trust.n_skewed:
        are = "is" if trust.n_skewed == 1 else "are"
        cells = counted(trust.n_cells, "cell")
        reasons.append(f"{trust.n_skewed} of {cells} {are} skewed between groups (skewness beyond {LARGEST_SKEW:g})")
    simulated = f"{trust.n_groups} groups, {counted(min(trust.n_cells, MOST_CELLS), 'cell')} independent of each other"
    why = f"holding together is approximate because {joined(reasons)}"
    return [f"{why}; simulated: {simulated}, the lowest of normal and exponential values"]


def on_disagreement(frame: pd.DataFrame, *, drawn: bool = False) -> list[str]:
    """Say why p and an interval that must hold for all cells together differ, where they do.

    Args:
        frame: The cells shown.
        drawn: In the words of a picture.
    """
    small = (frame["p_bh"] < ALPHA).to_numpy()
    known = (frame["low"].notna() & frame["p_bh"].notna()).to_numpy()
    across = ((frame["low"] <= 0) & (frame["high"] >= 0)).to_numpy()
    mark, span = ("outlined", "whisker") if drawn else ("p_bh below .05", "interval")
    plain = "not outlined" if drawn else "p_bh not below .05"
    texts = []
    for n_cells, text in (
        (int((known & small & across).sum()), f"{mark} though the {span} crosses 0"),
        (int((known & ~small & ~across).sum()), f"{plain} though the {span} excludes 0"),
    ):
        if n_cells:
            texts.append(f"{text}: {counted(n_cells, 'cell')}")
    why = f"p_bh screens each cell by sign flips, the {span} is made to hold for all cells together"
    return [f"{'; '.join(texts)} ({why})"] if texts else []
