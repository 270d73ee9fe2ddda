"""Runs of a model in which some edges are kept and all others ablated, for many sets of edges at once.

In the run of a circuit C on a clean prompt, edges of C carry what their senders give in this run, and all others what
these give in the corrupted prompt's run: the exact interchange of everything but C, in the direction noise. What is
left when no edge is kept is measured too: for prompts of equal lengths it is the corrupted run, else tokens without a
partner stay as they are. Instead of the corrupted run's values ablated edges may carry zero, or means.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.base.errors import PairError
from causalpatch.circuits.exact import graph_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_jobs import require_no_source_model
from causalpatch.experiment.edge_sets import EdgeSets
from causalpatch.experiment.edges import run_edges
from causalpatch.pairs import Pairs
from causalpatch.patches import Value
from causalpatch.results.status import has_number


@dataclass(frozen=True, eq=False)
class Kept:
    """The metric of every run.

    Args:
        values: Axes (set, pair).
        clean: Nothing ablated, (pair,).
        empty: Everything ablated, (pair,).
        provenance: The record of the runs.
        sets: Numbers of the sets that these are, (set,).
        pairs: Numbers of the pairs that these are, (pair,).
    """

    values: np.ndarray
    clean: np.ndarray
    empty: np.ndarray
    provenance: dict[str, Any]
    sets: np.ndarray
    pairs: np.ndarray

    @property
    def is_complete(self) -> bool:
        """Whether these are all runs that were asked for."""
        return bool(self.provenance["complete"])

    @property
    def f(self) -> np.ndarray:
        """(mean m(set) - mean m(nothing)) / (mean m(all) - mean m(nothing)), (set,)."""
        share: np.ndarray = (self.values.mean(-1) - self.empty.mean()) / (self.clean.mean() - self.empty.mean())
        return share


def first_metric(experiment: Experiment) -> Experiment:
    """Return the experiment in the direction of circuits, noise, with the first of its metrics."""
    turned = experiment.turned("noise")
    return turned if len(turned.metrics) == 1 else turned.measuring(turned.metrics[:1])


def run_kept(
    experiment: Experiment, kept: np.ndarray, value: Value | str = "source", fitted_on: Pairs | None = None
) -> Kept:
    """Run sets of edges; those that are alike run once.

    Args:
        experiment: In the direction noise; its first metric is read.
        kept: Edges that are kept, booleans ``(set, sender, receiver)``.
        value: What ablated edges carry.
        fitted_on: The pairs that means are those of; by default the experiment's own.

    Raises:
        KeyboardInterrupt: The user stopped the runs: of a set there is an f on all pairs or none.
    """
    found = run_while_wanted(experiment, kept, value, fitted_on)
    if not found.is_complete:
        raise KeyboardInterrupt
    return found


def run_while_wanted(
    experiment: Experiment, kept: np.ndarray, value: Value | str = "source", fitted_on: Pairs | None = None
) -> Kept:
    """Run sets of edges; where the user stops that, return what has a value of every set on every pair.

    These are the sets that were run on all pairs, if there are any; else all sets, on the pairs on which all were run.

    Args:
        experiment: As for ``run_kept``.
        kept: Likewise.
        value: Likewise.
        fitted_on: Likewise.

    Raises:
        KeyboardInterrupt: The user stopped the runs before there was anything to return.
    """
    graph = graph_of(experiment)
    bits = np.packbits(kept[:, graph.exists], axis=1)
    _, first, place = np.unique(bits, axis=0, return_index=True, return_inverse=True)
    ablated = np.concatenate([graph.exists[None], graph.exists & ~kept[first]])
    require_no_source_model(experiment, "edges cannot take values from another model's runs", "leave source_model= out")
    asked = EdgeSets.of_masks(ablated, [f"set {number}" for number in range(len(ablated))])
    effects = run_edges(experiment, asked, value, fitted_on=fitted_on)
    data = effects.to_xarray()
    values = data["metric"].values.reshape(len(ablated), -1)
    clean: np.ndarray = data["baseline_clean"].values.reshape(-1)
    there = has_number(data["status"].values) if not effects.is_complete else np.ones(values.shape, dtype=bool)
    runs, pairs = _whole(there)
    ids = {pair.id: number for number, pair in enumerate(experiment.pairs)}
    numbers = np.array([ids[name] for name in effects.pair_ids], dtype=np.int64)[pairs]
    place = place.reshape(-1) + 1  # the first run is the one with everything ablated
    sets = np.flatnonzero(np.isin(place, runs))
    if not len(sets) or not len(pairs):
        raise KeyboardInterrupt
    return Kept(
        values[np.ix_(place[sets], pairs)], clean[pairs], values[0, pairs], dict(effects.provenance), sets, numbers
    )


def _whole(there: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the runs and pairs of a part of a table that has no gaps.

    Args:
        there: What was run, (run, pair). The first run has to be in it.
    """
    on_all = np.asarray(there.all(1))
    if on_all[0] and on_all[1:].any():
        return np.flatnonzero(on_all), np.arange(there.shape[1])
    return np.arange(len(there)), np.flatnonzero(there.all(0))


def require_independent(pairs: Pairs, others: Pairs, what: str) -> None:
    """Make sure that pairs share no prompt, entity or group with others.

    Args:
        pairs: The pairs that are measured.
        others: Those that something was found on.
        what: What these are called.

    Raises:
        PairError: They do.
    """
    both = Pairs([*pairs, *others], name=pairs.name)
    shared = set(both.components[: len(pairs)].tolist()) & set(both.components[len(pairs) :].tolist())
    if shared:
        raise PairError(
            f"'{pairs.name}' is not independent of {what}",
            facts=[("shared", f"prompts, entities or groups in {len(shared)} independent components")],
            fix="found_on, held_out = pairs.split()",
        )
