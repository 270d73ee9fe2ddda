"""Scores in pieces: gradients of some pairs at a time, so that a runner can keep them and measure elsewhere.

A piece holds the scores of some pairs; those of edges are summed over them, since of each pair by itself they would be
as large as the model's graph. Cells are never cut: gradients score all of them at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from causalpatch.engine.edge_slopes import EdgeSums
from causalpatch.engine.node_slopes import NodeSums
from causalpatch.experiment import Experiment
from causalpatch.experiment.measured import Measured, Work
from causalpatch.results.status import Status

SLOPE_RUNS: Final = 3  # a forward and a backward, in forwards


@dataclass(frozen=True, eq=False)
class Scored:
    """Scores of all pairs, out of one piece or many.

    Args:
        values: ``(cell, pair)``; of edges ``(cell, 1)``, the sum over pairs.
        base: The metric of each pair's base run.
        source: The metric of each pair's source run.
        cost: What was spent.
        steepest: The largest slope.
    """

    values: np.ndarray
    base: np.ndarray
    source: np.ndarray
    cost: Mapping[str, Any]
    steepest: float


def scored(experiment: Experiment, work: Work, here: Callable[[], Measured]) -> Scored:
    """Measure scores: here, or by the experiment's runner.

    Args:
        experiment: With one metric.
        work: The scores.
        here: Measures them where there is no runner.
    """
    found = here() if experiment.runner is None else experiment.runner.measure(experiment, work)
    base, source = (found.baselines[name][0] for name in ("base", "source"))
    return Scored(found.values[0], base, source, found.record["cost"], float(found.record["steepest"]))


def measured_of(sums: NodeSums | EdgeSums, values: np.ndarray, *, pooled: bool, seconds: float) -> Measured:
    """Return scores as what a runner keeps.

    Args:
        sums: What the engine found.
        values: ``(cell, pair)``, or pooled ``(cell, 1)``.
        pooled: Whether they are summed over pairs.
        seconds: How long it took.
    """
    status = np.where(np.isnan(values), Status.UNALIGNED, Status.MEASURED).astype(np.uint8)
    record = {
        "engine": {"name": "gradients"},
        "complete": True,
        "cost": {**vars(sums.cost), "seconds": round(seconds, 3)},
        "steepest": sums.steepest,
        "pooled": pooled,
    }
    baselines = {"base": sums.base[None], "source": sums.source[None]}
    return Measured(values[None], status, baselines, np.arange(len(sums.base)), record)


def texts_of(work: Any) -> list[str]:
    """Return what names all cells of some scores: what was asked for."""
    return [f"{type(work).__name__} {sorted(asdict(work).items())}"]
