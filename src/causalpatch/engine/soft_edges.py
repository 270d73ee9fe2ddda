"""Edges cut by shares, and the slope of a metric in every share: what masks are learnt by.

In a run with the shares w, what a receiver v reads is

    x_v = x + sum over u with an edge to v of w[u, v] (term_u(there) - term_u(now)),

so 0 is the edge as it is, 1 the edge interchanged as in ``exact_edges``, and between them is a straight line.

1. Base and source run once for a batch of pairs; rows are pairs, each with shares of its own.
2. The model runs as it is, with gradients. What senders add more there than now is put together layer by layer; all
   receivers of a layer that hear the same read it by one product, and go through the norm and their projections
   together.
3. Heads behind a post-norm are scaled together, so that each receiver's own mixture goes through it.
4. Rows run once for each member of a group where heads share keys and values; see ``exact_edges``.

Symbols: R rows, S senders, V receivers, U units, T tokens, D width, C columns.
Cost: a forward and a backward per row; kept for the backward are about six copies of every receiver's stream.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.edge_slopes import chains_of, receivers_of
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.gradient import differentiable
from causalpatch.engine.hooks import Write, run_with_hooks
from causalpatch.engine.job import Cost, Job
from causalpatch.engine.means import Means
from causalpatch.engine.memory import budget_bytes, row_cost
from causalpatch.engine.put_in import PutIn
from causalpatch.engine.resolve import Placer
from causalpatch.engine.slopes import require_graph
from causalpatch.engine.untouched import Untouched, run_untouched
from causalpatch.engine.wiring import Wired, Wiring
from causalpatch.models import Port, Tap, plain_rows
from causalpatch.models.views import Whole
from causalpatch.sites import Site
from causalpatch.sites.graph import KINDS

_COPIES = 6  # of each receiver's stream, kept for the backward

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""From the metric of rows and the numbers of their pairs to the loss of each."""


