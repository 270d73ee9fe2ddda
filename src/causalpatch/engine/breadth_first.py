"""The wavefront where weights are fetched layer by layer: all batches and all waves meet a layer before it goes.

With all weights in memory, pairs come batch by batch and runs wave by wave, so that little is held at once. Each wave
goes through all layers, which costs nothing. Where layers are fetched for it, the order is turned around:

1. *Untouched runs*: the prompts of all batches go through the layers together (``layered``). What is kept of them goes
   to the host's memory or to disk, where memory for activations does not hold it.
2. *Passes*: waves are gathered until their streams take the share of memory that is meant for them (``front_rows``).
   Then they go through the layers together: each layer is fetched once, from the first that one of them enters.
3. Behind the layers the unembedding is fetched once for all of them.

Batches, waves and calls hold the same rows as where all weights are in memory, so that the numbers are the same.

Symbols: F bytes of the streams of all runs, S the memory meant for them, L layers.
Cost: ceil(F / S) passes, and one for the untouched runs, of at most L fetches each.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from causalpatch.engine import shares, wavefront
from causalpatch.engine.canonical import without_repeats
from causalpatch.engine.fetched import holding_layer, holding_part
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import Block, Cost, Job, lay_rows, portions
from causalpatch.engine.layered import LayeredCapture
from causalpatch.engine.means import Means
from causalpatch.engine.memory import exhausted, is_out_of_memory, release_memory
from causalpatch.engine.once import ports_of_job
from causalpatch.engine.resolve import Placer
from causalpatch.engine.scene import Fork, Prompts, Runs, Scene
from causalpatch.engine.shares import Kept, front_rows, is_full
from causalpatch.engine.stack import Stack, StackRun
from causalpatch.engine.unembedding import unembedding_of
from causalpatch.engine.wave import Wave
from causalpatch.engine.wavefront import Laid, Sweep


def measure(job: Job, gauge: Gauge, means: Means, cost: Cost) -> Iterator[Block]:
    """Measure every intervention on every pair; see ``reference.measure_rows`` for arguments and blocks.

    Raises:
        ModelUnsupported: The model cannot be replayed layer by layer; nothing has been yielded then.
        MemoryExhausted: One segment does not fit into memory.
    """
    if job.model.weights is None:
        yield from wavefront.measure(job, gauge, means, cost)
        return
    stack, placer = Stack(job.model, job.few_bits), Placer(job.pairs, job.base)
    job, means, copies = without_repeats(job, means)
    kept = Kept.of(job, gauge, wavefront.numbers_of_layers(job.model))
    opened = _open(job, gauge, stack, means, cost, kept)
    for _, blocks in opened:
        yield from blocks
    front = _Front(job, stack, kept)
    for sweep, _ in opened:
        indices = sweep.scenes[0].indices
        for numbers in portions(job, len(indices), shares.PORTION):
            rows, lost = lay_rows(job, placer, indices, numbers)
            if lost:
                yield from copies.spread(Block.lost(lost, len(gauge.metrics)))
            laid = sweep.lay(rows)
            if laid.derived is not None:
                yield from copies.spread(laid.derived)
            for part in laid.parts:
                for block in front.take(Member(sweep, laid, part)):
                    yield from copies.spread(block)
    for block in front.go():
        yield from copies.spread(block)


def _open(
    job: Job, gauge: Gauge, stack: Stack, means: Means, cost: Cost, kept: Kept
) -> list[tuple[Sweep, list[Block]]]:
    """Run the prompts of all pairs, and measure them untouched.

    Raises:
        MemoryExhausted: A batch does not fit into memory.
        NotFinite: A run gives NaN or infinity.
    """
    batches, ports = list(kept.batches()), ports_of_job(job, stack)
    where, forks = kept.place_all(batches, job.model.device), (None, *gauge.forks)

    def capture(indices: np.ndarray, fork: Fork | None) -> LayeredCapture:
        return LayeredCapture(stack, Prompts.of_pairs(job, gauge, indices, fork).batch, *ports, where)

    captures = [(indices, [capture(indices, fork) for fork in forks]) for indices in batches]
    for layer in range(stack.n_layers):
        with holding_layer(stack, layer):
            for indices, some in captures:
                try:
                    for each in some:
                        if layer == 0:
                            each.begin()
                        each.step(layer)
                except Exception as error:
                    if not is_out_of_memory(error):
                        raise
                    raise exhausted(job.model, job.pairs, int(indices[0])) from error
    found = []
    with holding_part(stack, unembedding_of(job.model.module)):
        for indices, some in captures:
            runs = [each.end() for each in some]
            scenes = [
                Scene(job, gauge, stack, indices, means, fork=fork, run=_made(run))
                for fork, run in zip(forks, runs, strict=True)
            ]
            found.append(wavefront.opened(job, gauge, scenes, cost, kept.longest(indices)))
    return found


def _made(run: StackRun) -> Runs:
    """Return what gives a scene a run that was made already."""
    return lambda _: (run, True)


@dataclass(frozen=True)
class Member:
    """Some runs of a batch that move on together.

    Args:
        sweep: The batch.
        laid: Where they are laid out.
        part: Their numbers there.
    """

    sweep: Sweep
    laid: Laid
    part: np.ndarray

    @property
    def n_rows(self) -> int:
        """Rows of all their streams."""
        return int(self.laid.lengths[self.part].sum()) * len(self.sweep.scenes)

    def halves(self) -> list["Member"]:
        """Return the first and the second half of the runs."""
        return [Member(self.sweep, self.laid, part) for part in np.array_split(self.part, 2)]


class _Front:
    """Runs that are gathered until they fill their share of memory, and then go through the layers together.

    Args:
        job: What is measured.
        stack: The layers.
        kept: What is kept of the untouched runs.
    """

    def __init__(self, job: Job, stack: Stack, kept: Kept) -> None:
        self.stack, self.most = stack, front_rows(job, kept)
        self.unembedding = unembedding_of(job.model.module)
        self._members: list[Member] = []
        self._n_rows = 0

    def take(self, member: Member) -> Iterator[Block]:
        """Take runs in, after those that are here have gone if there is no room; yield what was measured."""
        if self._members and is_full(self._n_rows, member.n_rows, self.most):
            yield from self.go()
        self._members.append(member)
        self._n_rows += member.n_rows

    def go(self) -> Iterator[Block]:
        """Let all that are here go through the layers, and yield what they measure."""
        members, self._members, self._n_rows = self._members, [], 0
        waiting = [members] if members else []
        while waiting:
            some = waiting.pop(0)
            blocks = None
            try:
                blocks = self._pass(some)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                waiting[:0] = _smaller(some, error)
            if blocks is None:
                release_memory()  # out here, where the error no longer holds the tensors of its frames
                continue
            yield from blocks

    def _pass(self, members: Sequence[Member]) -> list[Block]:
        """Go once through the layers."""
        cost = members[0].sweep.cost
        token_layers = cost.token_layers
        try:
            moved = [member.sweep.waves(member.laid, member.part) for member in members]
            every = [wave for some in moved for wave in some if wave is not None]
            for layer in range(min(wave.entry for wave in every), self.stack.n_layers):
                with holding_layer(self.stack, layer):
                    self._step(every, layer)
            with holding_part(self.stack, self.unembedding):
                return [
                    member.sweep.measure(member.laid, member.part, some)
                    for member, some in zip(members, moved, strict=True)
                ]
        except Exception:
            cost.token_layers = token_layers  # what did not come to an end is not counted as spent
            raise

    @staticmethod
    def _step(waves: Sequence[Wave], layer: int) -> None:
        for wave in waves:
            wave.step(layer)
        for scene in {id(wave.scene): wave.scene for wave in waves}.values():
            scene.neurons.forget()  # which looked at weights of this layer


def _smaller(members: list[Member], error: Exception) -> list[list[Member]]:
    """Return what did not fit into memory in smaller pieces: calls of fewer rows, fewer waves, smaller waves.

    Raises:
        MemoryExhausted: It is one run already.
    """
    shrunk = [member.sweep.shrink_chunk(member.laid) for member in members]
    if any(shrunk):
        return [members]
    if len(members) > 1:
        half = len(members) // 2
        return [members[:half], members[half:]]
    only = members[0]
    if len(only.part) > 1:
        return [[each] for each in only.halves()]
    raise only.sweep.too_large(only.laid, only.part) from error
