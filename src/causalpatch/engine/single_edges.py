"""Exact interchange of single edges by the wavefront: an edge changes one input, so all before it is the base run.

For an edge u -> v, delta_u being what the sender u adds more in the source run than in the base run:

1. Base and source run once for a batch of pairs.
2. Layer by layer, the base run's stream with delta_u on top goes through the layer's own module: up to its attention
   for the heads, with attention as in the base run for the MLP. The norm and the projections of a sender are made once,
   for all heads of the layer.
3. Attention is computed again with the new queries alone, the new keys alone, the new values alone; each head's z is
   what it hands on if that input of its own is changed, also where keys and values are shared.
4. From there on an edge is a patch with known values of one head's z, of the MLP's output or of the last stream, and
   the wavefront makes its run: the tokens and layers that can change.

Changed are the tokens at which delta_u is not 0, by way of keys and values also all later ones, and of these where the
head hands on something else at all: what the first token sees is itself, whatever its queries and keys. Where there are
none, the metric is the base run's.

Symbols: S senders, P pairs, T tokens, N = P T, H heads, D width.
Cost: for each sender and layer behind it a norm, the projections to q, k, v, three times attention, an MLP; then rows
(edges x changed tokens) through the layers that follow. Memory: 3 D numbers for each sender and token of a block.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalpatch.engine import shares, wavefront
from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import Captured
from causalpatch.engine.drawn import Computed
from causalpatch.engine.frozen import Frozen
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.hooks import Write, hooked
from causalpatch.engine.job import Block, Cost, Job
from causalpatch.engine.means import Means
from causalpatch.engine.memory import budget_bytes, is_out_of_memory, release_memory
from causalpatch.engine.resolve import Placement, Placer, Target
from causalpatch.engine.rows import KeysValues, attend_whole
from causalpatch.engine.selfcheck import why_drifts
from causalpatch.engine.senders import change_of_term
from causalpatch.engine.stack import Place, Stack
from causalpatch.engine.values import Row, Taps
from causalpatch.engine.wavefront import Sweep
from causalpatch.engine.wiring import Wiring
from causalpatch.models import Port
from causalpatch.models.views import Scaled
from causalpatch.sites import Site
from causalpatch.sites.graph import KINDS

_TRIED = 16
"""Tokens on which heads are looked at, whether they stand apart."""

_Wanted = dict[int, list[tuple[int, int]]]
"""By sender: the number of each edge, and its receiver."""


def why_not(job: Job, gauge: Gauge) -> str | None:
    """Say why single edges of a model cannot be run by the wavefront, or None."""
    return wavefront.why_not(job, gauge) or why_drifts("wavefront", wavefront.measure, job)


@dataclass(eq=False)
class SingleEdges:
    """Runs with one edge interchanged each.

    Args:
        job: Its one intervention patches all senders; see ``patches_of_senders``.
        gauge: The metrics.
        wiring: How the model is wired.
        edges: Numbers of the sender and the receiver of each edge.
    """

    job: Job
    gauge: Gauge
    wiring: Wiring
    edges: Int[np.ndarray, "edge 2"]
    cost: Cost = field(default_factory=Cost)

    def blocks(self) -> Iterator[Block]:
        """Yield the metrics of the base and the source runs, and of all edges, as they become known.

        Raises:
            ModelUnsupported: The model's layers cannot be run on rows, or do not give what they gave in its run.
            MemoryExhausted: One pair does not fit into memory.
            PairError: Prompts of unequal lengths have no alignment.
        """
        job, stack, placer = self.job, Stack(self.job.model), Placer(self.job.pairs, self.job.base)
        kept = shares.Kept.of(job, self.gauge, wavefront.numbers_of_layers(job.model))
        begin = partial(wavefront.open_sweep, job, self.gauge, stack, Means(), self.cost, kept)
        for sweep, untouched in in_batches(job, kept.batches(), begin):
            yield from untouched
            yield from _Batch(self, sweep, placer).blocks()

    def wanted(self) -> Iterator[tuple[int, _Wanted]]:
        """Yield each layer with the edges into it; behind the last layer those into the logits."""
        layers = self.wiring.graph.receiver_layers()[self.edges[:, 1]]
        for layer in np.unique(layers).tolist():
            found: _Wanted = {}
            for number in np.flatnonzero(layers == layer).tolist():
                sender, receiver = self.edges[number].tolist()
                found.setdefault(sender, []).append((number, receiver))
            yield layer, dict(sorted(found.items()))


class _Batch:
    """All edges on a batch of pairs.

    Args:
        runs: All runs.
        sweep: The pairs, run.
        placer: Finds which tokens of the source stand for which of the base.
    """

    def __init__(self, runs: SingleEdges, sweep: Sweep, placer: Placer) -> None:
        self.runs, self.sweep, self.scene = runs, sweep, sweep.scenes[0]
        self.wiring, self.graph, self.run = runs.wiring, runs.wiring.graph, self.scene.run
        self.model, job, scene = runs.wiring.model, runs.job, self.scene
        batch, slots = scene.prompts.batch, scene.slots
        self.n_pairs, self.n_tokens = len(slots), int(batch.mask[slots].sum(1).max())
        # The base run's tokens pair by pair, pads included.
        self.place = Place.of(
            np.repeat(slots, self.n_tokens), np.tile(np.arange(self.n_tokens), self.n_pairs), self.device
        )
        self.is_real = batch.mask[slots, : self.n_tokens]
        self.prompts = batch.take(slots)
        self.frozen = Frozen(scene.stack, self.run, slots, recompute_mlps=False)
        self.checked: set[tuple[int, str]] = set()
        self._placements: dict[bytes, Placement | None] = {}
        places = placer.places(job.interventions[0][0], scene.indices.tolist())
        known = [(n, place) for n, place in enumerate(places) if place is not None]
        nothing = np.zeros(0, dtype=np.int64)
        local = np.concatenate([nothing, *(np.full(len(place.base), n) for n, place in known)])
        base, source = (
            np.concatenate([nothing, *(getattr(place, name) for _, place in known)]) for name in ("base", "start")
        )
        there = scene.prompts.slots[job.source][local]
        self.met = self._index(local * self.n_tokens + base), self._index(there), self._index(source)

    @property
    def device(self) -> torch.device:
        """The model's device."""
        return self.model.device

    def blocks(self) -> Iterator[Block]:
        """Measure all edges, some senders into one layer at a time."""
        for layer, wanted in self.runs.wanted():
            senders = list(wanted)
            most = self._most_senders(layer)
            while senders:
                some = senders[:most]
                rows = None
                try:
                    with torch.no_grad():
                        rows = list(self._rows(layer, {sender: wanted[sender] for sender in some}))
                except Exception as error:
                    if not is_out_of_memory(error) or len(some) == 1:
                        raise
                if rows is None:
                    most = len(some) // 2
                    release_memory()
                    continue
                for begin in range(0, len(rows), shares.PORTION):
                    yield from self.sweep.blocks(rows[begin : begin + shares.PORTION])
                # It remembers all targets, and they hold their values.
                self.scene.taps = Taps(self.model)
                del rows, senders[:most]

    def _most_senders(self, layer: int) -> int:
        """Return how many senders go through a layer together."""
        n_rows = self.n_pairs * self.n_tokens
        scores = 3 * n_rows * self.n_tokens * self.graph.n_heads * max(4, self.model.dtype.itemsize)
        held = 8 * n_rows * self.model.width * self.model.dtype.itemsize + scores
        budget = shares.CHUNK * budget_bytes(self.device, self.runs.job.budget_gib)
        return max(1, min(self.sweep.chunk_rows // n_rows, int(budget // held)))

    def _rows(self, layer: int, wanted: _Wanted) -> Iterator[Row]:
        """Yield the runs of the edges from some senders into a layer."""
        deltas = torch.stack([self._delta(sender) for sender in wanted])
        differs = ((deltas != 0).any(-1).reshape(len(deltas), self.n_pairs, -1).cpu().numpy()) & self.is_real
        receivers = [receiver for some in wanted.values() for _, receiver in some]
        kinds = {self._kind(receiver) for receiver in receivers}
        computed = self._computed(layer, deltas, kinds)
        changed = {kind: self._changed(layer, computed[kind]) for kind in kinds & set(KINDS)}
        for place, some in enumerate(wanted.values()):
            for number, receiver in some:
                kind, site = self._kind(receiver), self._site(layer, receiver)
                tokens = differs[place]
                if kind in ("k", "v"):
                    tokens = np.maximum.accumulate(tokens, 1) & self.is_real
                if kind in changed:
                    tokens = tokens & changed[kind][place, site.unit or 0]
                target = Target(site, None, None, computed[kind][place], None, has_position=True)
                for local, pair in enumerate(self.scene.indices.tolist()):
                    yield Row(number, pair, local, ((target, self._placement(tokens[local])),))

    def _changed(self, layer: int, computed: Sequence[Computed]) -> Bool[np.ndarray, "sender head pair token"]:
        """Return at which tokens each head hands on something else at all.

        What the first token of a prompt sees is itself, whatever its queries and keys are.
        """
        wired, width = self.wiring.layers[layer], self.model.head_width
        base = self._base(wired.z).reshape(self.n_pairs, self.n_tokens, -1)
        found = torch.stack([one.run.tensors[wired.z] != base for one in computed])
        of_heads = [found[..., start : start + width].any(-1) for start in wired.starts]
        table: np.ndarray = torch.stack(of_heads, 1).cpu().numpy()
        return table

    def _computed(self, layer: int, deltas: Float[Tensor, "S N D"], kinds: set[str]) -> dict[str, list[Computed]]:
        """Return for each kind of input, by sender, what stands behind it if that sender's part of it is changed."""
        stream = self.place.rows_of(self.run.inputs[layer])
        found: dict[str, list[Computed]] = {}
        if kinds == {"logits"}:
            return {"logits": self._as_run(self.wiring.last, stream + deltas)}
        hidden, place = torch.cat([stream, *(stream + deltas)]), self._repeated(1 + len(deltas))
        wired = self.wiring.layers[layer]
        if kinds - {"mlp"}:
            found |= self._attended(layer, hidden, place, kinds - {"mlp"})
        if "mlp" in kinds:
            added = self.frozen.added_by_mlp(layer, hidden, place).reshape(1 + len(deltas), *stream.shape)
            self._check(layer, added[0], wired.mlp_out.view.read(self._base(wired.mlp_out.port), ()), "its MLP")
            view = wired.mlp_out.view
            found["mlp"] = self._as_run(
                wired.mlp_out.port, added[1:] / (view.factor if isinstance(view, Scaled) else 1.0)
            )
        return found

    def _attended(self, layer: int, hidden: Tensor, place: Place, kinds: set[str]) -> dict[str, list[Computed]]:
        """Return z of all heads, by sender, with the queries, the keys or the values changed of each head by itself."""
        parts = [
            part.reshape(len(part), -1, self.n_pairs, self.n_tokens, part.shape[-1]).permute(1, 2, 0, 3, 4)
            for part in self.frozen.attended(layer, hidden, place)
        ]
        base, changed = [part[:1] for part in parts], [part[1:] for part in parts]
        self._check_apart(layer)
        port = self.wiring.layers[layer].z
        known = self._attend(layer, base)[0].flatten(0, 1)
        self._check(layer, known, self._base(port), "its attention")
        found = {}
        for number, kind in enumerate(KINDS):
            if kind in kinds:
                mixed = [new if n == number else old for n, (old, new) in enumerate(zip(base, changed, strict=True))]
                found[kind] = self._as_run(port, self._attend(layer, mixed).flatten(1, 2))
        return found

    def _attend(self, layer: int, parts: Sequence[Float[Tensor, "_ P _ T _"]]) -> Float[Tensor, "S P T C"]:
        """Attend over whole prompts, some of the parts being those of the base run for all senders."""
        seen = self.run.seen(layer)
        n_senders, slots = max(len(part) for part in parts), self._index(self.scene.slots)
        query, keys, values = (part.expand(n_senders, *part.shape[1:]).flatten(0, 1) for part in parts)
        mask = seen.mask[slots] if len(seen.mask) > 1 else seen.mask.expand(len(slots), *seen.mask.shape[1:])
        mask = mask[..., : self.n_tokens, : self.n_tokens].repeat(n_senders, 1, 1, 1)
        whole = KeysValues(keys, values, mask, seen.scaling, seen.softcap, seen.sinks)
        attended = attend_whole(query, whole, is_causal=self.run.is_causal(layer))
        return attended.reshape(n_senders, self.n_pairs, self.n_tokens, -1)

    def _delta(self, sender: int) -> Float[Tensor, "N D"]:
        """Return what a sender adds more in the source run, at the base's tokens."""
        layer, place = divmod(sender - 1, self.graph.n_heads + 1)
        if sender == 0:
            port = self.wiring.layers[0].stream
            return self._there(port) - self._base(port)
        wired = self.wiring.layers[layer]
        if place == self.graph.n_heads:
            port, view = wired.mlp_out.port, wired.mlp_out.view
            return view.read(self._there(port), ()) - view.read(self._base(port), ())
        z, there = self._base(wired.z), self._there(wired.z)
        columns = slice(wired.starts[place], wired.starts[place] + self.model.head_width)
        mixed = z.clone()
        mixed[:, columns] = there[:, columns]
        return change_of_term(wired, z, mixed)

    def _base(self, port: Port) -> Float[Tensor, "N C"]:
        return self.place.rows_of(self.run.kept[port])

    def _there(self, port: Port) -> Float[Tensor, "N C"]:
        """Return what stands at a port in the source run, at the base's tokens; the base's own where none meets."""
        at, slot, token = self.met
        found = self._base(port)
        found[at] = self.run.kept[port][slot, token]
        return found

    def _as_run(self, port: Port, values: Float[Tensor, "S N C"]) -> list[Computed]:
        """Return values at a port, by sender, as patches read them."""
        by_pair = values.reshape(len(values), self.n_pairs, self.n_tokens, -1)
        return [Computed(Captured(self.model, self.prompts, None, {port: value})) for value in by_pair]

    def _check(self, layer: int, made: Tensor, known: Tensor, what: str) -> None:
        """Make sure that a layer gives of the base run's stream what it gave in the base run.

        Raises:
            ModelUnsupported: It does not.
        """
        if (layer, what) in self.checked:
            return
        self.checked.add((layer, what))
        real = self._index(np.flatnonzero(self.is_real))
        tolerance = 64 * torch.finfo(known.dtype).eps * max(1.0, float(known[real].abs().amax()))
        if made.shape != known.shape or not bool(((made - known)[real].abs() <= tolerance).all()):
            raise self.scene.stack.refusal(f"{what} in layer {layer} does not give on its own what it did")

    def _check_apart(self, layer: int) -> None:
        """Make sure that what attention sees of a head follows from that head's own projection.

        Raises:
            ModelUnsupported: It does not, as behind a norm over all heads.
        """
        if (layer, "apart") in self.checked:
            return
        self.checked.add((layer, "apart"))
        slot, token = (at[:_TRIED] for at in np.nonzero(self.is_real))
        place = Place.of(self.scene.slots[slot], token, self.device)
        hidden, rows = place.rows_of(self.run.inputs[layer]), torch.arange(len(slot), device=self.device)
        before = self.frozen.attended(layer, hidden, place)
        for kind, part in zip(KINDS, before, strict=True):
            write = Write(
                self.model.tap(Site(kind, layer, 0)), (torch.zeros_like(rows), rows), partial(torch.mul, other=2)
            )
            with hooked(self.model, [write]):
                after = self.frozen.attended(layer, hidden, place)[KINDS.index(kind)]
            if not torch.equal(part[1:], after[1:]):
                raise self.scene.stack.refusal(f"the '{kind}' of one head changes those of others in layer {layer}")

    def _placement(self, tokens: Bool[np.ndarray, " token"]) -> Placement | None:
        """Return where something is written; one and the same for all that are written at the same tokens."""
        key = tokens.tobytes()
        if key not in self._placements:
            at = np.flatnonzero(tokens)
            self._placements[key] = Placement(at, at, at + 1) if len(at) else None
        return self._placements[key]

    def _repeated(self, n: int) -> Place:
        return Place(self.place.slot.repeat(n), self.place.position.repeat(n))

    def _kind(self, receiver: int) -> str:
        """Return through which kind of input a receiver reads."""
        if receiver == self.graph.logits:
            return "logits"
        place = receiver % (3 * self.graph.n_heads + 1) // self.graph.n_heads
        return KINDS[place] if place < len(KINDS) else "mlp"

    def _site(self, layer: int, receiver: int) -> Site:
        """Return the site whose value a receiver's input changes."""
        kind = self._kind(receiver)
        if kind == "logits":
            return Site("resid_post", self.graph.n_layers - 1)
        if kind == "mlp":
            return Site("mlp_out", layer)
        return Site("z", layer, receiver % (3 * self.graph.n_heads + 1) % self.graph.n_heads)

    def _index(self, at: np.ndarray) -> Tensor:
        return torch.as_tensor(at, device=self.device)
