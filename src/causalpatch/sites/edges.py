"""Edges and paths: what one component sends, along which way, to what another one receives.

    path      = SENDER '->' RECEIVER ['->' [SENDER '->'] RECEIVER]…
    SENDER    = embed | pos_embed | resid_pre.L | resid_mid.L | resid_post.L | attn_out.L | head_out.L.H | mlp_out.L
    RECEIVER  = q.L.H | k.L.KV | v.L.KV | mlp_in.L | logits

each with ``@POSITION`` if it is not at all tokens. A *sender* is what a component adds to the stream, or the stream
itself. A *receiver* is one input of a component: the stream from which a head's queries, keys or values are projected,
the stream that an MLP's norm reads (``mlp_in``), or the stream behind the last layer (``logits``).

An edge is one sender and one receiver. In a longer path the component that receives sends on: ``q.5.1`` is followed by
``head_out.5.1``, ``mlp_in.4`` by ``mlp_out.4``, and a kv_head by the heads that it serves, unless one is named:
``head_out.3.2 -> k.5.0 -> head_out.5.1 -> logits``.

References:
    Wang et al. 2022, "Interpretability in the Wild", 2211.00593 (path patching); Goldowsky-Dill et al. 2023,
    "Localizing Model Behavior with Path Patching", 2304.05969 (sets of paths).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from causalpatch.base.errors import PathError
from causalpatch.base.suggest import closest
from causalpatch.sites.index import Position
from causalpatch.sites.names import NAMES
from causalpatch.sites.select import ModelShape, expand
from causalpatch.sites.site import Site, SiteSet, parse

SENDERS: Final = (
    *("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post"),
    *("attn_out", "head_out", "mlp_out"),
)
RECEIVERS: Final = ("q", "k", "v", "mlp_in", "logits")
_GRAMMAR = "SENDER -> RECEIVER [-> [SENDER ->] RECEIVER]…"
_RECEIVER = re.compile(r"\s*(?P<name>[a-z_]+)(?P<rest>(?:\..*)?(?:@.*)?)\s*")


@dataclass(frozen=True)
class Receiver:
    """One input of one component.

    Args:
        name: ``"q"``, ``"k"``, ``"v"``, ``"mlp_in"`` or ``"logits"``.
        layer: The layer; None for ``logits``.
        unit: The head of q, the kv_head of k and v, else None.
        position: Where in each prompt it receives; None for all positions.

    Raises:
        PathError: It is no input of a component.
    """

    name: str
    layer: int | None = None
    unit: int | None = None
    position: Position | None = None

    def __post_init__(self) -> None:
        if self.name not in RECEIVERS:
            raise _no_receiver(self.name)
        site = _as_site(self.name, self.layer, self.unit, self.position)
        object.__setattr__(self, "position", site.position)

    @property
    def attends(self) -> bool:
        """Whether it is an input of a head."""
        return self.name in ("q", "k", "v")

    @property
    def written(self) -> Site:
        """What has another value where nothing but this input has: its projection, or the MLP's output.

        The logits' input is the stream behind the last layer, whose number the model knows.
        """
        return _as_site(self.name, self.layer, self.unit, None)

    def __str__(self) -> str:
        indices = "".join(f".{index}" for index in (self.layer, self.unit) if index is not None)
        return f"{self.name}{indices}" + ("" if self.position is None else f"@{self.position}")


Node = Site | Receiver


@dataclass(frozen=True)
class Edge:
    """A sender and a receiver.

    Args:
        sender: What a component adds to the stream, or the stream; a site or its text.
        receiver: An input of a later component, or its text.

    Raises:
        PathError: The sender cannot send, or the receiver cannot receive.

    Examples:
        >>> str(Edge("head_out.3.2", "q.5.1@-1"))
        'head_out.3.2 -> q.5.1@-1'
    """

    sender: Site
    receiver: Receiver

    def __init__(self, sender: Site | str, receiver: Receiver | str) -> None:
        object.__setattr__(self, "sender", _as_sender(sender))
        object.__setattr__(
            self, "receiver", receiver if isinstance(receiver, Receiver) else parse_receiver(str(receiver))
        )

    def __str__(self) -> str:
        return f"{self.sender} -> {self.receiver}"


@dataclass(frozen=True)
class Path:
    """A chain of edges, from one sender to one last receiver.

    Args:
        nodes: The sender, then receivers in order, each with the sender behind it where that is not understood; sites,
            receivers or texts. An ``Edge`` is a path of one edge.

    Raises:
        PathError: The nodes are no chain.

    Examples:
        >>> path = Path(["head_out.3.2", "q.5.1", "mlp_in.6", "logits"])
        >>> str(path)
        'head_out.3.2 -> q.5.1 -> mlp_in.6 -> logits'
        >>> Path.parse(str(path)) == path
        True
    """

    nodes: tuple[Node, ...]

    def __init__(self, nodes: Sequence[Node | str] | Edge) -> None:
        listed = (nodes.sender, nodes.receiver) if isinstance(nodes, Edge) else tuple(map(_as_node, nodes))
        object.__setattr__(self, "nodes", _settled(listed))

    @classmethod
    def parse(cls, text: str) -> "Path":
        """Read a path.

        Raises:
            PathError: The text is no path.
        """
        parts = [part.strip() for part in text.split("->")]
        if len(parts) < 2 or not all(parts):
            raise PathError(
                f"{text!r} is not a path", facts=[("grammar", _GRAMMAR)], fix="write for instance head_out.3.2 -> q.5.1"
            )
        return cls(parts)

    @classmethod
    def of(cls, asked: "Path | Edge | str") -> "Path":
        """Return a path of a path, an edge or a text.

        Raises:
            PathError: It is none of these.
        """
        if isinstance(asked, Path):
            return asked
        if isinstance(asked, str):
            return cls.parse(asked)
        if isinstance(asked, Edge):
            return cls(asked)
        raise PathError(
            f"{repr(asked)[:60]} is not a path",
            facts=[("type", type(asked).__name__)],
            fix='give for instance Path(["head_out.3.2", "q.5.1"]) or "head_out.3.2 -> q.5.1"',
        )

    @property
    def receiver(self) -> Receiver:
        """The last receiver."""
        last = self.nodes[-1]
        if not isinstance(last, Receiver):
            raise AssertionError(f"{self} was checked")
        return last

    def __str__(self) -> str:
        return " -> ".join(map(str, self.nodes))


def parse_receiver(text: str) -> Receiver:
    """Read one receiver.

    Raises:
        PathError: The text names none, or several.
    """
    found = _parsed_receiver(text)
    if not isinstance(found, Site):
        raise PathError(
            f"{text!r} names several receivers", fix="give one number for each layer and head, such as q.5.1"
        )
    return _as_receiver(text, found)


def expand_receivers(text: str | Receiver, shape: ModelShape) -> tuple[Receiver, ...]:
    """Return the receivers that a text names in a model: ``q`` all queries, ``mlp_in.3:`` later MLPs.

    Raises:
        PathError: The text names no receiver.
        SiteNotFound: The model has no such layer or head.
    """
    if isinstance(text, Receiver):
        expand(text.written if text.name != "logits" else Site("logits"), shape)
        return (text,)
    return tuple(_as_receiver(text, site) for site in expand(_parsed_receiver(text), shape))


def expand_senders(text: str | Site | SiteSet, shape: ModelShape) -> tuple[Site, ...]:
    """Return the senders that a text names in a model: ``head_out`` all heads, ``mlp_out.2`` one MLP.

    Raises:
        PathError: What is named cannot send.
        SiteNotFound: The model has no such layer or head.
    """
    wanted = parse(text) if isinstance(text, str) else text
    _check_sender(wanted)
    return expand(wanted, shape)


def _settled(nodes: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return the nodes of a path in their one form, without senders that are understood."""
    problem = None
    if len(nodes) < 2 or not isinstance(nodes[0], Site) or not isinstance(nodes[-1], Receiver):
        problem = "it needs a sender first and a receiver last"
    kept: list[Node] = []
    for before, node in zip((None, *nodes), nodes, strict=False):
        if isinstance(before, Receiver) and before.name == "logits":
            problem = "nothing follows the logits"
        elif isinstance(node, Site) and before is not None:
            if not isinstance(before, Receiver) or not _belongs(node, before):
                problem = problem or f"{before} is no input of the component that sends {node}"
            elif node.position is None and before.name in ("q", "mlp_in"):
                continue
        kept.append(node)
    if problem is not None:
        raise PathError(
            f"'{' -> '.join(map(str, nodes))}' is not a path",
            facts=[("problem", problem), ("grammar", _GRAMMAR)],
            fix="write for instance head_out.3.2 -> q.5.1 -> logits",
        )
    return tuple(kept)


