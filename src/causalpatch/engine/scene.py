"""A batch of pairs with all that is known of its untouched runs, and where a patched run begins to differ from them.

Base and source prompts run together in one batch, each prompt once however many pairs share it. Metrics read tokens of
them; ``what_matters`` says which patches can reach these. What cannot, or what would be given the value that it has
already, is left out of a run; a run of which nothing is left is *derived*: the base run's numbers are its own.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalpatch.engine.capture import Captured
from causalpatch.engine.drawn import Donated
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.head import Head
from causalpatch.engine.head_shares import HeadShares
from causalpatch.engine.job import Cost, Job, most_rows
from causalpatch.engine.means import Means
from causalpatch.engine.neurons import Neurons
from causalpatch.engine.once import capture_once, run_stack
from causalpatch.engine.reads import Reads, what_matters
from causalpatch.engine.resolve import Placement, Role, Target
from causalpatch.engine.segments import Entry, Segments, entry_of, pack, trim
from causalpatch.engine.shares import logits_rows, n_columns
from causalpatch.engine.stack import Place, Stack, StackRun, layer_of
from causalpatch.engine.values import Known, Row, Taps, unchanged
from causalpatch.models import Model
from causalpatch.pairs import Batch
from causalpatch.patches import Source
from causalpatch.sites import Site

Side = Literal["answer", "wrong_answer"]
Fork = tuple[Side, int]
Runs = Callable[[Batch], tuple[StackRun, bool]]


@dataclass(frozen=True)
class Prompts:
    """Prompts of both sides of some pairs, and of those that they are resampled from, each once.

    Args:
        batch: The prompts, padded on the right.
        slots: For each side, and each value that is resampled, the prompt of each pair.
    """

    batch: Batch
    slots: dict[Role | Donated, Int[np.ndarray, " pair"]]

    @classmethod
    def of_pairs(cls, job: Job, gauge: Gauge, indices: np.ndarray, fork: Fork | None) -> "Prompts":
        """Put the prompts of some pairs together, those of the donors of resampled values among them.

        Args:
            job: What is measured.
            gauge: The metrics.
            indices: The pairs.
            fork: The side and number of the answer that is spelt out behind them, or None.
        """
        going_on = None if fork is None else gauge.continuations(*fork, indices)
        sides: dict[Role | Donated, Batch] = {
            role: job.pairs.batch(role, indices, padding_side="right", continuations=going_on)
            for role in (job.base, job.source)
        }
        for value in donated_in(job):
            numbers = [value.donor(job.pairs[number]) for number in indices.tolist()]
            sides[value] = value.pool.batch(value.value.side, numbers, padding_side="right")
        return cls.of(sides)

    @classmethod
    def of(cls, sides: dict[Role | Donated, Batch]) -> "Prompts":
        """Put prompts together."""
        rows = [(side, row) for side, batch in sides.items() for row in range(len(batch.lengths))]
        known: dict[tuple[bytes | int, ...], int] = {}
        slots: dict[Role | Donated, list[int]] = {side: [] for side in sides}
        chosen: list[tuple[Role | Donated, int]] = []
        for side, row in rows:
            batch = sides[side]
            more = [values[row].tobytes() for values in batch.beside.values()]
            key = (batch.ids[row][batch.mask[row]].tobytes(), int(batch.lengths[row]), *more)
            if key not in known:
                known[key] = len(chosen)
                chosen.append((side, row))
            slots[side].append(known[key])
        width = max(batch.ids.shape[1] for batch in sides.values())
        ids, mask, positions = (
            np.stack([_wide(getattr(sides[side], name)[row], width) for side, row in chosen])
            for name in ("ids", "mask", "position_ids")
        )
        lengths = np.array([sides[side].lengths[row] for side, row in chosen])
        first = next(iter(sides.values()))
        beside = {name: np.stack([sides[side].beside[name][row] for side, row in chosen]) for name in first.beside}
        start = np.zeros(len(chosen), dtype=np.int64)
        batch = Batch(ids, mask, positions, start, lengths, beside=beside, common=first.common)
        return cls(batch, {side: np.array(found) for side, found in slots.items()})


def _wide(row: np.ndarray, width: int) -> np.ndarray:
    return np.pad(row, (0, width - len(row)))


@dataclass(frozen=True)
class Placed:
    """Runs cut down to what matters.

    Args:
        segments: The runs that differ from the base run, packed.
        numbers: The number of each segment's run among those asked for.
        entries: Where each target of each segment comes in, in packed order.
    """

    segments: Segments
    numbers: Int[np.ndarray, " segment"]
    entries: Sequence[Sequence[Entry]]

    def take(self, chosen: Int[np.ndarray, " segment"]) -> "Placed":
        """Return some of the segments."""
        return Placed(self.segments.take(chosen), self.numbers[chosen], [self.entries[i] for i in chosen.tolist()])


class Scene:
    """A batch of pairs, run once; with a fork, the prompts go on through an answer.

    Args:
        job: What is measured.
        gauge: The metrics.
        stack: The layers.
        indices: The pairs.
        means: Fitted means.
        fork: The side and number of the answer that is spelt out, or None.
        run: Runs the prompts and says whether they were run now, and not remembered; see ``once.run_stack``, which does
            so by default.

    ``is_new`` is what that said.
    """

    def __init__(
        self,
        job: Job,
        gauge: Gauge,
        stack: Stack,
        indices: np.ndarray,
        means: Means,
        *,
        fork: Fork | None = None,
        run: Runs | None = None,
    ) -> None:
        self.job, self.gauge, self.stack, self.indices, self.fork = job, gauge, stack, indices, fork
        self.taps = Taps(stack.model)
        self.prompts = Prompts.of_pairs(job, gauge, indices, fork)
        self.slots = self.prompts.slots[job.base]
        self.run, self.is_new = (run or partial(run_stack, job, stack))(self.prompts.batch)
        self.head = Head(stack, self.run.returns_tuple)
        self.neurons, self.heads = Neurons(stack, self.run), HeadShares(stack, self.run)
        runs = {
            side: Captured(stack.model, self.prompts.batch, None, self.run.kept, slots)
            for side, slots in self.prompts.slots.items()
        }
        read = dict.fromkeys(t.site for group in job.interventions for t in group if t.needs_source)
        other = None if job.source_model is None else run_other(job, job.source_model, self.prompts, list(read))
        if other is not None:
            runs[job.source] = other
        donors = {side: run for side, run in runs.items() if isinstance(side, Donated)}
        groups = [job.pairs[number].group for number in indices.tolist()]
        self.known = Known(runs[job.source], runs[job.base], means, groups=groups, donors=donors)
        needs_all = n_columns(job, gauge, is_fork=fork is not None) == stack.model.vocab_size
        self.vocab = None if needs_all else self._columns(gauge.answer_columns)
        self.whole = fork is None and gauge.reads_all
        self.tokens = {role: self._tokens(role) for role in (job.base, job.source)}
        per_prompt = np.zeros((len(self.prompts.batch.lengths), self.tokens[job.base].shape[1]), dtype=np.int64)
        per_prompt[self.slots] = self.tokens[job.base]
        self.reads = Reads.of(per_prompt)
        self.matters = what_matters(self.run.visible, self.reads)
        self._logits = {job.base: self._unembed(job.base)}
        self._logits[job.source] = self._unembed(job.source) if other is None else self._of_other(other)

    @property
    def side(self) -> Side:
        """Whose answers are spelt out."""
        return cast(Fork, self.fork)[0]

    @property
    def rows_at_once(self) -> int:
        """Rows whose logits are computed together."""
        columns = self.stack.model.vocab_size if self.vocab is None else len(self.vocab)
        return logits_rows(self.job, self.gauge, columns)

    @property
    def runs_at_once(self) -> int:
        """Runs whose logits are computed and measured together."""
        return max(1, self.rows_at_once // int(self.tokens[self.job.base].shape[1]))

    def untouched(self, role: Role) -> Float[Tensor, "pair read column"]:
        """Return the logits of an untouched run where they are read."""
        return self._logits[role]

    def spelt(self, role: Role, logits: Float[Tensor, "row read vocab"], local: np.ndarray) -> Float[Tensor, " row"]:
        """Return the log-probability of the answer that is spelt out."""
        side, number = cast(Fork, self.fork)
        return self.gauge.spelt(self.as_run(role, logits, local, {}), side, number)

    def _columns(self, wanted: Int[Tensor, " column"]) -> Int[Tensor, " column"] | None:
        """Return the vocabulary entries to compute; None, all of them, where these come out otherwise by themselves."""
        batch, most = self.prompts.batch, 16
        slot, token = (index[:most] for index in np.nonzero(batch.mask))
        stream = Place.of(slot, token, self.stack.model.device).rows_of(self.run.inputs[self.stack.n_layers])
        tokens = batch.ids[slot, token], batch.position_ids[slot, token]
        with self.stack.running():
            return wanted if self.head.stand_alone(wanted, stream, tokens) else None

    def _tokens(self, role: Role) -> Int[np.ndarray, "pair read"]:
        """Return the tokens that are read of each pair's prompt."""
        slots, batch = self.prompts.slots[role], self.prompts.batch
        lengths, ends = batch.lengths[slots], batch.mask.sum(1)[slots]
        if self.fork is not None:
            steps = np.arange(int((ends - lengths).max()) + 1)
            spelt: np.ndarray = np.minimum(lengths[:, None] - 1 + steps, ends[:, None] - 1)
            return spelt
        if self.whole:
            every: np.ndarray = np.minimum(np.arange(int(lengths.max()))[None], lengths[:, None] - 1)
            return every
        return self.gauge.reads(lengths, self.indices, role)

    def _unembed(self, role: Role) -> Float[Tensor, "pair read column"]:
        slots, tokens = self.prompts.slots[role], self.tokens[role]
        # Each prompt once, and each token of it.
        flat = np.stack([np.repeat(slots, tokens.shape[1]), tokens.reshape(-1)])
        (slot, token), back = np.unique(flat, axis=1, return_inverse=True)
        back = back.reshape(-1)
        batch, device, most = self.prompts.batch, self.stack.model.device, self.rows_at_once
        ids, positions = batch.ids[slot, token], batch.position_ids[slot, token]
        stream = Place.of(slot, token, device).rows_of(self.run.inputs[self.stack.n_layers])
        found: list[Tensor] = []
        with self.stack.running():
            for begin in range(0, len(stream), most):
                some = slice(begin, begin + most)
                part = self.head.logits(stream[some], (ids[some], positions[some]), (), self.vocab)
                # Straight to where they are kept: of a whole vocabulary there is no room for all of them twice.
                found = found or [part.new_empty(len(back), part.shape[-1])]
                where = np.flatnonzero((back >= begin) & (back < begin + most))
                taken = torch.as_tensor(back[where] - begin, device=device)
                found[0][torch.as_tensor(where, device=device)] = part[taken]
        return found[0].reshape(*tokens.shape, -1)

    def _of_other(self, run: Captured) -> Float[Tensor, "pair read column"]:
        """Return another model's logits where those of the source runs are read."""
        tokens = torch.as_tensor(self.tokens[self.job.source], device=run.output.device)
        found: Tensor = run.output[torch.as_tensor(run.slots, device=tokens.device)[:, None], tokens]
        return found if self.vocab is None else found[..., self.vocab.to(found.device)]

    def as_run(self, role: Role, logits: Tensor, local: np.ndarray, forks: dict[str, Tensor]) -> Run:
        """Return logits of rows as metrics read them.

        Args:
            role: Whose prompts they are.
            logits: ``[row, read, column]``.
            local: The pair of each row in the batch.
            forks: Log-probabilities of whole answers by side, ``[row, answer]``.
        """
        pair = torch.as_tensor(self.indices[local], device=logits.device)
        slots, batch = self.prompts.slots[role][local], self.prompts.batch
        columns = slice(logits.shape[1] if self.whole else None)  # the longest prompt of a role may be the other's
        ids, mask, positions = batch.ids[slots, columns], batch.mask[slots, columns], batch.position_ids[slots, columns]
        rows = Batch(ids, mask, positions, batch.start[slots], batch.lengths[slots], role=role)
        return Run(logits, rows, pair, forks, None if self.whole else self.tokens[role][local], self.vocab)

    def place(self, rows: Sequence[Row]) -> Placed:
        """Cut runs down to the tokens that matter and can differ from the base run.

        Args:
            rows: The runs.
        """
        entries: dict[int, Entry] = {}
        for row in rows:
            for target, _ in row.targets:
                if id(target) not in entries:
                    entries[id(target)] = self._entry(target)
        same = self._same(rows)
        kept_rows: list[Row] = []
        kept_entries: list[list[Entry]] = []
        numbers: list[int] = []
        cache: dict[tuple[int, int, int], Placement | None] = {}
        for number, row in enumerate(rows):
            targets: list[tuple[Target, Placement | None]] = []
            found: list[Entry] = []
            for place_number, (target, place) in enumerate(row.targets):
                if place is None:
                    continue  # sites without positions are not run here
                entry = entries[id(target)]
                key = (id(place), entry.depth, row.local)
                if key not in cache:
                    cache[key] = trim(place, self.matters[entry.depth, self.slots[row.local], place.base])
                kept = cache[key]
                keep = same.get((number, place_number))
                if kept is not None and keep is not None and not keep.all():
                    kept = trim(place, keep & self.matters[entry.depth, self.slots[row.local], place.base])
                if kept is not None:
                    targets.append((target, kept))
                    found.append(entry)
            if targets:
                is_whole = len(targets) == len(row.targets) and all(
                    mine is theirs for (_, mine), (_, theirs) in zip(targets, row.targets, strict=True)
                )
                kept_rows.append(row if is_whole else replace(row, targets=tuple(targets)))
                kept_entries.append(found)
                numbers.append(number)
        segments, order = pack(kept_rows, kept_entries, self.slots, self.reads)
        return Placed(segments, np.array(numbers, dtype=np.int64)[order], [kept_entries[i] for i in order.tolist()])

    def _entry(self, target: Target) -> Entry:
        site = target.site
        layer = layer_of(self.stack.model, site.module.path) if site.module is not None else site.layer
        return entry_of(target, layer, self.stack.n_layers)

    def _same(self, rows: Sequence[Row]) -> dict[tuple[int, int], Bool[np.ndarray, " element"]]:
        """Find the elements of patches from the source that are not given their own value; True is kept.

        A patch is compared with the base run, so that no other of the same run may come before it at the same place:
        the patches of the run are of one kind of site in one layer and do not overlap, or else all of them change
        nothing.
        """
        asked = [
            (number, row)
            for number, row in enumerate(rows)
            if row.intervention < self.job.n_asked and all(isinstance(t.value, Source) for t, _ in row.targets)
        ]
        entries = [(t, row.local, place) for _, row in asked for t, place in row.targets if place is not None]
        answers = iter(unchanged(self.taps, self.known, entries))
        found: dict[tuple[int, int], np.ndarray] = {}
        for number, row in asked:
            differs = [~next(answers) for _ in row.targets]
            is_alone = len(differs) == 1 or _stand_apart(row)
            if is_alone or not any(one.any() for one in differs):
                for place, one in enumerate(differs):
                    found[number, place] = one
        return found


