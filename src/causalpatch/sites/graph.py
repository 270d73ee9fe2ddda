"""The graph of a decoder's components: who sends to whom, as arrays, with labels both ways.

Senders, in the order in which they add to the stream: the embedding, then in each layer its heads and its MLP.
Receivers, in the order in which they read it: in each layer the queries, keys and values of its heads and the MLP's
input, at last the logits. Every receiver hears all senders before it, so that its senders are the first ``heard`` ones:

    heard(q, k, v of layer l) = 1 + l (H + 1)
    heard(MLP of layer l)     = the same + H, or in parallel blocks the same
    heard(logits)             = 1 + L (H + 1)

An edge is one sender and one receiver. Keys and values are received head by head of the queries, also where heads
share them: then each head of a group is given a key of its own. A model has up to millions of edges; they are entries
of an array ``[sender, receiver]`` and never objects.

Symbols: L layers, H heads.

References:
    Syed et al. 2023, "Attribution Patching Outperforms Automated Circuit Discovery", 2310.10348; Hanna et al. 2024,
    "Have Faith in Faithfulness", 2403.17806 (the graph and its labels).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from causalpatch.base.errors import PathError

KINDS = ("q", "k", "v")
"""The inputs of a head."""

_SENDER = re.compile(r"(?P<first>embed|input)|a(?P<layer>\d+)\.h(?P<head>\d+)|m(?P<mlp>\d+)")
_RECEIVER = re.compile(r"(?P<last>logits)|a(?P<layer>\d+)\.h(?P<head>\d+)<(?P<kind>[qkv])>|m(?P<mlp>\d+)")
_ARROW = re.compile(r"\s*->\s*")


@dataclass(frozen=True)
class Graph:
    """The components of a model and all edges between them.

    Args:
        n_layers: Number of layers.
        n_heads: Number of query heads in a layer.
        is_parallel: Whether attention and MLP of a layer read the same stream, so that neither hears the other.

    Examples:
        >>> graph = Graph(n_layers=12, n_heads=12)  # GPT-2 small
        >>> graph.n_edges
        32491
        >>> graph.parse("a0.h3 -> a2.h1<q>")
        (4, 75)
        >>> graph.label(4, 75)
        'a0.h3 -> a2.h1<q>'
    """

    n_layers: int
    n_heads: int
    is_parallel: bool = False

    @property
    def n_senders(self) -> int:
        """Number of senders: the embedding, heads and MLPs."""
        return 1 + self.n_layers * (self.n_heads + 1)

    @property
    def n_receivers(self) -> int:
        """Number of receivers: queries, keys and values of heads, MLPs and the logits."""
        return self.n_layers * (3 * self.n_heads + 1) + 1

    def plain(self) -> list[int | bool]:
        """Return what makes it as plain data: ``Graph(*graph.plain())`` is the same."""
        return [self.n_layers, self.n_heads, self.is_parallel]

    @property
    def shape(self) -> tuple[int, int]:
        """Senders and receivers."""
        return self.n_senders, self.n_receivers

    @property
    def n_edges(self) -> int:
        """Number of edges."""
        return int(self.heard.sum())

    @cached_property
    def heard(self) -> np.ndarray:
        """How many senders each receiver hears, ``(receiver,)``: the first so many."""
        before = 1 + np.arange(self.n_layers) * (self.n_heads + 1)
        mlp = before if self.is_parallel else before + self.n_heads
        layers = np.concatenate([np.repeat(before[:, None], 3 * self.n_heads, 1), mlp[:, None]], 1)
        return np.append(layers.reshape(-1), self.n_senders)

    @cached_property
    def exists(self) -> np.ndarray:
        """Which edges there are, booleans ``(sender, receiver)``."""
        found: np.ndarray = np.arange(self.n_senders)[:, None] < self.heard
        return found

    @cached_property
    def edges(self) -> np.ndarray:
        """Numbers of the sender and the receiver of every edge, ``(edge, 2)``, sender by sender."""
        return np.argwhere(self.exists)

    def heads_from(self, layer: int) -> slice:
        """Return the senders that are the heads of a layer."""
        first = 1 + layer * (self.n_heads + 1)
        return slice(first, first + self.n_heads)

    def mlp_from(self, layer: int) -> int:
        """Return the sender that is the MLP of a layer."""
        return (layer + 1) * (self.n_heads + 1)

    def heads_to(self, kind: str, layer: int) -> slice:
        """Return the receivers that are the queries (``"q"``), keys or values of the heads of a layer."""
        first = layer * (3 * self.n_heads + 1) + KINDS.index(kind) * self.n_heads
        return slice(first, first + self.n_heads)

    def mlp_to(self, layer: int) -> int:
        """Return the receiver that is the input of the MLP of a layer."""
        return (layer + 1) * (3 * self.n_heads + 1) - 1

    @property
    def logits(self) -> int:
        """The last receiver."""
        return self.n_receivers - 1

    def receiver_layers(self) -> np.ndarray:
        """Return the layer of each receiver; of the logits the number of layers."""
        return np.arange(self.n_receivers) // (3 * self.n_heads + 1)

    def sender_label(self, sender: int) -> str:
        """Return a sender's name: ``embed``, ``a2.h1`` or ``m3``."""
        if sender == 0:
            return "embed"
        layer, place = divmod(sender - 1, self.n_heads + 1)
        return f"m{layer}" if place == self.n_heads else f"a{layer}.h{place}"

    def receiver_label(self, receiver: int) -> str:
        """Return a receiver's name: ``a2.h1<q>``, ``m3`` or ``logits``."""
        if receiver == self.logits:
            return "logits"
        layer, place = divmod(receiver, 3 * self.n_heads + 1)
        kind, head = divmod(place, self.n_heads)
        return f"m{layer}" if kind == len(KINDS) else f"a{layer}.h{head}<{KINDS[kind]}>"

    @cached_property
    def sender_labels(self) -> list[str]:
        """Names of all senders, in order."""
        return [self.sender_label(number) for number in range(self.n_senders)]

    @cached_property
    def receiver_labels(self) -> list[str]:
        """Names of all receivers, in order."""
        return [self.receiver_label(number) for number in range(self.n_receivers)]

    def label(self, sender: int, receiver: int) -> str:
        """Return an edge's name."""
        return f"{self.sender_label(sender)} -> {self.receiver_label(receiver)}"

    def find_sender(self, text: str) -> int:
        """Return the number of a sender.

        Raises:
            PathError: There is no such sender; ``input`` is understood as ``embed``.
        """
        match = _SENDER.fullmatch(text.strip())
        if match is None:
            raise self._unknown(text, "sender")
        if match["first"]:
            return 0
        layer = self._below(int(match["mlp"] or match["layer"]), self.n_layers, text, "layers")
        if match["mlp"]:
            return self.mlp_from(layer)
        return 1 + layer * (self.n_heads + 1) + self._below(int(match["head"]), self.n_heads, text, "heads")

    def find_receiver(self, text: str) -> int:
        """Return the number of a receiver.

        Raises:
            PathError: There is no such receiver.
        """
        match = _RECEIVER.fullmatch(text.strip())
        if match is None:
            raise self._unknown(text, "receiver")
        if match["last"]:
            return self.logits
        layer = self._below(int(match["mlp"] or match["layer"]), self.n_layers, text, "layers")
        if match["mlp"]:
            return self.mlp_to(layer)
        return self._head_to(layer, match["kind"], self._below(int(match["head"]), self.n_heads, text, "heads"))

    def parse(self, text: str) -> tuple[int, int]:
        """Return the numbers of an edge's sender and receiver.

        Raises:
            PathError: The text names no edge of this graph.
        """
        parts = _ARROW.split(text.strip())
        if len(parts) != 2:
            raise PathError(
                f"{text!r} is not an edge", facts=[("grammar", "SENDER -> RECEIVER")], fix='"a0.h3 -> a2.h1<q>"'
            )
        sender, receiver = self.find_sender(parts[0]), self.find_receiver(parts[1])
        if not self.exists[sender, receiver]:
            raise PathError(
                f"there is no edge '{self.label(sender, receiver)}'",
                facts=[("why", f"'{parts[1].strip()}' reads the stream before '{parts[0].strip()}' adds to it")],
                fix="name a receiver behind the sender",
            )
        return sender, receiver

    def mask(self, edges: Iterable[str | tuple[int, int]] = (), nodes: Iterable[str | int] = ()) -> np.ndarray:
        """Return a mask of some edges, booleans ``(sender, receiver)``.

        Args:
            edges: Edges by name or by numbers.
            nodes: Senders, each with all edges that go out of it.

        Raises:
            PathError: There is no such edge or sender.
        """
        found = np.zeros(self.shape, dtype=bool)
        for edge in edges:
            found[self.parse(edge) if isinstance(edge, str) else self.parse(self.label(*edge))] = True
        for node in nodes:
            number = self.find_sender(node) if isinstance(node, str) else node
            found[number] |= self.exists[number]
        return found

    def check(self, masks: Any) -> np.ndarray:
        """Return masks of edges with an axis of masks in front.

        Args:
            masks: One mask ``(sender, receiver)``, or several ``(mask, sender, receiver)``; an array or a tensor.

        Raises:
            PathError: They have another shape, hold more than 0 and 1, or name edges that there are not.
        """
        held = masks.detach().cpu() if hasattr(masks, "detach") else masks  # no tensors are known here
        given = np.asarray(held.double() if hasattr(held, "detach") else held)
        if given.ndim not in (2, 3) or given.shape[-2:] != self.shape or given.dtype.kind not in "biuf":
            raise PathError(
                f"a mask of edges does not fit: shape {np.shape(masks)}",
                facts=[("needed", f"({self.n_senders}, {self.n_receivers}): senders, receivers")],
                fix="make it by graph.mask([...])",
            )
        found = given.astype(bool).reshape(-1, *self.shape)
        if not np.array_equal(given.reshape(found.shape), found):
            raise PathError(
                "a mask of edges holds more than 0 and 1",
                facts=[("why", "an edge is interchanged or not; there are no shares of one")],
                fix="mask > 0.5",
            )
        wrong = np.argwhere(found & ~self.exists)
        if len(wrong):
            edge = self.label(*map(int, wrong[0][1:]))
            raise PathError(f"a mask names '{edge}', which is no edge", fix="mask & graph.exists")
        return found

    def names(self, numbers: np.ndarray) -> Sequence[str]:
        """Return the names of edges, given as ``(edge, 2)``."""
        senders, receivers = self.sender_labels, self.receiver_labels
        return [f"{senders[sender]} -> {receivers[receiver]}" for sender, receiver in numbers.tolist()]

    def _head_to(self, layer: int, kind: str, head: int) -> int:
        return layer * (3 * self.n_heads + 1) + KINDS.index(kind) * self.n_heads + head

    def _below(self, number: int, count: int, text: str, what: str) -> int:
        if number >= count:
            raise PathError(
                f"there is no {text.strip()!r} in this graph",
                facts=[(what, f"0 to {count - 1}")],
                fix="name one of these",
            )
        return number

    def _unknown(self, text: str, what: str) -> PathError:
        known = {"sender": "embed  a0.h0  m0", "receiver": "a0.h0<q>  a0.h0<k>  a0.h0<v>  m0  logits"}[what]
        return PathError(f"{text!r} is not a {what} of the graph", facts=[("such as", known)], fix="name one of these")


def ends_of(edge: str) -> tuple[str, str]:
    """Return the components at both ends of an edge.

    Examples:
        >>> ends_of("m0 -> a1.h0<v>")
        ('m0', 'a1.h0')
    """
    sender, _, receiver = edge.partition(" -> ")
    return sender, receiver.partition("<")[0]
