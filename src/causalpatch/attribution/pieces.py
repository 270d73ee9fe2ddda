"""Scores in pieces: gradients of some pairs at a time, so that a runner can keep them and measure elsewhere.

A piece holds the scores of some pairs; those of edges are summed over them, since of each pair by itself they would be
as large as the model's graph. Cells are never cut: gradients score all of them at once.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Final, TypeVar

import numpy as np
import torch

from causalpatch.engine.edge_slopes import EdgeSums
from causalpatch.engine.node_slopes import NodeSums
from causalpatch.engine.slopes import Points, Rule
from causalpatch.experiment import Experiment
from causalpatch.experiment.measured import Cuts, Measured, Work, has_same_columns
from causalpatch.models import Model
from causalpatch.pairs.role import Role
from causalpatch.results.status import Status

Made = TypeVar("Made", bound="Scoring")

SLOPE_RUNS: Final = 3  # a forward and a backward, in forwards


def points_of(method: str, steps: int, rule: Rule, base: Role) -> Points:
    """Return where a method takes slopes, of nodes or of edges.

    Args:
        method: The method.
        steps: Points of a way.
        rule: Which.
        base: Which side the base run is.

    Raises:
        SettingError: There are no steps, or no such rule.
    """
    if method in ("eap", "atp", "atp*", "relp"):
        return Points.base()
    return Points.ends() if method == "clean-corrupted" else Points.along(steps, rule, base)


def count_slopes(method: str, points: Points, n_moved: int, n_layers: int) -> int:
    """Count the forwards with a backward that a pair takes.

    Args:
        method: The method.
        points: Where it takes slopes.
        n_moved: What is moved one by one along the way of activations: cells, or senders.
        n_layers: Layers of the model.
    """
    if method == "atp*":
        return n_layers
    return len(points.shares) * (n_moved if method.endswith("ig-activations") else 1)


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


def contraction_of(model: Model) -> str:
    """Return in which type differences and gradients are multiplied: never in fewer bits than float32."""
    return str(torch.promote_types(model.dtype, torch.float32)).removeprefix("torch.")


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Scores as a work: what a runner is asked for, whatever is scored.

    Args:
        method: Where slopes are taken.
        steps: Points of a way.
        rule: Which points.
        positions: Whether positions are told apart.
        n_cells: How many scores there are.
        n_slopes: Forwards with a backward that a pair takes.
    """

    kind: ClassVar[str]
    """What plain data call such scores."""

    method: str
    steps: int
    rule: Rule
    positions: bool
    n_cells: int
    n_slopes: int

    @property
    def runs_per_pair(self) -> int:
        """The two ends, and slopes."""
        return 2 + SLOPE_RUNS * self.n_slopes

    def texts(self) -> list[str]:
        """Return what names the scores: what was asked for."""
        return [f"{type(self).__name__} {sorted(asdict(self).items())}"]

    def take(self: Made, cells: np.ndarray) -> Made:
        """Return all of them: they are not cut."""
        del cells
        return self

    def cuts(self, experiment: Experiment) -> Cuts:
        """Return how they may be cut: by pairs."""
        return Cuts(pairs=not self.positions or has_same_columns(experiment), cells=False)

    def plain(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return it as plain data."""
        return {"kind": self.kind, **asdict(self)}, {}

    @classmethod
    def of_plain(cls: type[Made], told: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> Made:
        """Return what ``plain`` wrote: lists, which stand for tuples in plain data, are tuples again."""
        del arrays
        held: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in told.items()}
        del held["kind"]
        return cls(**held)
