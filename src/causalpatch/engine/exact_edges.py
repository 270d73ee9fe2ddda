"""Exact interchange of edges: every input is put together from what reaches it, in one run of the model.

In a run with the edges M, what a receiver v reads is the stream of this run, in which the terms of the senders of M are
those of the source run (or zero, or of a mean; see ``put_in``):

    x_v = x + sum over u with M[u, v] of (term_u(source) - term_u(now))

1. Base and source run once. Rows are masks of edges times pairs; each begins at the first layer that its mask changes,
   where the stream is still the base run's.
2. As the model runs, what each sender gives is noted where it stands. Before a projection works out a head's queries,
   keys or values, they are computed from the head's own x_v, by the model's norm and projection; what the MLP and the
   final norm read is replaced. All else is the model's own forward.
3. Heads behind a post-norm are scaled together: their term is the norm of what all of them give, those of M from the
   source run.
4. Keys and values that heads share: where a mask tells the heads of a group apart, its rows run once for each member of
   a group, with the keys that this member reads, and z of each head is taken from its own run.

So all edges give the source run, all edges out of one sender give its patch, and no edge gives the base run.

Symbols: R rows, T tokens, D width.
"""

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine import restart
from causalpatch.engine.batches import in_batches
from causalpatch.engine.edge_slopes import chains_of, receivers_of
from causalpatch.engine.few_logits import few_columns, tokens_at
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.hooks import Write, users_hooks
from causalpatch.engine.job import Block, Cost, Job, batches_of_pairs, most_rows
from causalpatch.engine.layers import Layers
from causalpatch.engine.means import Means
from causalpatch.engine.memory import budget_bytes, is_out_of_memory, release_memory
from causalpatch.engine.put_in import PutIn
from causalpatch.engine.resolve import Placer
from causalpatch.engine.senders import change_of_term
from causalpatch.engine.structure import Findings
from causalpatch.engine.untouched import Untouched, run_untouched
from causalpatch.engine.wiring import Wiring
from causalpatch.models import Port, Tap
from causalpatch.models.views import Whole
from causalpatch.results.status import Status
from causalpatch.sites import Site
from causalpatch.sites.graph import KINDS

T = TypeVar("T")


