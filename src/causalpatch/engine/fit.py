"""What is fitted and drawn before anything is patched: means, widths of noise, donors, optimal constants.

1. Means of sites are summed in float64 over the prompts of their side, batch by batch, pads excluded.
2. Noise without a sigma is given one: ``multiple`` standard deviations of all numbers that the site has on its side,
   at the tokens that any intervention of the job patches there with such noise. So it is the same in every cell.
3. Resampled values are given the pair that each is taken from.
4. Values of other sites, tokens, runs or prompts are read (``elsewhere``), before all else.
5. Optimal constants are learnt (``learn``), with all else in place. The run that ablates everything at once takes the
   constants of the single runs.

All of it is written into the record, with the hash of the pairs and of what was fitted.

Cost: one run per prompt for each different mean, one for all widths of a side; constants see ``learn``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from causalpatch.base.errors import PairError, PatchError
from causalpatch.engine.batches import in_batches
from causalpatch.engine.drawn import Computed, Donated, Scattered, draw_donors
from causalpatch.engine.elsewhere import read_elsewhere
from causalpatch.engine.job import Job, batches_of_pairs
from causalpatch.engine.learn import Learnt, Place, Start, learn_constants
from causalpatch.engine.means import Means, fit_means
from causalpatch.engine.resolve import Target
from causalpatch.engine.widths import deviations, run_with_pairs
from causalpatch.patches import (
    Fitted,
    FittedOn,
    From,
    Given,
    Intervention,
    Mean,
    Noise,
    Optimal,
    Patch,
    Resample,
    Subspace,
    Value,
)
from causalpatch.patches.sampled import hash_of
from causalpatch.sites import Site


@dataclass(frozen=True)
class Fit:
    """A job whose values are all known, or follow from its runs.

    Args:
        job: The job.
        means: The means of its sites.
        record: What was fitted and drawn, as plain data.
        elsewhere: What was asked for where a given value was read elsewhere.
    """

    job: Job
    means: Means = field(default_factory=Means)
    record: Sequence[dict[str, Any]] = ()
    elsewhere: Mapping[Given, From] = field(default_factory=dict)


def fit_values(job: Job) -> Fit:
    """Fit and draw what the interventions of a job put in; nothing runs where there is nothing to fit.

    Raises:
        PairError: A pair has no group, no other pair to resample from, or no tokens where noise is put.
        PatchError: One intervention learns constants in two ways.
        MemoryExhausted: One run does not fit into memory.
    """
    elsewhere = read_elsewhere(job)
    job = elsewhere.job
    means = fit_all_means(job)
    sigmas = _fit_sigmas(job)
    wanted = dict.fromkeys(target.value for target in _targets(job) if isinstance(target.value, Resample))
    donors = {value: draw_donors(job.pairs, job.base, value) for value in wanted}

    def ready(target: Target) -> Target:
        value = target.value
        if isinstance(value, Noise):
            sigma = sigmas[target.site, _width(value)] if value.sigma is None else value.sigma
            return replace(target, value=Scattered(value, sigma, _key(target.site), target.stream))
        return replace(target, value=donors[value]) if isinstance(value, Resample) else target

    drawn = replace(job, interventions=[tuple(ready(target) for target in group) for group in job.interventions])
    record = [*_record_means(job, means), *_record_drawn(job, sigmas, donors)]
    learnt, said = _learn(drawn, means)
    record += said
    made = replace(drawn, interventions=_with_constants(drawn, learnt))
    return Fit(made, means, [*record, *elsewhere.record, *_record_given(job)], elsewhere.of)


def fit_patches(job: Job, asked: Sequence[Intervention]) -> list[Intervention]:
    """Return the interventions of a job with everything in them that is fitted.

    Args:
        job: The job.
        asked: What it was made from, for the labels.

    Raises:
        PairError: A pair has no group, or no tokens where noise is put.
        PatchError: One intervention learns constants in two ways.
    """
    fit = fit_values(job)

    def plain(target: Target) -> Value:
        value = target.value
        if isinstance(value, Mean):
            array = fit.means.of[target.site, value].cpu().numpy()
            by_position = target.has_position and value.over == "pairs"
            groups = fit.means.groups if value.per_group else ()
            return Fitted(array, str(value), _on(job, value.side), by_position, groups)
        if isinstance(value, Scattered):
            return replace(value.value, sigma=value.sigma)
        if isinstance(value, Given):
            return fit.elsewhere.get(value, value)
        if isinstance(value, Computed):
            raise AssertionError(f"{value} are made for one run and stand in no record")
        return value.value if isinstance(value, Donated) else value

    def whole(target: Target) -> Value:
        found = plain(target)
        if target.inside is None or isinstance(found, Subspace):
            return found
        return replace(target.inside, of=found)

    made = []
    for intervention, targets in zip(asked, fit.job.interventions, strict=False):
        patches = [Patch(t.site.at(t.position), whole(t), t.align, t.column) for t in targets]
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
        groups = None
        if mean.per_group:
            names, groups = _groups(job)
        mine = [target for target in targets if target.value == mean]
        for stream in dict.fromkeys((target.stream, target.key_stream) for target in mine):
            here = [t for t in mine if (t.stream, t.key_stream) == stream]
            sites = list(dict.fromkeys((t.site, t.has_position) for t in here))
            make = partial(run_with_pairs, job, mean.side, [site for site, _ in sites])
            runs = in_batches(job, batches_of_pairs(job), make)
            n_positions, n_keys = (int(job.pairs.of(each).lengths(mean.side).max()) for each in stream)
            fitted |= fit_means(runs, sites, mean, n_positions, n_keys, groups)
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


def _width(noise: Noise) -> Noise:
    """Return noise without what its width does not depend on."""
    return replace(noise, seed=0, draw=0)


def _fit_sigmas(job: Job) -> dict[tuple[Site, Noise], float]:
    """Return the standard deviation of noise at each site, for noise that says none."""
    places: dict[tuple[Site, Noise], list[Target]] = {}
    for target in _targets(job):
        if isinstance(target.value, Noise) and target.value.sigma is None:
            places.setdefault((target.site, _width(target.value)), []).append(target)
    sigmas: dict[tuple[Site, Noise], float] = {}
    for side in dict.fromkeys(noise.side for _, noise in places):
        found = deviations(job, side, {key: some for key, some in places.items() if key[1].side == side})
        sigmas |= {key: key[1].multiple * sigma for key, sigma in found.items()}
    return sigmas


def _key(site: Site) -> str:
    """Return the name that a site's draws go by: one name for one stream, out of a layer and into the next."""
    is_out = site.name == "resid_post" and site.layer is not None
    if is_out and site.layer is not None:
        return str(replace(site, name="resid_pre", layer=site.layer + 1))
    return str(site)


