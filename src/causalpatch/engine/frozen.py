"""What reaches an input directly: rows go through the layers while all else keeps its value of the base run.

Nothing but attention carries a change from one token to another. With attention frozen each token is by itself, and so
are rows: tokens of branches, each branch with its own senders. Layer by layer

1. what is sent there is written into a copy of the base run's stream;
2. for queries, keys and values the layer's module is called on the rows that are read, up to its attention;
3. for the others it is called with its attention, and its MLP unless that is computed again, replaced by what they gave
   in the base run. So norms behind a sublayer, multipliers and the order of a block are the model's own affair.

Nothing is folded or taken for linear: the norm in front of an input sees the whole changed stream.

Symbols: R rows (a token of a branch each).
Cost: for each receiver's layer one norm and projection (or MLP) of the rows; in the layers between additions, and the
MLPs where these are computed again.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from causalpatch.base.errors import EnoughError
from causalpatch.engine.bypass import bypassed
from causalpatch.engine.head import Head
from causalpatch.engine.hooks import Write, hooked
from causalpatch.engine.stack import Place, Stack, StackRun, call_layer
from causalpatch.models import Port
from causalpatch.sites import Site
from causalpatch.sites.edges import Receiver

ROWS = 2_048
"""Rows that go through the layers together; more gain nothing (see ``wavefront``)."""

_EMBEDDED = ("embed", "pos_embed")
_STREAM = ("resid_pre", "resid_post")


@dataclass(frozen=True, eq=False)
class Told:
    """Values of one activation at some tokens of some pairs.

    Args:
        local: The pair of each value in the batch.
        token: Its base token.
        value: The values, ``[element, *value_axes]``.
    """

    local: Int[np.ndarray, " element"]
    token: Int[np.ndarray, " element"]
    value: Shaped[Tensor, "element *axes"]

    def where(self, keep: np.ndarray) -> "Told":
        """Return some of the values, by a mask or by numbers."""
        if keep.dtype == bool and keep.all():
            return self
        at = np.flatnonzero(keep) if keep.dtype == bool else keep
        return Told(self.local[at], self.token[at], self.value[torch.as_tensor(at, device=self.value.device)])


@dataclass(frozen=True, eq=False)
class Branch:
    """Senders, and what they send to.

    Args:
        told: What is sent, by site.
        receivers: Inputs that are wanted with all of it; every sender stands before each of them.
    """

    told: Sequence[tuple[Site, Told]]
    receivers: Sequence[Receiver]

    @property
    def entry(self) -> int:
        """The first layer whose rows differ."""
        return min(_layer(site) for site, _ in self.told)

    def stop(self, n_layers: int) -> int:
        """Return the first layer that is not passed whole."""
        return max(n_layers if each.layer is None else each.layer for each in self.receivers)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Tokens of branches side by side, sorted by branch, pair and token."""

    owner: Int[np.ndarray, " row"]
    local: Int[np.ndarray, " row"]
    token: Int[np.ndarray, " row"]
    keys: Int[np.ndarray, " row"] = field(repr=False)
    sizes: tuple[int, int] = (1, 1)

    @classmethod
    def of(cls, branches: Sequence[Branch]) -> "_Rows":
        """Lay out every token at which something is sent."""
        parts = [(n, told) for n, branch in enumerate(branches) for _, told in branch.told]
        pairs = 1 + max(int(told.local.max(initial=0)) for _, told in parts)
        tokens = 1 + max(int(told.token.max(initial=0)) for _, told in parts)
        keys = np.unique(np.concatenate([(n * pairs + told.local) * tokens + told.token for n, told in parts]))
        return cls(keys // (pairs * tokens), keys // tokens % pairs, keys % tokens, keys, (pairs, tokens))

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, branch: int, told: Told) -> Int[np.ndarray, " element"]:
        """Return the row of each value of a branch."""
        pairs, tokens = self.sizes
        found: np.ndarray = np.searchsorted(self.keys, (branch * pairs + told.local) * tokens + told.token)
        return found


