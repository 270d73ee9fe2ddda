"""Path patching: what the last inputs of paths are given, computed exactly.

Of the three runs of path patching the first (the base and the source run) and the second (the base run in which only
what goes along the paths is changed) are made here; the third, the base run with the recorded inputs put in and all
behind them free to change, is a patch with given values, which any engine makes.

1. Pairs are taken in batches. Base and source prompts run once; first senders are read from the source run.
2. Trees of paths (``trees``) are gone through from the leaves: all inputs of one height go through the frozen layers
   together (``frozen``), equal parts of many trees once.
3. A head in the middle of a path attends again: its changed queries, keys and values go into a base run, and its term
   of the output projection is read there. An MLP in the middle is known from its input already.
4. What a sender does not change, bit for bit, is left out: there is nothing to be carried.

Cost: one run of each prompt; rows (branches x pairs x tokens that differ) through norms and projections; one run of the
base prompt for each head in the middle and pair.

References:
    Wang et al. 2022, "Interpretability in the Wild", 2211.00593, section 3 and appendix B; Goldowsky-Dill et al. 2023,
    "Localizing Model Behavior with Path Patching", 2304.05969.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from torch import Tensor

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine import wavefront
from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import Captured
from causalpatch.engine.drawn import Donated
from causalpatch.engine.frozen import Branch, Frozen, Told, kept_ports
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.hooks import Write, hooked, quiet
from causalpatch.engine.job import Job, batches_of_pairs, most_rows
from causalpatch.engine.scene import Prompts, run_other
from causalpatch.engine.selfcheck import why_drifts
from causalpatch.engine.stack import Place, Stack
from causalpatch.engine.trees import Reach, Received, Sent, own_tokens
from causalpatch.models import Model, Port
from causalpatch.pairs import Batch
from causalpatch.pairs.role import Role
from causalpatch.patches import Given
from causalpatch.sites import Position, Site
from causalpatch.sites.edges import Receiver

_TRIED = 16
"""Tokens on which the frozen layers are compared with the base run."""

_Parts = dict[int, tuple[np.ndarray, np.ndarray]]
"""Tokens and values by pair."""


def carry(
    job: Job, gauge: Gauge, trees: Sequence[Sequence[Received]], how: str, *, recompute_mlps: bool
) -> list[list[Given]]:
    """Compute what the last receivers of sets of paths are given.

    Args:
        job: The model, the pairs and the base side; its interventions do not matter.
        gauge: The metrics, for the engine's check of the model.
        trees: For each intervention the last receivers of its paths.
        how: What the values are, in words.
        recompute_mlps: Whether MLPs between a sender and a receiver are computed from the changed stream.

    Returns:
        For each intervention and receiver the values to put in: queries, keys or values of a head, the MLP's output, or
        the stream behind the last layer. Pairs that lack a sender's column are left out.

    Raises:
        ModelUnsupported: The layers of the model cannot be run on rows; the message says why.
        PathError: Nothing that is sent reaches its receiver.
        PairError: A position is outside a prompt, or prompts of unequal length have no alignment.
        MemoryExhausted: One pair does not fit into memory.
    """
    reach = Reach(job.pairs, job.base)
    wanted = list(dict.fromkeys(each for tree in trees for each in tree))
    for each in wanted:
        reach.received(each)  # before anything runs
    stack = _stack(job, gauge)
    found: dict[Received, _Parts] = {each: {} for each in wanted}
    make = partial(_carry_batch, job, stack, reach, wanted, recompute_mlps=recompute_mlps)
    for carried in in_batches(job, batches_of_pairs(job), make):
        for received, parts in carried:
            found[received] |= parts
    made = {each: _given(job, each, parts, how) for each, parts in found.items()}
    return [[made[each] for each in tree] for tree in trees]


def target_of(model: Model, receiver: Receiver) -> Site:
    """Return the site that is patched where an input is changed."""
    return Site("resid_post", model.shape.n_layers - 1) if receiver.layer is None else receiver.written


def _stack(job: Job, gauge: Gauge) -> Stack:
    """Return the layers of a model that can be run on rows.

    Raises:
        ModelUnsupported: They cannot.
    """
    why = wavefront.why_not(job, gauge)
    why = why_drifts("wavefront", wavefront.measure, job) if why is None else why
    if why is not None:
        raise ModelUnsupported(
            f"paths of '{job.model.name}' cannot be patched",
            facts=[("why", why), ("needed", "layers that are known by name and can be run token by token")],
            fix="patch whole sites, such as sweep(experiment, 'z')",
        )
    return Stack(job.model)


def _given(job: Job, received: Received, parts: _Parts, how: str) -> Given:
    pairs = sorted(parts)
    shape = (0, *_axes(job.model, received.receiver))
    arrays = [parts[pair][1] for pair in pairs]
    return Given(
        np.concatenate(arrays) if arrays else np.zeros(shape),
        np.concatenate([np.zeros(0, dtype=np.int64), *(parts[pair][0] for pair in pairs)]),
        np.cumsum([0, *(len(parts[pair][0]) for pair in pairs)]),
        tuple(job.pairs[pair].content_hash for pair in pairs),
        how,
        is_from_source=True,
    )


def _axes(model: Model, receiver: Receiver) -> tuple[int, ...]:
    return (model.head_width,) if receiver.attends else (model.width,)


def _carry_batch(
    job: Job, stack: Stack, reach: Reach, wanted: Sequence[Received], indices: np.ndarray, *, recompute_mlps: bool
) -> list[tuple[Received, _Parts]]:
    """Return what receivers are given in some pairs."""
    carrier = _Carrier(job, stack, reach, wanted, indices, recompute_mlps=recompute_mlps)
    heights = sorted({sent.height for sent in carrier.sent})
    for height in heights:
        carrier.send([sent for sent in carrier.sent if sent.height == height])
    return list(carrier.arrived(wanted))


@dataclass
class _Carrier:
    """A batch of pairs: its runs, and what has been sent so far."""

    job: Job
    stack: Stack
    reach: Reach
    wanted: Sequence[Received]
    indices: np.ndarray
    recompute_mlps: bool = field(kw_only=True)

    def __post_init__(self) -> None:
        job, self.model = self.job, self.stack.model
        self.placer = self.reach.placer
        self.sent = list(dict.fromkeys(_all_sent(self.wanted)))
        self.told: dict[Sent, Told] = {}
        sides: dict[Role | Donated, Batch] = {
            role: job.pairs.batch(role, self.indices, padding_side="right") for role in (job.base, job.source)
        }
        prompts = Prompts.of(sides)
        self.run = self.stack.run(prompts.batch, self._ports())
        self.base, self.source = (
            Captured(self.model, prompts.batch, None, self.run.kept, prompts.slots[role])
            for role in (job.base, job.source)
        )
        slots = prompts.slots[job.base]
        if job.source_model is not None:
            read = list(dict.fromkeys(sent.site for sent in self.sent))
            self.source = run_other(job, job.source_model, prompts, read)
        self.frozen = Frozen(self.stack, self.run, slots, recompute_mlps=self.recompute_mlps)
        self._check(slots)

    def send(self, some: Sequence[Sent]) -> None:
        """Find what senders of one height send, all lower ones being known."""
        for sent in some:
            if not sent.inputs:
                self.told[sent] = self._from_source(sent)
        again = [sent for sent in some if sent.inputs]
        inputs = dict(self._received([each for sent in again for each in sent.inputs]))
        heads = [sent for sent in again if sent.site.name == "head_out"]
        for sent in again:
            if sent.site.name != "head_out":
                self.told[sent] = self._at(sent.target.position, inputs[sent.inputs[0]])
        self.told |= {sent: self._at(sent.target.position, told) for sent, told in self._attend_again(heads, inputs)}

    def arrived(self, wanted: Sequence[Received]) -> Iterator[tuple[Received, _Parts]]:
        """Yield what receivers have, by pair; pairs that lack a sender's column are left out."""
        for received, told in self._received(wanted):
            value, reached = told.value.cpu(), self.reach.received(received)
            numbers = (value if value.dtype == torch.float64 else value.float()).numpy()
            ends = np.searchsorted(told.local, np.arange(len(self.indices) + 1)).tolist()  # rows lie pair by pair
            yield (
                received,
                {
                    pair: (told.token[ends[local] : ends[local + 1]], numbers[ends[local] : ends[local + 1]])
                    for local, pair in enumerate(self.indices.tolist())
                    if reached[pair] is not None
                },
            )

    def _received(self, wanted: Sequence[Received]) -> Iterator[tuple[Received, Told]]:
        """Yield what inputs have with all that is sent to them; those with the same senders share their rows."""
        branches: dict[tuple[Sent, ...], list[Received]] = {}
        for received in dict.fromkeys(wanted):
            branches.setdefault(received.senders, []).append(received)
        sending = {s: some for s, some in branches.items() if any(len(self.told[sent].token) for sent in s)}
        for senders, some in branches.items():
            if senders not in sending:
                for received in some:
                    yield received, self._nothing(_axes(self.model, received.receiver))
        groups = list(sending.items())
        # Rows know inputs by what is computed, not by where it is wanted.
        laid = [
            Branch(
                [(sent.site, self.told[sent]) for sent in senders],
                list(dict.fromkeys(_everywhere(each.receiver) for each in some)),
            )
            for senders, some in groups
        ]
        for number, receiver, told in self.frozen.receive(laid):
            for received in groups[number][1]:
                if _everywhere(received.receiver) == receiver:
                    yield received, self._at(received.receiver.position, told)

    def _at(self, position: Position | None, told: Told) -> Told:
        """Return what is told at the tokens of a position."""
        if position is None:
            return told
        is_at = np.zeros((len(self.indices), int(told.token.max(initial=0)) + 1), dtype=bool)
        for local, pair in enumerate(self.indices.tolist()):
            tokens = own_tokens(position, self.placer, pair)
            is_at[local, tokens[tokens < is_at.shape[1]]] = True
        return told.where(is_at[told.local, told.token])

    def _from_source(self, sent: Sent) -> Told:
        """Return a sender's values of the source run, where they differ from those of the base run."""
        places = [self.placer.place(sent.target, pair) for pair in self.indices.tolist()]
        known = [(local, place) for local, place in enumerate(places) if place is not None]
        tap = self.model.tap(sent.site)
        if not known:
            return self._nothing((self.model.width,))
        local = np.concatenate([np.full(len(place.base), n) for n, place in known])
        token = np.concatenate([place.base for _, place in known])
        start, stop = (np.concatenate([getattr(place, end) for _, place in known]) for end in ("start", "stop"))
        there = self.source.model.tap(sent.site)
        value = self.source.at(there, local, start)
        for number in np.flatnonzero(stop - start > 1).tolist():  # spans that meet by their mean
            steps = np.arange(start[number], stop[number])
            value[number] = self.source.at(there, np.full(len(steps), local[number]), steps).mean(0)
        differs = (value != self.base.at(tap, local, token)).any(-1).cpu().numpy()
        return Told(local, token, value).where(differs)

    def _attend_again(self, heads: Sequence[Sent], inputs: dict[Received, Told]) -> Iterator[tuple[Sent, Told]]:
        """Yield what heads send whose queries, keys or values are changed, each in a base run of its own."""
        rows = [
            (number, int(local))
            for number, sent in enumerate(heads)
            for local in np.unique(np.concatenate([inputs[each].local for each in sent.inputs]))
        ]
        parts: dict[int, list[Told]] = {}
        most = most_rows(self.job, int(self.job.pairs.lengths(self.job.base)[self.indices].max()))
        for begin in range(0, len(rows), most):
            for number, told in self._attend_rows(heads, inputs, rows[begin : begin + most]):
                parts.setdefault(number, []).append(told)
        for number, sent in enumerate(heads):
            some = parts.get(number, [])
            nothing = self._nothing((self.model.width,))
            yield sent, _joined([nothing, *some])

    def _attend_rows(
        self, heads: Sequence[Sent], inputs: dict[Received, Told], rows: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[int, Told]]:
        """Run base prompts with changed inputs of one head each; yield the head's terms where they may differ."""
        job = self.job
        pairs = self.indices[[local for _, local in rows]]
        batch = job.pairs.batch(job.base, pairs, padding_side="right")
        of: dict[Site, list[tuple[np.ndarray, np.ndarray, Tensor]]] = {}
        tokens: list[np.ndarray] = []
        for row, (number, local) in enumerate(rows):
            changed = []
            for each in heads[number].inputs:
                told = inputs[each].where(inputs[each].local == local)
                if not len(told.token):
                    continue
                of.setdefault(each.receiver.written, []).append((np.full(len(told.token), row), told.token, told.value))
                seen = each.receiver.name in ("k", "v")
                changed.append(np.arange(told.token.min(), batch.lengths[row]) if seen else told.token)
            tokens.append(np.unique(np.concatenate(changed)))
        writes = []
        for site, some in of.items():
            at, token = (np.concatenate([part[n] for part in some]) for n in (0, 1))
            index = tuple(torch.as_tensor(place, device=self.model.device) for place in (at, token))
            writes.append(Write(self.model.tap(site), index, torch.cat([value for _, _, value in some])))
        taps = {heads[number].site: self.model.tap(heads[number].site) for number, _ in rows}
        ports = {port for tap in taps.values() for port in (tap.port, *tap.companions)}
        with quiet(self.model), hooked(self.model, writes):
            run = self.stack.run(batch, list(ports))
        captured = Captured(self.model, batch, None, run.kept)
        for row, ((number, local), token) in enumerate(zip(rows, tokens, strict=True)):
            value = captured.at(taps[heads[number].site], np.full(len(token), row), token)
            yield number, Told(np.full(len(token), local), token, value)

    def _ports(self) -> list[Port]:
        """Return what is kept of the base and source runs."""
        sites = dict.fromkeys(sent.site for sent in self.sent)
        taps = [self.model.tap(site) for site in sites]
        layers = range(self.stack.n_layers)
        heads = sorted({site.layer for site in sites if site.name == "head_out" and site.layer is not None})
        queries = [self.model.tap(Site("q", layer, 0)).port for layer in layers]
        ports = [port for tap in taps for port in (tap.port, *tap.companions)]
        return list(dict.fromkeys([*ports, *queries, *kept_ports(self.stack, layers, heads)]))

    def _nothing(self, axes: tuple[int, ...]) -> Told:
        nothing = np.zeros(0, dtype=np.int64)
        return Told(nothing, nothing, self.run.inputs[0].new_zeros(0, *axes))

    def _check(self, slots: np.ndarray) -> None:
        """Make sure that the frozen layers give what the base run has where nothing is sent."""
        mask = self.run.batch.mask[slots]
        local, token = (at[:: max(1, len(at) // _TRIED)][:_TRIED] for at in np.nonzero(mask))
        place = Place.of(slots[local], token, self.model.device)
        for layer in range(self.stack.n_layers):
            hidden = place.rows_of(self.run.inputs[layer])
            made = self.frozen.replay(hidden, place, layer)
            tap = self.model.tap(Site("q", layer, 0))
            out = place.rows_of(self.run.inputs[layer + 1])
            known = {"frozen": out, "computed": out, "q": tap.view.read(place.rows_of(self.run.kept[tap.port]), ())}
            for name, value in known.items():
                tolerance = 32 * torch.finfo(value.dtype).eps * float(value.abs().amax())
                if not bool(((made[name] - value).abs() <= tolerance).all()):
                    what = {"frozen": "with its attention and MLP replaced", "computed": "with its attention replaced"}
                    raise ModelUnsupported(
                        f"paths of '{self.model.name}' cannot be patched",
                        facts=[("why", f"layer {layer} does not give {what.get(name, 'its queries')} what it did")],
                        fix="patch whole sites, such as sweep(experiment, 'z')",
                    )


def _all_sent(wanted: Iterable[Received]) -> Iterator[Sent]:
    """Yield all senders of trees, and of what is sent to these."""
    for received in wanted:
        for sent in received.senders:
            yield sent
            yield from _all_sent(sent.inputs)


def _everywhere(receiver: Receiver) -> Receiver:
    """Return a receiver at all tokens."""
    return Receiver(receiver.name, receiver.layer, receiver.unit)


def _joined(parts: Sequence[Told]) -> Told:
    return Told(
        np.concatenate([part.local for part in parts]),
        np.concatenate([part.token for part in parts]),
        torch.cat([part.value for part in parts]),
    )
