"""Two names for one run: interventions brought to one form, and those that are the same run once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from causalpatch.engine.job import Block, Job
from causalpatch.engine.means import Means
from causalpatch.engine.resolve import Target
from causalpatch.sites import Site


@dataclass(frozen=True)
class Copies:
    """Which interventions of a job each of its different runs stands for.

    Args:
        of: For each run the interventions.
    """

    of: Sequence[np.ndarray]

    def spread(self, block: Block) -> Iterator[Block]:
        """Yield a block for all interventions that its runs stand for."""
        counts = np.array([len(self.of[i]) for i in block.interventions.tolist()])
        numbers = np.concatenate([self.of[i] for i in block.interventions.tolist()])
        each = np.repeat(np.arange(len(block.pairs)), counts)
        yield Block(numbers, block.pairs[each], block.values[:, each], block.status[each])


def without_repeats(job: Job, means: Means) -> tuple[Job, Means, Copies]:
    """Return a job of different runs, in one form each: the stream out of a layer is the stream into the next.

    The controls are kept as they are, behind the rest: the identity patch must run, whatever else does.

    Args:
        job: The job.
        means: Means of its sites.

    Returns:
        The job of different runs, the means under their sites' names in it, and what each run stands for.
    """
    n_layers = job.model.shape.n_layers
    asked = [_canonical(targets, n_layers) for targets in job.interventions]
    known: dict[object, int] = {}
    of: list[list[int]] = []
    kept: list[tuple[Target, ...]] = []
    for number, targets in enumerate(asked):
        key: object = number if number >= job.n_asked else tuple(_key(target) for target in targets)
        if key not in known:
            known[key] = len(kept)
            kept.append(targets)
            of.append([])
        of[known[key]].append(number)
    reference = None if job.reference is None else next(n for n, some in enumerate(of) if job.reference in some)
    fitted = {(_late(site, n_layers), mean): value for (site, mean), value in means.of.items()}
    copies = Copies([np.array(some) for some in of])
    return replace(job, interventions=kept, reference=reference), Means({**means.of, **fitted}), copies


def _canonical(targets: tuple[Target, ...], n_layers: int) -> tuple[Target, ...]:
    def one(target: Target) -> Target:
        site = _late(target.site, n_layers)
        return target if site is target.site else replace(target, site=site)

    # What leaves a layer is written before what enters the next.
    return tuple(sorted(map(one, targets), key=lambda t: t.site.name != "resid_pre" or t in targets))


def _late(site: Site, n_layers: int) -> Site:
    """Return the stream into the next layer for the stream out of a layer, and any other site as it is."""
    if site.name != "resid_post" or site.layer is None or site.layer == n_layers - 1:
        return site
    return Site("resid_pre", site.layer + 1)


def _key(target: Target) -> object:
    # Values with arrays or functions are one only if they are the same object.
    value = target.value
    by_value = type(value).__name__ in ("Source", "Zero", "Identity", "Mean")
    return (target.site, target.position, target.column, target.align, value if by_value else id(value))