class Frozen:
    """The layers of a model with all but the senders as in the base run.

    Args:
        stack: The layers.
        run: The base run, with the ports of ``kept_ports``.
        slots: The prompt of each pair in the run.
        recompute_mlps: Whether MLPs between sender and receiver are computed from the changed stream.
    """

    def __init__(self, stack: Stack, run: StackRun, slots: Int[np.ndarray, " pair"], *, recompute_mlps: bool) -> None:
        self.stack, self.run, self.slots, self.recompute_mlps = stack, run, slots, recompute_mlps
        self.head = Head(stack, run.returns_tuple)
        self._attend: Callable[..., Tensor] = _unreachable

    def receive(self, branches: Sequence[Branch]) -> Iterator[tuple[int, Receiver, Told]]:
        """Compute what every receiver of every branch has then.

        Args:
            branches: The branches; each has something to send.

        Yields:
            The number of the branch, the receiver, and its value at every token at which something is sent: what its
            projection, or its MLP, gives then; for the logits the stream behind the last layer.
        """
        sizes = [sum(len(told.token) for _, told in branch.told) for branch in branches]
        begin = 0
        while begin < len(branches):
            stop, n_rows = begin + 1, sizes[begin]
            while stop < len(branches) and n_rows + sizes[stop] <= ROWS:
                n_rows += sizes[stop]
                stop += 1
            with self.stack.running(self._dispatch):
                found = list(self._pass(branches[begin:stop]))
            yield from ((begin + number, receiver, told) for number, receiver, told in found)
            begin = stop

    def replay(self, rows: Float[Tensor, "row width"], place: Place, layer: int) -> dict[str, Tensor]:
        """Return what one layer makes of rows of the base run, for a look at whether it is what that run has.

        Args:
            rows: The base run's stream into the layer.
            place: Where each row belongs.
            layer: The layer.

        Returns:
            The stream out of the layer with its MLP frozen and with its MLP computed, and the queries.
        """
        nothing = np.zeros(len(rows), dtype=np.int64)
        laid = _Rows(nothing, nothing, nothing, nothing)
        with self.stack.running(self._dispatch):
            out = {
                name: self._between(layer, rows, place, (laid, ()), is_free=is_free, keep=())[0]
                for name, is_free in (("frozen", False), ("computed", True))
            }
            site = Site("q", layer, 0)
            return {**out, "q": self._projected(layer, rows, place, [site])[site]}

    def attended(self, layer: int, hidden: Float[Tensor, "row width"], place: Place) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values that attention would see of rows, ``[head, row, head_width]``.

        Args:
            layer: The layer.
            hidden: The stream into it.
            place: Where each row belongs.
        """
        found: list[Tensor] = []

        def see(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *more: Any) -> Tensor:
            found.extend((query[0], key[0], value[0]))
            raise EnoughError

        self._attend = see
        with self.stack.running(self._dispatch), suppress(EnoughError):
            call_layer(self.stack, self.run, layer, hidden, place, is_partial=True)
        query, key, value = found
        return query, key, value

    def added_by_mlp(self, layer: int, hidden: Float[Tensor, "row width"], place: Place) -> Float[Tensor, "row width"]:
        """Return what a layer's MLP would add to rows, attention giving what it did.

        Args:
            layer: The layer.
            hidden: The stream into it.
            place: Where each row belongs.
        """
        nothing, site = np.zeros(len(hidden), dtype=np.int64), Site("mlp_out", layer)
        laid = _Rows(nothing, nothing, nothing, nothing)
        with self.stack.running(self._dispatch):
            return self._between(layer, hidden, place, (laid, ()), is_free=True, keep=[site])[1][site]

    def _pass(self, branches: Sequence[Branch]) -> Iterator[tuple[int, Receiver, Told]]:
        """Take branches through the layers together."""
        rows, n_layers = _Rows.of(branches), self.stack.n_layers
        entry = np.array([branch.entry for branch in branches])[rows.owner]
        last = np.array([branch.stop(n_layers) for branch in branches])[rows.owner]
        hidden = self.run.inputs[0].new_empty(len(rows), self.run.inputs[0].shape[-1])
        reading: dict[int, list[tuple[int, Receiver]]] = {}
        for number, branch in enumerate(branches):
            for each in branch.receivers:
                reading.setdefault(n_layers if each.layer is None else each.layer, []).append((number, each))
        for layer in range(int(entry.min()), int(last.max()) + 1):
            here = np.flatnonzero(entry == layer)
            if len(here):
                hidden[self._index(here)] = self._place(rows, here).rows_of(self.run.inputs[layer])
            self._enter(layer, hidden, rows, branches)
            if reading.get(layer):
                yield from self._read(layer, hidden, rows, branches, reading[layer])
            going = np.flatnonzero((entry <= layer) & (last > layer))
            if len(going):
                index = self._index(going)
                place = self._place(rows, going)
                told = (_some(rows, going), branches)
                is_free = self.recompute_mlps
                hidden[index], _ = self._between(layer, hidden[index], place, told, is_free=is_free, keep=())

    def _enter(self, layer: int, hidden: Tensor, rows: _Rows, branches: Sequence[Branch]) -> None:
        """Write what is sent by embeddings, or as the stream itself, into the stream into a layer."""
        for number, branch in enumerate(branches):
            embedded = [
                (site, told) for site, told in branch.told if layer == 0 and site.name in _EMBEDDED and len(told.token)
            ]
            if embedded:
                self._embed(hidden, rows, number, embedded)
            for site, told in branch.told:
                if site.name in _STREAM and _layer(site) == layer:
                    hidden[self._index(rows.find(number, told))] = told.value

    def _embed(self, hidden: Tensor, rows: _Rows, number: int, told: Sequence[tuple[Site, Told]]) -> None:
        own = np.flatnonzero(rows.owner == number)
        batch, slot, token = self.run.batch, self.slots[rows.local[own]], rows.token[own]
        writes = [
            self._write(site, (self._index(np.searchsorted(own, rows.find(number, each)))), each.value, is_first=True)
            for site, each in told
        ]
        ids = batch.ids[slot, token], batch.position_ids[slot, token]
        hidden[self._index(own)] = self.head.embed(ids, writes)

    def _read(
        self,
        layer: int,
        hidden: Tensor,
        rows: _Rows,
        branches: Sequence[Branch],
        wanted: Sequence[tuple[int, Receiver]],
    ) -> Iterator[tuple[int, Receiver, Told]]:
        """Yield what the receivers of a layer, or behind all of them, have."""
        for attends in (True, False):
            some = [(number, each) for number, each in wanted if each.attends is attends]
            if not some:
                continue
            chosen = np.flatnonzero(np.isin(rows.owner, [number for number, _ in some]))
            index, place = self._index(chosen), self._place(rows, chosen)
            sites = list(dict.fromkeys(each.written for _, each in some))
            if layer == self.stack.n_layers:
                values = dict.fromkeys(sites, hidden[index])
            elif attends:
                values = self._projected(layer, hidden[index], place, sites)
            else:
                told = (_some(rows, chosen), branches)
                _, values = self._between(layer, hidden[index], place, told, is_free=True, keep=sites)
            owner, local, token = rows.owner[chosen], rows.local[chosen], rows.token[chosen]
            for number, receiver in some:
                own = slice(*np.searchsorted(owner, [number, number + 1]).tolist())
                yield number, receiver, Told(local[own], token[own], values[receiver.written][own])

    def _projected(self, layer: int, hidden: Tensor, place: Place, sites: Sequence[Site]) -> dict[Site, Tensor]:
        """Return queries, keys and values of rows; the layer's module runs up to its attention."""
        taps = {site: self.stack.model.tap(site) for site in sites}
        self._attend = _stop
        with hooked(self.stack.model, keep={tap.port for tap in taps.values()}) as kept, suppress(EnoughError):
            call_layer(self.stack, self.run, layer, hidden, place, is_partial=True)
        return {site: tap.view.read(kept[tap.port], ())[0] for site, tap in taps.items()}

    def _between(
        self,
        layer: int,
        hidden: Tensor,
        place: Place,
        told: tuple[_Rows, Sequence[Branch]],
        *,
        is_free: bool,
        keep: Sequence[Site],
    ) -> tuple[Tensor, dict[Site, Tensor]]:
        """Call a layer on rows with its attention frozen, and its MLP unless it is free; write what is sent there.

        Args:
            layer: The layer.
            hidden: The stream into it, ``[row, width]``.
            place: Where each row belongs.
            told: The rows, and the branches that they are of.
            is_free: Whether the MLP is computed.
            keep: Sites of the layer whose values are wanted.

        Returns:
            The stream out of the layer, and the values of the sites.
        """
        writes = self._writes(layer, *told)
        taps = {site: self.stack.model.tap(site) for site in keep}
        block, model = self.stack.blocks[layer], self.stack.model.module
        self._attend = _unreachable
        with ExitStack() as around:
            giving = partial(self._giving, around)
            if any(write.tap.site.name == "head_out" for write in writes):
                # A head's share is changed in the projection, so that what is behind it sees the change.
                giving(block.attention, lambda: model.get_submodule(block.z.path)(self._known(block.z, place)))
            else:
                giving(block.attention, lambda: self._known(Port(block.attention, "output"), place))
            if not is_free:
                mlp = mlp_port(self.stack, layer)
                known = self._known(mlp, place)
                giving(mlp.path, lambda: known if mlp.like is None else known.flatten(0, 1))
            ports = {tap.port for tap in taps.values()}
            kept = around.enter_context(hooked(self.stack.model, writes, ports))
            out = call_layer(self.stack, self.run, layer, hidden, place, is_partial=True)
        return out, {site: tap.view.read(kept[tap.port], ())[0] for site, tap in taps.items()}

    def _writes(self, layer: int, rows: _Rows, branches: Sequence[Branch]) -> list[Write]:
        """Return what is sent from within a layer, for the rows of a call."""
        found: dict[Site, list[tuple[np.ndarray, Tensor]]] = {}
        present = set(np.unique(rows.owner).tolist()) if branches else set()
        for number in sorted(present):
            for site, told in branches[number].told:
                is_inside = site.name not in (*_EMBEDDED, *_STREAM) and site.layer == layer
                if is_inside and len(told.token):
                    found.setdefault(site, []).append((rows.find(number, told), told.value))
        return [
            self._write(
                site,
                self._index(np.concatenate([at for at, _ in parts])),
                torch.cat([value for _, value in parts]),
                is_first=False,
            )
            for site, parts in sorted(found.items(), key=lambda item: item[0].name == "resid_mid")
        ]

    def _write(self, site: Site, rows: Int[Tensor, " element"], value: Tensor, *, is_first: bool) -> Write:
        """Return a write into rows, which are on the first or on the second axis of a call's tensors."""
        zeros = torch.zeros_like(rows)
        return Write(self.stack.model.tap(site), (rows, zeros) if is_first else (zeros, rows), value)

    def _giving(self, modules: ExitStack, path: str, make: Callable[[], Tensor]) -> None:
        """Let a module give something else in the calls to come."""
        is_tuple = self.run.returns_tuple.get(path, False)

        def forward(*args: Any, **kwargs: Any) -> Any:
            return (make(), None) if is_tuple else make()

        modules.enter_context(bypassed(self.stack.model.module.get_submodule(path), forward))

    def _known(self, port: Port, place: Place) -> Tensor:
        """Return what the base run has at a port."""
        return place.rows_of(self.run.kept[port])[None]

    def _place(self, rows: _Rows, chosen: np.ndarray) -> Place:
        return Place.of(self.slots[rows.local[chosen]], rows.token[chosen], self.stack.model.device)

    def _index(self, at: np.ndarray) -> Int[Tensor, " index"]:
        return torch.as_tensor(at, device=self.stack.model.device)

    def _dispatch(self, *args: Any) -> Tensor:
        return self._attend(*args)


