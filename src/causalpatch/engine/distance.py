"""How far patched runs are off what the model computes by itself: two numbers per intervention and pair.

1. *norm ratio*: the length of the new values over that of the base run's own values at the same elements, means over
   the elements that are written. 0 for zero ablation, about 1 for what comes from another run.
2. *change elsewhere*: how far the patch moves the next token's distribution where nothing is asked, the mean of
   KL(base || patched) over the base prompt's tokens from the first patched one on that no metric reads. NaN where there
   is no such token.

A patch with a large effect that is also far off may show what an impossible state does, not what the component does.

Cost: one full forward per intervention and pair, whatever the engine, with the logits at all positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.engine.batches import in_batches, in_forwards
from causalpatch.engine.capture import in_batch, inputs_of
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.hooks import Write, run_with_hooks
from causalpatch.engine.job import Cost, Job, batches_of_pairs, lay_rows
from causalpatch.engine.means import Means
from causalpatch.engine.resolve import Placer
from causalpatch.engine.untouched import Untouched, run_untouched
from causalpatch.engine.values import Row, writes_of_rows
from causalpatch.models.views import take
from causalpatch.pairs import Batch


@dataclass(frozen=True, eq=False)
class Distance:
    """How far patched runs are off.

    Args:
        norm_ratio: Length of the new values over that of the old ones.
        change_elsewhere: Change of next-token distributions that nobody asked for, in nats.
    """

    norm_ratio: Float[np.ndarray, "intervention pair"]
    change_elsewhere: Float[np.ndarray, "intervention pair"]


def measure_distance(job: Job, gauge: Gauge, means: Means) -> Distance:
    """Measure how far the interventions of a job move runs off; NaN where a pair lacks a position.

    Args:
        job: The job, whose values are all fitted and drawn.
        gauge: The metrics, for the tokens that they read.
        means: Fitted means.

    Raises:
        MemoryExhausted: One row does not fit into memory.
    """
    found = np.full((2, len(job.interventions), len(job.pairs)), np.nan)
    placer = Placer(job.pairs, job.base)
    sites = list(dict.fromkeys(target.site for group in job.interventions for target in group))
    make = partial(run_untouched, job, gauge, means, Cost(), base_sites=sites)
    for batch in in_batches(job, batches_of_pairs(job), make):
        rows, _ = lay_rows(job, placer, batch.indices)
        for block in in_forwards(job, [rows], partial(_run_rows, job, gauge, batch)):
            found[:, block.interventions, block.pairs] = block.values
    return Distance(*found)


def _run_rows(job: Job, gauge: Gauge, batch: Untouched, rows: Sequence[Row]) -> Float[np.ndarray, "number row"]:
    prompts = job.pairs.batch(job.base, [row.pair for row in rows], padding_side=job.padding_side)
    writes = writes_of_rows(job.model, batch.known, rows, prompts)
    ports = {port for write in writes for port in (write.tap.port, *write.tap.companions)}
    call = inputs_of(job.model, prompts)
    output, kept = run_with_hooks(job.model, call, writes, ports, opens_attention=job.opens_attention)
    lengths = np.zeros((2, len(rows)))
    for write in writes:
        tap = write.tap
        new = take(tap.view, kept[tap.port], tuple(kept[port] for port in tap.companions), write.index)
        old = _base_values(batch, write, rows, prompts)
        number = write.index[0].cpu().numpy()
        for place, values in enumerate((new, old)):
            size = values.double().nan_to_num(neginf=0.0).reshape(len(values), -1).norm(dim=1).cpu().numpy()
            np.add.at(lengths[place], number, size)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = lengths[0] / lengths[1]
    logits = job.model.logits(output)
    if job.pairs.kind != "tokens" or logits.ndim != 3:
        return np.stack([ratio, np.full(len(rows), np.nan)])
    return np.stack([ratio, _elsewhere(job, gauge, batch, rows, prompts, logits)])


def _base_values(batch: Untouched, write: Write, rows: Sequence[Row], prompts: Batch) -> Tensor:
    """Return what the base run has at the elements of a write."""
    base, tap = batch.known.base, write.tap
    local = torch.tensor([row.local for row in rows], device=write.index[0].device)[write.index[0]]
    index: tuple[Tensor, ...] = (local,)
    if len(write.index) > 1:
        stream = base.model.stream_of(tap.site)
        own = torch.as_tensor(prompts.of(stream).start, device=local.device)[write.index[0]]
        theirs = torch.as_tensor(base.batch.of(stream).start, device=local.device)[local]
        index = (local, write.index[1] - own + theirs)
    companions = tuple(base.tensors[port] for port in tap.companions)
    return take(in_batch(base.model, tap, base.batch).view, base.tensors[tap.port], companions, index)


def _elsewhere(
    job: Job, gauge: Gauge, batch: Untouched, rows: Sequence[Row], prompts: Batch, logits: Tensor
) -> Float[np.ndarray, " row"]:
    """Return the mean divergence at tokens that no metric reads, from the first patched one on."""
    untouched = batch.runs["base"]
    pairs = np.array([row.pair for row in rows])
    if gauge.reads_all:
        return np.full(len(rows), np.nan)
    reads = gauge.reads(prompts.lengths, pairs, job.base)
    found = np.full(len(rows), np.nan)
    for number, row in enumerate(rows):
        places = [place for target, place in row.targets if place is not None and not target.is_ahead]
        patched = [int(place.base.min()) for place in places]
        tokens = np.setdiff1d(np.arange(min(patched, default=0), prompts.lengths[number]), reads[number])
        if not len(tokens):
            continue
        mine = logits[number, torch.as_tensor(prompts.start[number] + tokens, device=logits.device)]
        start = untouched.batch.start[row.local]
        theirs = untouched.logits[row.local, torch.as_tensor(start + tokens, device=logits.device)]
        old, new = (each.double().log_softmax(-1) for each in (theirs, mine))
        found[number] = float((old.exp() * (old - new)).sum(-1).mean())
    return found


def without_controls(job: Job) -> Job:
    """Return a job without its controls."""
    return replace(job, interventions=job.interventions[: job.n_asked], reference=None, n_controls=0)
