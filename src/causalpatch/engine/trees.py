"""Sets of paths as trees: which copy of which component has which value.

Along a path each component in the middle is computed again from its base inputs, in which only what is sent to it along
the path is changed. In a set of paths a component may stand on several of them. It is then computed once for each way
that leads on from it (the *treeified* model), with all that reaches it there:

    a -> q.5.1 -> logits  and  b -> k.5.1 -> logits    one copy of head 5.1, its queries and its keys changed
    a -> q.5.1 -> logits  and  b -> q.5.1 -> mlp_in.6  two copies of head 5.1

``tree_of`` reads a set of paths from the ends. ``Sent`` is a sender with all that reaches it, ``Received`` an input
with all that is sent to it; both are plain data, so that equal parts of many trees are computed once.

References:
    Goldowsky-Dill et al. 2023, "Localizing Model Behavior with Path Patching", 2304.05969, section 3.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from causalpatch.base.errors import PathError
from causalpatch.engine.resolve import Placer, Target
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import Role
from causalpatch.patches import Identity, Source
from causalpatch.patches.patch import Alignment
from causalpatch.sites import Every, Position, Site
from causalpatch.sites.edges import Node, Path, Receiver, expand_receivers

_STREAM = ("resid_pre", "resid_mid", "resid_post")
# Where in a layer a sender joins the stream: its input, attention, MLP, the next layer's input.
_JOINS = {"resid_pre": 0, "attn_out": 1, "head_out": 1, "resid_mid": 1, "mlp_out": 2, "resid_post": 3}


@dataclass(frozen=True)
class Sent:
    """What a component sends.

    Args:
        target: Its site and where; values of the source run where nothing is sent to the component itself.
        inputs: Its changed inputs; none for the first sender of a path.
    """

    target: Target
    inputs: tuple["Received", ...] = ()

    @property
    def site(self) -> Site:
        """The site, without its position."""
        return self.target.site

    @property
    def height(self) -> int:
        """How many receivers stand before it on its longest path."""
        return 1 + max(sender.height for each in self.inputs for sender in each.senders) if self.inputs else 0


@dataclass(frozen=True)
class Received:
    """An input of a component, and what is sent to it.

    Args:
        receiver: The input.
        senders: What is sent to it.
    """

    receiver: Receiver
    senders: tuple[Sent, ...]


def tree_of(
    model: Model, paths: Sequence[Path], column: int | None = None, align: Alignment | None = None
) -> tuple[Received, ...]:
    """Return the last receivers of a set of paths, each with all that reaches it.

    Args:
        model: The model.
        paths: The paths.
        column: The aligned column at which the first senders differ, or None for where they say.
        align: How spans of unequal lengths meet.

    Raises:
        PathError: A sender does not stand before its receiver, a component is both replaced and computed again, or one
            sender holds what another one sends.
        SiteNotFound: The model has no such component.
        SiteUnsupported: The model does not have such a site.
    """
    chains = [chain for path in paths for chain in _explicit(model, path)]
    ends: dict[Receiver, list[tuple[Node, ...]]] = {}
    for chain in dict.fromkeys(chains):
        ends.setdefault(_receiver(chain[-1]), []).append(chain[:-1])
    found = tuple(_received(model, receiver, some, column, align) for receiver, some in ends.items())
    places = [(each.receiver.name, each.receiver.layer, each.receiver.unit) for each in found]
    for each, place in zip(found, places, strict=True):
        if places.count(place) > 1:
            raise PathError(
                f"paths end in '{each.receiver}' and in the same input at other positions",
                facts=[("ends", ", ".join(str(one.receiver) for one in found))],
                fix="let them end in one receiver, such as one with a range of positions",
            )
    return found


def why_not_before(sender: Site, receiver: Receiver, model: Model) -> str | None:
    """Say why nothing that a component sends reaches an input directly, or None where it does.

    Args:
        sender: What is sent.
        receiver: The input.
        model: The model, for its number of layers and whether its blocks are parallel.
    """
    is_parallel = "resid_mid" in model.shape.refused
    if _depth(sender) < _reads(receiver, model.shape.n_layers, is_parallel=is_parallel):
        return None
    if receiver.name == "mlp_in" and is_parallel and sender.layer == receiver.layer:
        return "attention and MLP of a layer read the same stream (parallel blocks)"
    return f"{sender} is added to the stream behind where {receiver} reads it"


class Reach:
    """Finds at which base tokens senders and receivers may differ, whatever the values are; remembers it.

    Args:
        pairs: The pairs.
        base: Which side is the base run's.
    """

    def __init__(self, pairs: Pairs, base: Role) -> None:
        self.placer = Placer(pairs, base)
        self._known: dict[object, list[np.ndarray | None]] = {}

    def received(self, received: Received) -> Sequence[np.ndarray | None]:
        """Return the tokens of each pair at which an input may differ; None where the pair lacks a sender's column.

        Raises:
            PathError: There is none: nothing that is sent reaches the input at the tokens where it receives.
            PairError: A position is outside a prompt, or prompts of unequal length have no alignment.
        """
        key = (received.senders, received.receiver.position)
        if key not in self._known:
            self._known[key] = [self._at_receiver(received, pair) for pair in range(len(self.placer.pairs))]
        return self._known[key]

    def _at_receiver(self, received: Received, pair: int) -> np.ndarray | None:
        known = [part for part in (self._sent(sender)[pair] for sender in received.senders) if part is not None]
        if len(known) < len(received.senders):
            return None
        wanted = own_tokens(received.receiver.position, self.placer, pair)
        for sender, part in zip(received.senders, known, strict=True):
            # A pair none of whose tokens is aligned has nothing to send, which is no mistake.
            if len(part) and not np.isin(part, wanted).any():
                name = self.placer.pairs.name
                raise PathError(
                    f"nothing goes from '{_text(sender)}' to '{received.receiver}' in pair {pair} of '{name}'",
                    facts=[
                        ("sends", f"at tokens {_listed(part)}"),
                        ("receives", f"at tokens {_listed(wanted)}"),
                        ("why", "all else is frozen, so that a change stays at its token"),
                    ],
                    fix="name one position for both, or go through a head's keys and values",
                )
        every = np.unique(np.concatenate(known))
        return every[np.isin(every, wanted)]

    def _sent(self, sent: Sent) -> list[np.ndarray | None]:
        """Return the tokens of each pair at which a sender may differ."""
        if sent not in self._known:
            numbers = range(len(self.placer.pairs))
            if sent.inputs:
                found = [self.received(each) for each in sent.inputs]
                self._known[sent] = [self._at_sender(sent, [some[pair] for some in found], pair) for pair in numbers]
            else:
                places = self.placer.places(sent.target, numbers)
                self._known[sent] = [None if place is None else place.base for place in places]
        return self._known[sent]

    def _at_sender(self, sent: Sent, found: Sequence[np.ndarray | None], pair: int) -> np.ndarray | None:
        parts = [np.zeros(0, dtype=np.int64)]
        for each, tokens in zip(sent.inputs, found, strict=True):
            if tokens is None:
                return None
            is_seen = each.receiver.name in ("k", "v") and len(tokens)  # by all later queries
            n_tokens = len(self.placer.pairs[pair].input(self.placer.base))
            parts.append(np.arange(tokens.min(), n_tokens) if is_seen else tokens)
        every = np.unique(np.concatenate(parts))
        return every[np.isin(every, own_tokens(sent.target.position, self.placer, pair))]


def own_tokens(position: Position | None, placer: Placer, pair: int) -> np.ndarray:
    """Return the base prompt's tokens at a position."""
    if position is None:
        return np.arange(len(placer.pairs[pair].input(placer.base)))
    place = placer.place(Target(Site("embed"), position, None, Identity(), None, has_position=True), pair)
    return np.zeros(0, dtype=np.int64) if place is None else place.base


