"""Pairs in batches and rows in forwards, each as large as memory allows and halved when it runs out."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int

from causalpatch.engine.job import Block, Job, most_rows
from causalpatch.engine.memory import exhausted, is_out_of_memory, release_memory
from causalpatch.engine.values import Row
from causalpatch.results.status import Status

_Made = TypeVar("_Made")


def in_batches(
    job: Job, batches: Iterable[np.ndarray], make: Callable[[Int[np.ndarray, " pair"]], _Made]
) -> Iterator[_Made]:
    """Make something of each batch of pairs, halving the batches that do not fit into memory.

    Args:
        job: The job.
        batches: Indices of pairs.
        make: What is to be made of some pairs.

    Raises:
        MemoryExhausted: One pair does not fit into memory.
    """
    waiting = list(batches)
    while waiting:
        indices = waiting.pop(0)
        made = None
        try:
            made = make(indices)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(indices) == 1:
                raise exhausted(job.model, job.pairs, int(indices[0])) from error
            waiting[:0] = np.array_split(indices, 2)
        if made is not None:
            yield made
        else:
            release_memory()  # out here, where the error no longer holds the tensors of its frames


def in_forwards(
    job: Job, groups: Sequence[Sequence[Row]], run: Callable[[Sequence[Row]], Float[np.ndarray, "metric row"]]
) -> Iterator[Block]:
    """Measure rows in forwards as large as memory allows.

    Args:
        job: The job.
        groups: The rows; those of one forward are of one group.
        run: Measures some rows in one forward, or a few where answers are spelt out.

    Yields:
        The cells of each forward.

    Raises:
        MemoryExhausted: One row does not fit into memory.
    """
    lengths = job.pairs.sizes(job.base)
    limit = job.max_rows
    for rows in groups:
        most = most_rows(job, int(lengths[[row.pair for row in rows]].max())) if rows else 1
        most = most if limit is None else min(most, limit)
        start = 0
        while start < len(rows):
            some = rows[start : start + most]
            values = None
            try:
                values = run(some)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if len(some) == 1:
                    raise exhausted(job.model, job.pairs, some[0].pair) from error
            if values is None:
                most = limit = len(some) // 2
                release_memory()
                continue
            start += len(some)
            numbers = np.array([row.intervention for row in some])
            pairs = np.array([row.pair for row in some])
            yield Block.of(numbers, pairs, values, Status.MEASURED)