def _learn(job: Job, means: Means) -> tuple[dict[Place, Fitted], list[dict[str, Any]]]:
    """Learn all optimal constants of a job's interventions; return them by place, and the record."""
    made: dict[Place, Fitted] = {}
    record = []
    asked = [(n, t) for n, group in enumerate(job.interventions[: job.n_asked]) for t in group]
    values = {place: place[1].value for place in asked}
    for value in dict.fromkeys(value for value in values.values() if isinstance(value, Optimal)):
        places = [place for place in asked if values[place] == value]
        numbers = {number for number, _ in places}
        for number, target in asked:
            if number in numbers and isinstance(target.value, Optimal) and target.value != value:
                raise PatchError(
                    "one intervention learns constants in two ways",
                    facts=[("one", value), ("other", target.value)],
                    fix="give its patches one and the same Optimal(…)",
                )
        found = learn_constants(job, value, _starts(job, places), means)
        on = _on(job, job.base)
        made |= {place: Fitted(array, str(value), on) for place, array in found.of.items()}
        record.append(_record_learnt(value, on, found))
    return made, record


def _starts(job: Job, places: Sequence[Place]) -> dict[Place, Start]:
    """Return where the search for each constant begins: the mean, with the spread as the unit of a step."""
    mean = Mean("positions", side=job.base)
    only = replace(job, interventions=[tuple(replace(t, value=mean) for _, t in places)], reference=None, n_controls=0)
    means = fit_all_means(only).of
    spreads = deviations(job, job.base, {t.site: [replace(t, position=None, column=None)] for _, t in places})
    return {(number, target): Start(means[target.site, mean], spreads[target.site] or 1.0) for number, target in places}


