"""What the wavefront needs for a job, as its plan says: rows, memory, passes, and weights that are fetched.

Runs are laid out in the batches, portions and waves of the run itself; where layers are fetched one by one, waves are
gathered to passes as ``breadth_first`` gathers them.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from causalpatch.engine import shares
from causalpatch.engine.calibrate import remembered
from causalpatch.engine.cone import Cone, ModelNumbers, Runs
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import Job, lay_rows, portions
from causalpatch.engine.memory import chunk_bytes, state_bytes
from causalpatch.engine.plan import Fetches, Wave
from causalpatch.engine.reads import Reads
from causalpatch.engine.resolve import Placer, Role
from causalpatch.engine.shares import Kept, Limits, front_rows, is_full, logits_bytes, logits_rows, n_columns, waves
from causalpatch.engine.unembedding import unembedding_of
from causalpatch.engine.values import Row


@dataclass(frozen=True)
class LaidOut:
    """Runs as the wavefront lays them out: pairs in batches, the runs of a batch in portions.

    Args:
        kept: What is kept of the untouched runs.
        batches: The pairs of each batch.
        batch_of: The batch of each portion.
        laid: The runs of each portion.
    """

    kept: Kept
    batches: Sequence[np.ndarray]
    batch_of: Sequence[int]
    laid: Sequence[Sequence[Row]]

    @classmethod
    def of(cls, job: Job, gauge: Gauge, numbers: ModelNumbers) -> "LaidOut":
        """Lay out all runs of a job."""
        kept, placer = Kept.of(job, gauge, numbers), Placer(job.pairs, job.base)
        batches = list(kept.batches())
        found = [
            (number, lay_rows(job, placer, batch, some)[0])
            for number, batch in enumerate(batches)
            for some in portions(job, len(batch), shares.PORTION)
        ]
        return cls(kept, batches, *zip(*found, strict=True))


@dataclass(frozen=True)
class Cells:
    """Kinds of cells; every list and array has one entry per kind.

    Args:
        layer: Where they enter.
        point: Where in that layer.
        columns: How many columns they replace, or 0 for all.
        written: The tokens that they write.
        pair: Their pair.
        portion: Where they are laid out.
        n_asked: How many of them were asked for.
        count: How many there are, controls included.
    """

    layer: np.ndarray
    point: np.ndarray
    columns: np.ndarray
    written: Sequence[np.ndarray]
    pair: np.ndarray
    portion: np.ndarray
    n_asked: np.ndarray
    count: np.ndarray

    def runs(self, reads: np.ndarray) -> Runs:
        """Return them as runs.

        Args:
            reads: The tokens that are read in each pair, with -1 to fill up, ``(pair, read)``.
        """
        written = np.full((len(self.written), max(map(len, self.written), default=1)), -1)
        for row, tokens in zip(written, self.written, strict=True):
            row[: len(tokens)] = tokens
        return Runs(self.layer, self.point, written, reads[self.pair], self.columns)


def reads_of(gauge: Gauge, lengths: np.ndarray, role: Role) -> np.ndarray:
    """Return the tokens that are read in each pair, each once and -1 to fill up, ``(pair, read)``."""
    if gauge.reads_all:
        tokens = np.arange(lengths.max())
        return np.where(tokens < lengths[:, None], tokens, -1)
    reads = np.sort(gauge.reads(lengths, np.arange(len(lengths)), role), axis=1)
    reads[:, 1:][reads[:, 1:] == reads[:, :-1]] = -1
    return reads


def plan_wave(job: Job, gauge: Gauge, layout: LaidOut, cells: Cells, made: Cone, numbers: ModelNumbers) -> Wave:
    """Return what the wavefront engine needs: the same shares, laid out alike."""
    kept, device = layout.kept, job.model.device
    found = remembered(numbers, device, job.model.dtype)
    limits = [Limits.of(job, numbers, kept.longest(batch), found.rows if found else None) for batch in layout.batches]
    lengths = np.where(made.held > 0, made.held + kept.further[cells.pair], 0)
    reads, kinds = reads_of(gauge, job.pairs.lengths(job.base), job.base), np.zeros(len(job.pairs), dtype=np.int64)
    for pairs in layout.batches:
        kinds[pairs] = Reads.of(reads[pairs]).kinds
    order = np.lexsort((cells.pair, kinds[cells.pair], made.start))  # as segments are packed
    held: list[int] = []
    called: list[int] = []
    entries: list[int] = []
    for portion, batch in enumerate(layout.batch_of):
        here = order[(cells.portion[order] == portion) & (lengths[order] > 0)]
        counts = np.concatenate([cells.n_asked[here], (cells.count - cells.n_asked)[here]])
        rows = np.repeat(np.tile(lengths[here], 2), counts)
        is_control = np.repeat(np.arange(len(counts)) >= len(here), counts)
        parts = list(waves(rows, is_control, limits[batch].wave_rows))
        together = [int(rows[part].sum()) for part in parts]
        first = np.repeat(np.tile(cells.layer[here], 2), counts)
        entries += [int(first[part].min(initial=numbers.n_layers - 1)) for part in parts]
        held += together
        called += [min(limits[batch].chunk_rows, most) for most in together]
    chunk = max(called, default=1)
    runs, logits = zip(*(kept.n_bytes(batch) for batch in layout.batches), strict=True)
    largest = layout.batches[int(np.argmax(runs))]
    n_read = int((cells.count * made.reads).sum())
    columns = n_columns(job, gauge, is_fork=bool(gauge.forks))
    block = logits_bytes(job, gauge, min(n_read, logits_rows(job, gauge, columns)), columns)
    n_passes, fetches = len(held) * (1 + len(gauge.forks)), None
    if job.model.weights is not None:
        held, fetches = _fetches(job, gauge, kept, held, entries)
        n_passes = len(held)
    place = kept.place(largest, device) if fetches is None else kept.place_all(layout.batches, device)
    return Wave(
        token_layers=int((made.rows * cells.count).sum()),
        chunk_rows=chunk,
        chunk_bytes=max(block, chunk_bytes(numbers, chunk, int(kept.widths.max()))),
        base_bytes=max(runs) if fetches is None else sum(runs),
        base_place=place,
        logits_bytes=max(logits) if fetches is None else sum(logits),
        held_bytes=state_bytes(numbers, max(held, default=0)),
        passes=n_passes,
        fetches=fetches,
    )


def _fetches(
    job: Job, gauge: Gauge, kept: Kept, held: Sequence[int], entries: Sequence[int]
) -> tuple[list[int], Fetches]:
    """Gather waves to passes; return the rows of each pass, and what is fetched for them and the untouched runs.

    Args:
        job: The job, of a model whose weights are fetched.
        gauge: The metrics.
        kept: What is kept of the untouched runs.
        held: Rows of each wave.
        entries: The first layer that each wave enters.
    """
    weights, most, n_scenes = job.model.weights, front_rows(job, kept), 1 + len(gauge.forks)
    if weights is None:
        raise LookupError(job.model.name)  # asked of models whose weights are fetched alone
    passes: list[int] = []
    first: list[int] = []
    for rows, entry in zip(held, entries, strict=True):
        if passes and not is_full(passes[-1], rows * n_scenes, most):
            passes[-1] += rows * n_scenes
            first[-1] = min(first[-1], entry)
        else:
            passes.append(rows * n_scenes)
            first.append(entry)
    unembedding = unembedding_of(job.model.module)
    head = None if unembedding is None else weights.path_of(unembedding)
    starts = [0, *first]  # the untouched runs go through all layers
    n_bytes = sum(sum(weights.layer_bytes[start:]) for start in starts)
    n_bytes += len(starts) * (0 if head is None else weights.units[head].n_bytes)
    n_layers = len(weights.layers)
    loads = sum(n_layers - start for start in starts)
    return passes, Fetches(weights.store.place, n_layers, max(weights.layer_bytes), loads, n_bytes)
