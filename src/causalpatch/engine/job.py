"""What engines are asked to measure, in which pieces, and what they hand back: the same for every engine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, Shaped

from causalpatch.base.errors import NotFinite
from causalpatch.engine.few_bits import FewBits
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.memory import rows_per_forward
from causalpatch.engine.remembered import Remembered
from causalpatch.engine.resolve import Placer, Role, Target
from causalpatch.engine.routes import Ties
from causalpatch.engine.values import Row
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.batch import PaddingSide
from causalpatch.pairs.role import ROLE_WORDS
from causalpatch.results.status import Status
from causalpatch.sites.names import ATTENTION_SITES

BASE, SOURCE = -1, -2
"""Indices that stand for the untouched runs in a block."""


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Args:
        model: The model.
        pairs: The pairs.
        interventions: The targets of each intervention.
        base: Which side is the base run's, the other being the source's.
        padding_side: Where short prompts are padded.
        budget_gib: Memory for activations in GiB, or None for the default.
        max_rows: Most rows in one forward, or None for what memory allows.
        reference: Index of the intervention that ablates everything at once, or None.
        n_controls: How many of the last interventions are controls, such as the reference. Where a pair lacks one of
            their positions the rest is patched all the same.
        few_bits: How the wavefront multiplies the linear maps of patched rows, or None for what the layers do.
        source_model: The model that makes the source runs, or None for the same one.
        ties: Takes note of runs whose experts rounding may have chosen; they are left out. None where all are kept.
        remembered: Untouched runs of earlier jobs on the same pairs; None makes them all.
    """

    model: Model
    pairs: Pairs
    interventions: Sequence[tuple[Target, ...]]
    base: Role
    padding_side: PaddingSide = "right"
    budget_gib: float | None = None
    max_rows: int | None = None
    reference: int | None = None
    n_controls: int = 0
    few_bits: FewBits | None = None
    source_model: Model | None = None
    ties: Ties | None = None
    remembered: Remembered | None = None

    def model_of(self, run: Literal["base", "source"]) -> Model:
        """Return the model that makes the base or the source runs."""
        return self.model if run == "base" or self.source_model is None else self.source_model

    @property
    def n_asked(self) -> int:
        """How many of the interventions were asked for; the controls follow them."""
        return len(self.interventions) - self.n_controls

    @cached_property
    def opens_attention(self) -> bool:
        """Whether a patch stands inside attention, so that all runs compute attention step by step."""
        names = {target.site.name for group in self.interventions for target in group}
        return bool(names & ATTENTION_SITES)

    @property
    def source(self) -> Role:
        """Which side is the source run's."""
        return "clean" if self.base == "corrupt" else "corrupt"

    def part(self, numbers: Sequence[int]) -> "Job":
        """Return the job of some interventions, in ascending order."""
        return replace(
            self,
            interventions=[self.interventions[number] for number in numbers],
            reference=numbers.index(self.reference) if self.reference in numbers else None,
            n_controls=sum(number >= self.n_asked for number in numbers),
        )


@dataclass(frozen=True)
class Block:
    """Numbers of some cells, as they become known.

    Args:
        interventions: Indices of interventions; ``BASE`` and ``SOURCE`` stand for the untouched runs.
        pairs: Indices of pairs.
        values: Metric values; NaN where there is none.
        status: Codes of ``Status``.
    """

    interventions: Int[np.ndarray, " cell"]
    pairs: Int[np.ndarray, " cell"]
    values: Float[np.ndarray, "metric cell"]
    status: Shaped[np.ndarray, " cell"]

    @classmethod
    def of(cls, interventions: np.ndarray, pairs: np.ndarray, values: np.ndarray, status: Status) -> "Block":
        """Return a block of cells obtained in one way; those without a finite number have failed."""
        codes = np.where(np.isfinite(values).all(0), status, Status.FAILED)
        return cls(interventions, pairs, values, codes.astype(np.uint8))

    def renumbered(self, numbers: Sequence[int]) -> "Block":
        """Return the block of a job's part with the job's own numbers; untouched runs keep theirs."""
        if self.interventions[0] < 0:
            return self
        return replace(self, interventions=np.array(numbers, dtype=np.int64)[self.interventions])

    @classmethod
    def lost(cls, cells: Sequence[tuple[int, int]], n_metrics: int) -> "Block":
        """Return a block of (intervention, pair) cells whose pair lacks a position that is written."""
        interventions, pairs = np.array(cells).T
        nothing = np.full((n_metrics, len(cells)), np.nan)
        return cls(interventions, pairs, nothing, np.full(len(cells), Status.UNALIGNED, dtype=np.uint8))