def _belongs(sender: Site, receiver: Receiver) -> bool:
    """Say whether a sender may be the component that a receiver is an input of."""
    if sender.layer != receiver.layer:
        return False
    if receiver.name == "mlp_in":
        return sender.name == "mlp_out"
    return sender.name == "head_out" and (receiver.name != "q" or sender.unit == receiver.unit)


def _as_node(node: Node | str) -> Node:
    if isinstance(node, Receiver):
        return node
    if isinstance(node, Site):
        return _as_receiver(str(node), node) if node.name in RECEIVERS else _as_sender(node)
    name = str(node).strip().partition(".")[0].partition("@")[0]
    return parse_receiver(str(node)) if name in RECEIVERS else _as_sender(str(node))


def _as_sender(sender: Site | str) -> Site:
    found = parse(sender) if isinstance(sender, str) else sender
    _check_sender(found)
    if not isinstance(found, Site):
        raise PathError(
            f"'{sender}' names several senders", fix="give one number for each layer and head, such as head_out.3.2"
        )
    return found


def _check_sender(found: Site | SiteSet) -> None:
    if found.name not in SENDERS or found.stream is not None:
        instead = {"z": "head_out", "mlp_in": "mlp_out"}.get(found.name) or next(
            iter(closest(found.name, SENDERS, 1)), "head_out"
        )
        raise PathError(
            f"'{found}' cannot be a sender",
            facts=[("senders", "  ".join(SENDERS)), ("why", "a sender adds to the stream, or is the stream")],
            fix=f"did you mean {instead}?",
        )


