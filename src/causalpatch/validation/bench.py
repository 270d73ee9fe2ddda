"""Where sets of members are patched: each set in a run of its own, on every pair, each measured once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from causalpatch.engine.wiring import graph_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_sets import EdgeSets
from causalpatch.experiment.edges import run_edges
from causalpatch.experiment.subset import with_pairs
from causalpatch.experiment.towards import gap_to_source, sublayers_of, towards
from causalpatch.pairs import Pairs
from causalpatch.patches import Intervention, Value
from causalpatch.patches.value import needs_fitting
from causalpatch.results.effects import Effects
from causalpatch.results.words import PAIRED
from causalpatch.validation.components import Member, Node, Wire, masks_of

Set = Sequence[Member]


@dataclass(eq=False)
class Bench:
    """Effects of sets of members on every pair, in the direction of the gap.

    Args:
        experiment: Model, pairs, metrics and direction. A screen in few bits is not used.
        ablation: Where it is not None, the gap is that between the clean run and the run in which all attention and
            MLPs have this value.
        found_on: Pairs on which values are fitted, where they are fitted at all.
        n_runs: How many runs were made, of all sets and pairs.
    """

    experiment: Experiment
    ablation: Value | None = None
    found_on: Pairs | None = None
    n_runs: int = 0
    provenance: dict[str, Any] = field(default_factory=dict)
    _known: dict[tuple[frozenset[Member], Value | None], np.ndarray] = field(default_factory=dict)
    _untouched: dict[str, np.ndarray] = field(default_factory=dict)

    def __post_init__(self) -> None:
        made = self.experiment.measuring(self.experiment.metrics)
        made.precision = None
        self.experiment = made

    @property
    def group(self) -> np.ndarray:
        """Independent component of each pair, (pair,)."""
        found: np.ndarray = self.experiment.pairs.components
        return found

    def gap(self, metric: int = 0) -> np.ndarray:
        """Return the gap of each pair, (pair,); positive where all is well."""
        if self.ablation is None:
            return gap_to_source(self.experiment, metric)
        found: np.ndarray = self.effects([self._everything], self.ablation, metric)[0]
        return found

    @property
    def reference(self) -> str:
        """What the far end of the gap is called."""
        if self.ablation is None:
            return PAIRED
        return f"{self.ablation} at all {len(self._everything)} sublayers together"

    @property
    def _everything(self) -> tuple[Member, ...]:
        return tuple(map(Node, sublayers_of(self.experiment.model)))

    def measure(self, sets: Sequence[Set], value: Value | None = None) -> None:
        """Make the runs of those sets that were not measured with this value yet.

        Args:
            sets: The sets.
            value: What is put in; None for the source run's value.

        Raises:
            KeyboardInterrupt: The user stopped the runs: what is missing is no random part of what was asked.
        """
        wanted = {frozenset(each): tuple(each) for each in sets if (frozenset(each), value) not in self._known}
        if not wanted:
            return
        effects = self._run(list(wanted.values()), value)
        if not effects.is_complete:
            raise KeyboardInterrupt
        tables = [towards(self.experiment, effects, number) for number in range(len(self.experiment.metrics))]
        for place, key in enumerate(wanted):
            self._known[key, value] = np.stack([table[place] for table in tables])
        self.n_runs += len(wanted) * len(self.experiment.pairs)
        self.provenance = self.provenance or dict(effects.provenance)

    def effects(self, sets: Sequence[Set], value: Value | None = None, metric: int = 0) -> np.ndarray:
        """Return the effect of each set on each pair, (set, pair); NaN where a pair could not be patched.

        Args:
            sets: The sets; an empty one has no effect.
            value: What is put in.
            metric: Number of the metric.
        """
        self.measure([each for each in sets if each], value)
        nothing = np.zeros(len(self.experiment.pairs))
        return np.stack([self._known[frozenset(each), value][metric] if each else nothing for each in sets])

    def _run(self, sets: Sequence[Set], value: Value | None) -> Effects:
        labels = [f"set {number}" for number in range(len(sets))]
        if isinstance(sets[0][0], Wire):
            masks = masks_of(sets, graph_of(self.experiment.model))
            return run_edges(self.experiment, EdgeSets.of_masks(masks, labels))
        asked = [
            Intervention(tuple(member.patch(value) for member in members if not isinstance(member, Wire)), label)
            for members, label in zip(sets, labels, strict=True)
        ]
        if value is not None and needs_fitting(value) and self.found_on is not None:
            asked = with_pairs(self.experiment, self.found_on).fit(asked)
            self.n_runs += len(self.found_on)
        return self.experiment.run(asked, axes={"intervention": labels}, title=_title(sets))


def _title(sets: Sequence[Set]) -> str:
    first = " + ".join(map(str, sets[0]))
    return first if len(sets) == 1 else f"{first} … ({len(sets)} sets of components)"
