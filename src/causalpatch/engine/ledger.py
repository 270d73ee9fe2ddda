"""What engines that share a job have measured of it, which cells are open, and numbers made comparable.

Engines round differently, and an effect is a small difference. So the patched runs of each engine belong to untouched
runs of the same engine. The first engine's untouched runs are kept, and a later engine's numbers are moved by what its
untouched run of the pair differs from the kept one: effects stay what that engine measured, and a cell that is the
base run stays the base run exactly. For the same reason each engine measures an identity patch of its own, and the
largest effect of any of them is the noise floor.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Bool, Float, Int

from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import BASE, Block, Job
from causalpatch.patches import Identity


@dataclass(frozen=True, eq=False)
class Share:
    """Interventions that one engine measures on the same pairs.

    Args:
        numbers: The interventions, in ascending order; the last may be an identity patch in place of the job's.
        pairs: The pairs.
        job: The job of these alone.
        gauge: The metrics on these pairs.
    """

    numbers: Int[np.ndarray, " intervention"]
    pairs: Int[np.ndarray, " pair"]
    job: Job
    gauge: Gauge


@dataclass
class Ledger:
    """The cells of a job that are known.

    Args:
        job: The job.
        gauge: Its metrics.
        known: Which cells are, ``(intervention, pair)``.
        held: Which cells only a forward of their own may measure, ``(intervention, pair)``; see ``routes``.
        base: Metrics of the kept base runs, ``(metric, pair)``; NaN until measured.
        has_untouched: Whether a pair's untouched runs are, base and source, ``(2, pair)``.
        floor: Metrics of the identity patch that has the largest effects so far, ``(metric, pair)``.
    """

    job: Job
    gauge: Gauge
    known: Bool[np.ndarray, "intervention pair"] = field(init=False)
    held: Bool[np.ndarray, "intervention pair"] = field(init=False)
    base: Float[np.ndarray, "metric pair"] = field(init=False)
    has_untouched: Bool[np.ndarray, "2 pair"] = field(init=False)
    floor: Float[np.ndarray, "metric pair"] = field(init=False)

    def __post_init__(self) -> None:
        n_pairs, n_metrics = len(self.job.pairs), len(self.gauge.metrics)
        self.known, self.held = (np.zeros((len(self.job.interventions), n_pairs), dtype=bool) for _ in range(2))
        self.has_untouched = np.zeros((2, n_pairs), dtype=bool)
        self.base, self.floor = (np.full((n_metrics, n_pairs), np.nan) for _ in range(2))

    def pending(self, *, alone: bool = True) -> list[int]:
        """Return the interventions of which cells are open.

        Args:
            alone: Whether each run will have a forward of its own, as some cells need.
        """
        numbers: list[int] = np.flatnonzero(self._open(alone=alone).any(1)).tolist()
        return numbers

    def _open(self, *, alone: bool) -> Bool[np.ndarray, "intervention pair"]:
        return ~self.known if alone else ~self.known & ~self.held

    @property
    def is_open(self) -> bool:
        """Whether anything is left to be measured."""
        return not (self.known.all() and self.has_untouched.all())

    @property
    def identity(self) -> int | None:
        """The intervention that is the job's identity patch, or None where it has none."""
        job = self.job
        if job.n_controls and all(isinstance(target.value, Identity) for target in job.interventions[-1]):
            return len(job.interventions) - 1
        return None

    def shares(self, numbers: Sequence[int], *, alone: bool = True) -> Iterator[Share]:
        """Yield the open cells of some interventions, those of the same pairs together.

        Args:
            numbers: Interventions, in ascending order; none for the untouched runs alone.
            alone: Whether each run will have a forward of its own, as some cells need.
        """
        groups: dict[bytes, list[int]] = {}
        is_open = self._open(alone=alone)
        for number in numbers:
            groups.setdefault(is_open[number].tobytes(), []).append(number)
        missing = ~self.has_untouched.all(0)
        for key, some in groups.items() or ((missing.tobytes(), []),):
            pairs = np.flatnonzero(np.frombuffer(key, dtype=bool))
            if len(pairs):
                yield self._share(some, pairs)

    def _share(self, numbers: list[int], pairs: np.ndarray) -> Share:
        job, gauge, identity = self.job.part(numbers), self.gauge, self.identity
        if job.n_asked and identity is not None and identity not in numbers:
            own = tuple(replace(target, value=Identity(), align=None) for target in job.interventions[0])
            job = replace(job, interventions=[*job.interventions, own], n_controls=job.n_controls + 1)
            numbers = [*numbers, identity]
        if len(pairs) < len(self.job.pairs):
            job = replace(job, pairs=job.pairs.take(pairs))
            gauge = Gauge(gauge.metrics, job.pairs, job.model)
        return Share(np.array(numbers, dtype=np.int64), pairs, job, gauge)

    def hold(self, share: Share, cells: Collection[tuple[int, int]]) -> None:
        """Keep cells for an engine that gives each run a forward of its own.

        Args:
            share: The share that was measured without them.
            cells: Interventions and pairs, by the share's numbers; ``BASE`` for all of a pair.
        """
        for number, pair in cells:
            self.held[slice(None) if number == BASE else share.numbers[number], share.pairs[pair]] = True

    def entering(self, share: Share, blocks: Iterator[Block]) -> Iterator[Block]:
        """Take in what an engine measures of a share, and yield it by the job's own numbers, comparable.

        Args:
            share: The share.
            blocks: The engine's blocks.
        """
        own = np.full_like(self.base, np.nan)  # this engine's base runs
        for block in blocks:
            pairs = share.pairs[block.pairs]
            code = int(block.interventions[0])
            if code < 0:
                kept = self._untouched(code, replace(block, pairs=pairs), own)
                if kept is not None:
                    yield kept
                continue
            values = block.values
            if not np.array_equal(own[:, pairs], self.base[:, pairs]):
                values = values - own[:, pairs] + self.base[:, pairs]
            named = Block(share.numbers[block.interventions], pairs, values, block.status)
            yield self._patched(named)

    def _untouched(self, code: int, block: Block, own: np.ndarray) -> Block | None:
        """Note untouched runs; return those of pairs that had none."""
        if code == BASE:
            own[:, block.pairs] = block.values
        has = self.has_untouched[0 if code == BASE else 1]
        is_new = ~has[block.pairs]
        has[block.pairs] = True
        if not is_new.any():
            return None
        new = Block(*(part[..., is_new] for part in (block.interventions, block.pairs, block.values, block.status)))
        if code == BASE:
            self.base[:, new.pairs] = new.values
        return new

    def _patched(self, block: Block) -> Block:
        """Note patched runs; of several identity patches the one with the larger effect is kept."""
        self.known[block.interventions, block.pairs] = True
        is_floor = block.interventions == self.identity
        if not is_floor.any():
            return block
        pairs, values = block.pairs[is_floor], block.values.copy()
        before, base = self.floor[:, pairs], self.base[:, pairs]
        is_less = np.abs(values[:, is_floor] - base) < np.abs(before - base)
        self.floor[:, pairs] = values[:, is_floor] = np.where(is_less, before, values[:, is_floor])
        return replace(block, values=values)
