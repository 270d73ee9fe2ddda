"""Exact effects of edges: any set of them interchanged in one run.

===========================  ===================================================================
wanted                       say
===========================  ===================================================================
one edge in each run         ``patch_edges(experiment, ["a0.h3 -> a2.h1<q>", "m0 -> logits"])``
several edges in one run     ``patch_edges(experiment, [["a0.h3 -> m1", "m0 -> logits"]])``
a node, by all its edges     ``patch_edges(experiment, ["a0.h3"])``
masks                        ``patch_edges(experiment, masks)``, booleans (mask, sender, receiver)
===========================  ===================================================================

In the base run, an edge carries what its sender gives in the source run instead of what it gives now, to this receiver
alone; all that follows is computed anew. This is the intervention that scores of edges approximate. With
``value="zero"`` or a mean it carries nothing, or what its sender gives on average.

References:
    Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability", 2304.14997;
    Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching", 2304.05969.
"""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import MetricError, ModelUnsupported, PathError, SettingError
from causalpatch.engine import Job, Means, fit_values
from causalpatch.engine.exact_edges import ExactEdges
from causalpatch.engine.put_in import patches_of_senders
from causalpatch.engine.wiring import graph_of as _graph_of
from causalpatch.engine.wiring import wiring_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.provenance import describe_precision, describe_setup, notes_on
from causalpatch.models import Model
from causalpatch.patches import Intervention, Mean, Source, Value, Zero
from causalpatch.patches.value import as_value
from causalpatch.results.effects import Effects
from causalpatch.results.provenance import describe_program
from causalpatch.results.status import Status
from causalpatch.sites.graph import Graph

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
    edges: Sequence[Asked] | np.ndarray,
    *,
    value: Value | str = "source",
    labels: Sequence[str] | None = None,
) -> Effects:
    """Measure sets of edges, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction.
        edges: For each run an edge or a node by name, or a list of these that are interchanged together; or masks
            ``(mask, sender, receiver)`` over ``graph_of(model)``.
        value: What edges carry instead: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``. Zero and means take a run
            apart, so that there are shares in the direction noise alone: of what is lost with all edges replaced.
        labels: What results call the runs; by default their edges, or ``mask 0``, ``mask 1``, ….

    Returns:
        Effects with the axis ``intervention``, then ``pair``.

    Raises:
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known; or source
            runs are made by another model.
        PathError: There is no such edge or node, or a mask does not fit the graph.
        PairError: Prompts of unequal lengths have no alignment.
        MetricError: A metric spells out answers of several tokens.
        SettingError: Edges cannot carry such a value.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> cp.patch_edges(experiment, ["a0.h3 -> a2.h1<q>", "m0"]).dims
        ('intervention', 'pair')

    Cost:
        One run per set and pair, from the first layer on that reads one of its edges; as many as heads share a key,
        where a set gives them different keys. In a run, a norm and a projection for each head's input that is changed.
    """
    graph, carried = graph_of(experiment), carried_of(value)
    masks, names = _masks(graph, edges)
    names = list(labels) if labels is not None else names
    is_ablation = not isinstance(carried, Source)
    has_reference = is_ablation and experiment.direction == "noise"
    with undisturbed():
        started = time.perf_counter()
        job, means = job_of_edges(experiment, carried)
        every = np.concatenate([masks, graph.exists[None]]) if has_reference else masks
        runs = ExactEdges(job, experiment.gauge, wiring_of(experiment.model, experiment.pairs), every, means)
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
        axes={"intervention": names},
        pair_ids=[pair.id for pair in experiment.pairs],
        groups=experiment.pairs.components,
        metrics=[metric.name for metric in experiment.metrics],
        values=values,
        status=np.full(values.shape[1:], Status.MEASURED, dtype=np.uint8),
        baselines=baselines,
        provenance=_record(experiment, runs, carried, reference, time.perf_counter() - started),
    )


def carried_of(value: Value | str) -> Source | Zero | Mean:
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


def job_of_edges(experiment: Experiment, carried: Source | Zero | Mean) -> tuple[Job, Means]:
    """Return a job whose one intervention patches all senders, with the means that it puts in.

    Raises:
        ModelUnsupported: Source runs are made by another model.
        MetricError: A metric reads further forwards than that of the prompt.
    """
    if experiment.source_model is not None:
        raise ModelUnsupported(
            "edges cannot take values from another model's runs",
            facts=[("why", "what a head sends depends on its own output projection")],
            fix="leave source_model= out",
        )
    _require_plain(experiment)
    graph = graph_of(experiment)
    patches = patches_of_senders(carried, graph.n_layers, graph.n_heads)
    fitted = fit_values(experiment.job([Intervention(tuple(patches))]))
    return fitted.job, fitted.means


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


def _masks(graph: Graph, edges: Sequence[Asked] | np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Return the mask and the name of each run."""
    if isinstance(edges, np.ndarray):
        masks = graph.check(edges)
        return masks, [f"mask {number}" for number in range(len(masks))]
    asked = [edges] if isinstance(edges, str) else list(edges)
    if not asked:
        raise PathError("there are no edges to interchange", fix='patch_edges(experiment, ["m0 -> logits"])')
    groups = [[each] if isinstance(each, str) else list(each) for each in asked]
    made = [
        graph.mask([text for text in group if "->" in text], [text for text in group if "->" not in text])
        for group in groups
    ]
    return np.stack(made), [", ".join(group) for group in groups]


def _record(
    experiment: Experiment, runs: ExactEdges, carried: Source | Zero | Mean, reference: str, seconds: float
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
