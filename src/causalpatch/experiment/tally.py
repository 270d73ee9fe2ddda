"""What a run has measured so far, so that stopping it loses nothing."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from causalpatch.base.errors import CausalPatchWarning
from causalpatch.base.progress import bar
from causalpatch.engine import BASE, SOURCE, Block, Cost, Job, Role
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

    def n_made(self, n_asked: int) -> int:
        """Return how many patched runs were made, controls not counted."""
        return int(np.isin(self.status[:n_asked], (Status.MEASURED, Status.SCREENED, Status.FAILED)).sum())

    def pairs_with_baselines(self, reference: int | None) -> np.ndarray:
        """Return the pairs whose untouched runs, and reference run if there is one, were made; ``(kept,)``."""
        is_kept = np.isfinite(self.untouched).all((0, 1))
        if reference is not None:
            is_kept &= self.status[reference] != Status.SKIPPED
        return np.flatnonzero(is_kept)

    def noise_floor(self, metrics: Sequence[str]) -> dict[str, float]:
        """Return the largest effect of the identity patch by metric: what a patch that changes nothing seems to do."""
        seeming = np.abs(self.values[:, -1] - self.untouched[0])
        return {name: float(np.nanmax(row, initial=0.0)) for name, row in zip(metrics, seeming, strict=True)}

    def baselines(self, kept: np.ndarray, base: Role, reference: int | None) -> dict[str, np.ndarray]:
        """Return the metrics of the unpatched runs of some pairs by role, ``(metric, pair)``.

        Args:
            kept: The pairs.
            base: Which side is the base run's.
            reference: Index of the run that ablates everything at once, or None.
        """
        changed, source = self.untouched[:, :, kept]
        clean, corrupt = (changed, source) if base == "clean" else (source, changed)
        runs = {"base": changed, "source": source, "clean": clean, "corrupt": corrupt}
        return runs if reference is None else {**runs, "reference": self.values[:, reference, kept]}

    def add(self, block: Block) -> int:
        """Take in the numbers of some cells; return how many patched cells of them had none."""
        code = block.interventions[0]
        if code in (BASE, SOURCE):
            self.untouched[0 if code == BASE else 1][:, block.pairs] = block.values
            return 0
        cells = block.interventions, block.pairs
        n_new = int((self.status[cells] == Status.SKIPPED).sum())
        self.values[:, block.interventions, block.pairs] = block.values
        self.status[cells] = block.status
        return n_new

    def fill(self, blocks: Iterable[Block], job: Job, label: str, *, is_shown: bool | None) -> bool:
        """Take in all numbers of a job as they come; return False where the user stopped it in between.

        Args:
            blocks: The numbers.
            job: What was asked for.
            label: What the bar calls it.
            is_shown: Whether there is a bar.
        """
        total = max(1, len(job.interventions) * len(job.pairs))
        try:
            with bar(label, total, is_shown=is_shown) as advance:
                for block in blocks:
                    advance(self.add(block))
        except KeyboardInterrupt:
            n_done = self.n_made(job.n_asked)
            if not n_done:
                raise
            total -= len(job.pairs) * job.n_controls
            warnings.warn(
                CausalPatchWarning(f"stopped: {n_done:,} of {total:,} runs were made and are kept"), stacklevel=4
            )
            return False
        return True
