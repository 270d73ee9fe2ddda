"""Which tokens of the source's prompts stand for which of the base's, and by how much what stands there differs."""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.engine.job import Job
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.untouched import Untouched


@dataclass(frozen=True, eq=False)
class Meeting:
    """Which tokens of the source's prompts stand for which of the base's, over the columns of both batches.

    Args:
        row: The pair of each element in the batch.
        base: Its column in the base's batch.
        source: Its column in the source's batch.
    """

    row: Tensor
    base: Tensor
    source: Tensor

    @classmethod
    def of(cls, job: Job, batch: Untouched, target: Target, placer: Placer) -> "Meeting":
        """Return where a target takes its value from; pairs that lack its column have no elements.

        Raises:
            PairError: Prompts of unequal lengths have no alignment, or a position is outside a prompt.
        """
        places = placer.places(target, batch.indices.tolist())
        known = [(local, place) for local, place in enumerate(places) if place is not None]
        row = np.concatenate([np.zeros(0, dtype=np.int64), *(np.full(len(place.base), n) for n, place in known)])
        base, source = (
            np.concatenate([np.zeros(0, dtype=np.int64), *(getattr(place, name) for _, place in known)])
            for name in ("base", "start")
        )
        starts = [run.batch.of(target.stream).start for run in (batch.known.base, batch.known.source)]
        device = job.model.device
        return cls(
            *(torch.as_tensor(at, device=device) for at in (row, starts[0][row] + base, starts[1][row] + source))
        )

    def difference(
        self, base: Float[Tensor, "row position *axes"], source: Float[Tensor, "row place *axes"]
    ) -> Float[Tensor, "row position *axes"]:
        """Return source less base where they meet, 0 elsewhere; float32 at least."""
        wide = torch.promote_types(base.dtype, torch.float32)
        if self._is_all_in_order(base, source):
            return source.to(wide) - base.to(wide)
        found = torch.zeros(base.shape, dtype=wide, device=base.device)
        here = (self.row, self.base)
        found[here] = source[self.row, self.source].to(wide) - base[here].to(wide)
        return found

    def _is_all_in_order(self, base: Tensor, source: Tensor) -> bool:
        """Say whether each token meets the one in its own place."""
        n_pairs, n_tokens = base.shape[:2]
        if source.shape[:2] != base.shape[:2] or len(self.row) != n_pairs * n_tokens:
            return False
        places = torch.arange(len(self.row), device=self.row.device)
        return bool((self.base == self.source).all() and (self.row * n_tokens + self.base == places).all())


def columns_of(job: Job, batch: Untouched, stream: str | None = None) -> Int[Tensor, "pair column"]:
    """Return the place of each aligned column of each pair among all tokens of a batch; their number where it has none.

    Args:
        job: The job.
        batch: The pairs.
        stream: The stream whose tokens are counted.
    """
    tokens = job.pairs.of(stream).aligned().columns[batch.indices, :, 0 if job.base == "clean" else 1]
    prompts = batch.known.base.batch.of(stream)
    width = prompts.mask.shape[1]
    first = np.arange(len(tokens))[:, None] * width + prompts.start[:, None]
    places = np.where(tokens < 0, len(tokens) * width, first + tokens)
    return torch.as_tensor(places, device=job.model.device)
