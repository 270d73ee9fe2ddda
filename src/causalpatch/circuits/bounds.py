"""Completeness and minimality of a circuit, by search: what is found bounds them from one side alone.

*Completeness* (Wang et al.): a circuit C is complete if it goes on to behave as the model N when any of its edges K are
taken out of both. ``violation(K) = |f(C without K) - f(N without K)|``. There are too many K to try all: random ones
are drawn, and one is built up edge by edge, each time by the one of some drawn candidates that makes it largest.

*Minimality*: an edge e of C is needed if taking it out changes f, by itself or beside some K that are out as well:
``change(e) = max over K of |f(C without K) - f(C without K and e)|``.

K is sought on the experiment's pairs. There the largest violation is too large, as the winner of many. So it is
measured again on held-out pairs, with an interval. It is that of *some* K: that of all K may be larger, and no search
shows that a circuit is complete, or an edge useless.

References:
    Wang et al. 2023, "Interpretability in the Wild", 2211.00593.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from causalpatch.base.counts import require_count
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.seeds import generator
from causalpatch.circuits.circuit import Circuit
from causalpatch.circuits.keep import Kept, first_metric, require_independent, run_kept
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_jobs import carried_of, require_means
from causalpatch.experiment.subset import with_pairs
from causalpatch.pairs import Pairs
from causalpatch.patches import Mean, Value
from causalpatch.statistics.intervals import Interval, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")


@dataclass(frozen=True)
class Violation:
    """The largest violation of completeness that was found.

    Args:
        edges: The edges K that are taken out.
        found: Its size on the pairs it was sought on: too large, as it is the largest of many.
        held_out: f(C without K) - f(N without K) on held-out pairs, signed, with its interval; None without such pairs.
        n_tried: Sets that were tried.
    """

    edges: list[str]
    found: float
    held_out: Interval | None
    n_tried: int

    def __str__(self) -> str:
        lines = [
            f"largest violation of completeness found: {self.found:.3f} (of {self.n_tried} sets tried; exploratory)",
            f"  without {', '.join(self.edges)}",
        ]
        if self.held_out is not None:
            lines.append(f"  on held-out pairs {_interval(self.held_out)}")
        return "\n".join([*lines, "  that of all sets may be larger: this does not show that the circuit is complete"])


def completeness(
    experiment: Experiment,
    circuit: Circuit,
    held_out: Pairs | None = None,
    *,
    n_random: int = 40,
    n_steps: int = 5,
    n_candidates: int = 10,
    value: Value | str = "source",
) -> Violation:
    """Search for edges without which the circuit and the model differ most.

    Args:
        experiment: Model, pairs to search on, and metric, of several the first.
        circuit: The circuit.
        held_out: Pairs to measure what was found on.
        n_random: Random sets, of sizes from one edge to half of the circuit.
        n_steps: Most edges of the set that is built up.
        n_candidates: Edges that are tried in each step.
        value: What ablated edges carry: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``. Means are
            those of the experiment's pairs, also where held-out ones are run.

    Raises:
        ModelUnsupported: The circuit is of another model.
        RequestError: The circuit has no edges.
        PairError: Held-out pairs share prompts, entities or groups with those that are searched on.
        SettingError: Nothing is to be tried, or edges cannot carry such a value.

    Cost:
        Two runs per pair for each set that is tried: ``2 (n_random + n_steps n_candidates)``.
    """
    _require(experiment, circuit, held_out, value, n_random=n_random, n_steps=n_steps, n_candidates=n_candidates)
    if not n_random + n_steps * n_candidates:
        raise SettingError("no sets of edges are to be tried", fix="n_random=40")
    made, graph = first_metric(experiment), circuit.graph
    edges = np.argwhere(circuit.mask)
    draw = generator(experiment.seed, "completeness")

    def violations(sets: Sequence[np.ndarray]) -> np.ndarray:
        kept = run_kept(made, _without(circuit, sets), value)
        sizes: np.ndarray = np.abs(kept.f[: len(sets)] - kept.f[len(sets) :])
        return sizes

    most = max(1, len(edges) // 2)
    tried = [draw.choice(len(edges), int(draw.integers(1, most + 1)), replace=False) for _ in range(n_random)]
    sizes = violations([edges[each] for each in tried]) if tried else np.zeros(0)
    n_tried = len(tried)
    best, size = (tried[int(sizes.argmax())], float(sizes.max())) if tried else (np.zeros(0, dtype=int), -1.0)
    grown = np.zeros(0, dtype=int)
    for _ in range(min(n_steps, len(edges)) if n_candidates else 0):
        left = np.setdiff1d(np.arange(len(edges)), grown)
        candidates = draw.choice(left, min(n_candidates, len(left)), replace=False)
        sets = [np.append(grown, candidate) for candidate in candidates]
        sizes = violations([edges[each] for each in sets])
        n_tried += len(sets)
        grown = sets[int(sizes.argmax())]
        if sizes.max() > size:
            best, size = grown, float(sizes.max())
    chosen = edges[np.sort(best)]
    interval = None
    if held_out is not None:
        on = with_pairs(made, held_out)
        interval = _difference(run_kept(on, _without(circuit, [chosen]), value, made.pairs), held_out, experiment.seed)[
            0
        ]
    return Violation(list(graph.names(chosen)), size, interval, n_tried)


def minimality(
    experiment: Experiment,
    circuit: Circuit,
    held_out: Pairs | None = None,
    *,
    n_sets: int = 2,
    value: Value | str = "source",
) -> pd.DataFrame:
    """Search for what each edge of the circuit is needed for.

    Args:
        experiment: Model, pairs to search on, and metric, of several the first.
        circuit: The circuit.
        held_out: Pairs to measure what was found on.
        n_sets: Random sets K of a tenth of the circuit, besides the empty one.
        value: What ablated edges carry: ``"source"``, ``"zero"``, ``"mean"`` or a ``Mean``. Means are
            those of the experiment's pairs, also where held-out ones are run.

    Returns:
        A row per edge, that of the least change first: ``edge``, ``change`` that was found, ``n_out``, how many other
        edges were out then; with held-out pairs also ``held_out``, ``low`` and ``high``. The first row is the largest
        violation of minimality found; an edge that changes nothing here may be needed beside another K.

    Raises:
        ModelUnsupported: The circuit is of another model.
        RequestError: The circuit has no edges.
        PairError: Held-out pairs share prompts, entities or groups with those that are searched on.
        SettingError: Edges cannot carry such a value.

    Cost:
        ``(n_sets + 1) (edges + 1)`` runs per pair, and two per edge and held-out pair.
    """
    _require(experiment, circuit, held_out, value, n_sets=n_sets)
    made = first_metric(experiment)
    edges = np.argwhere(circuit.mask)
    draw = generator(experiment.seed, "minimality")
    size = max(1, len(edges) // 10)
    sets = [np.zeros(0, dtype=int), *(draw.choice(len(edges), size, replace=False) for _ in range(n_sets))]
    masks = []
    for out in sets:
        kept = circuit.mask.copy()
        kept[tuple(edges[out].T)] = False
        masks.append(kept)
        for edge in edges:
            without = kept.copy()
            without[tuple(edge)] = False
            masks.append(without)
    f = run_kept(made, np.stack(masks), value).f.reshape(len(sets), -1)
    changes = np.abs(f[:, :1] - f[:, 1:])
    best = changes.argmax(0)
    frame = pd.DataFrame(
        {"edge": list(circuit.graph.names(edges)), "change": changes.max(0), "n_out": [len(sets[n]) for n in best]}
    )
    if held_out is not None:
        rows = np.arange(len(edges))
        beside = np.stack([masks[n * (len(edges) + 1)] for n in best])
        without = np.stack([masks[n * (len(edges) + 1) + 1 + row] for row, n in zip(rows, best, strict=True)])
        both = run_kept(with_pairs(made, held_out), np.concatenate([beside, without]), value, made.pairs)
        found = _difference(both, held_out, experiment.seed)
        frame = frame.assign(**{name: [getattr(each, key) for each in found] for name, key in _COLUMNS.items()})
        frame.attrs["notes"] = list(dict.fromkeys(each.note for each in found if each.note))
    return frame.sort_values("change", kind="stable").reset_index(drop=True)


_COLUMNS = {"held_out": "estimate", "low": "low", "high": "high"}


def _without(circuit: Circuit, sets: Sequence[np.ndarray]) -> np.ndarray:
    """Return the circuit without each set of edges, then the model without each."""
    masks = np.repeat(np.stack([circuit.mask, circuit.graph.exists]), len(sets), axis=0)
    for row, edges in enumerate(sets):
        for half in (row, len(sets) + row):
            masks[(half, *edges.T)] = False
    return masks


def _difference(kept: Kept, pairs: Pairs, seed: int) -> list[Interval]:
    """Return f of the first half of the runs less that of the second, each with its interval."""
    first, second = np.split(kept.values, 2)
    gap = kept.clean - kept.empty
    return [ratio_interval(row, gap, pairs.components, seed=seed) for row in first - second]


def _require(
    experiment: Experiment, circuit: Circuit, held_out: Pairs | None, value: Value | str, **numbers: int
) -> None:
    circuit.require(experiment.model)
    circuit.require_edges()
    if held_out is not None:
        require_independent(held_out, experiment.pairs, "the pairs that are searched on")
        carried = carried_of(value)
        if isinstance(carried, Mean):
            require_means(carried, experiment.pairs, held_out)
    for name, number in numbers.items():
        require_count(name, number, 0, usual=5)


def _interval(at: Interval) -> str:
    around = f"[{at.low:.3f}, {at.high:.3f}]" if at.is_bounded else f"(no interval: {at.note})"
    return f"{at.estimate:+.3f} {around}"
