"""Values of other sites, tokens, runs, prompts or models, read before anything is patched.

1. Each ``From`` of a job names one site once its open layer and unit are those of the written site. Values with one run
   and prompts are read together, pair by pair, in runs that nothing changes.
2. What is read becomes a ``Given``: a value of its own for each pair and token. From there on every engine treats it as
   any other given value, so that all of them put in the same numbers.

Cost: one run of each prompt that is read, for all sites together.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import Captured, capture
from causalpatch.engine.job import Job, batches_of_pairs
from causalpatch.engine.resolve import Placement, Placer, Target
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import From, Given, OtherPrompts
from causalpatch.sites import Site

_Key = tuple[object, ...]


@dataclass(frozen=True)
class Elsewhere:
    """A job whose values of other places are known.

    Args:
        job: The job, with ``Given`` for each ``From``.
        of: What each of these was asked for as.
        record: What was read, as plain data.
    """

    job: Job
    of: Mapping[Given, From]
    record: Sequence[dict[str, Any]]


def read_elsewhere(job: Job) -> Elsewhere:
    """Read every value that a job takes from elsewhere; nothing runs where there is none.

    Raises:
        PairError: A prompt lacks a token that is read, or does not meet the base prompt.
        MemoryExhausted: One run does not fit into memory.
    """
    asked: dict[_Key, Target] = {}
    for target in (target for group in job.interventions for target in group):
        if isinstance(target.value, From):
            asked.setdefault(_key(target), target)
    if not asked:
        return Elsewhere(job, {}, ())
    made: dict[_Key, Given] = {}
    groups: dict[tuple[str, OtherPrompts | None], dict[_Key, Target]] = {}
    for key, target in asked.items():
        value = _value(target)
        groups.setdefault((value.run, value.prompts), {})[key] = target
    for targets in groups.values():
        made |= _read_group(job, targets)

    def ready(target: Target) -> Target:
        return replace(target, value=made[_key(target)]) if isinstance(target.value, From) else target

    known = replace(job, interventions=[tuple(map(ready, group)) for group in job.interventions])
    of = {made[key]: _value(target) for key, target in asked.items()}
    return Elsewhere(known, of, [_said(job, given, value) for given, value in of.items()])


def reader_of(job: Job, value: From) -> Model:
    """Return the model whose run a value is read in."""
    return job.model_of("source" if value.run == "source" else "base")


def _value(target: Target) -> From:
    if not isinstance(target.value, From):
        raise TypeError(target.value)
    return target.value


def _key(target: Target) -> _Key:
    return (target.value, target.position, target.column, target.align)


def _read_group(job: Job, targets: Mapping[_Key, Target]) -> dict[_Key, Given]:
    """Read the values of targets that are read in the same runs."""
    value = _value(next(iter(targets.values())))
    sites = {key: Site.parse(_value(target).site).at(None) for key, target in targets.items()}
    placer = Placer(job.pairs, job.base)
    parts: dict[_Key, dict[int, tuple[np.ndarray, np.ndarray]]] = {key: {} for key in targets}
    run = partial(_run, job, value, list(dict.fromkeys(sites.values())))
    for indices, captured in in_batches(job, batches_of_pairs(job), run):
        for key, target in targets.items():
            places = placer.places(target, indices.tolist())
            for pair, (tokens, found) in _values(captured, sites[key], indices, places):
                parts[key][pair] = (tokens, found)
    return {key: _given(job, targets[key], parts[key]) for key in targets}


def _run(job: Job, value: From, sites: Sequence[Site], indices: np.ndarray) -> tuple[np.ndarray, Captured]:
    """Run the prompts of some pairs, each other prompt once; return the run with the pairs."""
    slots = None
    if value.prompts is None:
        role = job.base if value.run == "base" else job.source
        batch = job.pairs.batch(role, indices, padding_side=job.padding_side)
    else:
        prompts = value.prompts
        rows = [prompts.number(job.pairs[pair]) or 0 for pair in indices.tolist()]  # the placer refuses pairs without
        chosen, slots = np.unique(rows, return_inverse=True)
        others = Pairs([prompts.as_pair(row) for row in chosen.tolist()], tokenizer=job.pairs.tokenizer)
        batch = others.batch("clean", padding_side=job.padding_side)
    captured = capture(reader_of(job, value), batch, sites, opens_attention=job.opens_attention)
    return indices, replace(captured, output=None, slots=slots)


def _values(
    run: Captured, site: Site, indices: np.ndarray, places: Sequence[Placement | None]
) -> Iterator[tuple[int, tuple[np.ndarray, np.ndarray]]]:
    """Yield for each pair that has the tokens the base tokens that are written, and what is written there."""
    known = [(local, place) for local, place in enumerate(places) if place is not None]
    if not known:
        return
    counts = [place.stop - place.start for _, place in known]
    local = np.concatenate([np.full(int(count.sum()), n) for (n, _), count in zip(known, counts, strict=True)])
    ranges = [np.arange(*ends) for _, place in known for ends in zip(place.start, place.stop, strict=True)]
    values = _wide(run.at(run.model.tap(site), local, np.concatenate(ranges)))
    means = torch.stack([part.mean(0) for part in torch.split(values, [len(some) for some in ranges])]).cpu().numpy()
    ends = np.cumsum([len(place.base) for _, place in known])
    for (number, place), part in zip(known, np.split(means, ends[:-1]), strict=True):
        yield int(indices[number]), (place.base, part)


def _wide(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _given(job: Job, target: Target, parts: Mapping[int, tuple[np.ndarray, np.ndarray]]) -> Given:
    pairs = sorted(parts)
    return Given(
        np.concatenate([parts[pair][1] for pair in pairs]) if pairs else np.zeros((0, 1)),
        np.concatenate([np.zeros(0, dtype=np.int64), *(parts[pair][0] for pair in pairs)]),
        np.cumsum([0, *(len(parts[pair][0]) for pair in pairs)]),
        tuple(job.pairs[pair].content_hash for pair in pairs),
        str(target.value),
        is_from_source=_value(target).moves_to_source,
    )


def _said(job: Job, given: Given, value: From) -> dict[str, Any]:
    """Return what was read, of which model, and its hash."""
    said = {"value": str(value), "pairs": job.pairs.name, "pairs_hash": job.pairs.content_hash}
    return {**said, "n_pairs": len(given.pairs), "model": reader_of(job, value).name, "hash": given.hash}
