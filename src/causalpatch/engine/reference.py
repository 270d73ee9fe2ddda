"""The reference engine: full forwards with plain hooks. It is the oracle for every faster engine and stays simple.

1. Pairs are taken in batches of like length. For each batch the base and source runs are made once: they give the
   baselines, and the values of every site that is read.
2. Rows are (intervention, pair). As many as fit into memory are stacked into one forward of the whole model, in which
   hooks replace the sites' values.
3. Metrics read the outputs. Answers of several tokens are spelt out by further forwards that go on through the answer,
   with the same patches on the prompt.
4. When memory runs out the number of rows is halved, down to one.

``measure_reference`` is the same with one row in each forward: no stacking, no padding, no other prompt beside it.

Symbols: K interventions, P pairs in a batch, R rows in a forward.
Cost: K x pairs rows of a full forward, plus two per pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float

from causalpatch.engine.batches import in_batches, in_forwards
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.generate import at_all
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.engine.job import Block, Cost, Job, batches_of_pairs, lay_rows
from causalpatch.engine.means import Means
from causalpatch.engine.resolve import Placer
from causalpatch.engine.routes import watching
from causalpatch.engine.untouched import Fork, Untouched, run_untouched, spell
from causalpatch.engine.values import Row, writes_of_rows
from causalpatch.pairs import Batch


def why_not(job: Job, gauge: Gauge) -> str | None:
    """Return nothing: full forwards with hooks run whatever runs at all."""
    del job, gauge
    return None


def measure_rows(job: Job, gauge: Gauge, means: Means, cost: Cost) -> Iterator[Block]:
    """Measure every intervention on every pair, interventions and pairs stacked into rows of a forward.

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
    for batch in in_batches(job, batches_of_pairs(job), partial(run_untouched, job, gauge, means, cost)):
        yield from batch.blocks()
        rows, lost = lay_rows(job, placer, batch.indices)
        if lost:
            yield Block.lost(lost, len(gauge.metrics))
        yield from in_forwards(job, [rows], partial(_run_rows, job, gauge, cost, batch))
        del batch  # its tensors go before those of the next are made


def measure_reference(job: Job, gauge: Gauge, means: Means, cost: Cost) -> Iterator[Block]:
    """Measure every intervention on every pair, each in a forward of its own.

    Args:
        job: What is to be measured.
        gauge: The metrics.
        means: Means of the sites that are replaced by one.
        cost: Counts what is spent.

    Yields:
        Blocks of cells: for each pair first the untouched runs, then the patched ones, one by one.

    Raises:
        MemoryExhausted: One row does not fit into memory.
        PatchDidNotFire: A module of a patch did not run.
        NotFinite: An untouched run gives NaN or infinity.
    """
    return measure_rows(replace(job, max_rows=1), gauge, means, cost)


def _run_rows(
    job: Job, gauge: Gauge, cost: Cost, batch: Untouched, rows: Sequence[Row]
) -> Float[np.ndarray, "metric row"]:
    numbers = [row.pair for row in rows]
    pair = torch.tensor(numbers, device=job.model.device)

    def run(fork: Fork | None, inputs: Batch) -> Run:
        # The inputs go on through an answer, or what was written, and the patches are the same.
        patched = at_all(job, rows, inputs) if fork == "all" else rows
        writes = writes_of_rows(job.model, batch.known, patched, inputs)
        call = inputs_of(job.model, inputs)
        with watching(job.ties, job.model, rows, inputs):
            output, _ = run_with_hooks(job.model, call, writes, opens_attention=job.opens_attention)
        cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(rows)
        return Run(job.model.logits(output), inputs, pair)

    prompts = job.pairs.batch(job.base, np.array(numbers), padding_side=job.padding_side)
    whole = spell(job, gauge, job.base, run(None, prompts), run)
    return gauge.values(whole, batch.runs, torch.tensor([row.local for row in rows], device=pair.device))
