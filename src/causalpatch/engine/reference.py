"""The reference engine: full forwards with plain hooks. It is the oracle for every faster engine and stays simple.

1. Pairs are taken in batches of like length. For each batch the base and source runs are made once: they give the
   baselines, and the values of every site that is read.
2. Rows are (intervention, pair). As many as fit into memory are stacked into one forward of the whole model, in which
   hooks replace the sites' values.
3. Metrics read the outputs. Answers of several tokens are spelt out by further forwards that go on through the answer,
   with the same patches on the prompt.
4. When memory runs out the number of rows is halved, down to one.

Symbols: K interventions, P pairs in a batch, R rows in a forward.
Cost: K x pairs rows of a full forward, plus two per pair.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float

from causalpatch.engine.capture import Captured, capture, inputs_of
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.engine.job import BASE, SOURCE, Block, Cost, Job, batches_of_pairs, check_finite, lay_rows, most_rows
from causalpatch.engine.means import Means, fit_means
from causalpatch.engine.memory import exhausted, is_out_of_memory, release_memory
from causalpatch.engine.resolve import Placer, Role
from causalpatch.engine.values import Known, Row, writes_of_rows
from causalpatch.pairs import Batch
from causalpatch.patches import Identity, Mean
from causalpatch.results.status import Status
from causalpatch.sites import Site

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class _PairBatch:
    """Some pairs with their untouched runs."""

    indices: np.ndarray
    known: Known
    runs: dict[str, Run]


def measure(job: Job, gauge: Gauge, means: Means, cost: Cost) -> Iterator[Block]:
    """Measure every intervention on every pair.

    Args:
        job: What is to be measured.
        gauge: The metrics.
        means: Means of the sites that are replaced by one.
        cost: Counts what is spent.

    Yields:
        Blocks of cells: for each batch of pairs first the untouched runs, then the patched ones.

    Raises:
        MemoryExhausted: One row does not fit into memory.
        PatchDidNotFire: A module of a patch did not run.
        NotFinite: An untouched run gives NaN or infinity.
    """
    placer = Placer(job.pairs, job.base)
    for batch, blocks in _in_batches(job, partial(_measure_untouched, job, gauge, means, cost)):
        yield from blocks
        rows, lost = lay_rows(job, placer, batch.indices)
        if lost:
            yield Block.lost(lost, len(gauge.metrics))
        yield from _run_patched(job, gauge, batch, rows, cost)


def _in_batches(job: Job, make: Callable[[np.ndarray], _Made]) -> Iterator[_Made]:
    """Make something of each batch of pairs, halving the batches that do not fit into memory."""
    waiting = list(batches_of_pairs(job))
    while waiting:
        indices = waiting.pop(0)
        made = None
        try:
            made = make(indices)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            waiting[:0] = _halves(job, indices, error)
        if made is not None:
            yield made
        else:
            release_memory()  # out here, where the error no longer holds the tensors of its frames


def _measure_untouched(
    job: Job, gauge: Gauge, means: Means, cost: Cost, indices: np.ndarray
) -> tuple[_PairBatch, list[Block]]:
    batch = _run_untouched(job, gauge, indices, means, cost)
    local = torch.arange(len(indices), device=job.model.device)
    blocks = []
    for name, code in (("base", BASE), ("source", SOURCE)):
        values = gauge.values(batch.runs[name], batch.runs, local)
        check_finite(job, gauge, name, indices, values)
        blocks.append(Block.of(np.full(len(indices), code), indices, values, Status.MEASURED))
    return batch, blocks


def _run_untouched(job: Job, gauge: Gauge, indices: np.ndarray, means: Means, cost: Cost) -> _PairBatch:
    """Make the base and source runs of some pairs, and keep there what the patches read."""
    targets = [target for group in job.interventions for target in group]
    read = {
        job.source: list(dict.fromkeys(t.site for t in targets if t.needs_source)),
        job.base: list(dict.fromkeys(t.site for t in targets if isinstance(t.value, Identity))),
    }
    captured = {role: _capture(job, role, indices, sites, cost) for role, sites in read.items()}
    runs = {
        name: _finish_run(job, gauge, role, captured[role], indices, cost)
        for name, role in (("base", job.base), ("source", job.source))
    }
    return _PairBatch(indices, Known(captured[job.source], captured[job.base], means), runs)


def _capture(job: Job, role: Role, indices: np.ndarray, sites: Sequence[Site], cost: Cost) -> Captured:
    captured = capture(job.model, job.pairs.batch(role, indices, padding_side=job.padding_side), sites)
    cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(indices)
    return captured


def _finish_run(job: Job, gauge: Gauge, role: Role, captured: Captured, indices: np.ndarray, cost: Cost) -> Run:
    """Turn a captured run into one that metrics can read, spelling answers out where they have several tokens."""
    pair = torch.as_tensor(indices, device=job.model.device)
    run = Run(job.model.logits(captured.output), captured.batch, pair)
    return _spell(job, gauge, role, run, (), None, cost)


def _run_patched(job: Job, gauge: Gauge, batch: _PairBatch, rows: Sequence[Row], cost: Cost) -> Iterator[Block]:
    """Run rows in forwards as large as memory allows, halving them when it runs out."""
    lengths = job.pairs.lengths(job.base)
    most = most_rows(job, int(lengths[batch.indices].max()))
    start = 0
    while start < len(rows):
        some = rows[start : start + most]
        values = None
        try:
            values = _run_rows(job, gauge, batch, some, cost)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(some) == 1:
                raise exhausted(job.model, job.pairs, some[0].pair) from error
        if values is None:
            most = len(some) // 2
            release_memory()
            continue
        start += len(some)
        numbers = np.array([row.intervention for row in some])
        pairs = np.array([row.pair for row in some])
        yield Block.of(numbers, pairs, values, Status.MEASURED)


def _run_rows(
    job: Job, gauge: Gauge, batch: _PairBatch, rows: Sequence[Row], cost: Cost
) -> Float[np.ndarray, "metric row"]:
    pairs = np.array([row.pair for row in rows])
    inputs = job.pairs.batch(job.base, pairs, padding_side=job.padding_side)
    run = _forward(job, batch.known, rows, inputs, cost)
    run = _spell(job, gauge, job.base, run, rows, batch.known, cost)
    local = torch.tensor([row.local for row in rows], device=job.model.device)
    return gauge.values(run, batch.runs, local)


def _forward(job: Job, known: Known, rows: Sequence[Row], inputs: Batch, cost: Cost) -> Run:
    writes = writes_of_rows(job.model, known, rows, inputs)
    output, _ = run_with_hooks(job.model, inputs_of(job.model, inputs), writes)
    cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(rows)
    pair = torch.tensor([row.pair for row in rows], device=job.model.device)
    return Run(job.model.logits(output), inputs, pair)


def _spell(job: Job, gauge: Gauge, role: Role, run: Run, rows: Sequence[Row], known: Known | None, cost: Cost) -> Run:
    """Add the log-probabilities of answers of several tokens, by forwards that go on through each of them."""
    pairs = run.pair.cpu().numpy()
    found: dict[str, list[torch.Tensor]] = {}
    for side, number in gauge.forks:
        going_on = gauge.continuations(side, number, pairs)
        inputs = job.pairs.batch(role, pairs, padding_side=job.padding_side, continuations=going_on)
        if known is None:
            output, _ = run_with_hooks(job.model, inputs_of(job.model, inputs))
            cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(pairs)
            fork = Run(job.model.logits(output), inputs, run.pair)
        else:
            fork = _forward(job, known, rows, inputs, cost)
        found.setdefault(side, []).append(gauge.spelt(fork, side, number))
    forks = {side: torch.stack(columns, 1) for side, columns in found.items()}
    return Run(run.logits, run.batch, run.pair, forks)


def _halves(job: Job, indices: np.ndarray, error: Exception) -> list[np.ndarray]:
    if len(indices) == 1:
        raise exhausted(job.model, job.pairs, int(indices[0])) from error
    middle = len(indices) // 2
    return [indices[:middle], indices[middle:]]


def fit_all_means(job: Job) -> Means:
    """Fit every mean that the interventions of a job put in; nothing runs where there is none."""
    targets = [target for group in job.interventions for target in group if isinstance(target.value, Mean)]
    fitted: dict[tuple[Site, Mean], torch.Tensor] = {}
    for mean in dict.fromkeys(target.value for target in targets if isinstance(target.value, Mean)):
        sites = list(dict.fromkeys((t.site, t.has_position) for t in targets if t.value == mean))
        names = [site for site, _ in sites]
        runs = _in_batches(job, partial(_capture, job, mean.side, sites=names, cost=Cost()))
        fitted |= fit_means(runs, sites, mean, int(job.pairs.lengths(mean.side).max())).of
    return Means(fitted)
