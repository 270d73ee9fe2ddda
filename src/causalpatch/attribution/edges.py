"""Scores of every edge of a model from a few forwards and backwards.

====================================  =====================================================================
method                                slopes are taken
====================================  =====================================================================
``"eap"``                             at the base run
``"eap-ig"``                          at points between the base's and the source's embeddings
``"eap-ig-activations"``              with each sender's own output between the base's and the source's
``"clean-corrupted"``                 at the clean and at the corrupted run
====================================  =====================================================================

A score approximates the effect of replacing what the sender sends to the receiver, and to it alone, by what it sends in
the source run. It is not a patch: ``patch_edges`` makes one.

References:
    Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit Discovery", 2310.10348; Hanna et al. 2024,
    "Have Faith in Faithfulness", 2403.17806; "Position-aware Automatic Circuit Discovery", 2502.04577.
"""

import time
from functools import partial
from typing import Any, Literal, get_args

import numpy as np

from causalpatch.attribution.confirm import confirm_scores
from causalpatch.attribution.pieces import Scoring, contraction_of, count_slopes, measured_of, points_of, scored
from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import SettingError
from causalpatch.engine.edge_slopes import EdgeSlopes
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.resolve import targets_of
from causalpatch.engine.slopes import Rule, is_rounding, no_gradient, require_steep
from causalpatch.engine.wiring import graph_of, wiring_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_jobs import job_of_senders, patch_of_senders, require_no_source_model
from causalpatch.experiment.measured import Measured
from causalpatch.experiment.provenance import describe_setup, notes_on
from causalpatch.patches import Source
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.provenance import describe_program

EdgeMethod = Literal["eap", "eap-ig", "eap-ig-activations", "clean-corrupted"]


def attribute_edges(
    experiment: Experiment,
    method: EdgeMethod = "eap-ig",
    *,
    steps: int = 5,
    rule: Rule = "midpoint",
    positions: bool = False,
) -> EdgeScores:
    """Score every edge between the embedding, heads, MLPs and the logits.

    Args:
        experiment: Model, pairs, metric and direction; of several metrics the first.
        method: Where slopes are taken; see the table above.
        steps: Points of ``"eap-ig"`` and ``"eap-ig-activations"``.
        rule: Which points: ``"midpoint"``, which makes both directions alike, or ``"eap-ig"``, as in the code of Hanna
            et al., for comparison with theirs.
        positions: Whether the positions of receivers are told apart.

    Returns:
        Scores with the sign of the effect on the metric, means over pairs.

    Raises:
        ModelUnsupported: The model's components are not known by name, or its stream is not the sum of what they add;
            or source runs are made by another model.
        MetricError: The metric has no gradient, such as ``rank``, or spells out answers.
        NoGradient: The metric has no slope at the base run, such as ``kl_from_base``.
        PairError: Prompts of unequal lengths have no alignment.
        SettingError: The method, the rule or the number of steps is not known.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> cp.attribute_edges(experiment, "eap").graph.n_edges
        479

    Cost:
        Per pair a forward of the source run, and a forward and a backward at each point; one forward more where no
        point is the base run, and with ``"eap-ig-activations"`` a forward and a backward for each sender and point.
        Memory: what a forward keeps for its backward; when that is gone, the differences of all senders and the
        gradients of a layer's receivers, of as many pairs at once as fit into the budget.
    """
    _check(experiment, method)
    with undisturbed():
        started = time.perf_counter()
        made = experiment if len(experiment.metrics) == 1 else experiment.measuring(experiment.metrics[:1])
        graph, points = graph_of(made.model), points_of(method, steps, rule, made.base)
        n_columns = made.pairs.aligned().n_columns if positions else 1
        shape = (n_columns, *graph.shape)
        work = EdgeScoring(
            method=method,
            steps=steps,
            rule=rule,
            positions=positions,
            n_cells=int(np.prod(shape)),
            n_slopes=count_slopes(method, points, graph.n_senders, graph.n_layers),
        )
        sums = scored(made, work, partial(work.measured, made))
        require_steep(sums.steepest, made.metrics[0].name, "input of every component", "eap-ig")
        largest, gap = float(np.abs(sums.values).max()) / len(made.pairs), float((sums.source - sums.base).mean())
        if is_rounding(largest, gap):
            raise no_gradient(
                made.metrics[0].name, f"the largest score is {largest:.1e}, of a gap of {gap:.3g}", "eap-ig"
            )
        targets = [targets_of(made.model, patch_of_senders(made.model, Source()))]
    n_pairs = len(experiment.pairs)
    labels = experiment.pairs.aligned().labels(experiment.base) if positions else None
    record: dict[str, Any] = {
        **describe_program(),
        **describe_setup(
            experiment.model, experiment.pairs, experiment.metrics[:1], experiment.direction, experiment.seed
        ),
        "notes": notes_on(experiment.pairs, experiment.base, targets),
        "method": method,
        "points": points.rule,
        "mean_base": float(sums.base.mean()),
        "mean_source": float(sums.source.mean()),
        "contraction": contraction_of(made.model),
        "facts": {
            "granularity": "heads (q, k, v), MLPs",
            "kind": "edge",
            "value": "source",
            "positions": "each aligned column by itself" if positions else "all aligned",
            "direction": experiment.direction,
            "circuit": "single edges, the rest of the run intact; a gradient, not a run",
        },
        "cost": {**sums.cost, "seconds": round(time.perf_counter() - started, 3)},
    }
    total = sums.values.reshape(shape) / n_pairs
    scores = EdgeScores(graph, total if positions else total[0], record, labels)
    return scores.confirmed_by(partial(confirm_scores, experiment))


class EdgeScoring(Scoring):
    """Scores of edges as a work; a cell for each column, sender and receiver."""

    kind = "scores of edges"

    def measured(self, experiment: Experiment) -> Measured:
        """Score edges here."""
        with undisturbed():
            started = time.perf_counter()
            points = points_of(self.method, self.steps, self.rule, experiment.base)
            job, wiring = job_of_senders(experiment, Source()), wiring_of(experiment.model, experiment.pairs)
            gauge = Gauge(experiment.metrics[:1], experiment.pairs, experiment.model)
            own = self.method == "eap-ig-activations"
            sums = EdgeSlopes(job, gauge, wiring, points, by_position=self.positions, own=own).measure()
        return measured_of(sums, sums.total.reshape(-1, 1), pooled=True, seconds=time.perf_counter() - started)


def _check(experiment: Experiment, method: str) -> None:
    if method not in get_args(EdgeMethod):
        raise SettingError(
            f"unknown method {method!r} for scores of edges",
            facts=[("known", ", ".join(get_args(EdgeMethod)))],
            fix='method="eap-ig"',
        )
    require_no_source_model(
        experiment,
        "edges cannot take values from another model's runs",
        "leave source_model= out, or take scores of nodes: attribute(experiment, 'z')",
    )
