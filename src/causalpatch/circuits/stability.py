"""Stability of circuits: how much of one is found again on resampled pairs.

Scores of edges are means over pairs, so those of a resample are weighted means of the scores of its parts. Independent
components of pairs are dealt into blocks, edges are scored once on each block, and bootstrap draws of blocks cost no
run of the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.counts import require_count
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.seeds import generator
from causalpatch.circuits.circuit import Circuit
from causalpatch.circuits.discover import By, Search, discover_circuit
from causalpatch.experiment import Experiment
from causalpatch.experiment.edge_jobs import carried_of
from causalpatch.experiment.subset import with_pairs
from causalpatch.patches import Value
from causalpatch.results.edge_scores import EdgeScores

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

_FEWEST = 4  # blocks below which resamples are nearly all alike


@dataclass(frozen=True, eq=False)
class Stability:
    """How often edges are found again.

    Args:
        circuit: The circuit found on all pairs.
        share: Share of the resamples in whose circuit each edge is, axes (sender, receiver).
        overlap: For each resample, edges in both circuits over edges in either (Jaccard).
        n_blocks: Blocks of independent components that were resampled.
    """

    circuit: Circuit
    share: np.ndarray
    overlap: np.ndarray
    n_blocks: int

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row for each edge that is ever found, with its share of the resamples."""
        some = np.argwhere(self.share > 0)
        at = tuple(some.T)
        frame = pd.DataFrame(
            {"edge": list(self.circuit.graph.names(some)), "share": self.share[at], "in_circuit": self.circuit.mask[at]}
        )
        return frame.sort_values("share", ascending=False, kind="stable").reset_index(drop=True)

    def __str__(self) -> str:
        low, middle, high = np.quantile(self.overlap, (0.05, 0.5, 0.95))
        always = int((self.share[self.circuit.mask] == 1).sum())
        return (
            f"{self.circuit!r}\n  found again on {len(self.overlap)} resamples of {self.n_blocks} blocks of pairs: "
            f"overlap {middle:.2f} (5 % to 95 %: {low:.2f} to {high:.2f}); "
            f"{always} of {self.circuit.n_edges} edges always"
        )


def stability(  # noqa: PLR0913 - what is scored, how a circuit is taken from it, and how pairs are resampled
    experiment: Experiment,
    score: Callable[..., EdgeScores],
    n_edges: int | None = None,
    *,
    fraction: float | None = None,
    method: Search = "top",
    by: By = "importance",
    n_draws: int = 200,
    n_blocks: int = 20,
    value: Value | str | None = None,
) -> Stability:
    """Find a circuit again on bootstrap resamples of the pairs' independent components.

    Args:
        experiment: Model, discovery pairs and metric.
        score: Scores edges of an experiment: ``cp.attribute_edges``, or a function that calls it.
        n_edges: Size of the circuit.
        fraction: Instead, its share of all edges.
        method: As for ``discover_circuit``.
        by: Likewise.
        n_draws: Resamples.
        n_blocks: Most blocks that components are dealt into; each holds the scores of all edges.
        value: What ablated edges carry, for scores that ask: ``score`` is given it as ``value=``, as ``learn_edges``
            takes it. Means are those of a block's own pairs. By default ``score`` is left to its own.

    Raises:
        SettingError: There are fewer than four independent components, or the scores do not ask what edges carry.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:8])
        >>> found = cp.stability(experiment, cp.attribute_edges, 10, n_blocks=4)
        >>> bool(found.overlap.mean() > 0.5)
        True

    Cost:
        What scoring all pairs once costs, in as many parts as there are blocks.
    """
    require_count("n_draws", n_draws, usual=200)
    further = {} if value is None else _carrying(score, value)
    pairs = experiment.pairs
    n_components = len(np.unique(pairs.components))
    count = min(n_blocks, n_components)
    if count < _FEWEST:
        raise SettingError(
            f"pairs cannot be resampled in {count} blocks",
            facts=[("components", n_components), ("needed", f"{_FEWEST} or more")],
            fix="take more independent pairs",
        )
    draw = generator(experiment.seed, "stability")
    block = (draw.permutation(n_components) % count)[pairs.components]
    parts = [
        score(with_pairs(experiment, pairs.take(np.flatnonzero(block == n))), **further).over_positions()
        for n in range(count)
    ]
    sizes = np.bincount(block, minlength=count)

    def circuit_of(times: np.ndarray) -> Circuit:
        weight = times * sizes / (times * sizes).sum()
        values = sum(w * part.values for w, part in zip(weight, parts, strict=True))
        means = {
            key: float(np.dot(weight, [part.provenance[key] for part in parts])) for key in ("mean_base", "mean_source")
        }
        scores = EdgeScores(parts[0].graph, np.asarray(values), {**parts[0].provenance, **means, "pairs": whole})
        return discover_circuit(scores, n_edges, fraction=fraction, method=method, by=by)

    whole = {"name": pairs.name, "hash": pairs.content_hash, "n": len(pairs)}
    circuit = circuit_of(np.ones(count))
    drawn = [circuit_of(draw.multinomial(count, np.full(count, 1 / count))).mask for _ in range(n_draws)]
    overlap = np.array([(mask & circuit.mask).sum() / (mask | circuit.mask).sum() for mask in drawn])
    return Stability(circuit, np.mean(drawn, axis=0), overlap, count)


def _carrying(score: Callable[..., EdgeScores], value: Value | str) -> dict[str, Any]:
    """Return what scores are told of what ablated edges carry.

    Raises:
        SettingError: They do not ask, or edges cannot carry it.
    """
    carried, taken = carried_of(value), inspect.signature(score).parameters.values()
    if not any(each.name == "value" or each.kind is each.VAR_KEYWORD for each in taken):
        raise SettingError(
            f"'{getattr(score, '__name__', score)}' does not ask what ablated edges carry",
            facts=[("value", f"'{carried}'"), ("asked by", "learn_edges, and functions with an argument value=")],
            fix="leave value= out, or stability(experiment, lambda e, value: learn_edges(e, value=value), …)",
        )
    return {"value": value}
