"""Masks of edges learnt by gradient descent: hard concrete gates, uniform gradient sampling, sigmoid top-k.

1. Every edge has a logit. In each step gates between 0 and 1 are drawn for the pairs of a batch, and the model runs on
   their clean prompts with each edge as far from what its sender gives to what replaces it as its gate says.
2. The loss is ``"gap"``, the square of what the metric is off by, as a share of the mean gap between clean and
   corrupted runs; or ``"kl"``, the divergence from what the model says of the whole vocabulary, in nats. Logits follow
   its slope (Adam).
3. ``"hard-concrete"`` and ``"ugs"`` are held to a size: with s the share that is kept on average and t the one wanted,
   the loss grows by a (s - t) + b (s - t)^2, in which a and b rise as long as s is off. t goes from 1 to the size over
   the first half of the steps. (Li & Janson set the price of an edge themselves; here it is what leads to the size.)
4. ``"sigmoid-topk"`` draws a size for every row, so that one order of the edges serves all sizes.

What is learnt is the order of edges by their logits. It fits the pairs that it was learnt on: evaluate it on others.

==================  ========================  ===============================================================
method              needs a size              gates in training
==================  ========================  ===============================================================
``"hard-concrete"``  yes                      0, 1, and some between
``"ugs"``            yes                      0 and 1, and uniform between for a share p (1 - p) of the draws
``"sigmoid-topk"``   no                       between 0 and 1
==================  ========================  ===============================================================

References:
    Bhaskar et al. 2024, "Finding Transformer Circuits with Edge Pruning", 2406.16778; Louizos et al. 2018, 1712.01312;
    Li & Janson 2024, "Optimal ablation for interpretability", 2409.09951; "Sigmoid top-k", 2609.25518.
"""

import time
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from causalpatch.base.collector import undisturbed
from causalpatch.base.counts import require_count, require_positive
from causalpatch.base.errors import NoGap, SettingError
from causalpatch.base.progress import bar
from causalpatch.base.seeds import generator
from causalpatch.circuits.circuit import Circuit, record_of
from causalpatch.circuits.discover import discover_circuit, size_of
from causalpatch.circuits.exact import graph_of
from causalpatch.circuits.gates import Gates, HardConcrete, TopK, Uniform
from causalpatch.circuits.keep import first_metric
from causalpatch.circuits.learning import RUNS_PER_ROW, Kept, State
from causalpatch.engine.soft_edges import Loss, SoftEdges
from causalpatch.engine.wiring import wiring_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_jobs import carried_of, job_of_edges
from causalpatch.experiment.provenance import describe_setup, notes_on
from causalpatch.patches import Value
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.provenance import describe_program
from causalpatch.results.score_words import LEARNT, UNSIGNED

Learning = Literal["sigmoid-topk", "hard-concrete", "ugs"]
Objective = Literal["gap", "kl"]

_GATES: dict[str, type[Gates]] = {
    "sigmoid-topk": TopK,
    "hard-concrete": HardConcrete,
    "ugs": Uniform,
}
_ROWS = 16  # pairs in a step
_WARM = 0.5  # share of the steps in which the size goes down to the one asked for
_PRICE_RATE = 0.5


def learn_circuit(  # noqa: PLR0913 - what is learnt, how large it is to be, and how it is learnt
    experiment: Experiment,
    n_edges: int | None = None,
    *,
    fraction: float | None = None,
    method: Learning = "hard-concrete",
    objective: Objective = "gap",
    steps: int = 300,
    rate: float = 0.1,
    value: Value | str = "source",
) -> Circuit:
    """Return the circuit of a size whose edges have the largest gates after learning.

    Args:
        experiment: Model, discovery pairs and metric, of several the first; its seed is that of all draws. Circuits run
            on clean prompts, whatever its direction.
        n_edges: How many edges.
        fraction: Instead, which share of all edges, rounded down.
        method: ``"hard-concrete"``, ``"ugs"`` or ``"sigmoid-topk"``.
        objective: ``"gap"`` or ``"kl"``; see above.
        steps: Steps of gradient descent.
        rate: Rate of Adam.
        value: What ablated edges carry: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``.

    Returns:
        The circuit; its record has how it was learnt, the losses of the first and the last tenth of the steps, and the
        seconds.

    Raises:
        SettingError: The size is none, or a setting is not known.
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known.
        MetricError: The metric spells out answers of several tokens, or has no gradient.
        NoGap: The objective is the gap, and there is none.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> circuit = cp.learn_circuit(experiment, 40, steps=5)
        >>> circuit.n_edges
        40

    Cost:
        A forward and a backward for each step and each of up to 16 pairs; memory as ``learn_edges``.
    """
    size = size_of(graph_of(experiment), n_edges, fraction)
    scores = learn_edges(experiment, method, size, objective=objective, steps=steps, rate=rate, value=value)
    chosen = discover_circuit(scores, size)
    found = {**scores.provenance[LEARNT], "n_edges": size, "tied": chosen.record["found"]["tied"]}
    record = record_of(scores.provenance, found, scores.provenance["facts"]["value"])
    return Circuit(chosen.graph, chosen.mask, record)


