"""Runs in which sets of edges are interchanged: the verb of edges, as ``Experiment.run`` is that of sites."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import MetricError, ModelUnsupported, SettingError
from causalpatch.engine import Job, Means, fit_values
from causalpatch.engine.exact_edges import ExactEdges
from causalpatch.engine.put_in import patches_of_senders
from causalpatch.engine.senders import Senders
from causalpatch.engine.wiring import graph_of, wiring_of
from causalpatch.experiment.experiment import Experiment
from causalpatch.experiment.provenance import describe_precision, describe_setup, notes_on
from causalpatch.patches import Intervention, Mean, Patch, Source, Value, Zero
from causalpatch.patches.value import as_value
from causalpatch.results.effects import Effects
from causalpatch.results.provenance import describe_program
from causalpatch.results.status import Status

Carried = Source | Zero | Mean
"""What edges can carry instead of what their senders give."""


def run_edges(
    experiment: Experiment, masks: np.ndarray, labels: Sequence[str], value: Value | str = "source"
) -> Effects:
    """Measure sets of edges, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction.
        masks: Edges that are interchanged in each run, booleans ``(mask, sender, receiver)``.
        labels: What results call the runs.
        value: What edges carry instead: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``. In the direction noise zero
            and means have a reference: a run with all edges replaced.

    Returns:
        Effects with the axis ``intervention``, then ``pair``.

    Raises:
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known.
        PairError: Prompts of unequal lengths have no alignment.
        MetricError: A metric spells out answers of several tokens.
        SettingError: Edges cannot carry such a value.
    """
    carried = carried_of(value)
    is_ablation = not isinstance(carried, Source)
    has_reference = is_ablation and experiment.direction == "noise"
    with undisturbed():
        started = time.perf_counter()
        job, means = job_of_edges(experiment, carried)
        wiring = wiring_of(experiment.model, experiment.pairs)
        every = np.concatenate([masks, wiring.graph.exists[None]]) if has_reference else masks
        runs = ExactEdges(job, experiment.gauge, wiring, every, means)
        values, untouched = runs.measure()
    base, source = untouched
    clean, corrupt = (base, source) if experiment.base == "clean" else (source, base)
    baselines = {"base": base, "source": source, "clean": clean, "corrupt": corrupt}
    reference = "corrupted run"
    if is_ablation:
        reference = f"{carried} at all edges together" if has_reference else "none"
    if has_reference:
        baselines["reference"], values = values[:, -1], values[:, :-1]
    return Effects.build(
        axes={"intervention": list(labels)},
        pair_ids=[pair.id for pair in experiment.pairs],
        groups=experiment.pairs.components,
        metrics=[metric.name for metric in experiment.metrics],
        values=values,
        status=np.full(values.shape[1:], Status.MEASURED, dtype=np.uint8),
        baselines=baselines,
        provenance=_record(experiment, runs, carried, reference, time.perf_counter() - started),
    )


def carried_of(value: Value | str) -> Carried:
    """Return what edges carry instead.

    Raises:
        PatchError: There is no such value.
        SettingError: Edges cannot carry it.
    """
    found = as_value(value)
    if not isinstance(found, Source | Zero | Mean):
        raise SettingError(
            f"edges cannot carry '{found}'",
            facts=[("known", '"source", "zero", "mean", Mean(…)')],
            fix='value="zero"',
        )
    return found


def job_of_edges(experiment: Experiment, carried: Carried) -> tuple[Job, Means]:
    """Return a job whose one intervention patches all senders, with the means that it puts in.

    Raises:
        ModelUnsupported: The model's components are not known by name, or source runs are made by another model.
        MetricError: A metric reads further forwards than that of the prompt.
    """
    fix = "leave source_model= out"
    require_no_source_model(experiment, "edges cannot take values from another model's runs", fix)
    _require_plain(experiment)
    graph = graph_of(experiment.model)
    patches = patches_of_senders(carried, graph.n_layers, graph.n_heads)
    fitted = fit_values(experiment.job([Intervention(tuple(patches))]))
    return fitted.job, fitted.means


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


def _record(
    experiment: Experiment, runs: ExactEdges, carried: Carried, reference: str, seconds: float
) -> dict[str, Any]:
    no_share = f"{carried} takes a run apart and cannot restore one" if reference == "none" else ""
    how = "from the first layer that is changed" if runs.restarts else "whole forwards"
    return {
        **describe_program(),
        **describe_setup(experiment.model, experiment.pairs, experiment.metrics, experiment.direction, experiment.seed),
        "site": "edges",
        "value": str(carried),
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
        "engine": {"name": "edges", "reason": f"inputs put together in the model's own forward, {how}"},
        "precision": describe_precision(experiment.model, None),
        "notes": notes_on(experiment.pairs, experiment.base, runs.job.interventions),
        "complete": True,
        "cost": {**vars(runs.cost), "seconds": round(seconds, 3)},
    }
