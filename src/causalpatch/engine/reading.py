"""Values of sites in patched runs: what one run computes, to be put into another.

The runs are full forwards with plain hooks, as the reference engine makes them: writes and captures stand in one
forward, so that what is read is what the patched run itself computes there, after any write at the same place.

Cost: one forward per prompt, and one for each side that the patches read.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from causalpatch.base.errors import PairError
from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import Captured, inputs_of
from causalpatch.engine.fit import fit_values
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.engine.job import Cost, Job, batches_of_pairs, lay_rows
from causalpatch.engine.means import Means
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.untouched import run_donors, run_role
from causalpatch.engine.values import Known, writes_of_rows


def read_patched(job: Job, read: Sequence[Target]) -> list[list[np.ndarray]]:
    """Run one intervention on every pair and return what sites hold in it.

    Args:
        job: The model, the pairs, the base, and the one intervention; without patches the base runs as it is.
        read: The sites, with the positions that are read in the base's prompt.

    Returns:
        For each site a list with the values of each pair, ``(element, *value_axes)`` in the order of its tokens, or
        ``(*value_axes)`` for sites without positions; in the model's precision.

    Raises:
        PairError: A pair lacks a position that is written or read.
        MemoryExhausted: One run does not fit into memory.
        PatchDidNotFire: A module of a patch or of a site that is read did not run.
    """
    fitted = fit_values(job)
    found: list[list[np.ndarray]] = [[np.zeros(0)] * len(job.pairs) for _ in read]
    make = partial(_run, fitted.job, fitted.means, read)
    for indices, values in in_batches(job, batches_of_pairs(job), make):
        for site, held in enumerate(values):
            for pair, value in zip(indices.tolist(), held, strict=True):
                found[site][pair] = value
    return found


def _run(
    job: Job, means: Means, read: Sequence[Target], indices: np.ndarray
) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    placer = Placer(job.pairs, job.base)
    captured = _captured(job, means, placer, list(read), indices)
    values = []
    for target in read:
        if not target.has_position:
            values.append([_array(row) for row in captured.value(target.site)])
            continue
        places = placer.places(target, indices.tolist())
        if any(place is None for place in places):
            raise _lacks(job, int(indices[[place is None for place in places].index(True)]), [target])
        tokens = [place.base for place in places if place is not None]
        local = np.repeat(np.arange(len(indices)), [len(each) for each in tokens])
        flat = captured.at(job.model.tap(target.site), local, np.concatenate(tokens))
        ends = np.cumsum([len(each) for each in tokens])[:-1]
        values.append(np.split(_array(flat), ends))
    return indices, values


def _captured(job: Job, means: Means, placer: Placer, read: Sequence[Target], indices: np.ndarray) -> Captured:
    """Run the intervention on some pairs and keep what the sites need."""
    sites = list(dict.fromkeys(target.site for target in read))
    written = job.interventions[0] if job.interventions else ()
    cost = Cost()
    if not written:
        return run_role(job, job.base, indices, sites, cost)
    base = run_role(job, job.base, indices, [t.site for t in written if t.needs_base], cost)
    from_source = [t.site for t in written if t.needs_source]
    source = run_role(job, job.source, indices, from_source, cost, job.model_of("source")) if from_source else base
    groups = [job.pairs[number].group for number in indices.tolist()]
    known = Known(source, base, means, groups=groups, donors=run_donors(job, indices, cost))
    rows, lost = lay_rows(job, placer, indices, [0])
    if lost:
        raise _lacks(job, lost[0][1], written)
    prompts = job.pairs.batch(job.base, indices, padding_side=job.padding_side)
    writes = writes_of_rows(job.model, known, rows, prompts)
    taps = [job.model.tap(site) for site in sites]
    ports = {port for tap in taps for port in (tap.port, *tap.companions)}
    output, tensors = run_with_hooks(
        job.model, inputs_of(job.model, prompts), writes, ports, opens_attention=job.opens_attention
    )
    return Captured(job.model, prompts, output, tensors)


def _array(value: torch.Tensor) -> np.ndarray:
    wide = value if value.dtype in (torch.float32, torch.float64) else value.float()
    array: np.ndarray = wide.cpu().numpy()
    return array


def _lacks(job: Job, pair: int, targets: Sequence[Target]) -> PairError:
    return PairError(
        f"pair {pair} of '{job.pairs.name}' lacks a position that is patched or read",
        facts=[("sites", ", ".join(str(target.site.at(target.position)) for target in targets)[:88])],
        fix=f"drop it (pairs.drop({pair})), or name a position that every prompt has, such as @-1",
    )