@dataclass(eq=False)
class SoftEdges:
    """Runs with edges cut by shares.

    Args:
        job: Its one intervention patches all senders; see ``patches_of_senders``.
        gauge: The metric.
        wiring: How the model is wired.
        means: Fitted means, where edges carry these.
    """

    job: Job
    gauge: Gauge
    wiring: Wiring
    means: Means = field(default_factory=Means)
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.chains = chains_of(self.wiring, self.wiring.model.dtype)
        self.placer = Placer(self.job.pairs, self.job.base)
        self._kept: dict[bytes, tuple[Untouched, PutIn]] = {}
        self._held = 0

    @property
    def rows_at_once(self) -> int:
        """How many rows fit into the budget."""
        model, graph = self.wiring.model, self.wiring.graph
        longest = int(self.job.pairs.lengths(self.job.base).max())
        size = torch.finfo(model.dtype).bits // 8
        held = longest * model.width * size * (_COPIES * graph.n_receivers + 2 * graph.n_senders)
        held += graph.n_layers * row_cost(model, longest).total + 4 * graph.exists.size
        most = int(budget_bytes(model.device, self.job.budget_gib) // (held * self.wiring.n_shared))
        return max(1, most if self.job.max_rows is None else min(most, self.job.max_rows))

    def slopes(
        self, pairs: Int[np.ndarray, " row"], shares: Float[Tensor, "R S V"], loss: Loss
    ) -> tuple[Float[Tensor, " R"], Float[Tensor, "R S V"]]:
        """Return the loss of rows, and its slope in every share of theirs.

        Args:
            pairs: The pair of each row.
            shares: How much of each edge is cut, 0 to 1, in float32.
            loss: What is made of the metric.

        Raises:
            MemoryExhausted: One row does not fit into memory.
            MetricError: The metric has no gradient.
        """
        rows = np.arange(len(pairs))
        pieces = np.array_split(rows, -(-len(rows) // self.rows_at_once))
        losses, slopes = torch.zeros(len(rows), device=shares.device), torch.zeros_like(shares)
        make = partial(self._piece, pairs, shares.detach(), loss)
        for some, value, slope in in_batches(self.job, pieces, make):
            losses[some], slopes[some] = value.to(losses), slope.to(slopes)
        return losses, slopes

    def values(self, pairs: Int[np.ndarray, " row"], shares: Float[Tensor, "R S V"]) -> Float[Tensor, " R"]:
        """Return the metric of rows, with a graph to the shares; to be called inside ``differentiable``."""
        batch, given = self._untouched(np.unique(pairs))
        local = torch.as_tensor(np.searchsorted(batch.indices, pairs), device=shares.device)
        copies = self.wiring.n_shared
        repeated = local.repeat_interleave(copies)
        inputs = self.job.pairs.batch(
            self.job.base, batch.indices[repeated.cpu().numpy()], padding_side=self.job.padding_side
        )
        assembly = _SoftAssembly(self, batch, given, repeated, shares.repeat_interleave(copies, 0), copies)
        model = self.wiring.model
        output, _ = run_with_hooks(
            model,
            inputs_of(model, inputs),
            assembly.writes(),
            opens_attention=self.job.opens_attention,
            with_gradient=True,
        )
        self.cost.forwards, self.cost.rows = self.cost.forwards + 1, self.cost.rows + len(repeated)
        numbers = torch.as_tensor(batch.indices, device=repeated.device)[repeated]
        found = self.gauge.tensors(Run(model.logits(output), inputs, numbers), batch.runs, repeated)[0]
        return found[::copies]

    def _piece(
        self, pairs: np.ndarray, shares: Tensor, loss: Loss, some: np.ndarray
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        leaf = shares[torch.as_tensor(some, device=shares.device)].requires_grad_()
        with differentiable(self.wiring.model):
            values = self.values(pairs[some], leaf)
            require_graph(values, self.gauge)
            losses = loss(values, torch.as_tensor(pairs[some], device=values.device))
            (slope,) = torch.autograd.grad(losses.sum(), leaf)
        return some, losses.detach(), slope

    def _untouched(self, indices: np.ndarray) -> tuple[Untouched, PutIn]:
        """Return the untouched runs of some pairs, and what is put in; both kept while they fit a quarter of memory."""
        key = indices.tobytes()
        if key not in self._kept:
            sites = [target.site for target in self.job.interventions[0]]
            with torch.no_grad():
                batch = run_untouched(self.job, self.gauge, self.means, self.cost, indices, base_sites=sites)
                made = (batch, PutIn.of(self.job, batch, self.wiring, self.placer))
            self._held += _bytes_of(*made)
            if self._held > budget_bytes(self.wiring.model.device, self.job.budget_gib) // 4:
                self._kept, self._held = {}, _bytes_of(*made)
            self._kept[key] = made
        return self._kept[key]


def _bytes_of(batch: Untouched, given: PutIn) -> int:
    return batch.n_bytes + sum(tensor.nbytes for tensor in given.there.values())


@dataclass(eq=False)
class _SoftAssembly:
    """What the senders of some rows give, and what receivers are given of it.

    Args:
        runs: All runs.
        batch: The pairs with their untouched runs.
        given: What edges carry where they are cut.
        local: The pair of each row in the batch.
        shares: How much of each edge is cut, ``[R, S, V]``.
        copies: Rows in a row that belong to one run.
    """

    runs: SoftEdges
    batch: Untouched
    given: PutIn
    local: Tensor
    shares: Tensor
    copies: int

    def __post_init__(self) -> None:
        self.wiring, self.graph = self.runs.wiring, self.runs.wiring.graph
        self.placed = self.given.placed[self.local]
        self.member = torch.arange(len(self.local), device=self.local.device) % self.copies
        # What senders add more there than now, [R, S, T, D]: of the embedding, and of heads and MLP layer by layer.
        self.more: dict[tuple[int, str], Tensor] = {}
        self.mixing: dict[int, tuple[Tensor, Tensor]] = {}  # by layer: z, and how far it is from there
        self.streams: dict[int, Tensor] = {}

    def writes(self) -> list[Write]:
        """Return what is written while the model runs, in the order in which it passes."""
        made: list[tuple[Port, Callable[[Tensor], Tensor]]] = []
        for layer, wired in enumerate(self.wiring.layers):
            made.append((wired.stream, partial(self._note_stream, layer)))
            made += [(wired.heads[kind].port, partial(self._project, layer, kind)) for kind in KINDS]
            made.append((wired.z, partial(self._note_z, layer)))
            made.append((wired.mlp.port, partial(self._read_mlp, layer)))
            made.append((wired.mlp_out.port, partial(self._note_mlp, layer)))
        made.append((self.wiring.last, self._read_last))
        index = (torch.arange(len(self.local), device=self.local.device),)
        return [Write(Tap(Site("logits"), port, Whole()), index, change) for port, change in made]

    def _away(self, port: Port, current: Tensor) -> Tensor:
        """Return how far what stands at a port is from what is put in."""
        return torch.where(self.placed, self.given.there[port][self.local] - current, 0.0)

    def _note_stream(self, layer: int, current: Tensor) -> Tensor:
        self.streams[layer] = current
        if layer == 0:
            self.more[0, "embed"] = self._away(self.wiring.layers[0].stream, current)[:, None]
        return current

    def _note_mlp(self, layer: int, current: Tensor) -> Tensor:
        tap = self.wiring.layers[layer].mlp_out
        self.more[layer, "mlp"] = tap.view.read(self._away(tap.port, current), ())[:, None]
        return current

    def _note_z(self, layer: int, current: Tensor) -> Tensor:
        """Note what heads add more there; of copies, each head's z is from the row with its own keys."""
        wired, model = self.wiring.layers[layer], self.wiring.model
        at = torch.tensor(wired.starts)[:, None] + torch.arange(model.head_width)
        if self.copies > 1:
            apart = current.reshape(-1, self.copies, *current.shape[1:])
            own = torch.stack([apart[:, head % self.copies][..., at[head]] for head in range(len(at))], -2)
            mixed = current.clone()
            mixed[..., at.flatten()] = own.flatten(-2).repeat_interleave(self.copies, 0)
            current = mixed
        away = self._away(wired.z, current)
        weight = plain_rows(wired.project) if wired.after is None else None
        if weight is None:
            self.mixing[layer] = (current, away)  # no sum of what each head adds
        else:
            by_head = weight.detach()[at].to(away.dtype)
            self.more[layer, "heads"] = torch.einsum("rthw,hwd->rhtd", away[..., at], by_head) * wired.times
        return current

    def _project(self, layer: int, kind: str, current: Tensor) -> Tensor:
        """Return a projection's output with what each head reads in its own columns."""
        chain, receivers = self.runs.chains[layer, kind], receivers_of(self.graph, (layer, kind))
        shares, units = self.shares[:, :, receivers], slice(0, None)
        if kind != "q" and self.copies > 1:  # one member of each group in each row
            members = shares.reshape(*shares.shape[:2], -1, self.copies)
            shares = members[torch.arange(len(members)), :, :, self.member]
            units = slice(0, None, self.copies)
        made = chain.of_units(self._read(shares, receivers.start, self.streams[layer]), units)
        out = current.clone()
        out[..., chain.places[units].flatten()] = made.flatten(2)
        return out

    def _read_mlp(self, layer: int, current: Tensor) -> Tensor:
        chain, receiver = self.runs.chains[layer, "mlp"], self.graph.mlp_to(layer)
        # Behind a norm that attention shares, the stream is what came into the layer.
        stream = self.streams[layer] if chain.modules else current
        shares = self.shares[:, :, receiver, None]
        return chain.forward(self._read(shares, receiver, stream.reshape(self.streams[layer].shape))[:, 0]).reshape(
            current.shape
        )

    def _read_last(self, current: Tensor) -> Tensor:
        receiver = self.graph.logits
        return self._read(self.shares[:, :, receiver, None], receiver, current)[:, 0]

    def _read(
        self, shares: Float[Tensor, "R S V"], receiver: int, stream: Float[Tensor, "R T D"]
    ) -> Float[Tensor, "R V T D"]:
        """Return the stream as some receivers read it, which all hear what the given one does."""
        heard, graph = int(self.graph.heard[receiver]), self.graph
        shares = shares.to(stream.dtype)
        n_receivers = shares.shape[2]
        total = stream.flatten(1)[:, None].repeat(1, n_receivers, 1)

        _add(total, shares[:, :1], self.more[0, "embed"])
        for layer in range(graph.n_layers):
            heads, mlp = graph.heads_from(layer), graph.mlp_from(layer)
            if heads.start < heard and layer in self.mixing:
                some = shares[:, heads].transpose(1, 2)
                total += self._mixed(self.wiring.layers[layer], *self.mixing[layer], some).flatten(2)
            elif heads.start < heard:
                _add(total, shares[:, heads], self.more[layer, "heads"])
            if mlp < heard:
                _add(total, shares[:, mlp : mlp + 1], self.more[layer, "mlp"])
        return total.reshape(-1, n_receivers, *stream.shape[1:])

    def _mixed(
        self, wired: Wired, z: Float[Tensor, "R T C"], away: Tensor, shares: Float[Tensor, "R V H"]
    ) -> Float[Tensor, "R V T D"]:
        """Return what attention adds more where shares of its heads are put in, by all that it goes through."""
        of_column = shares.repeat_interleave(self.wiring.model.head_width, 2)
        at = (torch.tensor(wired.starts)[:, None] + torch.arange(self.wiring.model.head_width)).flatten()
        spread = z.new_zeros(*shares.shape[:2], z.shape[-1])
        spread[..., at] = of_column
        moved = z[:, None] + spread[:, :, None] * away[:, None]
        return _added(wired, moved) - _added(wired, z)[:, None]


def _added(wired: Wired, z: Tensor) -> Tensor:
    given: Tensor = wired.project.forward(z)
    return (given if wired.after is None else wired.after.forward(given)) * wired.times


def _add(total: Float[Tensor, "R V N"], shares: Float[Tensor, "R S V"], more: Float[Tensor, "R S T D"]) -> None:
    """Add shares of what senders add more, in place: temporary sums of all layers would cut memory into pieces."""
    total.baddbmm_(shares.transpose(1, 2), more.flatten(2))
