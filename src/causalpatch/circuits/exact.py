"""Exact effects of edges: any set of them interchanged in one run, and every single one.

===========================  ===================================================================
wanted                       say
===========================  ===================================================================
every edge by itself         ``patch_edges(experiment)``
one edge in each run         ``patch_edges(experiment, ["a0.h3 -> a2.h1<q>", "m0 -> logits"])``
several edges in one run     ``patch_edges(experiment, [["a0.h3 -> m1", "m0 -> logits"]])``
a node, by all its edges     ``patch_edges(experiment, ["a0.h3"])``
masks                        ``patch_edges(experiment, masks)``, booleans (mask, sender, receiver)
===========================  ===================================================================

In the base run, an edge carries what its sender gives in the source run instead of what it gives now, to this receiver
alone; all that follows is computed anew. This is the intervention that scores of edges approximate.

Runs of one edge are made by the wavefront where the model's layers can be run on rows: what stands before the receiver
is the base run, and what stands behind it is computed where it can change. All other runs, and these where the layers
cannot, are forwards in which inputs are put together. The record says which, and why.

References:
    Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability", 2304.14997;
    Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching", 2304.05969.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import MetricError, ModelUnsupported, PathError
from causalpatch.base.progress import bar
from causalpatch.engine import single_edges
from causalpatch.engine.exact_edges import ExactEdges
from causalpatch.engine.job import Cost, Job
from causalpatch.engine.senders import Senders
from causalpatch.engine.single_edges import SingleEdges
from causalpatch.engine.wiring import Wiring, wiring_of
from causalpatch.engine.wiring import graph_of as _graph_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.provenance import describe_precision, describe_setup, notes_on
from causalpatch.models import Model
from causalpatch.patches import Intervention, Patch
from causalpatch.results.effects import Effects
from causalpatch.results.provenance import describe_program
from causalpatch.results.status import Status
from causalpatch.sites.graph import Graph

MASK_BYTES = 2**26
"""Masks that are held together where single edges are run by forwards."""

Asked = str | Sequence[str]


def graph_of(model: Model | Experiment) -> Graph:
    """Return the graph of a model's components, by its family's table; nothing runs.

    Args:
        model: The model, or an experiment with it.

    Raises:
        ModelUnsupported: Its components are not known by name, or its stream is not the sum of what they add.

    Examples:
        >>> import causalpatch as cp
        >>> cp.graph_of(cp.open_model("zoo:stories")).n_edges
        479
    """
    return _graph_of(model.model if isinstance(model, Experiment) else model)


def patch_edges(
    experiment: Experiment,
    edges: Sequence[Asked] | np.ndarray | None = None,
    *,
    labels: Sequence[str] | None = None,
) -> Effects:
    """Measure sets of edges, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction. Edges carry values of the source run. With ``engine="auto"`` or
            ``"wavefront"``, single edges are run by the wavefront where the model allows.
        edges: For each run an edge or a node by name, or a list of these that are interchanged together; or masks
            ``(mask, sender, receiver)`` over ``graph_of(model)``. By default every edge of the graph by itself, in the
            order of ``graph_of(model).edges``.
        labels: What results call the runs; by default their edges, or ``mask 0``, ``mask 1``, ….

    Returns:
        Effects with the axis ``intervention``, then ``pair``.

    Raises:
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known; or source
            runs are made by another model.
        PathError: There is no such edge or node, or a mask does not fit the graph.
        PairError: Prompts of unequal lengths have no alignment.
        MetricError: A metric spells out answers of several tokens.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> cp.patch_edges(experiment, ["a0.h3 -> a2.h1<q>", "m0"]).dims
        ('intervention', 'pair')

    Cost:
        A single edge: the tokens and layers that it can change; norm and projections once for a sender and a layer.
        Else one run per set and pair, from the first layer on that reads one of its edges; as many as heads share a
        key, where a set gives them different keys. In a run, a norm and a projection for each head's input that is
        changed.
    """
    if experiment.source_model is not None:
        raise ModelUnsupported(
            "edges cannot take values from another model's runs",
            facts=[("why", "what a head sends depends on its own output projection")],
            fix="leave source_model= out",
        )
    _require_plain(experiment)
    asked = _asked(graph_of(experiment), edges)
    with undisturbed():
        started = time.perf_counter()
        sites = Senders.sites(asked.graph.n_layers)
        job = experiment.job([Intervention(tuple(Patch(site) for site in sites))])
        total = len(asked.names) * len(experiment.pairs)
        with bar(f"edges of '{experiment.model.name}'", total, is_shown=experiment.show_progress) as advance:
            runs = _Runs(experiment, job, wiring_of(experiment.model, experiment.pairs), asked, advance)
            runs.measure()
    base, source = runs.untouched
    clean, corrupt = (base, source) if experiment.base == "clean" else (source, base)
    return Effects.build(
        axes={"intervention": asked.names if labels is None else list(labels)},
        pair_ids=[pair.id for pair in experiment.pairs],
        groups=experiment.pairs.components,
        metrics=[metric.name for metric in experiment.metrics],
        values=runs.values,
        status=runs.status,
        baselines={"base": base, "source": source, "clean": clean, "corrupt": corrupt},
        provenance=_record(experiment, runs, time.perf_counter() - started),
    )


@dataclass(frozen=True, eq=False)
class _Asked:
    """What is run.

    Args:
        graph: The graph.
        names: What the runs are called.
        single: Numbers of the runs of one edge.
        edges: The sender and the receiver of each of them, ``(edge, 2)``.
        masks: The edges of all other runs, in order.
    """

    graph: Graph
    names: list[str]
    single: np.ndarray
    edges: np.ndarray
    masks: np.ndarray

    @property
    def several(self) -> np.ndarray:
        """Numbers of all other runs."""
        return np.setdiff1d(np.arange(len(self.names)), self.single)


class _Runs:
    """All runs, each in the way that suits it."""

    def __init__(
        self, experiment: Experiment, job: Job, wiring: Wiring, asked: _Asked, advance: Callable[[int], None]
    ) -> None:
        self.experiment, self.job, self.wiring, self.asked, self.advance = experiment, job, wiring, asked, advance
        shape = (len(experiment.metrics), len(asked.names), len(experiment.pairs))
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
            size = max(1, MASK_BYTES // int(np.prod(asked.graph.shape)))
            for begin in range(0, len(asked.single), size):
                some = slice(begin, begin + size)
                masks = np.zeros((len(asked.single[some]), *asked.graph.shape), dtype=bool)
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


def _asked(graph: Graph, edges: Sequence[Asked] | np.ndarray | None) -> _Asked:
    """Return the runs that are asked for, those of one edge by its numbers alone."""
    if edges is None:
        pairs, none = graph.edges, np.zeros((0, *graph.shape), dtype=bool)
        return _Asked(graph, list(graph.names(pairs)), np.arange(len(pairs)), pairs, none)
    if isinstance(edges, np.ndarray):
        masks = graph.check(edges)
        names, is_single = [f"mask {number}" for number in range(len(masks))], masks.sum((1, 2)) == 1
        return _Asked(graph, names, np.flatnonzero(is_single), np.argwhere(masks[is_single])[:, 1:], masks[~is_single])
    listed = [edges] if isinstance(edges, str) else list(edges)
    if not listed:
        raise PathError("there are no edges to interchange", fix='patch_edges(experiment, ["m0 -> logits"])')
    groups = [[each] if isinstance(each, str) else list(each) for each in listed]
    is_single = np.array([len(group) == 1 and "->" in group[0] for group in groups])
    single = np.array([graph.parse(group[0]) for group, one in zip(groups, is_single, strict=True) if one])
    made = [
        graph.mask([text for text in group if "->" in text], [text for text in group if "->" not in text])
        for group, one in zip(groups, is_single, strict=True)
        if not one
    ]
    masks = np.stack(made) if made else np.zeros((0, *graph.shape), dtype=bool)
    names = [", ".join(group) for group in groups]
    return _Asked(graph, names, np.flatnonzero(is_single), single.reshape(-1, 2), masks)


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
