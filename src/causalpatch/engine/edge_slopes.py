"""Scores of all edges of a decoder, by one product of differences and gradients.

    s(u -> v) = mean over pairs of <delta_u, G_v>,    G_v the gradient at the stream by way of v alone

1. Base and source run once; where slopes are taken at the base run, the same forward gives them. Of a sender u the runs
   give delta_u, what it would add more: the embedding's difference, the MLP's, and of a head its difference of z
   through its columns of the output projection, through a post-norm by its mean slope at the same points (with each
   sender by itself, by its slope at each), times what the model multiplies it by.
2. A forward and a backward at each point (``slopes``), small ones at several points together, give gradients where
   receivers' inputs stand: at the outputs of the projections and at what the MLP reads. Keys and values that heads
   share are met once for each head that they serve, and taken back to their projection together, one member of all
   groups at a time.
3. What stands there is summed over points as it is met, as wide as a head (``gathered``), so that each point costs a
   forward, a backward and little else. At last the sums are taken back to the stream, some tokens and one layer after
   another, and the products with all deltas at these tokens are the scores.

Differences and gradients at the stream are made when activations are gone, and of a few tokens at a time.

Symbols: N tokens of a batch of pairs, S senders, U receivers of a group, D width, P columns.

References:
    Syed et al. 2023, 2310.10348 (EAP); Hanna et al. 2024, 2403.17806 (EAP-IG); "Position-aware Automatic Circuit
    Discovery", 2502.04577 (edges by position).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported, SiteUnsupported
from causalpatch.engine.chains import Chain, Norm
from causalpatch.engine.few_logits import few_of
from causalpatch.engine.gathered import Gathered
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import Cost, Job, batches_of_pairs, most_rows
from causalpatch.engine.meeting import Meeting, columns_of
from causalpatch.engine.memory import budget_bytes, row_cost
from causalpatch.engine.probes import Probes
from causalpatch.engine.recorders import own_hooks
from causalpatch.engine.resolve import Placer
from causalpatch.engine.senders import Senders
from causalpatch.engine.slopes import Points, measured_in_batches, require_slope, run_ends, take_slopes
from causalpatch.engine.untouched import Untouched
from causalpatch.engine.wiring import Wired, Wiring
from causalpatch.models import Port
from causalpatch.sites.graph import KINDS, Graph

AT_ONCE = 8
"""Points whose gradients are gathered before they are multiplied by differences."""
CPU_TOKENS = 128
"""Tokens that go through a forward and a backward together on a CPU: more gain little and take memory for each."""
BLOCK_NUMBERS = 2**22
"""Numbers of the differences that are held at once on a CPU, so that they stay in its cache."""

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
        self.placer = Placer(self.job.pairs, self.job.base)
        self.n_columns = self.job.pairs.aligned().n_columns if self.by_position else 1
        self.total = torch.zeros(self.n_columns, *graph.shape, dtype=torch.float64, device=model.device)
        self._added: dict[Port, Tensor] = {}

    def measure(self) -> EdgeSums:
        """Return the sums of scores over all pairs.

        Raises:
            MetricError: The metric has no gradient.
            NoGradient: The metric is smallest where slopes are taken.
            PairError: Prompts of unequal lengths have no alignment.
        """
        require_slope(self.job, self.gauge, self.points, "eap-ig")
        self.few = few_of(self.job, self.gauge)
        found, steepest = measured_in_batches(self.job, self._batches(), self._measure)
        return EdgeSums(self.total.cpu().numpy(), found["base"], found["source"], self.cost, steepest)

    def _measure(self, indices: np.ndarray) -> tuple[Untouched, float]:
        """Add the scores of some pairs, or nothing where memory runs out; return their runs and the largest slope."""
        sites = [target.site for target in self.job.interventions[0]]
        before = self.total.clone()
        # Where heads share keys slopes are taken in a run whose attention is computed step by step.
        begins = self.points.shares[0] == 0 and not self.own and self.wiring.n_shared == 1
        first = [self._probes({})] if begins else []
        try:
            batch = run_ends(
                self.job, self.gauge, self.cost, indices, sites, probes=first[0] if first else None, few=self.few
            )
            meeting = Meeting.of(self.job, batch, self.job.interventions[0][0], self.placer)
            senders = Senders(self.wiring, self.dtype, batch, meeting, (0.0,) if self.own else self.points.shares)
            batch = batch.bare(self.gauge)
            columns = columns_of(self.job, batch) if self.by_position else None
            own = self.own
            slope = self._add_own(batch, senders, columns) if own else self._add(first, batch, senders, columns)
        except Exception:
            self.total = before
            raise
        return batch, slope

    def _add(self, first: list[Probes], batch: Untouched, senders: Senders, columns: Tensor | None) -> float:
        """Add the scores of some pairs; return the largest slope.

        Args:
            first: Slopes at the first point, where they have been taken already; handed over, so that they can go.
            batch: The pairs.
            senders: What senders add more.
            columns: The places of aligned columns, where positions are told apart.
        """
        start, steepest, gathered, n_met = self.wiring.layers[0].stream, 0.0, self._gathered(), 0
        waiting = list(self.points.shares[len(first) :])
        while first or waiting:
            if first:
                probes = first.pop()
            else:
                some, waiting = waiting[: self._at_once(batch)], waiting[self._at_once(batch) :]
                moved = torch.cat([share * senders.embedded for share in some])
                probes = self._run(batch, {start: moved} if any(some) else {}, copies=len(some))
            steepest, n_met = max(steepest, probes.steepest), n_met + probes.copies
            for key, x, g in self._met(probes):
                points = [each.reshape(probes.copies, -1, *each.shape[1:]) for each in (x, g)]
                gathered[self._group(key)].add(key, points[0], points[1], self._made(key, probes))
            del probes
            if not waiting or n_met + self._at_once(batch) > AT_ONCE:
                self._contract(gathered, senders, columns)
                gathered, n_met = self._gathered(), 0
        return steepest

    def _at_once(self, batch: Untouched) -> int:
        """Return at how many points slopes are taken in one forward."""
        n_pairs, n_tokens = batch.known.base.batch.mask.shape
        most = self._budget // (n_pairs * self._bytes_per_run(n_tokens))
        if self.wiring.model.device.type == "cpu":
            most = min(most, CPU_TOKENS // (n_pairs * n_tokens))
        return max(1, int(min(most, AT_ONCE, most_rows(self.job, n_tokens) // n_pairs)))

    def _made(self, key: Key, probes: Probes) -> Float[Tensor, "P N U W"] | None:
        """Return what a projection made of the normed stream, without what it adds to nothing; None if not known."""
        chain = self.chains[key]
        if chain.way.starts is None or chain.way.port not in probes.values or not chain.is_folded:
            return None
        if chain.way.port not in self._added:
            nothing = torch.zeros(1, chain.width, dtype=self.dtype, device=self.wiring.model.device)
            with torch.no_grad():
                self._added[chain.way.port] = chain.forward(nothing)
        values = probes.values[chain.way.port].flatten(0, 1)
        made = chain.columns(values) - chain.columns(self._added[chain.way.port])
        return made.reshape(probes.copies, -1, *made.shape[1:])

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

    def _add_own(self, batch: Untouched, senders: Senders, columns: Tensor | None) -> float:
        """Add scores with each sender's output moved by itself; return the largest slope."""
        steepest, deltas = 0.0, senders.deltas(slice(None))
        for sender, move in enumerate(senders.moves(deltas)):
            first = int(np.flatnonzero(self.wiring.graph.exists[sender])[0])
            for share in self.points.shares:
                delta, probes = move.delta(share), self._run(batch, {move.port: share * move.by}, first)
                steepest = max(steepest, probes.steepest)
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

    def _contract(self, gathered: Mapping[int, Gathered[Key]], senders: Senders, columns: Tensor | None) -> None:
        """Add the products of differences and gradients, some tokens at a time."""
        heard, n_tokens, size = self.wiring.graph.heard, senders.n_tokens, self._block_of(senders)
        for begin in range(0, n_tokens, size):
            tokens = slice(begin, min(n_tokens, begin + size))
            here = None if columns is None else _within(columns, tokens)
            deltas = senders.deltas(tokens)
            sums, by_token = deltas.sum(-1), here is not None
            for group in gathered.values():
                receivers = {key: receivers_of(self.wiring.graph, key) for key in group.met}
                most = max((int(heard[some.start]) for some in receivers.values()), default=0)
                found = group.products(deltas[:most], sums[:most], tokens, by_token=by_token)
                for key, products in found.items():
                    n_heard = int(heard[receivers[key].start])
                    part = products[..., :n_heard, :] / len(self.points.shares)
                    self._sum_tokens(slice(n_heard), receivers[key], part if by_token else part[None], here)

    def _block_of(self, senders: Senders) -> int:
        """Return at how many tokens differences of all senders are held at once."""
        most = BLOCK_NUMBERS if self.wiring.model.device.type == "cpu" else 16 * BLOCK_NUMBERS
        most = max(1, most // (self.wiring.graph.n_senders * self.wiring.model.width))
        return -(-senders.n_tokens // -(-senders.n_tokens // most))

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

    def _run(self, batch: Untouched, moved: Mapping[Port, Tensor], first: int = 0, copies: int = 1) -> Probes:
        """Take slopes with some outputs moved, from a receiver on; of each pair in several runs side by side."""
        opens, probes = self.wiring.n_shared > 1, self._probes(moved, first)
        probes.copies = copies
        try:
            take_slopes(self.job, self.gauge, batch, probes, opens=opens, keeps_graph=opens, few=self.few)
        except SiteUnsupported as error:
            raise ModelUnsupported(
                f"edges of '{self.wiring.model.name}' cannot be scored",
                facts=[("why", "heads share keys, and its attention does not let each head's own be seen")],
                fix="take scores of nodes: attribute(experiment, 'z'), or measure edges: patch_edges(experiment, …)",
            ) from error
        self.cost.forwards, self.cost.rows = self.cost.forwards + 1, self.cost.rows + copies * len(batch.indices)
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
        probes.linked, probes.sloped = linked, {*ports, self.wiring.last}
        probes.read = {*streams, self.wiring.last, *self._projected()} & set(probes.ports)
        return probes

    def _projected(self) -> set[Port]:
        """Return where what a projection made is read too, and need not be made again."""
        ways = [way for wired in self.wiring.layers for way in wired.heads.values()]
        # In few bits it was rounded; and a reader's hook may have added to it.
        is_wide = self.wiring.model.dtype == self.dtype and not self.own
        return {way.port for way in ways if is_wide and not own_hooks(way.chain[0])}

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
        """Yield the pairs whose runs fit into the budget together."""
        lengths = np.maximum(self.job.pairs.lengths("clean"), self.job.pairs.lengths("corrupt"))
        for indices in batches_of_pairs(self.job):
            most = self._budget // self._bytes_per_run(int(lengths[indices].max()))
            yield from np.array_split(indices, -(-len(indices) // max(1, int(most))))

    @property
    def _budget(self) -> int:
        return budget_bytes(self.wiring.model.device, self.job.budget_gib)

    def _bytes_per_run(self, n_tokens: int) -> int:
        """Bytes of what all layers keep for a backward; with each sender by itself, of all differences too."""
        model, size = self.wiring.model, torch.finfo(self.dtype).bits // 8
        differences = self.wiring.graph.n_senders * model.width * size * n_tokens if self.own else 0
        return max(1, row_cost(model, n_tokens).activations * model.shape.n_layers + differences)


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


def _within(columns: Int[Tensor, "pair column"], tokens: slice) -> Int[Tensor, "pair column"]:
    """Return the places of columns among some tokens; their number where a column is not among them."""
    is_here = (columns >= tokens.start) & (columns < tokens.stop)
    return torch.where(is_here, columns - tokens.start, tokens.stop - tokens.start)