def mlp_port(stack: Stack, layer: int) -> Port:
    """Return where an MLP is frozen: at its module, or at its last projection where it has no module of its own."""
    block = stack.blocks[layer]
    return Port(block.mlp, "output") if block.mlp != block.path else stack.model.tap(Site("mlp_out", layer)).port


def kept_ports(stack: Stack, layers: Sequence[int], with_heads: Sequence[int]) -> list[Port]:
    """Return what has to be known of the base run to freeze some layers.

    Args:
        stack: The layers.
        layers: Layers whose attention and MLP are frozen.
        with_heads: Layers with a head that sends.
    """
    attention = [Port(stack.blocks[layer].attention, "output") for layer in layers]
    mlps = [mlp_port(stack, layer) for layer in layers]
    return [*attention, *mlps, *(stack.blocks[layer].z for layer in with_heads)]


def _some(rows: _Rows, chosen: np.ndarray) -> _Rows:
    return _Rows(rows.owner[chosen], rows.local[chosen], rows.token[chosen], rows.keys[chosen], rows.sizes)


def _layer(site: Site) -> int:
    """Return the layer at which a sender's rows begin to differ."""
    return (site.layer or 0) + (site.name == "resid_post")


def _stop(*_: Any) -> Tensor:
    raise EnoughError


def _unreachable(*_: Any) -> Tensor:
    raise AssertionError("attention ran though it is frozen")
