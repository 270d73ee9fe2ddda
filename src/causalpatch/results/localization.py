"""What a search from coarse to fine found: parts with their exact effects, and what stayed closed.

A search measures parts and opens some of them; every number here is the exact effect of a run, on the pairs that the
search itself chose by. So nothing is claimed of what it found: the largest effects are too large, and another search
may find others. ``components`` are handed to a confirmation on held-out pairs, which claims.

What stayed closed is not said to be without effect. Of each kind of unit a sample of those that were never measured is
patched exactly, and the share of them above ``delta`` has an upper bound (``statistics.missed``).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results import arrays, drilldown
from causalpatch.results.words import (
    PAIRED,
    counted,
    joined,
    own_notes,
    percent,
    reference_run,
    restored,
    restores,
    short_name,
)
from causalpatch.sites import Site
from causalpatch.statistics.missed import most_missed

if TYPE_CHECKING:
    import pandas as pd

    from causalpatch.results.pictures import Picture
    from causalpatch.results.selection import SelectionStability
else:
    pd = lazy("pandas")

_SHOWN = 12  # components that are printed
NO_CLAIM = "exploratory: found and measured on the same pairs, nothing is claimed"


@dataclass(frozen=True)
class Cell:
    """A part that was measured.

    Args:
        name: Its site.
        level: What it is: sublayer, position, head, neuron, expert, feature, module, channel.
        above: Number of the cell that it is a part of; -1 for parts of the whole model.
        effect: Its exact effect as a share of the gap.
        delta: Which |effect| matters.
        n_pairs: Pairs that it was measured on; fewer than all where a race decided it early.
        score: Largest |importance| of its units by scores; None where it was not scored.
        half: Largest |effect| of a random half of what it is made of; None where none was drawn.
        opened: Why it was opened: ``effect``, ``scores``, ``half``, ``set``; or an empty text.
        found: How it was measured: ``search``, or ``sample`` of what stayed closed.
        together: Number of the smallest set that it matters in, where it does not by itself; -1 otherwise.
        is_component: Whether it is among what was found: it matters, and nothing that it is made of accounts for it.
        ways: Of how many parts it is made, in each way in which it can be opened; none of what cannot be.
        is_spread: Whether what was found of it does not account for its effect.
    """

    name: str
    level: str
    above: int
    effect: float
    delta: float
    n_pairs: int
    score: float | None = None
    half: float | None = None
    opened: str = ""
    found: str = "search"
    together: int = -1
    is_component: bool = False
    ways: tuple[int, ...] = ()
    is_spread: bool = False


@dataclass(frozen=True)
class Closed:
    """Units of one kind, as far as they were opened.

    Args:
        level: What they are.
        n: How many the model has.
        delta: Which |effect| matters.
        sizes: Those that stayed closed, by stratum of their scores, (stratum,).
        sampled: How many of each were drawn and patched, (stratum,).
        matters: How many of these have an |effect| above ``delta``, (stratum,).
    """

    level: str
    n: int
    delta: float
    sizes: tuple[int, ...]
    sampled: tuple[int, ...]
    matters: tuple[int, ...]

    def at_most(self, level: float) -> int:
        """Return an upper bound on how many of the closed ones matter, those drawn among them."""
        return most_missed(self.sizes, self.sampled, self.matters, level)


@dataclass(frozen=True)
class Together:
    """A set of parts that matters where its members do not.

    Args:
        names: Its members.
        effect: Effect of all of them in one run, as a share of the gap.
        above: What they are parts of; an empty text where the first of them was measured with the others patched.
    """

    names: tuple[str, ...]
    effect: float
    above: str


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured on every pair, in the direction of the gap and in the metric's unit.

    Args:
        moved: Effect of each cell, (cell, pair); NaN where it was not measured on a pair.
        of_sets: Effect of each set that matters together, beside what else was patched, (set, pair).
        gap: Gap of each pair, (pair,).
        group: Independent component of each pair, (pair,).
    """

    moved: np.ndarray
    of_sets: np.ndarray
    gap: np.ndarray
    group: np.ndarray