@dataclass(eq=False)
class ExactEdges:
    """Runs with edges interchanged.

    Args:
        job: Its one intervention patches all senders; see ``patches_of_senders``.
        gauge: The metrics.
        wiring: How the model is wired.
        masks: The edges of each run, ``(mask, sender, receiver)``.
        means: Fitted means, where edges carry these.
        found: What is known already of the same pairs: untouched runs that fit into memory together, and whether runs
            may begin at a layer. It holds for as long as the model is what it was.
    """

    job: Job
    gauge: Gauge
    wiring: Wiring
    masks: Bool[np.ndarray, "mask sender receiver"]
    means: Means = field(default_factory=Means)
    cost: Cost = field(default_factory=Cost)
    found: Findings[Any] = field(default_factory=Findings)

    def __post_init__(self) -> None:
        self.dtype = self.wiring.model.dtype
        self.chains = chains_of(self.wiring, self.dtype)
        self.placer = Placer(self.job.pairs, self.job.base)
        layers = self.wiring.graph.receiver_layers()
        changed = np.asarray(self.masks.any(1))
        # The logits are read behind the last layer, which is run again: what goes straight to them costs little.
        first = np.where(changed.any(1), layers[changed.argmax(1)], 0)
        self.entry = np.minimum(first, self.wiring.graph.n_layers - 1)
        self.restarts, self.is_few, self.layers = self._verified()
        if not self.restarts:
            self.entry = np.zeros_like(first)

    def blocks(self) -> Iterator[Block]:
        """Yield the metrics of the base and the source runs, and of all masks, as they become known.

        Raises:
            MemoryExhausted: One pair does not fit into memory.
            PairError: Prompts of unequal lengths have no alignment.
        """
        for batch in in_batches(self.job, batches_of_pairs(self.job), self._untouched):
            yield from batch.blocks()
            for masks, found in self._runs(batch):
                numbers, pairs = np.repeat(masks, len(batch.indices)), np.tile(batch.indices, len(masks))
                yield Block.of(numbers, pairs, found.reshape(len(found), -1), Status.MEASURED)

    def _untouched(self, indices: np.ndarray) -> Untouched:
        sites = [target.site for target in self.job.interventions[0]]
        is_all = len(indices) == len(self.job.pairs)  # batches are not held together
        # What is kept serves sets of edges that begin at any layer.
        every = range(self.wiring.graph.n_layers)
        entries = every if is_all and self.restarts else sorted(set(self.entry.tolist()))
        base_sites = list(dict.fromkeys([*sites, *(Site("resid_pre", layer) for layer in entries)]))
        make = partial(run_untouched, self.job, self.gauge, self.means, self.cost, indices, base_sites=base_sites)
        if not is_all:
            return make()
        most = budget_bytes(self.wiring.model.device, self.job.budget_gib) // 4
        return self._known(("untouched", *base_sites), make, lambda batch: batch.n_bytes <= most)

    def _known(self, what: tuple[Hashable, ...], find: Callable[[], T], lasts: Callable[[T], bool] = bool) -> T:
        """Return what is known of these pairs and weights, finding it out where it is not."""
        job, model = self.job, self.wiring.model
        if users_hooks(model):
            return find()  # they may do another thing each time
        weights = model.content_hash
        key = (*what, self.gauge, job.base, job.padding_side, job.max_rows, job.interventions[0][0].value)
        ask = partial(self.found.of, model, key, lambda: (weights, find()), lambda held: lasts(held[1]))
        known: tuple[str, T] = ask()
        return (known if known[0] == weights else ask(anew=True))[1]

    def _runs(self, batch: Untouched) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield numbers of masks and what their runs measure, ``(metric, mask, pair)``."""
        given = PutIn.of(self.job, batch, self.wiring, self.placer)
        longest = int(batch.known.base.batch.mask.shape[1])
        apart = self._tells_apart()
        for entry in sorted(set(self.entry.tolist())):
            for is_apart in (False, True):
                numbers = np.flatnonzero((self.entry == entry) & (apart == is_apart))
                copies = self.wiring.n_shared if is_apart else 1
                most = max(1, most_rows(self.job, longest) // (len(batch.indices) * copies))
                begin = 0
                while begin < len(numbers):
                    some = numbers[begin : begin + most]
                    found = self._try(batch, given, some, entry, copies)
                    if found is None:
                        most = len(some) // 2
                        release_memory()
                        continue
                    yield some, found
                    begin += len(some)

    def _try(self, batch: Untouched, given: PutIn, some: np.ndarray, entry: int, copies: int) -> np.ndarray | None:
        try:
            return self._run(batch, given, some, entry, copies)
        except Exception as error:
            if not is_out_of_memory(error) or len(some) == 1:
                raise
            return None

    def _run(self, batch: Untouched, given: PutIn, some: np.ndarray, entry: int, copies: int) -> np.ndarray:
        """Return the metrics of some masks on the pairs of a batch, ``(metric, mask, pair)``."""
        n_pairs = len(batch.indices)
        # Rows lie mask by mask, in it pair by pair, in it copy by copy.
        local = np.tile(np.repeat(np.arange(n_pairs), copies), len(some))
        owner = np.repeat(some, n_pairs * copies)
        inputs = self.job.pairs.batch(self.job.base, batch.indices[local], padding_side=self.job.padding_side)
        assembly = _Assembly(self, batch, given, local, owner, copies, entry)
        rows = torch.as_tensor(local)
        known = restart.known_before(self.layers, entry, batch.known.base, rows, inputs, self.job) if entry else {}
        columns = few_columns(self.gauge, inputs) if self.is_few else None
        logits = restart.logits_from(self.layers, entry, known, inputs, assembly.writes(), columns)
        self.cost.forwards, self.cost.rows = self.cost.forwards + 1, self.cost.rows + len(local)
        device = self.wiring.model.device
        pair = torch.as_tensor(batch.indices[local], device=device)
        run = Run(logits, inputs, pair, tokens=tokens_at(columns, inputs))
        found = self.gauge.values(run, batch.runs, torch.as_tensor(local, device=device))
        table: np.ndarray = found.reshape(len(found), len(some), n_pairs, copies)[..., 0]
        return table

    def _tells_apart(self) -> Bool[np.ndarray, " mask"]:
        """Return which masks give heads that share a key or a value different ones."""
        graph, n_shared = self.wiring.graph, self.wiring.n_shared
        found = np.zeros(len(self.masks), dtype=bool)
        if n_shared == 1:
            return found
        for layer in range(graph.n_layers):
            for kind in ("k", "v"):
                some = self.masks[:, :, graph.heads_to(kind, layer)]
                groups = some.reshape(*some.shape[:2], -1, n_shared)
                found |= (groups != groups[..., :1]).any((1, 2, 3))
        return found

    def _verified(self) -> tuple[bool, bool, Layers]:
        """Return whether runs can begin at the layers in question, and be asked for some of the logits alone."""
        entries = sorted({*self.entry.tolist()} - {0})
        if restart.why_not(self.job, self.gauge) is not None:
            return False, False, Layers(self.wiring.model)
        return self._known(("entries", *entries), partial(self._verify, entries))

    def _verify(self, entries: Sequence[int]) -> tuple[bool, bool, Layers]:
        layers = Layers(self.wiring.model)  # it learns what layers return
        try:
            return True, restart.verify(self.job, self.gauge, layers, entries, self.cost), layers
        except ModelUnsupported:
            return False, False, layers


@dataclass(eq=False)
class _Assembly:
    """What the senders of some rows give, and what receivers are given of it.

    Args:
        runs: All runs.
        batch: The pairs with their untouched runs.
        given: What edges carry instead.
        local: The pair of each row in the batch.
        owner: The mask of each row.
        copies: Rows in a row that belong to one run.
        entry: The first layer that runs.
    """

    runs: ExactEdges
    batch: Untouched
    given: PutIn
    local: np.ndarray
    owner: np.ndarray
    copies: int
    entry: int

    def __post_init__(self) -> None:
        self.wiring = self.runs.wiring
        self.graph = self.wiring.graph
        base = self.batch.known.base
        self.rows = torch.as_tensor(self.local, device=self.wiring.model.device)
        first = self.wiring.layers[0].stream
        self.placed = self.given.placed[self.rows]
        # In layers that do not run, what senders give is what they give in the base run.
        self.now: dict[Port, Tensor] = {
            port: base.tensors[port][self.rows]
            for port in [first, *(wired.z for wired in self.wiring.layers), *self._mlps()]
        }
        self.there: dict[Port, Tensor] = {port: self.given.there[port][self.rows] for port in self.now}
        self.streams: dict[int, Tensor] = {}
        self.member = np.arange(len(self.local)) % self.copies

    def writes(self) -> list[Write]:
        """Return what is written while the model runs, in the order in which it passes."""
        made: list[tuple[Port, Callable[[Tensor], Tensor]]] = []
        touched = np.asarray(self.runs.masks[np.unique(self.owner)].any((0, 1)))
        for layer in range(self.entry, self.graph.n_layers):
            wired = self.wiring.layers[layer]
            made.append((wired.stream, partial(self._note_stream, layer)))
            for kind in KINDS:
                if touched[receivers_of(self.graph, (layer, kind))].any():
                    made.append((wired.heads[kind].port, partial(self._project, layer, kind)))
            made.append((wired.z, partial(self._note_z, layer)))
            if touched[self.graph.mlp_to(layer)]:
                made.append((wired.mlp.port, partial(self._read_mlp, layer)))
            made.append((wired.mlp_out.port, partial(self._note, wired.mlp_out.port)))
        if touched[self.graph.logits]:
            made.append((self.wiring.last, self._read_last))
        index = (torch.arange(len(self.local), device=self.rows.device),)
        return [Write(Tap(Site("logits"), port, Whole()), index, change) for port, change in made]

    def _mlps(self) -> list[Port]:
        return [wired.mlp_out.port for wired in self.wiring.layers]

    def _note(self, port: Port, current: Tensor) -> Tensor:
        self.now[port] = current
        return current

    def _note_stream(self, layer: int, current: Tensor) -> Tensor:
        self.streams[layer] = current
        return self._note(self.wiring.layers[layer].stream, current) if layer == 0 else current

    def _note_z(self, layer: int, current: Tensor) -> Tensor:
        """Note what heads hand on; of copies, each head's from the row with its own keys."""
        if self.copies > 1:
            wired, width = self.wiring.layers[layer], self.wiring.model.head_width
            apart = current.clone().reshape(-1, self.copies, *current.shape[1:])
            for head, start in enumerate(wired.starts):
                columns = slice(start, start + width)
                own = apart[:, head % self.copies, ..., columns].clone()
                apart[..., columns] = own[:, None]
            current = apart.reshape(current.shape)
        return self._note(self.wiring.layers[layer].z, current)

    def _project(self, layer: int, kind: str, current: Tensor) -> Tensor:
        """Return a projection's output with what each head reads in its own columns."""
        chain, starts = self.runs.chains[layer, kind], self.wiring.layers[layer].heads[kind].starts or ()
        receivers = receivers_of(self.graph, (layer, kind))
        out, width = current.clone(), self.wiring.layers[layer].heads[kind].width
        for head, receiver in enumerate(range(receivers.start, receivers.stop)):
            owner = chain.owners[head]
            is_own = self.member == head % self.wiring.n_shared if kind != "q" and self.copies > 1 else None
            if kind != "q" and self.copies == 1 and head % self.wiring.n_shared:
                continue  # all heads of the group read the same
            rows = self._rows(receiver, is_own)
            if not len(rows):
                continue
            columns = slice(starts[owner], starts[owner] + width)
            given = self._given(layer, receiver, rows, self.streams[layer][rows])
            out[rows, :, columns] = chain.of_unit(given, head)
        return out

    def _read_mlp(self, layer: int, current: Tensor) -> Tensor:
        receiver, chain = self.graph.mlp_to(layer), self.runs.chains[layer, "mlp"]
        rows = self._rows(receiver)
        out = current.clone()
        # Behind a norm that attention shares, the stream is what came into the layer.
        stream = self.streams[layer][rows] if chain.modules else current[rows]
        out[rows] = chain.forward(self._given(layer, receiver, rows, stream))
        return out

    def _read_last(self, current: Tensor) -> Tensor:
        rows = self._rows(self.graph.logits)
        out = current.clone()
        out[rows] = self._given(self.graph.n_layers, self.graph.logits, rows, current[rows])
        return out

    def _rows(self, receiver: int, among: np.ndarray | None = None) -> Tensor:
        """Return the rows in which something is interchanged on the way to a receiver."""
        is_changed = np.asarray(self.runs.masks[:, :, receiver].any(1))[self.owner]
        chosen = np.flatnonzero(is_changed if among is None else is_changed & among)
        return torch.as_tensor(chosen, device=self.rows.device)

    def _given(self, layer: int, receiver: int, rows: Tensor, stream: Tensor) -> Float[Tensor, "R T D"]:
        """Return the stream as a receiver reads it, in some rows."""
        heard = int(self.graph.heard[receiver])
        mask = torch.as_tensor(self.runs.masks[self.owner[rows.cpu().numpy()], :heard, receiver], device=rows.device)
        total = stream.clone()
        first = self.wiring.layers[0].stream
        if mask[:, 0].any():
            total += mask[:, 0, None, None] * (self.there[first][rows] - self.now[first][rows])
        for below in range(min(layer + 1, self.graph.n_layers)):
            wired, heads = self.wiring.layers[below], self.graph.heads_from(below)
            if heads.start < heard and mask[:, heads].any():
                total += self._heads(below, rows, mask[:, heads])
            place = self.graph.mlp_from(below)
            if place < heard and mask[:, place].any():
                port, view = wired.mlp_out.port, wired.mlp_out.view
                both = (view.read(held[port][rows], ()) for held in (self.there, self.now))
                total += mask[:, place, None, None] * (next(both) - next(both))
        return torch.where(self.placed[rows], total, stream)

    def _heads(self, layer: int, rows: Tensor, mask: Bool[Tensor, "R H"]) -> Float[Tensor, "R T D"]:
        """Return by how much what attention adds changes where some heads give what they do in the source run."""
        wired, width = self.wiring.layers[layer], self.wiring.model.head_width
        z, there = self.now[wired.z][rows], self.there[wired.z][rows]
        mixed = z.clone()
        for head, start in enumerate(wired.starts):
            columns = slice(start, start + width)
            mixed[..., columns] = torch.where(mask[:, head, None, None], there[..., columns], z[..., columns])
        return change_of_term(wired, z, mixed)
