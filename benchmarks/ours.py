"""Our contender: one call of ``causalpatch.sweep``, whichever engine it chooses."""

from dataclasses import dataclass, field

import numpy as np
from torch import nn

import causalpatch as cp
from benchmarks.tasks import Task
from benchmarks.workloads import Workload
from causalpatch.results.status import Status

NAME = "causalpatch"


@dataclass
class Sweep:
    """A workload on a model, ready to be run again and again.

    Args:
        workload: What is swept.
        task: Its pairs and cells.
        module: The model.
        n_derived: Cells that the last run found without running them, counted by pair.
        engine: What the last run said about the engine that it used.
    """

    workload: Workload
    task: Task
    module: nn.Module
    n_derived: int = 0
    engine: str = ""
    experiment: cp.Experiment = field(init=False)

    def __post_init__(self) -> None:
        model = cp.open_model(self.module)
        self.experiment = cp.Experiment(
            model, self.task.pairs, metric=self.task.metric, show_progress=False, **self.workload.settings
        )

    def run(self) -> np.ndarray:
        """Sweep and return the metric of every cell in every pair, ``(layer, along, pair)``."""
        effects = cp.sweep(self.experiment, self.task.site)
        table = effects.to_xarray()
        self.n_derived = int((table["status"].values == Status.DERIVED).sum())
        self.engine = dict(effects.provenance.get("engine") or {}).get("tier", "reference")
        values: np.ndarray = table["metric"].values
        return values

    def mean_over_pairs(self, values: np.ndarray) -> np.ndarray:
        """Return the metric of all cells in their order, averaged over pairs, ``(cell,)``."""
        return values.mean(-1).reshape(-1)

    def largest_effect(self, values: np.ndarray) -> float:
        """Return the largest |mean metric - mean base metric|."""
        base = self.experiment.baseline.corrupt[0].mean()
        return float(np.abs(self.mean_over_pairs(values) - base).max())
