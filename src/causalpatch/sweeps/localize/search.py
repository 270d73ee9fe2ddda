"""The search: from the whole model down, level by level, each part measured exactly before it is opened or left.

1. The whole and its coarsest parts are measured.
2. A part is opened by its effect; because it belongs to a set that matters together; by the scores of its units; or by
   the effect of a random half of what it is made of, so that parts that cancel each other are not lost.
3. What it is made of is measured. Where that matters together as much as the part does, it accounts for the part. Else
   a smallest set is looked for among the rest (``sets``), so that gates are found, of which no member matters by
   itself. Members of a set are opened with the others patched. A part that no such set of four or fewer accounts for
   stays in what was found.
4. Units that were never measured are sampled, stratified by their scores.

What has an effect is opened first, then what stands in for each other or cancels, then what did not fit before; a share
of the budget is kept for each of them, and for the sample.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from causalpatch.attribution.nodes import attribute
from causalpatch.base.errors import CausalPatchError
from causalpatch.base.seeds import generator
from causalpatch.experiment.towards import gap_to_source, numbers_towards, towards
from causalpatch.patches import Intervention
from causalpatch.results.localization import Closed, Together
from causalpatch.results.words import joined
from causalpatch.statistics.missed import draw_stratified
from causalpatch.statistics.racing import BURN_IN, Racing
from causalpatch.sweeps.localize.budget import Meter
from causalpatch.sweeps.localize.nodes import Node, describe_waiting, is_plain
from causalpatch.sweeps.localize.parts import Part, Tree, together
from causalpatch.sweeps.localize.rounds import bounds_of, run_rounds
from causalpatch.sweeps.localize.scored import ScoredBy, UnitScores
from causalpatch.sweeps.localize.sets import smallest_set

MOST_SEARCHED: Final = 64  # parts among which a set is looked for
SCORE_RUNS: Final = 5  # of each pair: three forwards and a backward, which counts as two
_FOR_HIDDEN: Final = 0.2  # of the budget is kept for parts that have no effect of their own
_FOR_ACCOUNTS: Final = 0.25  # of what is left, at most, is kept for what parts account for
_MADE_OF_UNITS: Final = ("sublayer", "position", "module")


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
    method: ScoredBy
    sample: int
    races: bool

    def __post_init__(self) -> None:
        experiment = self.meter.experiment
        self.nodes: list[Node] = []
        self.sets: list[Together] = []
        self.pending: list[str] = []
        self.waiting: dict[int, tuple[Node, list[Part]]] = {}  # what did not fit when it was to be measured
        self.notes: list[str] = []
        self.closed: list[Closed] = []
        self.whole = np.nan
        self.moved: dict[frozenset[str], np.ndarray] = {}  # effect on every pair of what was patched together
        self.of_sets: list[np.ndarray] = []
        self.n_raced, self.n_could = 0, 0
        self.scores = UnitScores()
        self.random = generator(experiment.seed, "localize")
        self.n_components = len(np.unique(experiment.pairs.components))
        self.gap = gap_to_source(experiment)

    def run(self) -> None:
        """Search, as far as the budget allows."""
        whole = self.tree.whole
        (children,) = self.tree.groups(whole)
        moved = self._moved([together([whole], "whole"), *(together([each], each.name) for each in children)])
        if self.meter.filling.is_ablation:
            self.gap = np.nan_to_num(moved[0])
        numbers_towards(self.meter.experiment, moved, self.gap, instead="experiment.run(…).effect()").require_gap()
        effects = self._shares(moved)
        self.whole = float(effects[0])
        n_pairs = len(self.meter.experiment.pairs)
        root = Node(whole, -1, self.whole, n_pairs, self._delta(whole), moved[0], opened="effect")
        for part, effect, own in zip(children, effects[1:].tolist(), moved[1:], strict=True):
            self._add(Node(part, -1, effect, n_pairs, self._delta(part), own))
        if self.meter.filling.is_ablation and self.method is not None:
            self.notes.append("units were not scored: scores are of values of the source run")
        elif self.method is not None and self.tree.scored:
            self._score(self.method)
        coarsest = list(self.nodes)
        kept, self.meter.reserve = self.meter.reserve, self.meter.reserve + _FOR_HIDDEN * self.meter.budget.amount
        self._account([(root, coarsest)])
        self._exhaust(self._chosen(coarsest, draws=False))
        self.meter.reserve = kept
        self._rest_together(root)
        self._exhaust(self._chosen(coarsest, draws=True))
        self._exhaust([node for node, _ in self.waiting.values()])
        self.pending = [describe_waiting(node, parts) for node, parts in self.waiting.values()]
        self._sample()

    def _exhaust(self, frontier: list[Node]) -> None:
        """Open parts, and what they are made of, until nothing is left to be opened or no budget."""
        while frontier and not self.meter.is_stopped:
            n_before = len(self.nodes)
            frontier = self._open(frontier)
            if len(self.nodes) == n_before:
                break

    def _open(self, frontier: Sequence[Node]) -> list[Node]:
        """Measure what some parts are made of; return what is to be opened next."""
        wanted: list[tuple[Node, list[Part]]] = []
        for node in frontier:
            if id(node) in self.waiting:
                wanted.append(self.waiting.pop(id(node)))
                continue
            groups = self.tree.groups(node.part)
            wanted.append((node, self.scores.ranked(groups[min(node.next_group, len(groups) - 1)])))
            node.next_group += 1
        self._settle_contexts(frontier)
        made = self._measured(wanted)
        self._account([(node, self._made_of(node, made[id(node)])) for node, _ in wanted if made[id(node)]])
        again: list[Node] = []
        for node, parts in wanted:
            own = made[id(node)]
            if len(own) < len(parts):
                measured = {child.part for child in own}
                self.waiting[id(node)] = node, [part for part in parts if part not in measured]
            can_go_on = own and node.next_group < len(self.tree.groups(node.part))
            if can_go_on and len(own) == len(parts) and not any(child.matters for child in own):
                again.append(node)
            elif can_go_on and node.is_spread:
                again += self._chosen(own, draws=True)
        return [*again, *self._chosen([child for node, _ in wanted for child in made[id(node)]], draws=False)]

    def _made_of(self, node: Node, last: Sequence[Node]) -> list[Node]:
        """Return all that was measured of what a part is made of, in the way that it was opened last."""
        level = last[0].part.level
        return [each for each in self.nodes if each.above == node.number and each.part.level == level]

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
            elif node.part.level == "sublayer" and self._is_scored(node):
                node.opened = "scores"  # scores are of units at all positions
        if draws and self.halves:
            self._draw([node for node in able if not node.opened])
        for node in able:
            if node.opened in ("scores", "half", "set"):
                node.next_group = len(self.tree.groups(node.part)) - 1  # units at all positions at once
        opened = [node for node in able if node.opened]
        return sorted(opened, key=lambda node: -max(abs(node.effect), node.score or 0.0, node.half or 0.0))

    def _is_scored(self, node: Node) -> bool:
        """Say whether a unit of a part has a score above its delta."""
        units = self.tree.units(node.part)
        return any((self.scores.score(unit) or 0.0) > self._delta(unit) for unit in units)

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

    def _account(self, families: Sequence[tuple[Node, Sequence[Node]]]) -> None:
        """Note which parts nothing that they are made of accounts for; look for sets that do."""
        open_ones = [(node, children) for node, children in families if not is_plain(node, children)]
        for node, _ in families:
            node.is_spread = any(node is each for each, _ in open_ones)
        asked: list[Intervention] = []
        for n, (node, children) in enumerate(open_ones):
            held = (*node.context, *(child.part for child in children if child.matters))
            asked.append(together([*node.context, node.part], f"{n}: all"))
            asked.append(together(held or [node.part], f"{n}: found"))
        if self.meter.fitting(asked) < len(asked):
            short = joined([node.part.name for node, _ in open_ones])
            self.notes.append(f"no budget was left to see whether what was found accounts for {short}")
            return
        effects = self._plainly(asked).reshape(-1, 2).tolist()
        for (node, children), (target, reached) in zip(open_ones, effects, strict=True):
            found, rest = ([c for c in children if c.matters is matters] for matters in (True, False))
            reached = reached if found or node.context else 0.0
            node.is_spread = abs(target - reached) > node.delta
            if node.is_spread and 1 < len(rest) <= MOST_SEARCHED:
                held = (*node.context, *(child.part for child in found))
                near = min(node.delta, abs(target - reached) / 2)
                chosen = smallest_set(self._if_fitting, held, rest, target, near)
                if chosen is not None and _is_more(chosen[0], chosen[1] - reached, node.delta):
                    self._join(*chosen, node, reached, held)
                    node.is_spread = False

    def _rest_together(self, root: Node) -> None:
        """Look for a set among parts of which none matters: what stands in for each other has no effect alone.

        Only the whole needs this: parts of one sublayer do not hide behind what follows them.
        """
        rest = [node for node in self.nodes if not node.matters]
        asked = [together([node.part for node in rest], "all that do not matter alone")] if len(rest) > 1 else []
        if not asked or not self.meter.fitting(asked):
            return
        target = float(self._plainly(asked)[0])
        if abs(target) <= root.delta or not _is_more(rest, target, root.delta):
            return
        chosen = smallest_set(self._if_fitting, (), rest, target, min(root.delta, abs(target) / 2))
        if chosen is not None and _is_more(*chosen, root.delta):
            self._join(*chosen, root, 0.0, ())

    def _join(self, members: Sequence[Node], effect: float, node: Node, reached: float, beside: Sequence[Part]) -> None:
        """Note that parts matter together, beside others that were patched in the same run."""
        whole = self.moved[_key([*beside, *(each.part for each in members)])]
        self.of_sets.append(whole - self._known(beside))
        self.sets.append(Together(tuple(each.part.name for each in members), effect - reached, node.part.name))
        for member in members:
            member.together = len(self.sets) - 1
            member.context = (*node.context, *(each.part for each in members if each is not member))

    def _measured(self, wanted: Sequence[tuple[Node, list[Part]]]) -> dict[int, list[Node]]:
        """Measure parts of several nodes, as many as fit; return what became of each node's."""
        made: dict[int, list[Node]] = {id(node): [] for node, _ in wanted}
        flat = [(node, part) for node, parts in wanted for part in parts]
        # What parts account for is measured afterwards, by two runs for each.
        kept = self.meter.cost([together([node.part], f"{n}") for n, (node, _) in enumerate([*wanted, *wanted])])
        kept = min(kept, _FOR_ACCOUNTS * max(self.meter.left, 0.0))
        self.meter.reserve += kept
        for delta in sorted({self._delta(part) for _, part in flat}, reverse=True):
            some = [(node, part) for node, part in flat if self._delta(part) == delta]
            asked = [together([*node.context, part], f"{n}: {part.name}") for n, (node, part) in enumerate(some)]
            some = some[: self.meter.fitting(asked)]
            if not some:
                continue
            plain = any(node.context for node, _ in some)
            effects, n_pairs, moved = self._effects(asked[: len(some)], delta, plain=plain)
            for (node, part), effect, n, row in zip(some, effects.tolist(), n_pairs.tolist(), moved, strict=True):
                if not n:
                    continue
                own = row - (self._known(node.context) if node.of_context else 0.0)
                score = self.scores.score(part)
                child = Node(part, node.number, effect - node.of_context, n, delta, own, score)
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
            self.sets.append(Together(names, child.effect, ""))
            self.of_sets.append(child.moved)
            child.together = len(self.sets) - 1

    def _effects(
        self, asked: Sequence[Intervention], delta: float, *, plain: bool
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return effects as shares of the gap, on how many pairs, and on every pair.

        Pairs are drawn in rounds where there are enough components.
        """
        n_all = len(self.meter.experiment.pairs)
        if plain or not self.races or self.n_components < 2 * BURN_IN:
            moved = self._moved(asked)
            return self._shares(moved), np.full(len(asked), n_all), moved
        bounds = bounds_of(self.meter.experiment)
        gap = abs(float(self.gap.mean()))
        racing = Racing(len(asked), self.n_components, above=delta * gap, bounds=bounds, by_magnitude=True)
        raced = run_rounds(self.meter, asked, [each.label for each in asked], racing)
        self.n_raced += int(raced.n_pairs.sum())
        self.n_could += len(asked) * n_all
        return np.nan_to_num(racing.mean) / gap, raced.n_pairs, raced.moved

    def _if_fitting(self, asked: Sequence[Intervention]) -> np.ndarray | None:
        """Return effects on all pairs as shares of the gap; None where they do not fit into the budget."""
        return None if self.meter.fitting(asked) < len(asked) else self._plainly(asked)

    def _plainly(self, asked: Sequence[Intervention]) -> np.ndarray:
        """Return effects on all pairs as shares of the gap, (intervention,)."""
        return self._shares(self._moved(asked)) if len(asked) else np.zeros(0)

    def _moved(self, asked: Sequence[Intervention]) -> np.ndarray:
        """Return effects on all pairs in the direction of the gap, (intervention, pair), and keep them."""
        moved = towards(self.meter.experiment, self.meter.run(asked, [each.label for each in asked]))
        self.moved |= {_key_of(each): row for each, row in zip(asked, moved, strict=True)}
        return moved

    def _known(self, parts: Sequence[Part]) -> np.ndarray:
        """Return the effect on every pair of parts that were patched together before; 0 where they were not."""
        return self.moved.get(_key(parts), np.zeros(len(self.gap))) if parts else np.zeros(len(self.gap))

    def _shares(self, moved: np.ndarray) -> np.ndarray:
        return numbers_towards(self.meter.experiment, moved, self.gap).recovered()

    def _score(self, method: Literal["atp", "relp"]) -> None:
        """Score all units at once; where that is not possible, say why and go on without."""
        experiment = self.meter.experiment
        runs = SCORE_RUNS * len(experiment.pairs)
        flops = self.meter.flops_of(runs)
        if not self.meter.has(runs):
            self.notes.append("units were not scored: it did not fit into the budget")
            return
        try:
            found = attribute(experiment, self.tree.scored, method)
        except CausalPatchError as error:
            self.notes.append(f"units were not scored: {error.what}")
            return
        seconds = max(float(scores.provenance["cost"]["seconds"]) for scores in found.values())
        self.meter.count(runs, flops, seconds)
        self.scores = UnitScores.of(found)
        for node in self.nodes:
            node.score = self.scores.largest(self.tree.units(node.part))

    def _sample(self) -> None:
        """Measure a sample of the units that were never measured."""
        measured = {_unit_of(node.part) for node in self.nodes}
        units = self.tree.units(self.tree.whole)
        places = {node.part.name: number for number, node in enumerate(self.nodes)}
        levels = list(dict.fromkeys(unit.level for unit in units))
        for n_left, level in zip(range(len(levels), 0, -1), levels, strict=True):
            kind = [unit for unit in units if unit.level == level]
            closed = [unit for unit in kind if _unit_of(unit) not in measured]
            ranked = self.scores.ranked([closed[n] for n in self.random.permutation(len(closed))])
            delta = self._delta(kind[0])
            self.meter.reserve = 0.0
            self.meter.reserve = max(self.meter.left, 0.0) * (1 - 1 / n_left)  # as much for each kind
            # The first layers cost most: what of these fits, fits wherever the sample falls.
            dearest = sorted(closed, key=_layer_of)[: self.sample]
            n_drawn = self.meter.fitting([together([unit], unit.name) for unit in dearest])
            drawn = draw_stratified(np.arange(len(ranked)), n_drawn, self.random)
            some = [ranked[n] for n in drawn.chosen]
            n_pairs = len(self.meter.experiment.pairs)
            moved = self._moved([together([unit], unit.name) for unit in some]) if some else np.zeros((0, n_pairs))
            effects = self._shares(moved)
            is_above = np.abs(effects) > delta
            for unit, effect, own in zip(some, effects.tolist(), moved, strict=True):
                above = places.get(unit.above, -1)
                self._add(Node(unit, above, effect, n_pairs, delta, own, self.scores.score(unit), found="sample"))
            matters = np.bincount(drawn.stratum[is_above], minlength=len(drawn.sizes))
            counts = (tuple(map(int, each)) for each in (drawn.sizes, drawn.sampled, matters))
            self.closed.append(Closed(level, len(kind), delta, *counts))

    def _add(self, node: Node) -> None:
        node.number = len(self.nodes)
        node.ways = tuple(map(len, self.tree.groups(node.part)))
        self.nodes.append(node)

    def _delta(self, part: Part) -> float:
        return part.delta if self.delta is None else self.delta


def _is_more(members: Sequence[Node], effect: float, delta: float) -> bool:
    """Say whether parts have another effect together than their own added up: small ones that add up are no set."""
    return abs(effect - sum(member.effect for member in members)) > delta


def _key(parts: Sequence[Part]) -> frozenset[str]:
    return _key_of(together(parts, "together"))


def _key_of(intervention: Intervention) -> frozenset[str]:
    """Return what names everything that an intervention patches."""
    return frozenset(str(patch.site) for patch in intervention.patches)


def _layer_of(part: Part) -> int:
    layer = part.sites[0].layer
    return layer if isinstance(layer, int) else 0


def _unit_of(part: Part) -> str:
    """Return the name of a unit at whatever position."""
    return str(part.sites[0].at(None))