def _explicit(model: Model, path: Path) -> Iterator[tuple[Node, ...]]:
    """Yield a path with all its senders named: one for each head that a kv_head in the middle serves."""
    choices: list[Sequence[Node]] = []
    nodes = (*path.nodes, None)
    for node, after in itertools.pairwise(nodes):
        if isinstance(node, Site):
            model.tap(node)
            _check_serves(model, choices, node)
            choices.append([node])
            continue
        receiver = _receiver(node)
        expand_receivers(receiver, model.shape)
        choices.append([receiver])
        if isinstance(after, Receiver):
            choices.append(_sends(model, receiver))
    yield from itertools.product(*choices)


def _check_serves(model: Model, before: Sequence[Sequence[Node]], sender: Site) -> None:
    """Make sure that a sender in the middle of a path is a head that the kv_head before it serves."""
    if not before:
        return
    receiver = _receiver(before[-1][0])
    served = _sends(model, receiver)
    if sender.at(None) not in served:
        raise PathError(
            f"'{receiver}' is no input of '{sender}'",
            facts=[("it serves", ", ".join(map(str, served)))],
            fix=f"go on with {served[0]}, or leave the sender out for all of them",
        )


def _sends(model: Model, receiver: Receiver) -> list[Site]:
    """Return what the component of an input sends."""
    if receiver.name == "mlp_in":
        return [Site("mlp_out", receiver.layer)]
    if receiver.name == "q":
        return [Site("head_out", receiver.layer, receiver.unit)]
    group = model.n_heads // model.n_kv_heads
    first = (receiver.unit or 0) * group
    return [Site("head_out", receiver.layer, head) for head in range(first, first + group)]


