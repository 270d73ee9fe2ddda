"""ACDC: edges are taken away one by one, from the logits backwards, unless the metric gets worse by a threshold.

1. The circuit begins with all edges. Receivers are visited from the last to the first, the senders of each likewise.
2. An edge is ablated: it carries what its sender gives in the corrupted prompt's run (or zero, or a mean). Let the
   loss be the metric, or its negative where a higher metric is better. If mean loss(without) - mean loss(with) <
   threshold, it stays ablated.
3. Edges that have no way to the logits any more can do nothing; they are taken away without a run.

Candidates are batched: row k of a batch is the circuit without its first k candidates. Rows up to the first edge that
must stay are decided by one forward, the others are tried again with that edge in place. So the result is that of one
candidate after the other, in as many forwards as edges stay, or fewer. Since late edges are tried first, runs begin at
late layers.

Single candidates are judged beside all that still stands: of two edges that do the same (an OR), the first one is taken
away without loss and the second one stays; two that undo each other stay both. With a metric that may rise, edges that
work against the behaviour are taken away; with a distance, such as ``kl_from_base``, they stay.

References:
    Conmy et al. 2023, "Towards Automated Circuit Discovery for Mechanistic Interpretability", 2304.14997.
"""

import time
import warnings
from typing import Any

import numpy as np

from causalpatch.base.counts import require_positive
from causalpatch.base.errors import CausalPatchWarning
from causalpatch.circuits.circuit import Circuit, inputs_of, record_of
from causalpatch.circuits.exact import graph_of
from causalpatch.circuits.keep import first_metric, run_kept
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_jobs import carried_of
from causalpatch.experiment.provenance import describe_setup
from causalpatch.patches import Value
from causalpatch.sites.graph import Graph

_MOST = 256  # candidates in a batch


def acdc(experiment: Experiment, threshold: float, *, value: Value | str = "source") -> Circuit:
    """Return the edges that cannot be taken away one after the other without a loss.

    Args:
        experiment: Model, pairs and metric, of several the first; ``"kl_from_base"`` is the usual one, the logit
            difference the other. Circuits run on clean prompts, whatever its direction.
        threshold: The loss that an edge must prevent to stay, in the metric's unit: nats for ``kl_from_base``.
        value: What ablated edges carry: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``.

    Returns:
        The circuit; its record has the threshold, and how many runs were made. It may have no edges. Stopped by Ctrl-C,
        it is what was left by then, with a warning: edges that were not tried are in it.

    Raises:
        SettingError: The threshold is not above 0.
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known.
        MetricError: The metric spells out answers of several tokens.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4], "kl_from_base")
        >>> circuit = cp.acdc(experiment, threshold=0.1)
        >>> 0 < circuit.fraction < 0.5
        True

    Cost:
        A run per edge and pair, none for edges into a sender of which no edge is left, and as many again, of a batch at
        most, for each edge that stays; clean and corrupted runs for each batch.
    """
    require_positive("threshold", threshold, usual=0.01)
    graph = graph_of(experiment)
    made = first_metric(experiment)
    search = _Search(made, graph, threshold, value)
    started = time.perf_counter()
    try:
        mask, is_complete = search.result(), True
    except KeyboardInterrupt:
        if not search.n_runs or experiment.runner is not None:  # a runner has kept the runs: the search goes on
            raise
        mask, is_complete = search.mask, False
        left = f"{int(mask.sum()):,} of {graph.n_edges:,} edges are left, those among them that were not tried"
        warnings.warn(CausalPatchWarning(f"stopped after {search.n_runs:,} runs: {left}"), stacklevel=2)
    setup = describe_setup(made.model, made.pairs, made.metrics, made.direction, made.seed)
    found: dict[str, Any] = {
        "method": "acdc",
        "threshold": threshold,
        "value": str(carried_of(value)),
        "metric": made.metrics[0].name,
        "runs": search.n_runs,
        "complete": is_complete,
        "seconds": round(time.perf_counter() - started, 3),
    }
    return Circuit(graph, mask, record_of(setup, found, found["value"]))


class _Search:
    """One search.

    Args:
        experiment: In the direction noise, with one metric.
        graph: All edges.
        threshold: The loss that an edge must prevent.
        value: What ablated edges carry.
    """

    def __init__(self, experiment: Experiment, graph: Graph, threshold: float, value: Value | str) -> None:
        self.value = value
        self.experiment, self.graph, self.threshold = experiment, graph, threshold
        self.sign = -1 if experiment.metrics[0].is_higher_when_clean("noise") else 1
        self.into = inputs_of(graph)
        self.mask = graph.exists.copy()
        self.loss = self.sign * float(experiment.baseline.clean[0].mean())
        self.n_runs, self.most = 0, 8

    def result(self) -> np.ndarray:
        """Return the edges that stay."""
        graph = self.graph
        waiting = [(sender, graph.logits) for sender in range(graph.n_senders - 1, -1, -1)]
        self._decide(waiting)
        for sender in range(graph.n_senders - 1, 0, -1):
            # All that hears a sender was decided before: it stands behind it.
            if not self.mask[sender].any():
                self.mask[:, self.into[sender]] = False
                continue
            self._decide(
                [
                    (before, receiver)
                    for receiver in reversed(self.into[sender])
                    for before in range(int(graph.heard[receiver]) - 1, -1, -1)
                ]
            )
        return self.mask

    def _decide(self, waiting: list[tuple[int, int]]) -> None:
        """Take away the candidates that can go, in order."""
        while waiting:
            some = waiting[: self.most]
            masks = np.repeat(self.mask[None], len(some), axis=0)
            for row, edge in enumerate(some):
                masks[(slice(row, None), *edge)] = False
            losses = self.sign * run_kept(self.experiment, masks, self.value).values.mean(-1)
            self.n_runs += len(some)
            stays = np.flatnonzero(~(np.diff(losses, prepend=self.loss) < self.threshold))
            gone = int(stays[0]) if len(stays) else len(some)
            if gone:
                self.mask, self.loss = masks[gone - 1], float(losses[gone - 1])
            waiting = waiting[gone + 1 :] if len(stays) else waiting[gone:]
            self.most = min(self.most, 2 * (gone + 1)) if len(stays) else min(2 * self.most, _MOST)
