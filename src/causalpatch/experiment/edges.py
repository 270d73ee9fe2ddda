"""Runs in which sets of edges are interchanged: the verb of edges, as ``Experiment.run`` is that of sites.

Runs of one edge are made by the wavefront where the model's layers can be run on rows: what stands before the receiver
is the base run, and what stands behind it is computed where it can change. All other runs, and these where the layers
cannot, are forwards in which inputs are put together. The record says which, and why.
"""

import json
import time
import warnings
import weakref
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import CausalPatchWarning, ModelUnsupported, PairError
from causalpatch.base.progress import bar
from causalpatch.engine import Block, Job, Means, single_edges
from causalpatch.engine.exact_edges import ExactEdges
from causalpatch.engine.resolve import targets_of
from causalpatch.engine.single_edges import SingleEdges
from causalpatch.engine.structure import Findings
from causalpatch.engine.wiring import Wiring, wiring_of
from causalpatch.experiment.edge_jobs import Carried, carried_of, job_of_edges, patch_of_senders
from causalpatch.experiment.edge_sets import EdgeSets
from causalpatch.experiment.experiment import Experiment
from causalpatch.experiment.measured import Cuts, Measured
from causalpatch.experiment.provenance import describe_pairs, describe_precision, describe_setup, notes_on
from causalpatch.experiment.tally import Tally
from causalpatch.pairs import Pairs
from causalpatch.pairs.plain import pairs_of_plain, plain_pairs
from causalpatch.patches import Mean, Source, Value
from causalpatch.patches.files import plain_value, value_of_plain
from causalpatch.results.effects import Effects
from causalpatch.results.provenance import describe_program
from causalpatch.results.status import Status

MASK_BYTES = 2**26
"""Masks that are held together where single edges are run by forwards."""

_FOUND: "weakref.WeakKeyDictionary[Experiment, dict[str, Findings[Any]]]" = weakref.WeakKeyDictionary()
"""What is known of an experiment's untouched runs, by the pairs that means are of; it goes with the experiment."""


def run_edges(
    experiment: Experiment, asked: EdgeSets, value: Value | str = "source", *, fitted_on: Pairs | None = None
) -> Effects:
    """Measure sets of edges, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction.
        asked: The edges that are interchanged in each run.
        value: What edges carry instead: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``. In the direction noise zero
            and means have a reference: a run with all edges replaced.
        fitted_on: The pairs that means are those of; by default the experiment's own.

    Returns:
        Effects with the axis ``intervention``, then ``pair``. Stopped by Ctrl-C, they hold what was measured; those
        that a runner makes are kept by it instead, and the interrupt goes on.

    Raises:
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known.
        PairError: Prompts of unequal lengths have no alignment.
        MetricError: A metric spells out answers of several tokens.
        SettingError: Edges cannot carry such a value.
    """
    carried = carried_of(value)
    with undisturbed():
        if experiment.runner is None:
            fitted = job_of_edges(experiment, carried, fitted_on)
            found, targets = _measured(experiment, asked, carried, fitted, fitted_on), fitted[0].interventions
        else:
            found = experiment.runner.measure(experiment, EdgeRuns(asked, carried, fitted_on))
            targets = [targets_of(experiment.model, patch_of_senders(experiment.model, carried))]
    reference = "corrupted run"
    if not isinstance(carried, Source):
        reference = f"{carried} at all edges together" if _has_reference(experiment, carried) else "none"
    return Effects.build(
        axes={"intervention": list(asked.labels)},
        pair_ids=[experiment.pairs[int(pair)].id for pair in found.kept],
        groups=experiment.pairs.components[found.kept],
        metrics=[metric.name for metric in experiment.metrics],
        values=found.values,
        status=found.status,
        baselines=found.baselines,
        provenance={
            **_record(experiment, carried, reference, fitted_on),
            "notes": notes_on(experiment.pairs, experiment.base, targets),
            **found.record,
        },
    )


