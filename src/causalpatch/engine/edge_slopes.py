"""Scores of all edges of a decoder, by one product of differences and gradients.

    s(u -> v) = mean over pairs of <delta_u, G_v>,    G_v the gradient at the stream by way of v alone

1. Base and source run once; where slopes are taken at the base run, the same forward gives them. Of a sender u the runs
   give delta_u, what it would add more: the embedding's difference, the MLP's, and of a head its difference of z
   through its columns of the output projection, to first order through a post-norm, times what the model multiplies it
   by.
2. A forward and a backward at each point (``slopes``) give gradients where receivers' inputs stand: at the outputs of
   the projections and at what the MLP reads. Keys and values that heads share are met once for each head that they
   serve, and taken back to their projection together, one member of all groups at a time.
3. What stands there is summed over points as it is met, as wide as a head (``gathered``), so that each point costs a
   forward, a backward and little else. At last ``chains`` takes the sums back to the stream, one layer after another,
   and the products with all deltas are the scores.

Differences and gradients at the stream are made when activations are gone. Nothing has a copy of the stream for each
receiver but G itself, one layer at a time.

Symbols: N tokens of a batch of pairs, S senders, U receivers of a group, D width, P columns.

References:
    Syed et al. 2023, 2310.10348 (EAP); Hanna et al. 2024, 2403.17806 (EAP-IG); "Position-aware Automatic Circuit
    Discovery", 2502.04577 (edges by position).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported, SiteUnsupported
from causalpatch.engine.chains import Chain, Norm
from causalpatch.engine.few_logits import few_of
from causalpatch.engine.gathered import Gathered
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import Cost, Job, batches_of_pairs
from causalpatch.engine.memory import budget_bytes
from causalpatch.engine.probes import Probes
from causalpatch.engine.resolve import Placer
from causalpatch.engine.senders import Senders
from causalpatch.engine.slopes import (
    Meeting,
    Points,
    columns_of,
    measured_in_batches,
    moved_to,
    require_slope,
    run_ends,
    take_slopes,
)
from causalpatch.engine.untouched import Untouched
from causalpatch.engine.wiring import Wired, Wiring
from causalpatch.models import Port
from causalpatch.sites.graph import KINDS, Graph

AT_ONCE = 8
"""Points whose gradients are gathered before they are multiplied by differences."""

Key = tuple[int, str]
"""A layer and ``"q"``, ``"k"``, ``"v"`` or ``"mlp"``; behind the last layer ``"logits"``."""


@dataclass(frozen=True, eq=False)
class EdgeSums:
    """What is found of all edges.

    Args:
        total: Sum of scores over pairs, ``(position, sender, receiver)``; one position where they are not told apart.
        base: The metric of each pair's base run.
        source: The metric of each pair's source run.
        cost: What was spent.
        steepest: The largest slope; ``require_steep`` refuses scores of a metric that has none.
    """

    total: Float[np.ndarray, "position sender receiver"]
    base: Float[np.ndarray, " pair"]
    source: Float[np.ndarray, " pair"]
    cost: Cost
    steepest: float


@dataclass(eq=False)
class EdgeSlopes:
    """Scores of edges by gradients.

    Args:
        job: Its one intervention patches all senders; see ``patches_of_senders``.
        gauge: The metric.
        wiring: How the model is wired.
        points: Where slopes are taken.
        by_position: Whether the positions of receivers are told apart.
        own: Whether each sender's output is moved by itself, all else as in the base run (IG over activations).
    """

    job: Job
    gauge: Gauge
    wiring: Wiring
    points: Points
    by_position: bool = False
    own: bool = False
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        graph, model = self.wiring.graph, self.wiring.model
        self.dtype = torch.promote_types(model.dtype, torch.float32)
        self.chains = chains_of(self.wiring, self.dtype)
        self.senders = Senders(self.wiring, self.dtype)
        self.placer = Placer(self.job.pairs, self.job.base)
        self.n_columns = self.job.pairs.aligned().n_columns if self.by_position else 1
        self.total = torch.zeros(self.n_columns, *graph.shape, dtype=torch.float64, device=model.device)

    def measure(self) -> EdgeSums:
        """Return the sums of scores over all pairs.

        Raises:
            MetricError: The metric has no gradient.
            NoGradient: The metric is smallest where slopes are taken.
            PairError: Prompts of unequal lengths have no alignment.
        """
        require_slope(self.job, self.gauge, self.points)
        self.few = few_of(self.job, self.gauge)
        found, steepest = measured_in_batches(self.job, self._batches(), self._measure)
        return EdgeSums(self.total.cpu().numpy(), found["base"], found["source"], self.cost, steepest)

    def _measure(self, indices: np.ndarray) -> tuple[Untouched, float]:
        """Add the scores of some pairs, or nothing where memory runs out; return their runs and the largest slope."""
        sites = [target.site for target in self.job.interventions[0]]
        before = self.total.clone()
        # Where heads share keys slopes are taken in a run whose attention is computed step by step.
        begins = self.points.shares[0] == 0 and not self.own and self.wiring.n_shared == 1
        first = self._probes({}) if begins else None
        try:
            batch = run_ends(self.job, self.gauge, self.cost, indices, sites, probes=first, few=self.few)
            slope = self._add(batch.lean(self.gauge), first)
        except Exception:
            self.total = before
            raise
        return batch, slope

    def _add(self, batch: Untouched, first: Probes | None) -> float:
        """Add the scores of some pairs; return the largest slope.

        Args:
            batch: The pairs.
            first: Slopes at the first point, where they have been taken already.
        """
        meeting = Meeting.of(self.job, batch, self.job.interventions[0][0], self.placer)
        columns = columns_of(self.job, batch) if self.by_position else None
        if self.own:
            return self._add_own(batch, meeting, columns)
        start, difference = self.wiring.layers[0].stream, self.senders.embedded(batch, meeting)
        steepest, n_points = 0.0, len(self.points.shares)
        gathered = self._gathered()
        for number, share in enumerate(self.points.shares):
            probes, first = first or self._run(batch, moved_to(share, start, difference)), None
            steepest = max(steepest, _steepest(probes))
            for key, x, g in self._met(probes):
                gathered[self._group(key)].add(key, x, g)
            del probes
            if number == n_points - 1 or number % AT_ONCE == AT_ONCE - 1:
                self._contract(gathered, self.senders.deltas(batch, meeting), columns)
                gathered = self._gathered()
        return steepest

    def _group(self, key: Key) -> int:
        """Return the number of the group in which a receiver's gradients are gathered: those that hear about the same.

        An MLP behind its layer's heads hears but one sender less than the heads of the next layer.
        """
        return key[0] + (key[1] == "mlp" and not self.wiring.graph.is_parallel)

    def _gathered(self) -> dict[int, Gathered[Key]]:
        groups: dict[int, dict[Key, Chain]] = {}
        for key, chain in self.chains.items():
            groups.setdefault(self._group(key), {})[key] = chain
        return {number: Gathered(chains, self.dtype) for number, chains in groups.items()}

    def _add_own(self, batch: Untouched, meeting: Meeting, columns: Tensor | None) -> float:
        """Add scores with each sender's output moved by itself."""
        steepest, deltas = 0.0, self.senders.deltas(batch, meeting)
        for sender, (port, moved) in enumerate(self.senders.moves(batch, meeting, deltas)):
            first = int(np.flatnonzero(self.wiring.graph.exists[sender])[0])
            delta = deltas[sender].flatten(0, 1)
            for share in self.points.shares:
                probes = self._run(batch, {port: share * moved}, first)
                steepest = max(steepest, _steepest(probes))
                for key, x, g in self._met(probes):
                    receivers = receivers_of(self.wiring.graph, key)
                    if receivers.start < first:
                        continue
                    chain = self.chains[key]
                    pushed = chain.push(x, delta.to(x.dtype)).to(self.dtype)
                    pushed = pushed if chain.way.starts is None else chain.columns(pushed)
                    of_token = (
                        (g.to(self.dtype) * pushed).flatten(1).sum(-1)
                        if chain.way.starts is None
                        else (g.to(self.dtype) * pushed).sum(-1)
                    )
                    self._sum_tokens(sender, receivers, of_token / len(self.points.shares), columns)
        return steepest

    def _contract(self, gathered: Mapping[int, Gathered[Key]], deltas: Tensor, columns: Tensor | None) -> None:
        """Add the products of differences and gradients."""
        heard, rows = self.wiring.graph.heard, deltas.flatten(1, 2)
        for group in gathered.values():
            receivers = {key: receivers_of(self.wiring.graph, key) for key in group.chains}
            n_senders = max(int(heard[some.start]) for some in receivers.values())
            for key, products in group.products(rows[:n_senders]).items():
                some = receivers[key]
                n_heard = int(heard[some.start])
                of_token = products[:, :n_heard] / len(self.points.shares)
                self._sum_tokens(slice(n_heard), some, of_token, columns)

    def _sum_tokens(
        self, senders: int | slice, receivers: slice, of_token: Float[Tensor, "N *edges"], columns: Tensor | None
    ) -> None:
        """Add scores of tokens."""
        into = self.total[:, senders, receivers]
        if columns is None:
            into[0] += of_token.sum(0, dtype=torch.float64).reshape(into.shape[1:])
            return
        padded = torch.cat([of_token, of_token.new_zeros(1, *of_token.shape[1:])]).double()
        into += padded[columns].sum(0).reshape(into.shape)

    def _run(self, batch: Untouched, moved: Mapping[Port, Tensor], first: int = 0) -> Probes:
        """Take slopes with some outputs moved, from a receiver on."""
        opens, probes = self.wiring.n_shared > 1, self._probes(moved, first)
        try:
            take_slopes(self.job, self.gauge, batch, probes, opens=opens, keeps_graph=opens, few=self.few)
        except SiteUnsupported as error:
            raise ModelUnsupported(
                f"edges of '{self.wiring.model.name}' cannot be scored",
                facts=[("why", "heads share keys, and its attention does not let each head's own be seen")],
                fix="take scores of nodes: attribute(experiment, 'z'), or measure edges: patch_edges(experiment, …)",
            ) from error
        self.cost.forwards, self.cost.rows = self.cost.forwards + 1, self.cost.rows + len(batch.indices)
        return probes

    def _probes(self, moved: Mapping[Port, Tensor], first: int = 0) -> Probes:
        """Return the probes of a run, from a receiver on."""
        ports: list[Port] = []
        linked: list[Port] = []
        for layer, wired in enumerate(self.wiring.layers):
            for key, way in [((layer, kind), wired.heads[kind]) for kind in KINDS] + [((layer, "mlp"), wired.mlp)]:
                if receivers_of(self.wiring.graph, key).start >= first:
                    ports.append(way.port)
                    if self.wiring.n_shared > 1 and key[1] in ("k", "v"):
                        shared, of_head = _shared(wired, key[1])
                        ports += [shared, of_head]
                        linked += [way.port, shared]
        streams = [wired.stream for wired in self.wiring.layers]
        probes = Probes.at([*streams, *ports, self.wiring.last], moved)
        probes.read, probes.linked, probes.sloped = {*streams, self.wiring.last}, linked, {*ports, self.wiring.last}
        return probes

    def _met(self, probes: Probes) -> Iterator[tuple[Key, Tensor, Tensor]]:
        """Yield for each group of receivers the stream and the gradients, from the last to the first."""
        slopes = dict(probes.slopes)  # going back from keys to their projection passes the probes once more
        for key in reversed(list(self.chains)):
            way, wired = self.chains[key].way, self.wiring.layers[min(key[0], len(self.wiring.layers) - 1)]
            if way.port not in slopes:
                continue  # it was not asked for, or nothing of it reaches the metric
            stream = probes.values[way.port if key[1] == "logits" else wired.stream].flatten(0, 1)
            if key[1] in ("k", "v") and self.wiring.n_shared > 1:
                yield key, stream, self._of_heads(key, wired, probes, slopes)
            elif way.starts is None:
                yield key, stream, slopes[way.port].flatten(0, 1)
            else:
                yield key, stream, self.chains[key].columns(slopes[way.port].flatten(0, 1))

    def _of_heads(
        self, key: Key, wired: Wired, probes: Probes, slopes: Mapping[Port, Tensor]
    ) -> Float[Tensor, "N U W"]:
        """Return gradients at a shared key's or value's projection, for each head that it serves by itself."""
        chain, n_shared = self.chains[key], self.wiring.n_shared
        shared, of_head = _shared(wired, key[1])
        of_heads = slopes[of_head]
        of_members = of_heads.reshape(*of_heads.shape[:2], -1, n_shared, of_heads.shape[-1])
        found: list[Tensor] = []
        for member in range(n_shared):
            (back,) = torch.autograd.grad(
                probes.nodes[shared], probes.nodes[chain.way.port], of_members[..., member, :], retain_graph=True
            )
            found.append(chain.columns(back.flatten(0, 1))[:, member::n_shared])
        return torch.stack(found, 2).flatten(1, 2)

    def _batches(self) -> Iterator[np.ndarray]:
        """Yield the pairs whose differences fit into the budget together."""
        lengths = np.maximum(self.job.pairs.lengths("clean"), self.job.pairs.lengths("corrupt"))
        for indices in batches_of_pairs(self.job):
            most = self._budget // max(1, self._bytes_per_token() * int(lengths[indices].max()))
            yield from np.array_split(indices, -(-len(indices) // max(1, int(most))))

    @property
    def _budget(self) -> int:
        return budget_bytes(self.wiring.model.device, self.job.budget_gib)

    def _bytes_per_token(self) -> int:
        """Bytes of the differences of all senders, and of the gradients of a layer's receivers, at one token."""
        graph, size = self.wiring.graph, torch.finfo(self.dtype).bits // 8
        return (graph.n_senders + 3 * graph.n_heads + AT_ONCE) * self.wiring.model.width * size


def chains_of(wiring: Wiring, dtype: torch.dtype) -> dict[Key, Chain]:
    """Return what each group of receivers reads the stream through, from the first to the last.

    Args:
        wiring: How the model is wired.
        dtype: In which contractions are computed.
    """
    width, n_heads = wiring.model.width, wiring.graph.n_heads
    found: dict[Key, Chain] = {}
    norms: dict[nn.Module, Norm | None] = {}
    for layer, wired in enumerate(wiring.layers):
        for kind in KINDS:
            n_shared = 1 if kind == "q" else wiring.n_shared
            owners = [head // n_shared for head in range(n_heads)]
            found[layer, kind] = Chain(wired.heads[kind], width, dtype, owners, norms)
        found[layer, "mlp"] = Chain(wired.mlp, width, dtype, norms=norms)
    found[len(wiring.layers), "logits"] = Chain(wiring.end, width, dtype, norms=norms)
    return found


def receivers_of(graph: Graph, key: Key) -> slice:
    """Return the receivers of a group."""
    layer, kind = key
    if kind in KINDS:
        return graph.heads_to(kind, layer)
    place = graph.logits if kind == "logits" else graph.mlp_to(layer)
    return slice(place, place + 1)


def _shared(wired: Wired, kind: str) -> tuple[Port, Port]:
    """Return where a shared key or value stands, and where it stands once for each head."""
    if kind == "k":
        return Port(wired.attends, "key"), Port(wired.attends, "head_key")
    return Port(wired.attends, "value"), Port(wired.attends, "head_value")


def _steepest(probes: Probes) -> float:
    return max((float(slope.abs().amax()) for slope in probes.slopes.values()), default=0.0)
