"""What is fitted and drawn before anything is patched: means, widths of noise, donors of resampled values.

1. Means of sites are summed in float64 over the prompts of their side, batch by batch, pads excluded.
2. Noise without a sigma is given one: ``multiple`` standard deviations of all numbers that the site has on its side,
   at the tokens that any intervention of the job patches there with such noise. So it is the same in every cell.
3. Resampled values are given the pair that each is taken from.

All of it is written into the record, with the hash of the pairs and of what was fitted.

Cost: one run per prompt for each different mean, and one for all widths of a side.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import PairError, PatchError
from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import Captured
from causalpatch.engine.drawn import Donated, Scattered, draw_donors
from causalpatch.engine.job import Cost, Job, batches_of_pairs
from causalpatch.engine.means import Means, fit_means
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.untouched import run_role
from causalpatch.pairs.role import Role
from causalpatch.patches import Fitted, FittedOn, Identity, Intervention, Mean, Noise, Patch, Resample, Value
from causalpatch.patches.sampled import hash_of
from causalpatch.sites import Site


@dataclass(frozen=True)
class Fit:
    """A job whose values are all known, or follow from its runs.

    Args:
        job: The job.
        means: The means of its sites.
        record: What was fitted and drawn, as plain data.
    """

    job: Job
    means: Means
    record: Sequence[dict[str, Any]]


def fit_values(job: Job) -> Fit:
    """Fit and draw what the interventions of a job put in; nothing runs where there is nothing to fit.

    Raises:
        PairError: A pair has no group, no other pair to resample from, or no tokens where noise is put.
        MemoryExhausted: One run does not fit into memory.
    """
    means = fit_all_means(job)
    sigmas = _fit_sigmas(job)
    wanted = dict.fromkeys(target.value for target in _targets(job) if isinstance(target.value, Resample))
    donors = {value: draw_donors(job.pairs, job.base, value) for value in wanted}

    def ready(target: Target) -> Target:
        value = target.value
        if isinstance(value, Noise):
            sigma = sigmas[target.site, _width(value)] if value.sigma is None else value.sigma
            return replace(target, value=Scattered(value, sigma, _key(target.site)))
        return replace(target, value=donors[value]) if isinstance(value, Resample) else target

    interventions = [tuple(ready(target) for target in group) for group in job.interventions]
    return Fit(replace(job, interventions=interventions), means, _record(job, means, sigmas, donors))


def fit_patches(job: Job, asked: Sequence[Intervention]) -> list[Intervention]:
    """Return the interventions of a job with everything in them that is fitted.

    Args:
        job: The job.
        asked: What it was made from, for the labels.

    Raises:
        PairError: A pair has no group, or no tokens where noise is put.
    """
    means, sigmas = fit_all_means(job), _fit_sigmas(job)

    def ready(target: Target) -> Value:
        value = target.value
        if isinstance(value, Mean):
            array = means.of[target.site, value].cpu().numpy()
            on = FittedOn(job.pairs.name, job.pairs.content_hash, len(job.pairs), value.side)
            by_position = target.has_position and value.over == "pairs"
            return Fitted(array, str(value), on, by_position, means.groups if value.per_group else ())
        if isinstance(value, Noise) and value.sigma is None:
            return replace(value, sigma=sigmas[target.site, _width(value)])
        if isinstance(value, Donated | Scattered):
            return value.value
        return value

    made = []
    for intervention, targets in zip(asked, job.interventions, strict=False):
        patches = [Patch(t.site.at(t.position), ready(t), t.align, t.column) for t in targets]
        made.append(Intervention(tuple(patches), intervention.label))
    return made


def fit_all_means(job: Job) -> Means:
    """Fit every mean that the interventions of a job put in; nothing runs where there is none.

    Raises:
        PairError: A pair has no group, and a mean is asked for per group.
    """
    targets = [target for target in _targets(job) if isinstance(target.value, Mean)]
    fitted: dict[tuple[Site, Mean], torch.Tensor] = {}
    names: tuple[str, ...] = ()
    for mean in dict.fromkeys(target.value for target in targets if isinstance(target.value, Mean)):
        sites = list(dict.fromkeys((t.site, t.has_position) for t in targets if t.value == mean))
        groups = None
        if mean.per_group:
            names, groups = _groups(job)
        runs = in_batches(job, batches_of_pairs(job), partial(_with_pairs, job, mean.side, [site for site, _ in sites]))
        fitted |= fit_means(runs, sites, mean, int(job.pairs.lengths(mean.side).max()), groups)
    return Means(fitted, names)


def _groups(job: Job) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the names of the groups, and the number of each pair's."""
    found = [pair.group for pair in job.pairs]
    for number, group in enumerate(found):
        if group is None:
            raise PairError(
                f"pair {number} of '{job.pairs.name}' has no group, so there is no mean of its group",
                facts=[("groups", ", ".join(sorted({name for name in found if name is not None})[:8]) or "none")],
                fix="fill the column group, or take the mean over all pairs: Mean()",
            )
    names = sorted({name for name in found if name is not None})
    return tuple(names), np.array([names.index(str(name)) for name in found])