def _receiver(node: Node | None) -> Receiver:
    if not isinstance(node, Receiver):
        raise AssertionError(f"{node} is no receiver: the path was checked")
    return node


def _received(
    model: Model,
    receiver: Receiver,
    chains: Sequence[tuple[Node, ...]],
    column: int | None,
    align: Alignment | None,
) -> Received:
    groups: dict[Site, list[tuple[Node, ...]]] = {}
    for chain in chains:
        sender = chain[-1]
        if not isinstance(sender, Site):
            raise AssertionError(f"{sender} is no sender: the path was checked")
        why = why_not_before(sender, receiver, model)
        if why is not None:
            raise PathError(
                f"nothing goes from '{sender}' to '{receiver}'",
                facts=[("why", why), ("order", "attention of layer 0, its MLP, attention of layer 1, …")],
                fix="name a sender that stands before its receiver",
            )
        groups.setdefault(sender, []).append(chain)
    senders = [_sent(model, site, some, column, align) for site, some in groups.items()]
    _check_apart(receiver, senders)
    return Received(receiver, tuple(senders))


def _sent(
    model: Model, site: Site, chains: Sequence[tuple[Node, ...]], column: int | None, align: Alignment | None
) -> Sent:
    first = [chain for chain in chains if len(chain) == 1]
    position = None if isinstance(site.position, Every) else site.position
    if len(first) == len(chains):
        return Sent(Target(site.at(None), position, column, Source(), align, has_position=True))
    if first:
        longer = next(chain for chain in chains if len(chain) > 1)
        raise PathError(
            f"'{site}' cannot both begin a path and stand in the middle of another one that goes on alike",
            facts=[("the other", " -> ".join(map(str, longer)))],
            fix="leave one of them out: its source value holds all that reaches it",
        )
    ends: dict[Receiver, list[tuple[Node, ...]]] = {}
    for chain in chains:
        ends.setdefault(_receiver(chain[-2]), []).append(chain[:-2])
    inputs = tuple(_received(model, receiver, some, column, align) for receiver, some in ends.items())
    return Sent(Target(site.at(None), position, None, Source(), None, has_position=True), inputs)


def _check_apart(receiver: Receiver, senders: Sequence[Sent]) -> None:
    """Make sure that no sender holds what another one sends to the same input."""
    for one, other in itertools.permutations(senders, 2):
        is_same = one.site == other.site and bool(one.inputs or other.inputs)
        is_part = one.site.name == "attn_out" and other.site.name == "head_out" and one.site.layer == other.site.layer
        is_stream = one.site.name in _STREAM and one.site != other.site and _depth(other.site) <= _depth(one.site)
        if is_same or is_part or is_stream:
            raise PathError(
                f"'{_text(one)}' and '{_text(other)}' cannot both send to '{receiver}'",
                facts=[
                    ("why", f"{one.site} is changed twice" if is_same else f"{one.site} holds {other.site} already")
                ],
                fix="measure them in runs of their own",
            )


def _depth(sender: Site) -> int:
    """Return where a sender joins the stream: three places in each layer, its input, attention and MLP."""
    return -1 if sender.layer is None else 3 * sender.layer + _JOINS[sender.name]


def _reads(receiver: Receiver, n_layers: int, *, is_parallel: bool) -> int:
    """Return the first place whose changes an input does not read."""
    if receiver.name == "logits":
        return 3 * n_layers + 1
    return 3 * (receiver.layer or 0) + (2 if receiver.name == "mlp_in" and not is_parallel else 1)


def _text(sent: Sent) -> str:
    column = "" if sent.target.column is None else f"@column {sent.target.column}"
    return f"{sent.site.at(sent.target.position)}{column}"


def _listed(tokens: np.ndarray) -> str:
    listed = tokens.tolist()
    return ", ".join(map(str, listed[:8])) + (", …" if len(listed) > 8 else "")