class Localization(arrays.Saved):
    """What was found, from coarse to fine.

    Args:
        cells: All parts that were measured, in the order of the search.
        closed: What stayed closed, by kind of unit.
        sets: Sets that matter together.
        pending: Names of parts that were to be opened when the budget ended.
        spent: What was spent: ``runs``, ``seconds``, ``FLOP``.
        edges: Effects of edges between what was found, by name, where they were asked for.
        provenance: The record of the runs, with ``budget``, ``planned``, ``level``, ``whole`` (the effect of all parts
            together, as a share of the gap), ``stopped`` (whether the user ended it), ``saved`` (share of the runs that
            races did without) and ``search`` (what was looked at).
        measured: Effects on every pair.
    """

    format = "causalpatch localization"

    def __init__(  # noqa: PLR0913 - everything that a search finds
        self,
        cells: Sequence[Cell],
        closed: Sequence[Closed],
        sets: Sequence[Together],
        pending: Sequence[str],
        spent: Mapping[str, float],
        edges: Mapping[str, float],
        provenance: Mapping[str, Any],
        measured: Measured,
    ) -> None:
        self.cells, self.closed, self.sets = tuple(cells), tuple(closed), tuple(sets)
        self.pending, self.spent, self.edges = tuple(pending), dict(spent), dict(edges)
        self.provenance = dict(provenance)
        self.measured = measured

    @cached_property
    def found(self) -> tuple[Cell, ...]:
        """The components, that of the largest |effect| first; members of a set by the effect of the set."""
        return tuple(sorted((cell for cell in self.cells if cell.is_component), key=self._size, reverse=True))

    @property
    def components(self) -> list[Site]:
        """The sites that were found, that of the largest |effect| on the discovery pairs first."""
        return [Site.parse(cell.name) for cell in self.found]

    def select(self, *levels: str, beyond: float = 0.0) -> Self:
        """Return the same search with fewer components, to confirm these and nothing else.

        What is near delta on the discovery pairs can hardly be supported on others, and costs all others power.

        Args:
            levels: Keep components of these levels, such as ``"head"``; of all where none is named.
            beyond: Keep components with a larger |effect|, a share of the gap; of members of a set, the set's.

        Raises:
            SettingError: Nothing is kept.

        Examples:
            >>> import causalpatch as cp
            >>> model = cp.open_model("zoo:stories")
            >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:12], show_progress=False)
            >>> found = cp.localize(experiment, budget=2000, units="heads", positions="all")
            >>> [str(site) for site in found.select("head", beyond=0.25).components]
            ['z.0.2', 'z.3.2', 'z.3.1']
        """
        kept = {cell for cell in self.found if (not levels or cell.level in levels) and self._size(cell) > beyond}
        if not kept:
            raise SettingError(
                f"no {' or '.join(levels) or 'component'} was found with an effect beyond {beyond:g}",
                facts=[("found", ", ".join(f"{cell.name} {cell.effect:.2f}" for cell in self.found[:6]) or "nothing")],
                fix='found.select("head", beyond=0.2), or search with another budget or metric',
            )
        made = copy.copy(self)
        made.__dict__.pop("found", None)
        made.cells = tuple(replace(cell, is_component=cell in kept) for cell in self.cells)
        return made

    @property
    def level(self) -> float:
        """With which probability bounds hold."""
        return float(self.provenance["level"])

    @property
    def unopened(self) -> pd.DataFrame:
        """What stayed closed, a row per kind of unit.

        Returns:
            ``level``, ``n`` in the model, ``closed`` of them, ``sampled`` of these, ``above_delta`` among the sampled,
            ``at_most`` and ``fraction_at_most`` (of the closed ones, with the probability in ``attrs["level"]``) and
            ``delta``; ``attrs["pending"]`` names parts that were to be opened when the budget ended.
        """
        rows = [
            {
                "level": each.level,
                "n": each.n,
                "closed": sum(each.sizes),
                "sampled": sum(each.sampled),
                "above_delta": sum(each.matters),
                "at_most": each.at_most(self.level),
                "fraction_at_most": each.at_most(self.level) / sum(each.sizes) if sum(each.sizes) else 0.0,
                "delta": each.delta,
            }
            for each in self.closed
        ]
        frame = pd.DataFrame(rows, columns=[*_CLOSED])
        frame.attrs.update(level=self.level, pending=list(self.pending))
        return frame

    def summary(self) -> pd.DataFrame:
        """Return a row per component, that of the largest |effect| first.

        Returns:
            ``component``, ``level``, ``effect`` (share of the gap on the discovery pairs, which is too large for what
            was chosen by it), ``n_pairs``, ``part_of``, ``opened_by`` (why what it is a part of was opened),
            ``together`` (the set that it matters in, or an empty text).
        """
        return pd.DataFrame([self._row(cell) for cell in self.found], columns=[*_FOUND])

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per part that was measured: all that is known of it."""
        return pd.DataFrame([vars(cell) for cell in self.cells], columns=list(Cell.__dataclass_fields__))

    def plot(self, stability: SelectionStability | None = None) -> Picture:
        """Draw the way down, from left to right: sublayers by layer, what opened ones are made of, level by level.

        Args:
            stability: What ``selection_stability`` returned for this search: a last panel then shows how often each
                part is selected again on resampled pairs.
        """
        frame = self.to_dataframe()
        lines = [self._where, self._spent_words, *self._closed_words]
        word = restored(self.provenance)
        return drilldown.draw(frame, title=self._title, lines=lines, word=word, stability=stability)

    def __str__(self) -> str:
        shown = [self._line(cell) for cell in self.found[:_SHOWN]]
        more = len(self.found) - len(shown)
        lines = [
            self._title,
            self._where,
            *(shown or ["nothing that was measured moves it by more than delta"]),
            *([f"  … and {more} more: found.summary()"] if more > 0 else []),
            *(f"edge {name}: {restores(self.provenance)} {effect:.3f}" for name, effect in self.edges.items()),
            *self._closed_words,
            *([self._pending_words] if self.pending else []),
            self._spent_words,
            *(f"note: {note}" for note in own_notes(self.provenance)),
            f"next: {self._next}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        names = ", ".join(cell.name for cell in self.found[:4]) + (" …" if len(self.found) > 4 else "")
        return f"Localization({counted(len(self.found), 'component')}: {names or 'none'}; {NO_CLAIM})"

    @property
    def _title(self) -> str:
        metric = self.provenance["metrics"][0]
        return f"Parts of '{short_name(self.provenance['model']['name'])}' that move {metric} ({NO_CLAIM})"

    @property
    def _where(self) -> str:
        pairs = self.provenance["pairs"]
        parts = f"all {counted(self.provenance['n_whole'], 'part')} together"
        whole = f"{self.provenance['whole']:.3f} of the gap {restored(self.provenance)} by {parts}"
        if reference_run(self.provenance) != PAIRED:
            whole = f"gap: clean run to {reference_run(self.provenance)}"
        return f"'{pairs['name']}', {counted(pairs['n'], 'pair')} · {self.provenance['direction']} · {whole}"

    @property
    def _closed_words(self) -> list[str]:
        lines = []
        for row in self.unopened.to_dict("records"):
            if not row["closed"]:
                lines.append(f"{row['level']}s: all {row['n']:,} were measured")
                continue
            drawn = f"{row['above_delta']} of {row['sampled']} drawn are above {percent(row['delta'])}"
            bound = (
                f"at most {percent(round(row['fraction_at_most'], 3))} of the closed are ({percent(self.level)} bound)"
            )
            told = f"{drawn}; {bound}" if row["sampled"] else "none was drawn, so nothing is known of them"
            if row["sampled"] == row["closed"]:
                told = f"all of these were patched at last: {row['above_delta']} are above {percent(row['delta'])}"
            lines.append(f"{row['level']}s: {row['closed']:,} of {row['n']:,} stayed closed; {told}")
        return lines

    @property
    def _pending_words(self) -> str:
        names = list(self.pending[:6]) + ([f"{len(self.pending) - 6} more"] if len(self.pending) > 6 else [])
        return f"not opened for lack of budget: {joined(names)}"

    @property
    def _spent_words(self) -> str:
        spent = self.spent
        text = f"spent {spent['runs']:,.0f} runs, {spent['seconds']:.1f} s, {spent['FLOP']:.3g} FLOP"
        saved = self.provenance.get("saved") or 0.0
        raced = f"; races did without {percent(round(saved, 3))} of the runs that they could have made" if saved else ""
        return f"{text} of a budget of {self.provenance['budget']}{raced}"

    @property
    def _next(self) -> str:
        if self.pending:
            return "open what is pending with a larger budget, or confirm what was found on held-out pairs"
        if not self.found:
            return "try the other direction (experiment.turned), another metric, or check the pairs (pairs.check())"
        return "confirm these on pairs that the search never saw: the other half of pairs.split()"

    def _size(self, cell: Cell) -> float:
        return abs(self.sets[cell.together].effect if cell.together >= 0 else cell.effect)

    def _above(self, cell: Cell) -> Cell | None:
        return self.cells[cell.above] if cell.above >= 0 else None

    def _row(self, cell: Cell) -> dict[str, Any]:
        above = self._above(cell)
        return {
            "component": cell.name,
            "level": cell.level,
            "effect": cell.effect,
            "n_pairs": cell.n_pairs,
            "part_of": above.name if above else "",
            "opened_by": (above.opened if above else "") or ("sample" if cell.found == "sample" else ""),
            "together": " + ".join(self.sets[cell.together].names) if cell.together >= 0 else "",
        }

    def _line(self, cell: Cell) -> str:
        if cell.together >= 0:
            held = self.sets[cell.together]
            others = [name for name in held.names if name != cell.name]
            if not held.above:
                doing = f"{restores(self.provenance)} {cell.effect:+.3f} of the gap"
                return f"  {cell.name} ({cell.level}): {doing} where {joined(others)} is patched too"
            beside = f"together with {joined(others)}" if others else f"more beside what else was found of {held.above}"
            return f"  {cell.name} ({cell.level}): {cell.effect:+.3f} alone, {held.effect:+.3f} {beside}"
        return f"  {cell.name} ({cell.level}): {restores(self.provenance)} {cell.effect:+.3f} of the gap"

    def _parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        held = {"effects": np.array([cell.effect for cell in self.cells]), **vars(self.measured)}
        about = {
            "cells": [{key: value for key, value in vars(cell).items() if key != "effect"} for cell in self.cells],
            "closed": [vars(each) for each in self.closed],
            "sets": [vars(each) for each in self.sets],
            **{name: getattr(self, name) for name in ("pending", "spent", "edges", "provenance")},
        }
        return held, about

    @classmethod
    def _of_parts(cls, held: dict[str, np.ndarray], about: dict[str, Any]) -> Self:
        effects = held["effects"].tolist()
        lists = ("sizes", "sampled", "matters")
        cells = [{**cell, "ways": tuple(cell["ways"])} for cell in about["cells"]]
        return cls(
            [Cell(effect=effect, **cell) for effect, cell in zip(effects, cells, strict=True)],
            [Closed(**{**each, **{name: tuple(each[name]) for name in lists}}) for each in about["closed"]],
            [Together(**{**each, "names": tuple(each["names"])}) for each in about["sets"]],
            **{name: about[name] for name in ("pending", "spent", "edges", "provenance")},
            measured=Measured(**{name: held[name] for name in Measured.__dataclass_fields__}),
        )


_CLOSED = ("level", "n", "closed", "sampled", "above_delta", "at_most", "fraction_at_most", "delta")
_FOUND = ("component", "level", "effect", "n_pairs", "part_of", "opened_by", "together")