def learn_edges(
    experiment: Experiment,
    method: Learning = "sigmoid-topk",
    n_edges: int | None = None,
    *,
    objective: Objective = "gap",
    steps: int = 300,
    rate: float = 0.1,
    value: Value | str = "source",
) -> EdgeScores:
    """Learn a gate for every edge; the order of these gives circuits of all sizes.

    Args:
        experiment: As for ``learn_circuit``.
        method: Likewise; ``"sigmoid-topk"`` is made for all sizes at once.
        n_edges: The size that ``"hard-concrete"`` and ``"ugs"`` are held to.
        objective: ``"gap"`` or ``"kl"``; see above.
        steps: Steps of gradient descent.
        rate: Rate of Adam.
        value: What ablated edges carry.

    Returns:
        The gates, 0 to 1, as scores for ``discover_circuit`` and ``evaluate_circuit``. They are no effects: by
        importance and by magnitude their order is the same.

    Raises:
        SettingError: A setting is not known, or a size is missing, or given to a method that has none.
        ModelUnsupported: The model's components are not known by name, or wired in a way that is not known.
        MetricError: The metric spells out answers of several tokens, or has no gradient.
        NoGap: The objective is the gap, and there is none.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> gates = cp.learn_edges(experiment, steps=5)
        >>> cp.discover_circuit(gates, 20).n_edges
        20

    Cost:
        A forward and a backward for each step and each of up to 16 pairs. Memory: about six copies of the stream of
        every receiver for as many rows at once as fit into the budget.
    """
    _check(experiment, method, n_edges, objective, steps, rate)
    started = time.perf_counter()
    made = first_metric(experiment)
    carried = carried_of(value)
    with undisturbed():
        measured = made.measuring("kl_from_base") if objective == "kl" else made
        loss = _loss(made, objective)
        job, means = job_of_edges(measured, carried)
        soft = SoftEdges(job, measured.gauge, wiring_of(made.model, made.pairs), means)
        descent = _Descent(measured, soft, loss, _GATES[method](soft.wiring.graph.n_edges, made.model.device))
        name = {"learn": method, "objective": objective, "steps": steps, "rate": rate, "value": str(carried)}
        losses = descent.run(steps, rate, n_edges, Kept.of(made, {**name, "n_edges": n_edges}))
    tenth = max(1, steps // 10)
    learnt = {
        "method": method,
        "objective": objective,
        "steps": steps,
        "rate": rate,
        "value": str(carried),
        "first_loss": float(np.mean(losses[:tenth])),
        "last_loss": float(np.mean(losses[-tenth:])),
        **({} if n_edges is None else {"held_to": n_edges}),
        "seconds": round(time.perf_counter() - started, 3),
    }
    baseline = made.baseline
    record: dict[str, Any] = {
        **describe_program(),
        **describe_setup(made.model, made.pairs, made.metrics, made.direction, made.seed),
        "notes": notes_on(made.pairs, made.base, job.interventions),
        "method": method,
        UNSIGNED: True,
        LEARNT: learnt,
        "mean_base": float(baseline.clean.mean()),
        "mean_source": float(baseline.corrupt.mean()),
        "facts": {
            "granularity": "heads (q, k, v), MLPs",
            "kind": "edge",
            "value": str(carried),
            "positions": "all aligned",
            "direction": "noise",
            "circuit": "gates of all edges, learnt together",
        },
        "cost": {**vars(soft.cost), "seconds": learnt["seconds"]},
    }
    return EdgeScores(soft.wiring.graph, descent.gates_by_edge(), record)


def runs_of_learning(n_pairs: int, steps: int) -> int:
    """Return how many runs learning takes: a forward and a backward, of two, for each step and pair of a batch.

    Args:
        n_pairs: Pairs; a step sees 16 of them at most.
        steps: Steps.
    """
    sizes = [len(part) for part in _batches(np.arange(n_pairs))]
    return RUNS_PER_ROW * sum(sizes[step % len(sizes)] for step in range(steps))


def _batches(order: np.ndarray) -> list[np.ndarray]:
    """Return the pairs of each step, in turn."""
    return [np.sort(part) for part in np.array_split(order, -(-len(order) // _ROWS))]


class _Descent:
    """Gradient descent on the gates of all edges.

    Args:
        experiment: In the direction noise, with the metric that the loss is made of.
        soft: Runs with edges cut by shares.
        loss: The loss of rows.
        gates: What is learnt.
    """

    def __init__(self, experiment: Experiment, soft: SoftEdges, loss: Loss, gates: Gates) -> None:
        self.experiment, self.soft, self.loss, self.gates = experiment, soft, loss, gates
        self.graph = soft.wiring.graph
        self.exists = torch.as_tensor(self.graph.exists, device=gates.logits.device)

    def run(self, steps: int, rate: float, n_edges: int | None, kept: Kept) -> list[float]:
        """Learn, or go on with it; return the mean loss of every step, without the price of edges."""
        seed = generator(self.experiment.seed, "learnt gates")
        draws = torch.Generator().manual_seed(int(seed.integers(2**62)))
        order = seed.permutation(len(self.experiment.pairs))
        batches = _batches(order)
        descent = torch.optim.Adam([self.gates.logits], lr=rate)
        prices = torch.zeros(2, device=self.gates.logits.device, requires_grad=True)
        ascent = torch.optim.Adam([prices], lr=_PRICE_RATE, maximize=True)
        state = State({"logits": self.gates.logits, "prices": prices}, (descent, ascent), draws)
        losses = kept.recall(state)
        every = kept.every(RUNS_PER_ROW * len(batches[0]))
        with bar("learning", steps, is_shown=self.experiment.show_progress) as advance, torch.enable_grad():
            advance(len(losses))
            begun = len(losses)
            for step in range(begun, steps):
                if step > begun and step % every == 0:
                    kept.keep(state, losses)
                descent.zero_grad()
                ascent.zero_grad()
                losses.append(self._slope(batches[step % len(batches)], draws))
                size = self.gates.size()
                if size is not None and n_edges is not None:
                    done = min(1.0, step / max(1.0, _WARM * steps))
                    off = size - (1 + (n_edges / self.graph.n_edges - 1) * done)
                    torch.autograd.backward(prices[0] * off + prices[1] * off.square())
                    ascent.step()
                descent.step()
                advance(1)
        return losses

    def gates_by_edge(self) -> np.ndarray:
        """Return sigmoids of the logits, ``(sender, receiver)``; in float64, in which large ones are not all 1."""
        found = np.full(self.graph.shape, np.nan)
        found[self.graph.exists] = torch.sigmoid(self.gates.logits.detach().double()).cpu().numpy()
        return found

    def _slope(self, pairs: np.ndarray, draws: torch.Generator) -> float:
        """Add the slope of the mean loss of a batch to that of the logits."""
        kept = self.gates.draw(len(pairs), draws)
        shares = torch.zeros(len(pairs), *self.graph.shape, device=kept.device)
        shares[:, self.exists] = 1 - kept.detach()
        losses, slopes = self.soft.slopes(pairs, shares, self.loss)
        torch.autograd.backward(kept, -slopes[:, self.exists] / len(pairs))
        return float(losses.mean())


def _loss(experiment: Experiment, objective: Objective) -> Loss:
    """Return the loss of rows.

    Raises:
        NoGap: Clean and corrupted runs have the same mean.
    """
    if objective == "kl":
        return _as_it_is
    baseline = experiment.baseline
    gap = float(baseline.clean[0].mean() - baseline.corrupt[0].mean())
    if gap == 0:
        raise NoGap(
            "clean and corrupted runs have the same mean metric, so that no share of the gap can be learnt",
            facts=[("mean", float(baseline.clean[0].mean()))],
            fix='objective="kl", or pairs on which the metric differs',
        )
    clean = torch.as_tensor(baseline.clean[0], device=experiment.model.device)
    return partial(_off, clean, gap)


def _as_it_is(values: Tensor, pairs: Tensor) -> Tensor:
    del pairs
    return values


def _off(clean: Tensor, gap: float, values: Tensor, pairs: Tensor) -> Tensor:
    return ((values - clean[pairs].to(values)) / gap).square()


def _check(experiment: Experiment, method: str, n_edges: int | None, objective: str, steps: int, rate: float) -> None:
    for name, given, known in (("method", method, get_args(Learning)), ("objective", objective, get_args(Objective))):
        if given not in known:
            raise SettingError(
                f"unknown {name} {given!r} to learn a circuit",
                facts=[("known", ", ".join(known))],
                fix=f'{name}="{known[0]}"',
            )
    require_count("steps", steps, usual=300)
    require_positive("rate", rate, usual=0.1)
    if n_edges is not None:
        require_count("n_edges", n_edges, usual=20)
    n_all = graph_of(experiment).n_edges
    if method != "sigmoid-topk" and (n_edges is None or not 0 < n_edges <= n_all):
        raise SettingError(
            f"'{method}' is held to a number of edges",
            facts=[("asked for", n_edges), ("edges", f"{n_all:,}")],
            fix=f'n_edges={max(1, n_all // 20)}, or method="sigmoid-topk" for all sizes',
        )
