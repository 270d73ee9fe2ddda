"""Shi et al.'s test of minimality: whether an edge matters as much as random edges that a circuit does not need.

1. The circuit is inflated by a random path from the embedding to the logits, and one of the edges that were added is
   taken out again: how much f changes by that is what a needless edge does. This is drawn many times.
2. Each edge of the circuit is taken out by itself. The null for it: its change is larger than that of a random edge at
   least a share ``quantile`` of the time. The number of random ones that it beats is binomial at the null's end.
3. p of all edges are adjusted together (Holm). A small one says that the edge does no more than a random one, so that
   the circuit is not minimal. A large one shows nothing: not that the edge is needed.

References:
    Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs", 2410.13032.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from causalpatch.base.counts import require_count
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.seeds import generator
from causalpatch.circuits.circuit import Circuit, inputs_of
from causalpatch.circuits.keep import first_metric, run_kept
from causalpatch.experiment import Experiment
from causalpatch.patches import Value
from causalpatch.sites.graph import Graph
from causalpatch.statistics.families import holm

if TYPE_CHECKING:
    import pandas as pd
    from scipy import special
else:
    pd = lazy("pandas")
    special = lazy("scipy.special")


def minimality_test(
    experiment: Experiment,
    circuit: Circuit,
    *,
    n_random: int = 100,
    quantile: float = 0.9,
    value: Value | str = "source",
) -> pd.DataFrame:
    """Test for each edge of a circuit whether it does more than random edges that the circuit does not need.

    Args:
        experiment: Model, pairs and metric, of several the first.
        circuit: The circuit.
        n_random: Random inflated circuits.
        quantile: Share of random edges that an edge should beat; that of the paper unless given.
        value: What ablated edges carry: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``.

    Returns:
        A row per edge, that of the smallest p first: ``edge``, ``change`` of f without it, ``beats``, the share of
        random edges with a smaller change, ``p`` and ``p_holm``; small where the edge is not needed.

    Raises:
        ModelUnsupported: The circuit is of another model.
        RequestError: The circuit has no edges.
        SettingError: The circuit has all edges, the numbers are impossible, or edges cannot carry such a value.

    Cost:
        ``2 n_random + edges + 1`` runs per pair.
    """
    circuit.require(experiment.model)
    circuit.require_edges()
    require_count("n_random", n_random, usual=100)
    if not 0 < quantile < 1 or circuit.n_edges == circuit.graph.n_edges:
        raise SettingError(
            "there are no random edges to compare those of the circuit with",
            facts=[("random", n_random), ("quantile", quantile), ("left over", circuit.complement().n_edges)],
            fix="n_random=100, quantile=0.9, and a circuit that leaves edges over",
        )
    draw = generator(experiment.seed, "minimality test")
    masks = [circuit.mask]
    edges = np.argwhere(circuit.mask)
    for edge in edges:
        masks.append(_without(circuit.mask, edge))
    for _ in range(n_random):
        path = _random_path(circuit, draw)
        inflated = circuit.mask.copy()
        inflated[tuple(path.T)] = True
        added = path[~circuit.mask[tuple(path.T)]]
        masks += [inflated, _without(inflated, added[draw.integers(len(added))])]
    f = run_kept(first_metric(experiment), np.stack(masks), value).f
    changes = np.abs(f[0] - f[1 : len(edges) + 1])
    inflated_f = f[len(edges) + 1 :].reshape(n_random, 2)
    random_changes = np.abs(inflated_f[:, 0] - inflated_f[:, 1])
    beats = (changes[:, None] > random_changes).sum(1)
    p = special.bdtr(beats, n_random, quantile)
    frame = pd.DataFrame(
        {
            "edge": list(circuit.graph.names(edges)),
            "change": changes,
            "beats": beats / n_random,
            "p": p,
            "p_holm": holm(p),
        }
    )
    return frame.sort_values("p", kind="stable").reset_index(drop=True)


def _without(mask: np.ndarray, edge: np.ndarray) -> np.ndarray:
    made = mask.copy()
    made[tuple(edge)] = False
    return made


def _random_path(circuit: Circuit, draw: np.random.Generator) -> np.ndarray:
    """Return the edges of a random path from the embedding to the logits, one of which is not in the circuit."""
    graph, into = circuit.graph, inputs_of(circuit.graph)
    rest = np.argwhere(graph.exists & ~circuit.mask)
    sender, receiver = map(int, rest[draw.integers(len(rest))])
    path = [(sender, receiver)]
    while sender:  # backwards to the embedding
        receiver_before = int(draw.choice(into[sender]))
        sender = int(draw.integers(graph.heard[receiver_before]))
        path.append((sender, receiver_before))
    while receiver != graph.logits:  # forwards to the logits
        sender = _component(graph, into, receiver)
        receiver = int(draw.choice(np.flatnonzero(graph.exists[sender])))
        path.append((sender, receiver))
    return np.array(path)


def _component(graph: Graph, into: list[list[int]], receiver: int) -> int:
    """Return the sender whose input a receiver is."""
    return next(sender for sender in range(graph.n_senders) if receiver in into[sender])