def _stand_apart(row: Row) -> bool:
    """Say whether patches of a run are of one kind of site in one layer, none at a place where another is."""
    sites = [target.site for target, _ in row.targets]
    kinds = {(site.name, site.layer, site.module, site.dictionary) for site in sites}
    units = {target.site.unit for target, _ in row.targets}
    taken: set[tuple[int | None, int]] = set()
    for target, place in row.targets:
        here = {(target.site.unit, token) for token in ([] if place is None else place.base.tolist())}
        if taken & here:
            return False
        taken |= here
    return len(kinds) == 1 and (None not in units or len(units) == 1)


def run_other(job: Job, model: Model, prompts: Prompts, sites: Sequence[Site]) -> Captured:
    """Run another model on the source prompts of some pairs, as many at once as fit; its output are the logits.

    Args:
        job: The job.
        model: The model of the source runs.
        prompts: The prompts of the pairs.
        sites: What is kept.
    """
    chosen, slots = np.unique(prompts.slots[job.source], return_inverse=True)

    n_parts = -(-len(chosen) // most_rows(job, prompts.batch.ids.shape[1]))
    beside = [] if job.remembered is None else [t.site for some in job.remembered.beside for t in some]
    parts = [
        capture_once(job, Cost(), model, prompts.batch.take(rows), sites, beside)
        for rows in np.array_split(chosen, n_parts)
    ]
    tensors = {port: torch.cat([part.tensors[port] for part in parts]) for port in parts[0].tensors}
    logits = torch.cat([model.logits(part.output) for part in parts])
    return Captured(model, prompts.batch.take(chosen), logits, tensors, slots)


def donated_in(job: Job) -> list[Donated]:
    """Return the resampled values of a job."""
    values = (target.value for group in job.interventions for target in group)
    return list(dict.fromkeys(value for value in values if isinstance(value, Donated)))
