"""The search: from the whole model down, level by level, each part measured exactly before it is opened or left.

1. The whole and its coarsest parts are measured.
2. A part is opened by its effect; because it belongs to a set that matters together; by the scores of its units; or by
   the effect of a random half of what it is made of, so that parts that cancel each other are not lost.
3. What it is made of is measured. Where that matters together as much as the part does, it accounts for the part. Else
   a smallest set is looked for among the rest: what can be left out is, in chunks of one half, a quarter, an eighth
   (delta debugging), so that gates are found, of which no member matters by itself. Members of a set are opened with
   the others patched. A part that no such set of four or fewer accounts for stays in what was found.
4. Units that were never measured are sampled, stratified by their scores.

References:
    Zeller & Hildebrandt 2002, "Simplifying and isolating failure-inducing input", IEEE Transactions on Software
    Engineering 28 (the smallest set).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from causalpatch.attribution.nodes import attribute
from causalpatch.base.errors import CausalPatchError
from causalpatch.base.seeds import generator
from causalpatch.patches import Intervention
from causalpatch.results.localization import Cell, Closed, Together
from causalpatch.statistics.missed import draw_stratified
from causalpatch.statistics.racing import BURN_IN, Racing
from causalpatch.sweeps.localize.budget import Meter
from causalpatch.sweeps.localize.parts import Part, Tree, together
from causalpatch.sweeps.localize.rounds import bounds_of, run_rounds

MOST_TOGETHER: Final = 4  # members of a set; what needs more is spread over many parts
MOST_SEARCHED: Final = 64  # parts among which a set is looked for
_MADE_OF_UNITS: Final = ("sublayer", "position", "module")
SCORE_RUNS: Final = 5  # of each pair: three forwards and a backward, which counts as two


@dataclass
class Node:
    """A part that was measured, and what became of it.

    Beside what a ``Cell`` holds: the parts that are patched beside it (``context``) and their own effect, in which way
    it is opened next (``next_group``), and whether nothing small that it is made of accounts for it (``is_spread``).
    """

    part: Part
    above: int
    effect: float
    n_pairs: int
    delta: float
    score: float | None = None
    half: float | None = None
    opened: str = ""
    found: str = "search"
    together: int = -1
    number: int = -1
    context: tuple[Part, ...] = ()
    of_context: float = 0.0
    next_group: int = 0
    is_spread: bool = False

    @property
    def matters(self) -> bool:
        """Whether its effect is above delta, or that of a set that it belongs to."""
        return abs(self.effect) > self.delta or self.together >= 0


@dataclass
class Search:
    """A search.

    Args:
        meter: Makes the runs and counts them.
        tree: What the model is made of.
        delta: Which |effect| matters; None for the default of each level.
        halves: Random halves that are drawn of each part that nothing else opens.
        method: How units are scored; None for no scores.
        sample: Units of each kind that are drawn of what stayed closed.
        races: Whether pairs are drawn in rounds, where there are enough components.
    """

    meter: Meter
    tree: Tree
    delta: float | None
    halves: int
    method: str | None
    sample: int
    races: bool

    def __post_init__(self) -> None:
        experiment = self.meter.experiment
        self.nodes: list[Node] = []
        self.sets: list[Together] = []
        self.pending: list[str] = []
        self.notes: list[str] = []
        self.closed: list[Closed] = []
        self.whole = np.nan
        self.n_raced, self.n_could = 0, 0
        self.scores: dict[tuple[str, int], np.ndarray] = {}
        self.random = generator(experiment.seed, "localize")
        self.n_components = len(np.unique(experiment.pairs.components))
        self.gap = abs(float((experiment.baseline.clean - experiment.baseline.corrupt)[0].mean()))

    def run(self) -> None:
        """Search, as far as the budget allows."""
        whole = self.tree.whole
        (children,) = self.tree.groups(whole)
        effects = self._plainly([together([whole], "whole"), *(together([each], each.name) for each in children)])
        self.whole = float(effects[0])
        n_pairs = len(self.meter.experiment.pairs)
        root = Node(whole, -1, self.whole, n_pairs, self._delta(whole), opened="effect")
        for part, effect in zip(children, effects[1:].tolist(), strict=True):
            self._add(Node(part, -1, effect, n_pairs, self._delta(part)))
        if self.method is not None and self.tree.scored:
            self._score()
        self._account(root, self.nodes)
        frontier = self._chosen(self.nodes, draws=True)
        while frontier and not self.meter.is_stopped:
            frontier = self._open(frontier)
        self.meter.reserve = 0.0
        self._sample()

    def cells(self) -> list[Cell]:
        """Return what was measured, with what counts as found."""
        accounted: set[int] = set()
        for node in self.nodes:
            above = node.above if node.matters else -1
            while above >= 0 and above not in accounted:
                accounted.add(above)
                above = self.nodes[above].above
        return [
            Cell(
                name=node.part.name,
                level=node.part.level,
                above=node.above,
                effect=node.effect,
                delta=node.delta,
                n_pairs=node.n_pairs,
                score=node.score,
                half=node.half,
                opened=node.opened,
                found=node.found,
                together=node.together,
                is_component=node.matters and (number not in accounted or (node.is_spread and node.together < 0)),
            )
            for number, node in enumerate(self.nodes)
        ]

    def _open(self, frontier: Sequence[Node]) -> list[Node]:
        """Measure what some parts are made of; return what is to be opened next."""
        wanted: list[tuple[Node, list[Part]]] = []
        for node in frontier:
            groups = self.tree.groups(node.part)
            wanted.append((node, self._ranked(groups[min(node.next_group, len(groups) - 1)])))
        for node in frontier:
            node.next_group += 1
        self._settle_contexts(frontier)
        made = self._measured(wanted)
        again: list[Node] = []
        children: list[Node] = []
        for node, parts in wanted:
            own = made[id(node)]
            if len(own) < len(parts):
                share = f" ({len(own):,} of {len(parts):,} parts)" if own else ""
                self.pending.append(f"{node.part.name}{share}")
            if not own:
                continue
            is_accounted = self._account(node, own)
            children += own
            can_go_on = node.next_group < len(self.tree.groups(node.part))
            if not any(child.matters for child in own) and can_go_on and len(own) == len(parts):
                again.append(node)
            elif not is_accounted and can_go_on:
                again += self._chosen(own, draws=True)
        return [*again, *self._chosen(children, draws=False)]

    def _settle_contexts(self, nodes: Sequence[Node]) -> None:
        """Measure what is patched beside some parts, by itself."""
        some = [node for node in nodes if node.context]
        asked = [together(node.context, f"{n}: beside {node.part.name}") for n, node in enumerate(some)]
        if self.meter.fitting(asked) == len(asked):
            for node, effect in zip(some, self._plainly(asked).tolist(), strict=True):
                node.of_context = effect

    def _chosen(self, nodes: Sequence[Node], *, draws: bool) -> list[Node]:
        """Return the parts that are to be opened, those that matter most first, and note why."""
        able = [node for node in nodes if self.tree.groups(node.part) and not node.opened]
        for node in able:
            if abs(node.effect) > node.delta:
                node.opened = "effect"
            elif node.together >= 0:
                node.opened = "set"
            elif node.part.level == "sublayer" and self._has_score(node.part):
                node.opened = "scores"  # scores are of units at all positions
        if draws and self.halves:
            self._draw([node for node in able if not node.opened])
        for node in able:
            if node.opened in ("scores", "half", "set"):
                node.next_group = len(self.tree.groups(node.part)) - 1  # units at all positions at once
        opened = [node for node in able if node.opened]
        return sorted(opened, key=lambda node: -max(abs(node.effect), node.score or 0.0, node.half or 0.0))

    def _draw(self, nodes: Sequence[Node]) -> None:
        """Measure random halves of what parts are made of, and open those of which one matters."""
        asked, of = [], []
        for node in (node for node in nodes if node.part.level in _MADE_OF_UNITS):
            ways = [self.tree.units(node.part), *self.tree.groups(node.part)[:1]]
            ways = [way for number, way in enumerate(ways) if len(way) > 1 and way not in ways[:number]]
            for draw in range(self.halves if ways else 0):
                way = ways[draw % len(ways)]
                chosen = np.sort(self.random.choice(len(way), len(way) // 2, replace=False))
                asked.append(together([*node.context, *(way[n] for n in chosen)], f"half {draw} of {node.part.name}"))
                of.append(node)
        n_fitting = self.meter.fitting(asked)
        if n_fitting < len(asked):
            self.notes.append(f"{len(asked) - n_fitting} of {len(asked)} random halves did not fit into the budget")
        for node, effect in zip(of, self._plainly(asked[:n_fitting]), strict=False):
            node.half = max(node.half or 0.0, abs(float(effect)))
            if node.half > node.delta:
                node.opened = "half"

    def _account(self, node: Node, children: Sequence[Node]) -> bool:
        """Say whether parts account for what they are parts of; look for a set of them that does."""
        node.is_spread = not self._accounts(node, children)
        return not node.is_spread

    def _accounts(self, node: Node, children: Sequence[Node]) -> bool:
        found, rest = ([c for c in children if c.matters is matters] for matters in (True, False))
        if len(found) == 1 and abs(node.effect - found[0].effect) <= node.delta:
            return True
        if not found and abs(node.effect) <= node.delta:
            return True
        held = (*node.context, *(child.part for child in found))
        asked = [together([*node.context, node.part], "all"), together(held, "found")] if held else []
        if asked and self.meter.fitting(asked) < len(asked):
            return False
        target, reached = self._plainly(asked).tolist() if asked else (node.effect, 0.0)
        if abs(target - reached) <= node.delta:
            return True
        near = min(node.delta, abs(target - reached) / 2)
        chosen = self._smallest(held, rest, target, near) if 1 < len(rest) <= MOST_SEARCHED else None
        if chosen is None:
            return False
        members, effect = chosen
        self.sets.append(Together(tuple(each.part.name for each in members), effect - reached, node.part.name))
        for member in members:
            member.together = len(self.sets) - 1
            others = tuple(each.part for each in members if each is not member)
            member.context = (*node.context, *others)
        return True

    def _smallest(
        self, held: tuple[Part, ...], rest: Sequence[Node], target: float, near: float
    ) -> tuple[list[Node], float] | None:
        """Return the smallest set that, with what is held, has the target effect, and that effect; None if it is large.

        A set of ``MOST_TOGETHER`` lies in as many of twice as many chunks, so that at least one other can be left out.
        """
        kept, n_chunks = list(rest), 2
        all_of_them = [together([*held, *(node.part for node in kept)], "all of them")]
        if not self.meter.fitting(all_of_them):
            return None
        effect = float(self._plainly(all_of_them)[0])
        if abs(effect - target) > near:
            return None
        while len(kept) > 1:
            n_chunks = min(n_chunks, len(kept))
            chunks = [chunk.tolist() for chunk in np.array_split(np.arange(len(kept)), n_chunks)]
            without = [[node for n, node in enumerate(kept) if n not in chunk] for chunk in chunks]
            asked = [together([*held, *(node.part for node in each)], f"set {n}") for n, each in enumerate(without)]
            if self.meter.fitting(asked) < len(asked):
                return None
            effects = self._plainly(asked)
            fits = np.flatnonzero(np.abs(effects - target) <= near)
            if len(fits):
                best = int(fits[np.argmin(np.abs(effects[fits] - target))])
                kept, effect = without[best], float(effects[best])
                n_chunks = max(n_chunks - 1, 2)
            elif n_chunks == len(kept) or n_chunks >= 2 * MOST_TOGETHER:
                break
            else:
                n_chunks *= 2
        return (kept, effect) if len(kept) <= MOST_TOGETHER else None

    def _measured(self, wanted: Sequence[tuple[Node, list[Part]]]) -> dict[int, list[Node]]:
        """Measure parts of several nodes, as many as fit; return what became of each node's."""
        made: dict[int, list[Node]] = {id(node): [] for node, _ in wanted}
        flat = [(node, part) for node, parts in wanted for part in parts]
        # What parts account for is measured afterwards, by two runs in a call of its own for each part.
        kept = self.meter.cost([together([node.part], f"{n}") for n, (node, _) in enumerate(wanted[:1] * 2)]) * len(wanted)
        self.meter.reserve += kept
        for delta in sorted({self._delta(part) for _, part in flat}, reverse=True):
            some = [(node, part) for node, part in flat if self._delta(part) == delta]
            asked = [together([*node.context, part], f"{n}: {part.name}") for n, (node, part) in enumerate(some)]
            some = some[: self.meter.fitting(asked)]
            if not some:
                continue
            plain = any(node.context for node, _ in some)
            effects, n_pairs = self._effects(asked[: len(some)], delta, plain=plain)
            for (node, part), effect, n in zip(some, effects.tolist(), n_pairs.tolist(), strict=True):
                if not n:
                    continue
                child = Node(part, node.number, effect - node.of_context, n, delta, self._score_of(part))
                child.context, child.of_context = node.context, node.of_context
                if node.context:
                    self._in_context(child)
                made[id(node)].append(child)
                self._add(child)
        self.meter.reserve -= kept
        return made

    def _in_context(self, child: Node) -> None:
        """Note that a part matters with others patched, whose own effect is next to nothing."""
        if abs(child.effect) > child.delta:
            names = (child.part.name, *(part.name for part in child.context))
            self.sets.append(Together(names, child.effect, "the others patched too"))
            child.together = len(self.sets) - 1

    def _effects(self, asked: Sequence[Intervention], delta: float, *, plain: bool) -> tuple[np.ndarray, np.ndarray]:
        """Return effects as shares of the gap and on how many pairs, by rounds where there are enough components."""
        n_pairs = len(self.meter.experiment.pairs)
        if plain or not self.races or self.n_components < 2 * BURN_IN:
            return self._plainly(asked), np.full(len(asked), n_pairs)
        bounds = bounds_of(self.meter.experiment)
        above = delta * self.gap
        racing = Racing(len(asked), self.n_components, above=above, bounds=bounds, by_magnitude=True)
        raced = run_rounds(self.meter, asked, [each.label for each in asked], racing)
        self.n_raced += int(raced.n_pairs.sum())
        self.n_could += len(asked) * n_pairs
        return np.nan_to_num(racing.mean) / self.gap, raced.n_pairs

    def _plainly(self, asked: Sequence[Intervention]) -> np.ndarray:
        """Return effects on all pairs as shares of the gap, (intervention,)."""
        if not len(asked):
            return np.zeros(0)
        found = self.meter.run(asked, [each.label for each in asked])
        return np.asarray(found.recovered().values.reshape(-1), dtype=float)

    def _score(self) -> None:
        """Score all units at once; where that is not possible, say why and go on without."""
        experiment = self.meter.experiment
        runs = SCORE_RUNS * len(experiment.pairs)
        flops = self.meter.flops_of(runs)
        if not self.meter.has(runs):
            self.notes.append("units were not scored: it did not fit into the budget")
            return
        try:
            found = attribute(experiment, self.tree.scored, self.method)  # type: ignore[arg-type]
        except CausalPatchError as error:
            self.notes.append(f"units were not scored: {error.what}")
            return
        seconds = max(float(scores.provenance["cost"]["seconds"]) for scores in found.values())
        self.meter.count(runs, flops, seconds)
        for scores in found.values():
            shares = np.abs(np.nan_to_num(scores.importance().values))
            level = scores.axes[1]
            for layer, row in zip(scores.coordinates["layer"], shares, strict=True):
                self.scores[level, int(layer)] = row
        for node in self.nodes:
            units = self.tree.units(node.part)
            node.score = max((self._score_of(unit) or 0.0 for unit in units), default=None)

    def _score_of(self, part: Part) -> float | None:
        site = part.sites[0]
        row = self.scores.get((part.level, site.layer)) if isinstance(site.layer, int) else None
        return None if row is None or not isinstance(site.unit, int) else float(row[site.unit])

    def _has_score(self, part: Part) -> bool:
        """Say whether a unit of a part has a score above its delta."""
        return any((self._score_of(unit) or 0.0) > self._delta(unit) for unit in self.tree.units(part))

    def _ranked(self, parts: list[Part]) -> list[Part]:
        """Return parts, those of the largest scores first."""
        return sorted(parts, key=lambda part: -(self._score_of(part) or 0.0))

    def _sample(self) -> None:
        """Measure a sample of the units that were never measured."""
        measured = {_unit_of(node.part) for node in self.nodes}
        units = self.tree.units(self.tree.whole)
        places = {node.part.name: number for number, node in enumerate(self.nodes)}
        for level in dict.fromkeys(unit.level for unit in units):
            kind = [unit for unit in units if unit.level == level]
            closed = [unit for unit in kind if _unit_of(unit) not in measured]
            ranked = self._ranked([closed[n] for n in self.random.permutation(len(closed))])
            delta = self._delta(kind[0])
            n_drawn = self.meter.fitting([together([unit], unit.name) for unit in ranked[: self.sample]])
            drawn = draw_stratified(np.arange(len(ranked)), n_drawn, self.random)
            some = [ranked[n] for n in drawn.chosen]
            effects = self._plainly([together([unit], unit.name) for unit in some])
            is_above = np.abs(effects) > delta
            for unit, effect in zip(some, effects.tolist(), strict=True):
                above = places.get(unit.above, -1)
                n_pairs = len(self.meter.experiment.pairs)
                self._add(Node(unit, above, effect, n_pairs, delta, self._score_of(unit), found="sample"))
            matters = np.bincount(drawn.stratum[is_above], minlength=len(drawn.sizes))
            counts = (tuple(map(int, each)) for each in (drawn.sizes, drawn.sampled, matters))
            self.closed.append(Closed(level, len(kind), delta, *counts))

    def _add(self, node: Node) -> None:
        node.number = len(self.nodes)
        self.nodes.append(node)

    def _delta(self, part: Part) -> float:
        return part.delta if self.delta is None else self.delta


def _unit_of(part: Part) -> str:
    """Return the name of a unit at whatever position."""
    return str(part.sites[0].at(None))