def _parsed_receiver(text: str) -> Site | SiteSet:
    found = _RECEIVER.fullmatch(text)
    if found is None or found["name"] not in RECEIVERS:
        raise _no_receiver(text)
    name = "mlp_out" if found["name"] == "mlp_in" else found["name"]
    return parse(name + found["rest"])


def _as_receiver(text: str, site: Site) -> Receiver:
    name = "mlp_in" if text.strip().startswith("mlp_in") else site.name
    if name not in RECEIVERS:
        raise _no_receiver(text)
    return Receiver(name, site.layer, site.unit, site.position)


def _as_site(name: str, layer: int | None, unit: int | None, position: Position | None) -> Site:
    site_name = "mlp_out" if name == "mlp_in" else name
    return Site(site_name, layer, unit if NAMES[site_name].unit_axis else None, position)


def _no_receiver(text: str) -> PathError:
    name = text.strip().partition(".")[0].partition("@")[0]
    near = {"mlp_out": "mlp_in", "mlp_pre": "mlp_in", "final_norm": "logits", "z": "q"}.get(name) or next(
        iter(closest(name, RECEIVERS, 1)), "q"
    )
    return PathError(
        f"{text!r} cannot receive",
        facts=[("receivers", "q.LAYER.HEAD  k.LAYER.KV_HEAD  v.LAYER.KV_HEAD  mlp_in.LAYER  logits")],
        fix=f"did you mean {near}?",
    )
