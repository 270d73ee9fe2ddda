"""Circuits from scores: the largest edges, or greedily from the logits backwards.

==============  =================================================================================================
method          takes
==============  =================================================================================================
``"top"``       the n edges that score highest, wherever they are
``"greedy"``    one edge after the other: the one that scores highest of those into what was already reached,
                which at first is the logits (Hanna et al.); so that every edge has a way to the logits
==============  =================================================================================================

``by="importance"`` ranks by score / (mean m(source) - mean m(base)): edges that work against the behaviour come last.
``by="magnitude"`` ranks by |score|: these count as much. Edges of equal scores are taken in the order of the graph, and
the record says how many were left that score as much as the last one taken: n is never changed to avoid that.

References:
    Hanna et al. 2024, "Have Faith in Faithfulness", 2403.17806 (both searches); Mueller et al. 2025, "MIB: A
    Mechanistic Interpretability Benchmark", 2504.13151 (importance and magnitude).
"""

import hashlib
import heapq
from typing import Any, Literal, get_args

import numpy as np

from causalpatch.base.counts import require_count
from causalpatch.base.errors import SettingError
from causalpatch.circuits.circuit import Circuit, inputs_of, record_of
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.score_words import importance_of
from causalpatch.sites.graph import Graph

Search = Literal["top", "greedy"]
By = Literal["importance", "magnitude"]


def discover_circuit(
    scores: EdgeScores,
    n_edges: int | None = None,
    *,
    fraction: float | None = None,
    method: Search = "top",
    by: By = "importance",
) -> Circuit:
    """Return the circuit of a size that scores suggest.

    Args:
        scores: Of ``attribute_edges``; where positions are told apart, their sums count.
        n_edges: How many edges.
        fraction: Instead, which share of all edges, rounded down.
        method: ``"top"`` or ``"greedy"``; see the table above.
        by: ``"importance"`` or ``"magnitude"``.

    Raises:
        SettingError: The size is none, 0, or beyond the edges that have a score; or the method or order is not known.
        NoGap: Importance is asked for where base and source have the same mean.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> circuit = cp.discover_circuit(cp.attribute_edges(experiment, "eap"), 12, method="greedy")
        >>> circuit.n_edges
        12

    Cost:
        No run of the model. ``"top"`` sorts all edges; ``"greedy"`` sorts those into each receiver and takes n steps.
    """
    require_scores(scores)
    graph = scores.graph
    taken = size_of(graph, n_edges, fraction)
    order, key = ranking(scores, taken, method, by)
    mask = np.zeros(graph.shape, dtype=bool)
    mask[tuple(graph.edges[order].T)] = True
    left = np.delete(key, order)
    found: dict[str, Any] = {
        "method": f"{method} by {by}",
        "n_edges": taken,
        "tied": int((left == key[order[-1]]).sum()),
        "scores": describe_scores(scores),
    }
    carried = scores.provenance.get("facts", {}).get("value", "source")
    return Circuit(graph, mask, record_of(scores.provenance, found, carried))


def require_scores(scores: object) -> None:
    """Make sure that scores are those of edges.

    Raises:
        SettingError: They are something else.
    """
    if not isinstance(scores, EdgeScores):
        raise SettingError(
            f"a circuit cannot be found by {type(scores).__name__}",
            facts=[("needed", "scores of edges")],
            fix="cp.attribute_edges(experiment)",
        )


def ranking(scores: EdgeScores, n_edges: int, method: str, by: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the first edges in the order in which a search takes them, and what it ranks all by.

    Returns:
        Numbers of edges among ``graph.edges``, and a key of every edge, larger for what is taken earlier.

    Raises:
        SettingError: Fewer edges have a score, or the search is not known.
    """
    for name, given, known in (("method", method, get_args(Search)), ("by", by, get_args(By))):
        if given not in known:
            raise SettingError(
                f"unknown {name} {given!r} to find a circuit",
                facts=[("known", ", ".join(known))],
                fix=f'{name}="{known[0]}"',
            )
    values = scores.over_positions().values
    shares = importance_of(values, scores.provenance) if by == "importance" else np.abs(values)
    key = shares[tuple(scores.graph.edges.T)]
    n_scored = int(np.isfinite(key).sum())
    if n_edges > n_scored:
        raise SettingError(
            f"a circuit of {n_edges:,} edges is larger than the graph",
            facts=[("edges", f"{len(key):,}"), ("with a score", f"{n_scored:,}")],
            fix=f"n_edges={n_scored}, or fewer",
        )
    key = np.where(np.isfinite(key), key, -np.inf)
    if method == "top":
        return np.argsort(-key, kind="stable")[:n_edges], key
    return _greedily(scores.graph, key, n_edges), key


def describe_scores(scores: EdgeScores) -> dict[str, Any]:
    """Return what scores a circuit was found by, as plain data."""
    values = np.ascontiguousarray(scores.values)
    kept: dict[str, Any] = {
        key: scores.provenance[key] for key in ("method", "points", "direction") if key in scores.provenance
    }
    return {**kept, "hash": hashlib.sha256(values.tobytes()).hexdigest()[:16]}


def size_of(graph: Graph, n_edges: int | None, fraction: float | None) -> int:
    """Return how many edges a circuit has.

    Raises:
        SettingError: Neither or both are given, or the circuit would have none.
    """
    if (n_edges is None) == (fraction is None):
        raise SettingError(
            "a circuit has a number of edges or a share of them",
            facts=[("edges", f"{graph.n_edges:,}")],
            fix="n_edges=20",
        )
    if n_edges is not None and n_edges != 0:
        require_count("n_edges", n_edges, usual=20)
        return int(n_edges)
    if fraction is not None and 0 < fraction <= 1 and share_of(graph, fraction):
        return share_of(graph, fraction)
    what = f"n_edges={n_edges}" if fraction is None else f"fraction={fraction}"
    raise SettingError(
        f"{what} is no size of a circuit",
        facts=[("edges", f"{graph.n_edges:,}"), ("smallest fraction", f"{1 / graph.n_edges:.2g}")],
        fix="n_edges=20",
    )


def share_of(graph: Graph, fraction: float) -> int:
    """Return how many edges a share of all is, rounded down."""
    return int(fraction * graph.n_edges + 1e-9)


def _greedily(graph: Graph, key: np.ndarray, n_edges: int) -> np.ndarray:
    """Return edges in the order in which the best one into what is reached is taken."""
    senders, receivers = graph.edges.T
    by_receiver = np.lexsort((np.arange(len(key)), -key, receivers))
    begins = np.searchsorted(receivers[by_receiver], np.arange(graph.n_receivers + 1)).tolist()
    into = inputs_of(graph)
    # Of each reached receiver its best edge that is left: (-key, number of the edge, place among those sorted).
    waiting: list[tuple[float, int, int]] = []

    def offer(place: int, receiver: int) -> None:
        if place < begins[receiver + 1]:
            number = int(by_receiver[place])
            heapq.heappush(waiting, (-float(key[number]), number, place))

    offer(begins[graph.logits], graph.logits)
    reached = {0}
    order: list[int] = []
    while len(order) < n_edges:
        cost, number, place = heapq.heappop(waiting)
        if np.isinf(cost):
            raise SettingError(
                f"only {len(order):,} edges with a score lead to the logits",
                facts=[("asked for", f"{n_edges:,}")],
                fix='n_edges=…, or method="top"',
            )
        order.append(number)
        offer(place + 1, int(receivers[number]))
        sender = int(senders[number])
        if sender not in reached:
            reached.add(sender)
            for receiver in into[sender]:
                offer(begins[receiver], receiver)
    return np.array(order)
