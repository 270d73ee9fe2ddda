"""Runs of a model in which some edges are kept and all others ablated, for many sets of edges at once.

In the run of a circuit C on a clean prompt, edges of C carry what their senders give in this run, and all others what
these give in the corrupted prompt's run: the exact interchange of everything but C, in the direction noise. What is
left when no edge is kept is measured too: for prompts of equal lengths it is the corrupted run, else tokens without a
partner stay as they are. Instead of the corrupted run's values ablated edges may carry zero, or means.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.circuits.exact import graph_of, patch_edges
from causalpatch.experiment import Experiment
from causalpatch.patches import Value


@dataclass(frozen=True, eq=False)
class Kept:
    """The metric of every run.

    Args:
        values: Axes (set, pair).
        clean: Nothing ablated, (pair,).
        empty: Everything ablated, (pair,).
        provenance: The record of the runs.
    """

    values: np.ndarray
    clean: np.ndarray
    empty: np.ndarray
    provenance: dict[str, Any]

    @property
    def f(self) -> np.ndarray:
        """(mean m(set) - mean m(nothing)) / (mean m(all) - mean m(nothing)), (set,)."""
        share: np.ndarray = (self.values.mean(-1) - self.empty.mean()) / (self.clean.mean() - self.empty.mean())
        return share


def first_metric(experiment: Experiment) -> Experiment:
    """Return the experiment in the direction of circuits, noise, with the first of its metrics."""
    turned = experiment.turned("noise")
    return turned if len(turned.metrics) == 1 else turned.measuring(turned.metrics[:1])


def run_kept(experiment: Experiment, kept: np.ndarray, value: Value | str = "source") -> Kept:
    """Run sets of edges; those that are alike run once.

    Args:
        experiment: In the direction noise; its first metric is read.
        kept: Edges that are kept, booleans ``(set, sender, receiver)``.
        value: What ablated edges carry.

    Raises:
        KeyboardInterrupt: The user stopped the runs: of a set there is an f on all pairs or none.
    """
    graph = graph_of(experiment)
    bits = np.packbits(kept[:, graph.exists], axis=1)
    _, first, place = np.unique(bits, axis=0, return_index=True, return_inverse=True)
    ablated = np.concatenate([graph.exists[None], graph.exists & ~kept[first]])
    effects = patch_edges(experiment, ablated, value=value)
    if not effects.is_complete:
        raise KeyboardInterrupt
    data = effects.to_xarray()
    values = data["metric"].values.reshape(len(ablated), -1)
    clean: np.ndarray = data["baseline_clean"].values.reshape(-1)
    return Kept(values[1:][place.reshape(-1)], clean, values[0], dict(effects.provenance))
