"""What a run has measured so far, so that stopping it loses nothing."""

from dataclasses import dataclass, field

import numpy as np

from causalpatch.engine import BASE, SOURCE, Block, Cost, Job
from causalpatch.results.status import Status


@dataclass
class Tally:
    """Numbers as they come in.

    Args:
        values: Metrics of the interventions, ``(metric, intervention, pair)``; NaN until measured.
        status: Codes of ``Status``, ``(intervention, pair)``; skipped until measured.
        untouched: Metrics of the base and source runs, ``(2, metric, pair)``.
        cost: What was spent.
    """

    values: np.ndarray
    status: np.ndarray
    untouched: np.ndarray
    cost: Cost = field(default_factory=Cost)

    @classmethod
    def of(cls, job: Job, n_metrics: int) -> "Tally":
        """Return a tally for a job, nothing measured yet."""
        shape = (len(job.interventions), len(job.pairs))
        values, untouched = np.full((n_metrics, *shape), np.nan), np.full((2, n_metrics, shape[1]), np.nan)
        return cls(values, np.full(shape, Status.SKIPPED, dtype=np.uint8), untouched)

    def add(self, block: Block) -> None:
        """Take in the numbers of some cells."""
        code = block.interventions[0]
        if code in (BASE, SOURCE):
            self.untouched[0 if code == BASE else 1][:, block.pairs] = block.values
            return
        is_finite = np.isfinite(block.values).all(0)
        status = np.where(block.is_aligned, np.where(is_finite, Status.MEASURED, Status.FAILED), Status.UNALIGNED)
        self.values[:, block.interventions, block.pairs] = block.values
        self.status[block.interventions, block.pairs] = status
