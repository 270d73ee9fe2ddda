"""Runs in which sets of edges are interchanged: the verb of edges, as ``Experiment.run`` is that of sites."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import MetricError, ModelUnsupported
from causalpatch.engine.exact_edges import ExactEdges
from causalpatch.engine.job import Job
from causalpatch.engine.senders import Senders
from causalpatch.engine.wiring import wiring_of
from causalpatch.experiment.experiment import Experiment
from causalpatch.experiment.provenance import describe_precision, describe_setup, notes_on
from causalpatch.patches import Intervention, Patch
from causalpatch.results.effects import Effects
from causalpatch.results.provenance import describe_program
from causalpatch.results.status import Status


def run_edges(experiment: Experiment, masks: np.ndarray, labels: Sequence[str]) -> Effects:
    """Measure sets of edges, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction. Edges carry values of the source run.
        masks: Edges that are interchanged in each run, booleans ``(mask, sender, receiver)``.
        labels: What results call the runs.

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
        wiring = wiring_of(experiment.model, experiment.pairs)
        runs = ExactEdges(job_of_senders(experiment), experiment.gauge, wiring, masks)
        values, untouched = runs.measure()
    base, source = untouched
    clean, corrupt = (base, source) if experiment.base == "clean" else (source, base)
    return Effects.build(
        axes={"intervention": list(labels)},
        pair_ids=[pair.id for pair in experiment.pairs],
        groups=experiment.pairs.components,
        metrics=[metric.name for metric in experiment.metrics],
        values=values,
        status=np.full(values.shape[1:], Status.MEASURED, dtype=np.uint8),
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


def _record(experiment: Experiment, runs: ExactEdges, seconds: float) -> dict[str, Any]:
    how = "from the first layer that is changed" if runs.restarts else "whole forwards"
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
        "engine": {"name": "edges", "reason": f"inputs put together in the model's own forward, {how}"},
        "precision": describe_precision(experiment.model, None),
        "notes": notes_on(experiment.pairs, experiment.base, runs.job.interventions),
        "complete": True,
        "cost": {**vars(runs.cost), "seconds": round(seconds, 3)},
    }