@dataclass(frozen=True, eq=False)
class EdgeRuns:
    """Sets of edges as a work: what a runner is asked for.

    Args:
        asked: The edges that are interchanged in each run.
        value: What they carry instead.
        fitted_on: The pairs that means are those of; None for those that are measured.

    Raises:
        PairError: Means are of pairs that cannot be kept as plain data.
    """

    asked: EdgeSets
    value: Carried
    fitted_on: Pairs | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.value, Mean):
            object.__setattr__(self, "fitted_on", None)
        elif self.fitted_on is not None and plain_pairs(self.fitted_on) is None:
            raise PairError(
                "the pairs that means are of are no plain prompts, which alone can be kept", fix="found_on=None"
            )

    @property
    def n_cells(self) -> int:
        """How many sets there are."""
        return len(self.asked.labels)

    @property
    def runs_per_pair(self) -> int:
        """A run for each set."""
        return self.n_cells

    def texts(self) -> list[str]:
        """Return what names each set: its edges, and what these carry."""
        plain, _ = plain_value(self.value)
        carried = json.dumps(plain, sort_keys=True)
        if self.fitted_on is not None:
            carried += f" of {self.fitted_on.content_hash}"
        return [f"edges {name} {carried}" for name in self.asked.names()]

    def take(self, cells: np.ndarray) -> "EdgeRuns":
        """Return some of the sets."""
        return EdgeRuns(self.asked.take(cells), self.value, self.fitted_on)

    def cuts(self, experiment: Experiment) -> Cuts:
        """Return how they may be cut: means of the pairs that are measured are made of all of them."""
        del experiment
        apart = not isinstance(self.value, Mean) or self.fitted_on is not None
        return Cuts(pairs=apart, cells=True, cells_first=True)

    def measured(self, experiment: Experiment) -> Measured:
        """Run the sets here."""
        with undisturbed():
            fitted = job_of_edges(experiment, self.value, self.fitted_on)
            return _measured(experiment, self.asked, self.value, fitted, self.fitted_on)

    def plain(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the sets as plain data, with arrays by their names."""
        value, arrays = plain_value(self.value)
        asked, shape = self.asked, self.asked.masks.shape
        fitted_on = None if self.fitted_on is None else plain_pairs(self.fitted_on)
        told = {"kind": "edges", "value": value, "labels": list(asked.labels), "shape": list(shape), "of": fitted_on}
        bits = np.packbits(asked.masks.reshape(shape[0], int(np.prod(shape[1:]))), axis=1)
        return told, {**arrays, "single": asked.single, "edges": asked.edges, "masks": bits}

    @classmethod
    def of_plain(cls, told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> "EdgeRuns":
        """Return what ``plain`` wrote."""
        shape = tuple(told["shape"])
        bits = np.unpackbits(arrays["masks"], axis=1, count=int(np.prod(shape[1:]))) if shape[0] else np.zeros(shape)
        asked = EdgeSets(told["labels"], arrays["single"], arrays["edges"], bits.reshape(shape).astype(bool))
        fitted_on = None if told["of"] is None else pairs_of_plain(told["of"])
        return cls(asked, carried_of(value_of_plain(told["value"], arrays)), fitted_on)


def _has_reference(experiment: Experiment, carried: Carried) -> bool:
    return not isinstance(carried, Source) and experiment.direction == "noise"


def _measured(
    experiment: Experiment, asked: EdgeSets, carried: Carried, fitted: tuple[Job, Means], fitted_on: Pairs | None
) -> Measured:
    """Run sets of edges here; stopped by Ctrl-C, return what was measured."""
    started = time.perf_counter()
    wiring = wiring_of(experiment.model, experiment.pairs)
    has_reference, n_asked = _has_reference(experiment, carried), len(asked.labels)
    sets = asked.with_run_of(wiring.graph.exists) if has_reference else asked
    of = "" if fitted_on is None else fitted_on.content_hash
    runs = _Runs(experiment, fitted, wiring, sets, _FOUND.setdefault(experiment, {}).setdefault(of, Findings()))
    is_complete = runs.measure(n_asked)
    place = n_asked if has_reference else None
    kept = runs.tally.pairs_with_baselines(place)
    record = {
        "engine": _engine(runs),
        "precision": describe_precision(experiment.model, None),
        "complete": is_complete,
        "cost": {**vars(runs.tally.cost), "seconds": round(time.perf_counter() - started, 3)},
    }
    values, status = runs.tally.values[:, :n_asked, kept], runs.tally.status[:n_asked, kept]
    return Measured(values, status, runs.tally.baselines(kept, experiment.base, place), kept, record)


class _Runs:
    """All runs, each in the way that suits it."""

    def __init__(
        self,
        experiment: Experiment,
        fitted: tuple[Job, Means],
        wiring: Wiring,
        asked: EdgeSets,
        found: Findings[Any],
    ) -> None:
        self.experiment, self.wiring, self.asked = experiment, wiring, asked
        self.job, self.means = fitted
        shape = (len(experiment.metrics), len(asked.labels), len(experiment.pairs))
        status = np.full(shape[1:], Status.SKIPPED, dtype=np.uint8)
        self.tally = Tally(np.full(shape, np.nan), status, np.full((2, shape[0], shape[2]), np.nan))
        self.found = found
        self.restarts = True
        self.why = ""  # why single edges are not run by the wavefront
        self.counts = {"wavefront": 0, "forwards": 0}

    def measure(self, n_asked: int) -> bool:
        """Make the runs; return False where the user stopped them in between.

        Args:
            n_asked: How many of the runs were asked for; controls follow them.
        """
        total = len(self.asked.labels) * len(self.experiment.pairs)
        title = f"edges of '{self.experiment.model.name}'"
        try:
            with bar(title, total, is_shown=self.experiment.show_progress) as advance:
                for block in self._blocks():
                    advance(self.tally.add(block))
        except KeyboardInterrupt:
            n_done = self.tally.n_made(n_asked)
            if not n_done:
                raise
            total = n_asked * len(self.experiment.pairs)
            warnings.warn(
                CausalPatchWarning(f"stopped: {n_done:,} of {total:,} runs were made and are kept"), stacklevel=4
            )
            return False
        return True

    def _blocks(self) -> Iterator[Block]:
        """Make the runs, sets of several edges first: what shares refer to is one of them."""
        asked = self.asked
        if len(asked.masks):
            order = np.roll(np.arange(len(asked.masks)), 1)  # the reference is the last
            yield from self._by_forwards(asked.several[order], asked.masks[order])
        if not len(asked.single):
            return
        if not (yield from self._by_wavefront()):
            size = max(1, MASK_BYTES // int(np.prod(self.wiring.graph.shape)))
            for begin in range(0, len(asked.single), size):
                some = slice(begin, begin + size)
                masks = np.zeros((len(asked.single[some]), *self.wiring.graph.shape), dtype=bool)
                masks[np.arange(len(masks)), *asked.edges[some].T] = True
                yield from self._by_forwards(asked.single[some], masks)

    def _by_wavefront(self) -> Generator[Block, None, bool]:
        """Run single edges by the wavefront; return False where the model does not allow it."""
        if self.experiment.engine not in ("auto", "wavefront"):
            self.why = f'engine="{self.experiment.engine}"'
        elif not isinstance(self.job.interventions[0][0].value, Source):
            self.why = "edges carry other values than the source run's"
        else:
            self.why = single_edges.why_not(self.job, self.experiment.gauge) or ""
        if self.why:
            return False
        runs = SingleEdges(self.job, self.experiment.gauge, self.wiring, self.asked.edges, self.tally.cost)
        try:
            for block in runs.blocks():
                yield block.renumbered(self.asked.single.tolist())
        except ModelUnsupported as error:
            self.why = error.what
            return False
        self.counts["wavefront"] += len(self.asked.single)
        return True

    def _by_forwards(self, numbers: np.ndarray, masks: np.ndarray) -> Iterator[Block]:
        runs = ExactEdges(self.job, self.experiment.gauge, self.wiring, masks, self.means, self.tally.cost, self.found)
        self.restarts &= runs.restarts
        for block in runs.blocks():
            yield block.renumbered(numbers.tolist())
        self.counts["forwards"] += len(numbers)


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


def _record(experiment: Experiment, carried: Carried, reference: str, fitted_on: Pairs | None) -> dict[str, Any]:
    no_share = f"{carried} takes a run apart and cannot restore one" if reference == "none" else ""
    return {
        **describe_program(),
        **describe_setup(experiment.model, experiment.pairs, experiment.metrics, experiment.direction, experiment.seed),
        "site": "edges",
        "value": str(carried),
        **({"fitted_on": describe_pairs(fitted_on or experiment.pairs)} if isinstance(carried, Mean) else {}),
        "reference": reference,
        "no_share": no_share,
        "facts": {
            "granularity": "heads (q, k, v), MLPs",
            "kind": "edge",
            "value": str(carried),
            "positions": "all aligned",
            "direction": experiment.direction,
            "circuit": "sets of edges, the rest of the run intact",
        },
    }
