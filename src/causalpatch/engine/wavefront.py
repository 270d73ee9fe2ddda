"""The wavefront engine: recompute only what a patch can change, for all patches together, on unmodified layers.

1. The prompts of a batch of pairs run once (``scene``). Runs whose patch cannot reach what a metric reads, or writes
   what is there already, are *derived*: their metric is the base run's.
2. Every other run is a segment of packed rows (``segments``) that enters at its first patched layer.
3. Layer by layer, all segments that have entered go through the layer's own module in chunks of rows (``wave``); hooks
   write the patched values, attention adds the base run's keys and values (``rows``).
4. The final norm and the head run on the tokens that metrics read, over the answers' columns where that is enough.

Assumes causal attention through the interface of transformers and layers that see nothing else of other tokens;
``stack`` refuses models for which this does not hold.

Cost: rows x layers after the entry, instead of prompts x layers x interventions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.base.errors import MemoryExhausted
from causalpatch.engine import shares
from causalpatch.engine.batches import in_batches
from causalpatch.engine.calibrate import preferred_rows
from causalpatch.engine.canonical import without_repeats
from causalpatch.engine.cone import ModelNumbers
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.hooks import users_hooks
from causalpatch.engine.job import BASE, SOURCE, Block, Cost, Job, check_finite, lay_rows, portions
from causalpatch.engine.means import Means
from causalpatch.engine.memory import chunk_bytes, exhausted, is_out_of_memory, release_memory
from causalpatch.engine.once import run_stack
from causalpatch.engine.planning import numbers_of
from causalpatch.engine.resolve import Placer, Role, Target
from causalpatch.engine.scene import Placed, Scene
from causalpatch.engine.shares import Kept, Limits, waves
from causalpatch.engine.stack import Stack, layer_of
from causalpatch.engine.values import Row
from causalpatch.engine.wave import Wave
from causalpatch.models import Model
from causalpatch.models.taps import STEPS
from causalpatch.results.status import Status

# Sites by which layers are taken apart.
_NEEDED = ("resid_pre", "z", "mlp_post", "final_norm")


def why_not(job: Job, gauge: Gauge) -> str | None:
    """Say why no run of a job can be made by the wavefront, or None."""
    if gauge.steps:
        return "what the model goes on to write is read, which takes whole forwards"
    if job.model.family is None:
        return "its layers are not known by name"
    if job.pairs.kind != "tokens":
        return "its inputs are not tokens"
    if job.model.streams:
        return "an encoder stands before its layers"
    if job.model.sees_ahead:
        return "its tokens see later ones"
    lacking = [name for name in _NEEDED if name in job.model.shape.refused]
    if lacking:
        return f"it has no {lacking[0]}: {job.model.shape.refused[lacking[0]].partition(';')[0]}"
    hooked = users_hooks(job.model)
    return f"hooks stand on {hooked[0]}, and they expect whole prompts" if hooked else None


def why_not_targets(model: Model, targets: Sequence[Target]) -> str | None:
    """Say why a run with some targets cannot be made by the wavefront, or None."""
    for target in targets:
        if not target.has_position:
            return f"{target.site} has no positions"
        if target.is_ahead:
            return f"{target.site} stands in front of the layers, in the vision tower"
        if target.site.module is not None and target.site.module.side in STEPS:
            return f"{target.site} needs all steps of a recurrent module"
        if target.site.module is not None and layer_of(model, target.site.module.path) is None:
            return f"{target.site} stands outside the layers"
    return None


def measure(job: Job, gauge: Gauge, means: Means, cost: Cost) -> Iterator[Block]:
    """Measure every intervention on every pair; see ``reference.measure_rows`` for arguments and blocks.

    Raises:
        ModelUnsupported: The model cannot be replayed layer by layer; nothing has been yielded then.
        MemoryExhausted: One segment does not fit into memory.
    """
    stack = Stack(job.model, job.few_bits)
    placer = Placer(job.pairs, job.base)
    job, means, copies = without_repeats(job, means)
    kept = Kept.of(job, gauge, numbers_of_layers(job.model))
    for sweep, blocks in in_batches(job, kept.batches(), partial(open_sweep, job, gauge, stack, means, cost, kept)):
        yield from blocks
        indices = sweep.scenes[0].indices
        for numbers in portions(job, len(indices), shares.PORTION):
            rows, lost = lay_rows(job, placer, indices, numbers)
            if lost:
                yield from copies.spread(Block.lost(lost, len(gauge.metrics)))
            for block in sweep.blocks(rows):
                yield from copies.spread(block)
        del sweep, blocks  # its tensors go before those of the next are made


def open_sweep(
    job: Job, gauge: Gauge, stack: Stack, means: Means, cost: Cost, kept: Kept, indices: np.ndarray
) -> tuple["Sweep", list[Block]]:
    """Run the prompts of some pairs, and measure them untouched.

    Args:
        job: What is measured.
        gauge: The metrics.
        stack: The layers.
        means: Fitted means.
        cost: Counts what is spent.
        kept: Where their tensors are kept.
        indices: The pairs.

    Returns:
        What measures interventions on them, and the cells of the untouched runs.

    Raises:
        NotFinite: A run gives NaN or infinity.
    """
    run = partial(run_stack, job, stack, where=kept.place(indices, job.model.device))
    scenes = [Scene(job, gauge, stack, indices, means, fork=fork, run=run) for fork in (None, *gauge.forks)]
    return opened(job, gauge, scenes, cost, kept.longest(indices))


def opened(job: Job, gauge: Gauge, scenes: Sequence[Scene], cost: Cost, longest: int) -> tuple["Sweep", list[Block]]:
    """Measure untouched runs.

    Args:
        job: What is measured.
        gauge: The metrics.
        scenes: The prompts of some pairs, run, then those with an answer behind them.
        cost: Counts what is spent.
        longest: Tokens of the longest prompt, with the answer that follows it.

    Returns:
        What measures interventions on them, and the cells of the untouched runs.

    Raises:
        NotFinite: A run gives NaN or infinity.
    """
    sweep, indices = Sweep(job, gauge, scenes, cost, longest), scenes[0].indices
    blocks = []
    for name, code in (("base", BASE), ("source", SOURCE)):
        check_finite(job, gauge, name, indices, sweep.untouched[name])
        blocks.append(Block.of(np.full(len(indices), code), indices, sweep.untouched[name], Status.MEASURED))
    made = [scene for scene in scenes if scene.is_new]
    cost.forwards += len(made)
    cost.rows += sum(len(scene.prompts.batch.lengths) for scene in made)
    return sweep, blocks


def numbers_of_layers(model: Model) -> ModelNumbers:
    """Return the numbers of a model that a stack was made of."""
    return cast(ModelNumbers, numbers_of(model))  # the stack has refused models without layers


@dataclass(frozen=True)
class Laid:
    """Runs of a batch of pairs, laid out.

    Args:
        rows: The runs.
        placed: What of them differs from the base run in each scene.
        lengths: Rows of each run, in the scene where it has most.
        parts: Numbers of the runs that move on together.
        derived: The cells that are known already, if any.
    """

    rows: Sequence[Row]
    placed: Sequence[Placed]
    lengths: Int[np.ndarray, " run"]
    parts: Sequence[Int[np.ndarray, " _"]]
    derived: Block | None


class Sweep:
    """All interventions on a batch of pairs.

    Args:
        job: What is measured.
        gauge: The metrics.
        scenes: The prompts, run, then those with an answer behind them.
        cost: Counts what is spent.
        longest: Tokens of the longest prompt, with the answer that follows it.
    """

    def __init__(self, job: Job, gauge: Gauge, scenes: Sequence[Scene], cost: Cost, longest: int) -> None:
        self.job, self.gauge, self.scenes, self.cost = job, gauge, scenes, cost
        self.status = Status.MEASURED if job.few_bits is None else Status.SCREENED
        numbers, device = numbers_of_layers(job.model), job.model.device
        self.limits = Limits.of(job, numbers, longest, preferred_rows(numbers, device, job.model.dtype))
        self.chunk_rows = self.limits.chunk_rows
        local = np.arange(len(scenes[0].indices))
        roles = {"base": job.base, "source": job.source}
        self.runs = {
            name: scenes[0].as_run(role, scenes[0].untouched(role), local, self._forks_untouched(role))
            for name, role in roles.items()
        }
        self.untouched = {name: self._measure_untouched(role, self.runs[name]) for name, role in roles.items()}

    def _measure_untouched(self, role: Role, run: Run) -> Float[np.ndarray, "metric pair"]:
        """Measure untouched runs, as many at once as patched ones."""
        scene, local = self.scenes[0], np.arange(len(self.scenes[0].indices))
        found = []
        for begin in range(0, len(local), scene.runs_at_once):
            some = slice(begin, begin + scene.runs_at_once)
            forks = {side: table[some] for side, table in run.forks.items()}
            part = scene.as_run(role, run.logits[some], local[some], forks)
            found.append(self.gauge.values(part, self.runs, torch.as_tensor(local[some], device=run.logits.device)))
        return np.concatenate(found, 1)

    def _forks_untouched(self, role: Role) -> dict[str, Tensor]:
        local = np.arange(len(self.scenes[0].indices))
        found: dict[str, list[Tensor]] = {}
        for scene in self.scenes[1:]:
            found.setdefault(scene.side, []).append(scene.spelt(role, scene.untouched(role), local))
        return {side: torch.stack(columns, 1) for side, columns in found.items()}

    def blocks(self, rows: Sequence[Row]) -> Iterator[Block]:
        """Measure runs."""
        laid = self.lay(rows)
        if laid.derived is not None:
            yield laid.derived
        waiting = list(laid.parts)
        while waiting:
            part = waiting.pop(0)
            block = None
            try:
                block = self.measure(laid, part)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._shrink(laid, part, error, waiting)
            if block is None:
                release_memory()  # out here, where the error no longer holds the tensors of its frames
                continue
            yield block

    def lay(self, rows: Sequence[Row]) -> Laid:
        """Lay runs out: find what is known already, and what moves on together.

        Raises:
            MemoryExhausted: Not even that fits into memory.
        """
        try:
            placed = [scene.place(rows) for scene in self.scenes]
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise exhausted(self.job.model, self.job.pairs, rows[0].pair) from error
        lengths = np.zeros(len(rows), dtype=np.int64)
        for some in placed:
            lengths[some.numbers] = np.maximum(lengths[some.numbers], some.segments.lengths)
        known, derived = np.flatnonzero(lengths == 0), None
        if len(known):
            same = [rows[i] for i in known.tolist()]
            numbers, pairs, local = np.array([(row.intervention, row.pair, row.local) for row in same]).T
            derived = Block.of(numbers, pairs, self.untouched["base"][:, local], Status.DERIVED)
        # In packed order, so that what shares base keys stays together; runs that matter to forks alone come last.
        order = np.concatenate([placed[0].numbers, np.setdiff1d(np.flatnonzero(lengths), placed[0].numbers)])
        is_control = np.array([rows[i].intervention >= self.job.n_asked for i in order.tolist()], dtype=bool)
        parts = [order[part] for part in waves(lengths[order], is_control, self.limits.wave_rows)]
        return Laid(rows, placed, lengths, parts, derived)

    def waves(self, laid: Laid, part: np.ndarray) -> list[Wave | None]:
        """Return the segments of some runs in each scene, none of which has moved yet; None where nothing differs."""
        return [self._wave(scene, some, part) for scene, some in zip(self.scenes, laid.placed, strict=True)]

    def measure(self, laid: Laid, part: np.ndarray, moved: Sequence[Wave | None] | None = None) -> Block:
        """Measure some runs.

        Args:
            laid: Where they are laid out.
            part: Their numbers.
            moved: Their segments in each scene, where these have gone through the layers already.
        """
        token_layers = self.cost.token_layers
        try:
            values = self._values_of(laid, part, moved)
        except Exception:
            self.cost.token_layers = token_layers  # what did not come to an end is not counted as spent
            raise
        self.cost.rows += len(part)
        numbers, pairs = np.array([(laid.rows[i].intervention, laid.rows[i].pair) for i in part.tolist()]).T
        return Block.of(numbers, pairs, values, self.status)

    def _shrink(self, laid: Laid, part: np.ndarray, error: Exception, waiting: list[np.ndarray]) -> None:
        """Make what does not fit into memory smaller: the chunk of rows, then the part."""
        if self.shrink_chunk(laid):
            waiting.insert(0, part)
        elif len(part) > 1:
            waiting[:0] = np.array_split(part, 2)
        else:
            raise self.too_large(laid, part) from error

    def shrink_chunk(self, laid: Laid) -> bool:
        """Halve the rows of a call; say whether that was possible."""
        longest = int(laid.placed[0].segments.lengths.max(initial=1))
        is_large = self.chunk_rows > longest
        self.chunk_rows = max(longest, self.chunk_rows // 2) if is_large else self.chunk_rows
        return is_large

    def too_large(self, laid: Laid, part: np.ndarray) -> MemoryExhausted:
        """Return the error for a run that does not fit into memory by itself."""
        pair = laid.rows[int(part[0])].pair
        n_keys = int(self.job.pairs.lengths(self.job.base)[pair])
        longest = int(laid.placed[0].segments.lengths.max(initial=1))
        needed = chunk_bytes(numbers_of_layers(self.job.model), longest, n_keys)
        return exhausted(self.job.model, self.job.pairs, pair, needed)

    def _values_of(
        self, laid: Laid, part: np.ndarray, moved: Sequence[Wave | None] | None
    ) -> Float[np.ndarray, "metric run"]:
        """Measure some runs, in the order of ``part``."""
        forks: dict[str, list[Tensor]] = {}
        for number, scene in enumerate(self.scenes[1:], start=1):
            columns = [
                (where, scene.spelt(self.job.base, logits, local))
                for where, local, logits in self._logits(number, laid, part, moved)
            ]
            where = np.concatenate([where for where, _ in columns])
            column = torch.cat([spelt for _, spelt in columns])
            forks.setdefault(scene.side, []).append(column[torch.as_tensor(np.argsort(where), device=column.device)])
        spelt = {side: torch.stack(columns, 1) for side, columns in forks.items()}
        values = np.empty((len(self.gauge.metrics), len(part)))
        scene = self.scenes[0]
        for where, local, logits in self._logits(0, laid, part, moved):
            index = torch.as_tensor(where, device=logits.device)
            run = scene.as_run(self.job.base, logits, local, {side: table[index] for side, table in spelt.items()})
            values[:, where] = self.gauge.values(run, self.runs, torch.as_tensor(local, device=logits.device))
        return values

    def _wave(self, scene: Scene, placed: Placed, part: np.ndarray) -> Wave | None:
        here = np.flatnonzero(np.isin(placed.numbers, part))
        return Wave(scene, placed.take(here), self.chunk_rows, self.cost) if len(here) else None

    def _logits(
        self, number: int, laid: Laid, part: np.ndarray, moved: Sequence[Wave | None] | None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, Float[Tensor, "run read column"]]]:
        """Yield logits of runs where a scene reads them, in blocks: places in ``part``, local pairs, logits."""
        scene = self.scenes[number]
        wave = self._wave(scene, laid.placed[number], part) if moved is None else moved[number]
        place_of = {number: place for place, number in enumerate(part.tolist())}
        local_of = np.array([laid.rows[i].local for i in part.tolist()])
        base, at_once = scene.untouched(self.job.base), scene.runs_at_once
        where = np.zeros(0, dtype=np.int64)
        if wave is not None:
            stream = wave.stream()
            where = np.array([place_of[number] for number in wave.placed.numbers.tolist()])
            for begin in range(0, len(where), at_once):
                some = np.arange(begin, min(begin + at_once, len(where)))
                local = local_of[where[some]]
                yield where[some], local, wave.logits(stream, some, local, base)
        # What matters to another scene alone is the base run in this one.
        idle = np.setdiff1d(np.arange(len(part)), where)
        for begin in range(0, len(idle), at_once):
            some = idle[begin : begin + at_once]
            yield some, local_of[some], base[torch.as_tensor(local_of[some], device=base.device)]
