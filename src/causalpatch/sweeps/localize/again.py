"""A search made again on resampled pairs, from the effects that it stored.

1. Independent components of pairs are drawn with replacement. Shares of all cells, and of the sets that matter
   together, are ratios of the drawn sums.
2. The rules of the search are followed down from the coarsest parts: a part is opened by its share, or as the search
   opened it by scores, by a random half (these are not drawn again) or for its set. What matters, and nothing that it
   is made of, is selected.
3. A draw that opens what the search left closed, or opens it in another way (its units at all positions, where none of
   its positions matters), *wanted* cells that were never measured. ``measured_too`` runs these, until no draw wants
   others.

What the sample of closed units found is drawn again too, but opens nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.experiment import Experiment
from causalpatch.experiment.towards import numbers_towards, towards
from causalpatch.patches.value import as_value
from causalpatch.results.localization import Cell, Localization, Measured
from causalpatch.results.shares import component_sums
from causalpatch.sweeps.localize.budget import Budget, Meter, plain
from causalpatch.sweeps.localize.parts import Part, Tree, together, tree_of
from causalpatch.sweeps.localize.values import value_of

Way = tuple[int, int]  # a cell, and the number of a way in which it can be opened


@dataclass(frozen=True, eq=False)
class Drawn:
    """What each draw selects.

    Args:
        found: The search.
        times: How often each independent component is drawn, (draw, component).
    """

    found: Localization
    times: np.ndarray

    @cached_property
    def shares(self) -> np.ndarray:
        """Share of the gap of every cell, (draw, cell)."""
        return self._shares(self.found.measured.moved)

    @cached_property
    def matters(self) -> np.ndarray:
        """Which cells matter by themselves or in their set, (draw, cell)."""
        cells = self.found.cells
        delta = np.array([cell.delta for cell in cells])
        large: np.ndarray = np.abs(self.shares) > delta
        sets = np.abs(self._shares(self.found.measured.of_sets))
        for number, cell in enumerate(cells):
            if cell.together >= 0:
                large[:, number] |= sets[:, cell.together] > cell.delta
        return large

    @cached_property
    def _opened(self) -> tuple[np.ndarray, np.ndarray]:
        """Return which cells are reached, and which of these are opened, (draw, cell)."""
        cells = self.found.cells
        reached, opened = np.zeros((2, *self.shares.shape), dtype=bool)
        for number, cell in enumerate(cells):
            above = np.ones(len(self.shares), dtype=bool) if cell.above < 0 else opened[:, cell.above]
            reached[:, number] = above if cell.found == "search" else True
            if cell.ways and cell.found == "search":
                as_before = cell.opened in ("scores", "half") or (cell.opened == "set" and cell.together < 0)
                opened[:, number] = above & (self.matters[:, number] | as_before)
        return reached, opened

    @cached_property
    def selected(self) -> np.ndarray:
        """Which cells are selected, (draw, cell)."""
        cells = self.found.cells
        live = self.matters & self._opened[0]
        accounted = np.zeros(live.shape, dtype=bool)
        for number in reversed(range(len(cells))):  # what a cell is part of stands before it
            cell = cells[number]
            if cell.above >= 0 and cell.found == "search":
                accounted[:, cell.above] |= live[:, number] | accounted[:, number]
        kept = np.array([cell.is_spread and cell.together < 0 for cell in cells], dtype=bool)
        chosen: np.ndarray = live & (~accounted | kept)
        return chosen

    @cached_property
    def lacking(self) -> dict[Way, int]:
        """How many parts were never measured, by what they are parts of and in which way."""
        return {
            (number, way): n - len(self.inside(number, way))
            for number, cell in enumerate(self.found.cells)
            for way, n in enumerate(cell.ways)
            if cell.found == "search" and n > len(self.inside(number, way))
        }

    @cached_property
    def wanted(self) -> dict[Way, np.ndarray]:
        """Which draws want cells that were never measured, (draw,), by what these are parts of and in which way."""
        asked: dict[Way, np.ndarray] = {}
        for number, way in self.lacking:
            cell, opened = self.found.cells[number], self._opened[1][:, number]
            last = len(cell.ways) - 1
            # By its own effect a part is opened in its first way, and else in its last.
            by_effect = np.abs(self.shares[:, number]) > cell.delta
            if way == 0:
                wants = opened & (by_effect if last else True)
            else:
                held = self.inside(number, way - 1)
                barren = ~self.matters[:, held].any(-1) if len(held) == cell.ways[way - 1] else False
                wants = opened & np.where(by_effect, barren, way == last)
            if wants.any():
                asked[number, way] = wants
        return asked

    @cached_property
    def _by_level(self) -> Mapping[tuple[int, str], list[int]]:
        held: dict[tuple[int, str], list[int]] = {}
        for number, cell in enumerate(self.found.cells):
            if cell.found == "search" and cell.above >= 0:
                held.setdefault((cell.above, cell.level), []).append(number)
        return held

    def inside(self, number: int, way: int) -> list[int]:
        """Return the numbers of the cells that were measured of what a cell is made of, in one way."""
        cell = self.found.cells[number]
        levels = [level for above, level in self._by_level if above == number]
        placed = [level for level in levels if level == "position"]
        wanted = placed if len(cell.ways) > 1 and way == 0 else [level for level in levels if level not in placed]
        if len(cell.ways) == 1:
            wanted = levels
        return [each for level in wanted for each in self._by_level[number, level]]

    def _shares(self, moved: np.ndarray) -> np.ndarray:
        measured = self.found.measured
        known = np.isfinite(moved)
        top = self.times @ component_sums(np.where(known, moved, 0.0), measured.group).T
        bottom = self.times @ component_sums(known * measured.gap, measured.group).T
        shares: np.ndarray = np.divide(top, bottom, out=np.zeros(top.shape), where=bottom != 0)
        return shares


def measured_too(found: Localization, times: np.ndarray, experiment: Experiment) -> tuple[Localization, int]:
    """Measure whatever draws want, level by level, until no draw wants a cell that was never measured.

    Args:
        found: The search.
        times: How often each independent component is drawn, (draw, component).
        experiment: What the search was made with.

    Returns:
        The search with these cells, and how many runs they took.

    Raises:
        SettingError: The experiment is another one.
    """
    made = plain(experiment)
    _require_same(found, made)
    asked = found.provenance["search"]
    meter = Meter(made, Budget(np.inf, "runs"), value_of(as_value(asked["value"]), made.direction))
    tree = tree_of(made, asked["positions"], asked["units"], asked["features"])
    while True:
        drawn = Drawn(found, times)
        if not drawn.wanted:
            return found, int(meter.spent["runs"])
        found = _with(found, meter, tree, drawn)


def _with(found: Localization, meter: Meter, tree: Tree, drawn: Drawn) -> Localization:
    """Return the search with the cells that some draws want."""
    walk = _Walk(found, tree)
    wanted: list[tuple[int, Part]] = []
    for number, way in drawn.wanted:
        known = {found.cells[each].name for each in drawn.inside(number, way)}
        wanted += [(number, part) for part in tree.groups(walk.part(number))[way] if part.name not in known]
    beside = {number: walk.beside(number) for number, _ in wanted}
    alone = {number: parts for number, parts in beside.items() if parts}
    runs = [together(parts, f"{number}: beside") for number, parts in alone.items()]
    runs += [together([*beside[number], part], f"{n}: {part.name}") for n, (number, part) in enumerate(wanted)]
    effects = meter.run(runs, [each.label for each in runs])
    if not effects.is_complete:
        raise KeyboardInterrupt
    moved = towards(meter.experiment, effects)
    of_beside = dict(zip(alone, moved, strict=False))
    own = np.stack(
        [row - of_beside.get(number, 0.0) for (number, _), row in zip(wanted, moved[len(alone) :], strict=True)]
    )
    measured = found.measured
    shares = numbers_towards(meter.experiment, own, measured.gap).recovered()
    delta = found.provenance["search"]["delta"]
    cells = [
        Cell(
            name=part.name,
            level=part.level,
            above=number,
            effect=float(share),
            delta=part.delta if delta is None else delta,
            n_pairs=int(np.isfinite(row).sum()),
            ways=tuple(map(len, tree.groups(part))),
        )
        for (number, part), share, row in zip(wanted, shares, own, strict=True)
    ]
    more = Measured(np.concatenate([measured.moved, own]), measured.of_sets, measured.gap, measured.group)
    held = found.closed, found.sets, found.pending, found.spent, found.edges, found.provenance
    return Localization([*found.cells, *cells], *held, more)


@dataclass(frozen=True)
class _Walk:
    """Finds the parts that cells are of.

    Args:
        found: The search.
        tree: What its model is made of.
    """

    found: Localization
    tree: Tree

    def part(self, number: int) -> Part:
        """Return the part of a cell."""
        cell = self.found.cells[number]
        above = self.tree.whole if cell.above < 0 else self.part(cell.above)
        return next(part for way in self.tree.groups(above) for part in way if part.name == cell.name)

    def beside(self, number: int) -> list[Part]:
        """Return what is patched beside the parts of a cell: the others of its set, and of what it is part of."""
        cell = self.found.cells[number]
        outer = [] if cell.above < 0 else self.beside(cell.above)
        held = self.found.sets[cell.together] if cell.together >= 0 else None
        if held is None or not held.above:
            return outer
        cells = self.found.cells
        others = [n for n, each in enumerate(cells) if each.together == cell.together and n != number]
        return [*outer, *map(self.part, others)]


def _require_same(found: Localization, experiment: Experiment) -> None:
    """Make sure that an experiment is that of a search.

    Raises:
        SettingError: It is another one.
    """
    record = found.provenance
    for what, one, other in (
        ("model", record["model"].get("hash"), experiment.model.content_hash),
        ("pairs", record["pairs"]["hash"], experiment.pairs.content_hash),
        ("metric", record["metrics"][0], experiment.metrics[0].name),
        ("direction", record["direction"], experiment.direction),
    ):
        if one != other:
            raise SettingError(
                f"the search was made with another {what}" if what != "pairs" else "the search was made on other pairs",
                facts=[("search", one), ("experiment", other)],
                fix="give the experiment that the search was made with",
            )