def _with_pairs(job: Job, side: Role, sites: Sequence[Site], indices: np.ndarray) -> tuple[np.ndarray, Captured]:
    return indices, run_role(job, side, indices, sites, Cost())


def _width(noise: Noise) -> Noise:
    """Return noise without what its width does not depend on."""
    return replace(noise, seed=0, draw=0)


def _fit_sigmas(job: Job) -> dict[tuple[Site, Noise], float]:
    """Return the standard deviation of noise at each site, for noise that says none."""
    places: dict[tuple[Site, Noise], list[Target]] = {}
    for target in _targets(job):
        if isinstance(target.value, Noise) and target.value.sigma is None:
            places.setdefault((target.site, _width(target.value)), []).append(replace(target, value=Identity()))
    sigmas: dict[tuple[Site, Noise], float] = {}
    for side in dict.fromkeys(noise.side for _, noise in places):
        mine = {key: list(dict.fromkeys(some)) for key, some in places.items() if key[1].side == side}
        sites = list(dict.fromkeys(site for site, _ in mine))
        spreads = {key: _Spread() for key in mine}
        placer = Placer(job.pairs, side)
        for indices, run in in_batches(job, batches_of_pairs(job), partial(_with_pairs, job, side, sites)):
            for key, targets in mine.items():
                spreads[key].add(_values_at(run, placer, key[0], targets, indices))
        for (site, noise), found in spreads.items():
            sigmas[site, noise] = noise.multiple * found.deviation(str(site))
    return sigmas


def _values_at(
    run: Captured, placer: Placer, site: Site, targets: Sequence[Target], indices: np.ndarray
) -> Float[Tensor, " number"]:
    """Return all numbers of a site at the tokens that some targets name."""
    value = run.value(site)
    if not targets[0].has_position:
        return value.double().flatten()
    is_here = np.zeros(run.batch.mask.shape, dtype=bool)
    for target in targets:
        for row, place in enumerate(placer.places(target, indices.tolist())):
            if place is not None:
                is_here[row, run.batch.start[row] + place.base] = True
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

    def deviation(self, site: str) -> float:
        """Return the standard deviation, with n - 1 as in ROME."""
        if self.n < 2:
            raise PatchError(
                f"the spread of '{site}' cannot be taken of {self.n} numbers",
                facts=[("needed", "two or more, over all pairs")],
                fix="say how wide the noise is: Noise(sigma=0.1)",
            )
        return float(np.sqrt(self.squares / (self.n - 1)))


def _key(site: Site) -> str:
    """Return the name that a site's draws go by: one name for one stream, out of a layer and into the next."""
    is_out = site.name == "resid_post" and site.layer is not None
    return str(Site("resid_pre", site.layer + 1)) if is_out and site.layer is not None else str(site)


def _targets(job: Job) -> list[Target]:
    return [target for group in job.interventions for target in group]


def _record(
    job: Job, means: Means, sigmas: dict[tuple[Site, Noise], float], donors: dict[Resample, Donated]
) -> list[dict[str, Any]]:
    """Return what was fitted and drawn: from which pairs, and the hash of what came of it."""
    pairs = {"pairs": job.pairs.name, "pairs_hash": job.pairs.content_hash, "n_pairs": len(job.pairs)}
    record: list[dict[str, Any]] = []
    for mean in dict.fromkeys(mean for _, mean in means.of):
        arrays = [held.cpu().numpy() for (_, each), held in means.of.items() if each == mean]
        found = hash_of(np.concatenate([array.ravel() for array in arrays]))
        record.append({"value": str(mean), "side": mean.side, **pairs, "n_sites": len(arrays), "hash": found})
    for noise in dict.fromkeys(noise for _, noise in sigmas):
        widths = {str(site): sigma for (site, each), sigma in sigmas.items() if each == noise}
        found = hash_of(np.array(list(widths.values())))
        said = {"n_sites": len(widths), "sigma_low": min(widths.values()), "sigma_high": max(widths.values())}
        record.append({"value": str(noise), "side": noise.side, **pairs, **said, "hash": found})
    for value, donated in donors.items():
        found = hash_of(np.array([donated.donor(pair) for pair in job.pairs]))
        record.append({"value": str(value), "side": value.side, **pairs, "hash": found})
    return [*record, *_record_fitted(job)]


def _record_fitted(job: Job) -> list[dict[str, Any]]:
    """Return what was fitted beforehand, on which pairs, and its hash."""
    found: dict[tuple[object, ...], dict[Fitted, None]] = {}
    for target in _targets(job):
        if isinstance(target.value, Fitted):
            found.setdefault((target.value.how, target.value.on), {})[target.value] = None
    record = []
    for some in map(list, found.values()):
        how, on = some[0].how, some[0].on
        digest = some[0].hash if len(some) == 1 else hash_of(np.array([each.hash for each in some]))
        pairs = {"pairs": on.name, "pairs_hash": on.hash, "n_pairs": on.n_pairs}
        record.append({"value": how, "side": on.side, **pairs, "n_sites": len(some), "hash": digest})
    return record