@dataclass
class Cost:
    """What was spent.

    Args:
        forwards: Calls of the whole model.
        rows: Runs in them, or in waves.
        token_layers: Rows of single tokens that single layers were called on, in waves.
    """

    forwards: int = 0
    rows: int = 0
    token_layers: int = 0


def batches_of_pairs(job: Job) -> Iterator[np.ndarray]:
    """Yield the indices of pairs in batches of like length, each with at most as many pairs as rows fit."""
    lengths = np.maximum(job.pairs.sizes("clean"), job.pairs.sizes("corrupt"))
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        # Sorted by length, so the last pair of a batch is its longest: take as many as fit at that length.
        stop = min(len(order), start + most_rows(job, int(lengths[order[start]])))
        stop = start + min(stop - start, most_rows(job, int(lengths[order[stop - 1]])))
        yield np.sort(order[start:stop])
        start = stop


def most_rows(job: Job, n_tokens: int) -> int:
    """Return how many rows of so many tokens go into one forward."""
    fitting = rows_per_forward(job.model, n_tokens, job.budget_gib)
    return fitting if job.max_rows is None else max(1, min(fitting, job.max_rows))


def portions(job: Job, n_pairs: int, most: int) -> Iterator[Sequence[int]]:
    """Yield the numbers of interventions, the controls first, in even portions of about so many runs at most.

    Args:
        job: The job.
        n_pairs: Pairs that each intervention runs on.
        most: Runs in a portion.
    """
    numbers = _controls_first(job)
    n_portions = max(1, -(-len(numbers) * n_pairs // most))
    size = max(1, -(-len(numbers) // n_portions))
    for begin in range(0, len(numbers), size):
        yield numbers[begin : begin + size]


def _controls_first(job: Job) -> Sequence[int]:
    # Without the controls the others would mean nothing to one who stops in between.
    return [*range(job.n_asked, len(job.interventions)), *range(job.n_asked)]


def lay_rows(
    job: Job, placer: Placer, indices: np.ndarray, numbers: Sequence[int] | None = None
) -> tuple[list[Row], list[tuple[int, int]]]:
    """Return the rows to run for some pairs, and the (intervention, pair) cells that have no such position.

    Args:
        job: The job.
        placer: Finds the positions.
        indices: The pairs.
        numbers: The interventions; all of them, the controls first, unless given.
    """
    rows, lost = [], []
    pairs = indices.tolist()
    for number in _controls_first(job) if numbers is None else numbers:
        targets = job.interventions[number]
        places = [placer.places(target, pairs) if target.has_position else [None] * len(pairs) for target in targets]
        for local, pair in enumerate(pairs):
            placed = tuple([(target, place[local]) for target, place in zip(targets, places, strict=True)])
            # Most have one target and a place for it.
            if placed[0][1] is None or len(placed) > 1:
                if number >= job.n_asked:
                    placed = tuple(each for each in placed if each[1] is not None or not each[0].has_position)
                if any(place is None and target.has_position for target, place in placed):
                    lost.append((number, pair))
                    continue
            rows.append(Row(number, pair, local, placed))
    return rows, lost


def check_finite(job: Job, gauge: Gauge, name: str, indices: np.ndarray, values: np.ndarray) -> None:
    """Make sure that an untouched run gave numbers.

    Raises:
        NotFinite: It gives NaN or infinity.
    """
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        metric, row = bad[0]
        role = job.base if name == "base" else job.source
        raise NotFinite(
            f"the {ROLE_WORDS[role]} run of pair {indices[row]} of '{job.pairs.name}' gives {values[metric, row]}",
            facts=[("metric", gauge.metrics[metric].name), ("model", f"'{job.model.name}' in {job.model.dtype}")],
            fix="check the checkpoint for NaN weights, or open the model in float32",
        )