def _with_constants(job: Job, learnt: dict[Place, Fitted]) -> list[tuple[Target, ...]]:
    """Return the interventions with their constants; the controls take those of the first that patches a place."""
    if not learnt:
        return list(job.interventions)
    first: dict[tuple[object, ...], Fitted] = {}
    for (_, target), fitted in learnt.items():
        first.setdefault((target.site, target.position, target.column), fitted)

    def ready(number: int, target: Target) -> Target:
        if not isinstance(target.value, Optimal):
            return target
        kept = first[target.site, target.position, target.column]
        return replace(target, value=learnt.get((number, target), kept))

    return [tuple(ready(number, target) for target in group) for number, group in enumerate(job.interventions)]


def _on(job: Job, side: Any) -> FittedOn:
    return FittedOn(job.pairs.name, job.pairs.content_hash, len(job.pairs), side)


def _targets(job: Job) -> list[Target]:
    return [target for group in job.interventions for target in group]


def _said(on: FittedOn) -> dict[str, Any]:
    return {"side": on.side, "pairs": on.name, "pairs_hash": on.hash, "n_pairs": on.n_pairs}


def _record_means(job: Job, means: Means) -> list[dict[str, Any]]:
    """Return which means were fitted on which pairs, and their hash."""
    record = []
    for mean in dict.fromkeys(mean for _, mean in means.of):
        arrays = [held.cpu().numpy() for (_, each), held in means.of.items() if each == mean]
        found = hash_of(np.concatenate([array.ravel() for array in arrays]))
        record.append({"value": str(mean), **_said(_on(job, mean.side)), "n_sites": len(arrays), "hash": found})
    return record


def _record_drawn(
    job: Job, sigmas: dict[tuple[Site, Noise], float], donors: dict[Resample, Donated]
) -> list[dict[str, Any]]:
    """Return how wide noise is and by which pairs that was decided, and which donors were drawn."""
    record: list[dict[str, Any]] = []
    for noise in dict.fromkeys(noise for _, noise in sigmas):
        widths = {str(site): sigma for (site, each), sigma in sigmas.items() if each == noise}
        found = hash_of(np.array(list(widths.values())))
        said = {"n_sites": len(widths), "sigma_low": min(widths.values()), "sigma_high": max(widths.values())}
        record.append({"value": str(noise), **_said(_on(job, noise.side)), **said, "hash": found})
    for value, donated in donors.items():
        found = hash_of(np.array([donated.donor(pair) for pair in job.pairs]))
        record.append({"value": str(value), **_said(_on(job, value.side)), "hash": found})
    return record


def _record_learnt(value: Optimal, on: FittedOn, found: Learnt) -> dict[str, Any]:
    """Return what learning came to: the mean loss over the interventions, with means and with constants."""
    digest = hash_of(np.concatenate([array.ravel() for array in found.of.values()]))
    losses = {
        "mean_loss_of_means": float(np.nanmean(found.before)),
        "mean_loss": float(np.nanmean(found.after)),
    }
    return {"value": str(value), **_said(on), "n_sites": len(found.of), **losses, "steps": value.steps, "hash": digest}


def _record_given(job: Job) -> list[dict[str, Any]]:
    """Return what was fitted beforehand, on which pairs, and its hash."""
    found: dict[tuple[str, FittedOn], dict[Fitted | Subspace, None]] = {}
    for target in _targets(job):
        if isinstance(target.value, Fitted):
            found.setdefault((target.value.how, target.value.on), {})[target.value] = None
        if target.inside is not None and target.inside.on is not None:
            how = f"subspace of dimension {target.inside.dimension}"
            found.setdefault((how, target.inside.on), {})[target.inside] = None
    record = []
    for (how, on), some in ((key, list(each)) for key, each in found.items()):
        digest = some[0].hash if len(some) == 1 else hash_of(np.array([each.hash for each in some]))
        record.append({"value": how, **_said(on), "n_sites": len(some), "hash": digest})
    return record
