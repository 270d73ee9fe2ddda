"""How widely the values of sites are spread over the data: the widths of noise.

The standard deviation is over all numbers that a site has at the tokens that any of some targets names, in the prompts
of one side: streamed in float64, pads excluded.

Cost: one run per prompt and side.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import PatchError
from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import Captured
from causalpatch.engine.job import Cost, Job, batches_of_pairs
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.untouched import run_role
from causalpatch.pairs.role import Role
from causalpatch.patches import Identity
from causalpatch.sites import Site

_Key = TypeVar("_Key")


def run_with_pairs(job: Job, side: Role, sites: Sequence[Site], indices: np.ndarray) -> tuple[np.ndarray, Captured]:
    """Run one side of some pairs; return it with the pairs."""
    return indices, run_role(job, side, indices, sites, Cost())


def deviations(job: Job, side: Role, places: Mapping[_Key, Sequence[Target]]) -> dict[_Key, float]:
    """Return standard deviations, with n - 1 as in ROME.

    Args:
        job: The job, for its model and pairs.
        side: Whose prompts are run.
        places: For each deviation that is wanted targets of one site, which say at which tokens.

    Raises:
        PatchError: There are fewer than two numbers.
        PairError: A pair has no such token.
    """
    if not places:
        return {}
    mine = {key: list(dict.fromkeys(replace(t, value=Identity()) for t in some)) for key, some in places.items()}
    sites = list(dict.fromkeys(targets[0].site for targets in mine.values()))
    spreads = {key: _Spread() for key in mine}
    placer = Placer(job.pairs, side)
    for indices, run in in_batches(job, batches_of_pairs(job), partial(run_with_pairs, job, side, sites)):
        for key, targets in mine.items():
            spreads[key].add(_values_at(run, placer, targets, indices))
    return {key: found.deviation(mine[key][0].site) for key, found in spreads.items()}


def _values_at(
    run: Captured, placer: Placer, targets: Sequence[Target], indices: np.ndarray
) -> Float[Tensor, " number"]:
    """Return all numbers of a site at the tokens that some targets name."""
    value = run.value(targets[0].site)
    if not targets[0].has_position:
        return value.double().flatten()
    batch = run.batch_of(targets[0].site)
    is_here = np.zeros(batch.mask.shape, dtype=bool)
    for target in targets:
        for row, place in enumerate(placer.places(target, indices.tolist())):
            if place is not None:
                is_here[row, batch.start[row] + place.base] = True
    return value[torch.as_tensor(is_here, device=value.device)].double().flatten()


@dataclass
class _Spread:
    """Mean and squared deviations of numbers that come in portions (Chan et al. 1979)."""

    n: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def add(self, numbers: Float[Tensor, " number"]) -> None:
        n = len(numbers)
        if not n:
            return
        mean = float(numbers.mean())
        step = mean - self.mean
        self.squares += float(((numbers - mean) ** 2).sum()) + step**2 * self.n * n / (self.n + n)
        self.mean += step * n / (self.n + n)
        self.n += n

    def deviation(self, site: Site) -> float:
        if self.n < 2:
            raise PatchError(
                f"the spread of '{site}' cannot be taken of {self.n} numbers",
                facts=[("needed", "two or more, over all pairs")],
                fix="say how wide the noise is: Noise(sigma=0.1)",
            )
        return float(np.sqrt(self.squares / (self.n - 1)))
