"""Runs in which sets of edges are interchanged: the verb of edges, as ``Experiment.run`` is that of sites.

Runs of one edge are made by the wavefront where the model's layers can be run on rows: what stands before the receiver
is the base run, and what stands behind it is computed where it can change. All other runs, and these where the layers
cannot, are forwards in which inputs are put together. The record says which, and why.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import MetricError, ModelUnsupported
from causalpatch.base.progress import bar
from causalpatch.engine import single_edges
from causalpatch.engine.exact_edges import ExactEdges
from causalpatch.engine.job import Cost, Job
from causalpatch.engine.senders import Senders
from causalpatch.engine.single_edges import SingleEdges
from causalpatch.engine.wiring import Wiring, wiring_of
from causalpatch.experiment.experiment import Experiment
from causalpatch.experiment.provenance import describe_precision, describe_setup, notes_on
from causalpatch.patches import Intervention, Patch
from causalpatch.results.effects import Effects
from causalpatch.results.provenance import describe_program
from causalpatch.results.status import Status

MASK_BYTES = 2**26
"""Masks that are held together where single edges are run by forwards."""


@dataclass(frozen=True, eq=False)
class EdgeSets:
    """Sets of edges that are run, those of one edge as its numbers alone.

    Args:
        labels: What results call the runs.
        single: Numbers of the runs of one edge.
        edges: The sender and the receiver of each of them, ``(edge, 2)``.
        masks: The edges of all other runs in order, booleans ``(mask, sender, receiver)``.
    """

    labels: Sequence[str]
    single: np.ndarray
    edges: np.ndarray
    masks: np.ndarray

    @classmethod
    def of_edges(cls, edges: np.ndarray, labels: Sequence[str]) -> "EdgeSets":
        """Return single edges, given as ``(edge, 2)``, each in a run of its own."""
        return cls(labels, np.arange(len(edges)), edges, np.zeros((0, 0, 0), dtype=bool))

    @classmethod
    def of_masks(cls, masks: np.ndarray, labels: Sequence[str]) -> "EdgeSets":
        """Return sets given as masks ``(mask, sender, receiver)``."""
        is_single = masks.sum((1, 2)) == 1
        return cls(labels, np.flatnonzero(is_single), np.argwhere(masks[is_single])[:, 1:], masks[~is_single])

    @property
    def several(self) -> np.ndarray:
        """Numbers of all runs but those of one edge."""
        return np.setdiff1d(np.arange(len(self.labels)), self.single)


def run_edges(experiment: Experiment, asked: EdgeSets) -> Effects:
    """Measure sets of edges, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction. Edges carry values of the source run.
        asked: The edges that are interchanged in each run.

    Returns:
        Effects with the axis ``intervention``, then ``pair``.

    Raises:
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known.
        PairError: Prompts of unequal lengths have no alignment.
        MetricError: A metric spells out answers of several tokens.
    """
    _require_plain(experiment)
    with undisturbed():
        started = time.perf_counter()
        job, wiring = job_of_senders(experiment), wiring_of(experiment.model, experiment.pairs)
        total = len(asked.labels) * len(experiment.pairs)
        with bar(f"edges of '{experiment.model.name}'", total, is_shown=experiment.show_progress) as advance:
            runs = _Runs(experiment, job, wiring, asked, advance)
            runs.measure()
    base, source = runs.untouched
    clean, corrupt = (base, source) if experiment.base == "clean" else (source, base)
    return Effects.build(
        axes={"intervention": list(asked.labels)},
        pair_ids=[pair.id for pair in experiment.pairs],
        groups=experiment.pairs.components,
        metrics=[metric.name for metric in experiment.metrics],
        values=runs.values,
        status=runs.status,
        baselines={"base": base, "source": source, "clean": clean, "corrupt": corrupt},
        provenance=_record(experiment, runs, time.perf_counter() - started),
    )


def job_of_senders(experiment: Experiment) -> Job:
    """Return what the engine is asked for where all senders are met: one intervention that patches them."""
    sites = Senders.sites(experiment.model.shape.n_layers)
    return experiment.job([Intervention(tuple(Patch(site) for site in sites))])


def require_no_source_model(experiment: Experiment, what: str, fix: str) -> None:
    """Make sure that source runs are made by the model itself.

    Args:
        experiment: The experiment.
        what: What cannot be done otherwise.
        fix: What to type instead.

    Raises:
        ModelUnsupported: They are made by another model.
    """
    if experiment.source_model is not None:
        raise ModelUnsupported(what, facts=[("why", "what a head sends depends on its own output projection")], fix=fix)


class _Runs:
    """All runs, each in the way that suits it."""

    def __init__(
        self, experiment: Experiment, job: Job, wiring: Wiring, asked: EdgeSets, advance: Callable[[int], None]
    ) -> None:
        self.experiment, self.job, self.wiring, self.asked, self.advance = experiment, job, wiring, asked, advance
        shape = (len(experiment.metrics), len(asked.labels), len(experiment.pairs))
        self.values = np.full(shape, np.nan)
        self.status = np.full(shape[1:], Status.MEASURED, dtype=np.uint8)
        self.untouched = np.full((2, shape[0], shape[2]), np.nan)
        self.cost = Cost()
        self.restarts = True
        self.why = ""  # why single edges are not run by the wavefront
        self.counts = {"wavefront": 0, "forwards": 0}

    def measure(self) -> None:
        """Make the runs."""
        asked = self.asked
        if len(asked.single) and not self._by_wavefront():
            size = max(1, MASK_BYTES // int(np.prod(self.wiring.graph.shape)))
            for begin in range(0, len(asked.single), size):
                some = slice(begin, begin + size)
                masks = np.zeros((len(asked.single[some]), *self.wiring.graph.shape), dtype=bool)
                masks[np.arange(len(masks)), *asked.edges[some].T] = True
                self._by_forwards(asked.single[some], masks)
        if len(asked.masks):
            self._by_forwards(asked.several, asked.masks)

    def _by_wavefront(self) -> bool:
        """Run single edges by the wavefront; return False where the model does not allow it."""
        if self.experiment.engine not in ("auto", "wavefront"):
            self.why = f'engine="{self.experiment.engine}"'
        else:
            self.why = single_edges.why_not(self.job, self.experiment.gauge) or ""
        if self.why:
            return False
        runs = SingleEdges(self.job, self.experiment.gauge, self.wiring, self.asked.edges, self.advance, self.cost)
        try:
            values, self.untouched = runs.measure()
        except ModelUnsupported as error:
            self.why = error.what
            return False
        self.values[:, self.asked.single], self.status[self.asked.single] = values, runs.status
        self.counts["wavefront"] += len(self.asked.single)
        return True

    def _by_forwards(self, numbers: np.ndarray, masks: np.ndarray) -> None:
        runs = ExactEdges(self.job, self.experiment.gauge, self.wiring, masks, self.advance, self.cost)
        self.values[:, numbers], self.untouched = runs.measure()
        self.counts["forwards"] += len(numbers)
        self.restarts &= runs.restarts


def _require_plain(experiment: Experiment) -> None:
    """Make sure that each run is one forward.

    Raises:
        MetricError: A metric reads further ones.
    """
    gauge = experiment.gauge
    for metric in gauge.metrics:
        if (metric.spells_answers and gauge.forks) or metric.generates is not None:
            does = "spells out answers of several tokens" if metric.generates is None else "reads what is written on"
            raise MetricError(
                f"edges cannot be measured by '{metric.name}', which {does}",
                facts=[("pairs", f"'{experiment.pairs.name}'")],
                fix='measure the first token: load_pairs(…, first_token=True), or metric="kl_divergence"',
            )


def _engine(runs: _Runs) -> dict[str, Any]:
    """Return how runs were made, in words and numbers."""
    told = []
    if runs.counts["wavefront"]:
        told.append("single edges: rows of tokens that can have changed")
    if runs.counts["forwards"]:
        how = "from the first layer that is changed" if runs.restarts else "whole forwards"
        told.append(f"inputs put together in the model's own forward, {how}")
    found = {"name": "edges", "reason": "; ".join(told), "interventions": dict(runs.counts)}
    return found | ({"without_wavefront": runs.why} if runs.why else {})


def _record(experiment: Experiment, runs: _Runs, seconds: float) -> dict[str, Any]:
    return {
        **describe_program(),
        **describe_setup(experiment.model, experiment.pairs, experiment.metrics, experiment.direction, experiment.seed),
        "site": "edges",
        "value": "source",
        "reference": "corrupted run",
        "no_share": "",
        "facts": {
            "granularity": "heads (q, k, v), MLPs",
            "kind": "edge",
            "value": "source",
            "positions": "all aligned",
            "direction": experiment.direction,
            "circuit": "sets of edges, the rest of the run intact",
        },
        "engine": _engine(runs),
        "precision": describe_precision(experiment.model, None),
        "notes": notes_on(experiment.pairs, experiment.base, runs.job.interventions),
        "complete": True,
        "cost": {**vars(runs.cost), "seconds": round(seconds, 3)},
    }
