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

    def n_made(self, reference: int | None) -> int:
        """Return how many patched runs were made, that of the reference not counted."""
        is_made = np.isin(self.status, (Status.MEASURED, Status.FAILED))
        return int((is_made if reference is None else np.delete(is_made, reference, axis=0)).sum())

    def pairs_with_baselines(self, reference: int | None) -> np.ndarray:
        """Return the pairs whose untouched runs, and reference run if there is one, were made; ``(kept,)``."""
        is_kept = np.isfinite(self.untouched).all((0, 1))
        if reference is not None:
            is_kept &= self.status[reference] != Status.SKIPPED
        return np.flatnonzero(is_kept)

    def add(self, block: Block) -> None:
        """Take in the numbers of some cells."""
        code = block.interventions[0]
        if code in (BASE, SOURCE):
            self.untouched[0 if code == BASE else 1][:, block.pairs] = block.values
            return
        self.values[:, block.interventions, block.pairs] = block.values
        self.status[block.interventions, block.pairs] = block.status
