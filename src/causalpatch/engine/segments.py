"""Segments: the tokens of one patched run that can differ from the base run, from its first patched token on.

Under causal attention a patch at (layer, position) reaches later positions of later layers alone. So each run, one
intervention on one pair, is a segment of tokens ``start`` to ``stop`` that enters at its first patched layer; ``stop``
is one past the last token that a metric reads. All else is the base run. Segments lie packed side by side in one
tensor of rows, sorted such that those of equal start, stop and prompt are neighbours and attend to the same base keys.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int

from causalpatch.engine.reads import Reads
from causalpatch.engine.resolve import Placement, Target
from causalpatch.engine.values import Row

INPUT, PROJECTION, UP, DOWN = range(4)
"""Where in its first layer a run begins to differ: at the layer's input, behind attention, in front of the activation,
behind it."""
STAGES = (INPUT, PROJECTION, UP, DOWN)

_STAGES = {"z": PROJECTION, "head_out": PROJECTION, "attn_bias": PROJECTION, "attn_out": PROJECTION}
_STAGES |= {
    "resid_mid": PROJECTION,
    "router": UP,
    "mlp_pre": UP,
    "mlp_gate": UP,
    "mlp_post": DOWN,
    "mlp_bias": DOWN,
    "mlp_out": DOWN,
}
_BEHIND = frozenset({"final_norm", "logits"})


@dataclass(frozen=True)
class Entry:
    """Where a target comes in.

    Args:
        layer: Layer that is run first; the number of layers for what stands behind the last.
        stage: Where in that layer.
        depth: The stream into this layer is the first that changes; the number of layers is the final norm's input.
    """

    layer: int
    stage: int
    depth: int


def entry_of(target: Target, layer: int | None, n_layers: int) -> Entry:
    """Return where a target comes in.

    Args:
        target: The target.
        layer: Its layer; for a module the one that it stands in, or None if it stands in front of all.
        n_layers: Number of layers.
    """
    name = target.site.name
    if name in _BEHIND:
        return Entry(n_layers, INPUT, n_layers)
    if layer is None:
        return Entry(0, INPUT, 0)
    if name == "resid_post":
        return Entry(layer + 1, INPUT, layer + 1)
    stage = _STAGES.get(target.anchor or name, INPUT)
    return Entry(layer, stage, layer if stage == INPUT else layer + 1)


@dataclass(frozen=True)
class Segments:
    """Packed segments; every array has one entry per segment, in the order in which they are packed.

    Args:
        rows: The runs, their placements cut down to the tokens that matter.
        start: First token.
        stop: One past the last token.
        kind: What is read of the segment's prompt.
        slot: The prompt in its batch.
        entry: Layer that is run first.
        stage: Where in that layer.
    """

    rows: Sequence[Row]
    start: Int[np.ndarray, " segment"]
    stop: Int[np.ndarray, " segment"]
    kind: Int[np.ndarray, " segment"]
    slot: Int[np.ndarray, " segment"]
    entry: Int[np.ndarray, " segment"]
    stage: Int[np.ndarray, " segment"]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> Int[np.ndarray, " segment"]:
        """Tokens of each segment."""
        lengths: np.ndarray = self.stop - self.start
        return lengths

    @property
    def first_whole(self) -> Int[np.ndarray, " segment"]:
        """First layer that each segment passes whole."""
        layers: np.ndarray = self.entry + (self.stage != INPUT)
        return layers

    def take(self, chosen: np.ndarray) -> "Segments":
        """Return some of the segments, in the order given."""
        arrays = (self.start, self.stop, self.kind, self.slot, self.entry, self.stage)
        return Segments([self.rows[i] for i in chosen.tolist()], *(array[chosen] for array in arrays))


def pack(
    rows: Sequence[Row], entries: Sequence[Sequence[Entry]], slots: Int[np.ndarray, " prompt"], reads: Reads
) -> tuple[Segments, Int[np.ndarray, " segment"]]:
    """Lay runs side by side.

    Args:
        rows: The runs; every one writes at least one token before its stop.
        entries: Where each target of each run comes in.
        slots: The prompt of each local pair.
        reads: What is read of each prompt.

    Returns:
        The segments, and for each of them the index of its run.
    """
    firsts: dict[int, int] = {}  # runs on one pair share their placements
    for place in (place for row in rows for _, place in row.targets if place is not None):
        if id(place) not in firsts:
            firsts[id(place)] = int(place.base.min())
    start = np.array([min(firsts[id(place)] for _, place in row.targets) for row in rows], dtype=np.int64)
    slot = slots[np.array([row.local for row in rows], dtype=np.int64)]
    first = np.array([min((e.layer, e.stage) for e in some) for some in entries], dtype=np.int64).reshape(-1, 2)
    kind = reads.kinds[slot]
    order = np.lexsort((first[:, 1], first[:, 0], slot, kind, start))
    arrays = (start, reads.stops[slot], kind, slot, first[:, 0], first[:, 1])
    return Segments([rows[i] for i in order.tolist()], *(array[order] for array in arrays)), order


@dataclass(frozen=True)
class Group:
    """Neighbouring segments of equal extent, the same number on each of some prompts.

    Args:
        first: Row of the first segment's first token in the layout.
        slots: Prompts, in order.
        count: Segments on each prompt.
        start: First token that differs from the base run; keys before it are the base run's.
        tokens: The tokens of each segment that are rows.
    """

    first: int
    slots: Int[np.ndarray, " prompt"]
    count: int
    start: int
    tokens: Int[np.ndarray, " token"]

    @property
    def n_segments(self) -> int:
        """Number of segments."""
        return len(self.slots) * self.count

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return self.n_segments * len(self.tokens)


@dataclass(frozen=True)
class Layout:
    """Tokens of segments, side by side as the rows of one call.

    Args:
        segments: All segments.
        chosen: Those that have rows here, in packed order.
        owner: For each row the index of its segment among the chosen.
        token: For each row its token.
    """

    segments: Segments
    chosen: Int[np.ndarray, " segment"]
    owner: Int[np.ndarray, " row"]
    token: Int[np.ndarray, " row"]

    @classmethod
    def of(cls, segments: Segments, chosen: Int[np.ndarray, " segment"]) -> "Layout":
        """Lay out every token of some segments."""
        lengths = segments.lengths[chosen]
        owner = np.repeat(np.arange(len(chosen)), lengths)
        first = np.cumsum(lengths) - lengths
        return cls(segments, chosen, owner, np.arange(len(owner)) - (first - segments.start[chosen])[owner])

    def __len__(self) -> int:
        return len(self.token)

    @property
    def slot(self) -> Int[np.ndarray, " row"]:
        """The prompt of each row."""
        slots: np.ndarray = self.segments.slot[self.chosen][self.owner]
        return slots

    def where(self, keep: Bool[np.ndarray, " row"]) -> "Layout":
        """Return the layout of some of the rows; no segment may lose all of its rows."""
        return replace(self, owner=self.owner[keep], token=self.token[keep])

    def find(self, owner: Int[np.ndarray, " element"], token: Int[np.ndarray, " element"]) -> np.ndarray:
        """Return the row of each (segment among the chosen, token); -1 where it is not a row here."""
        width = int(self.token.max(initial=0)) + int(token.max(initial=0)) + 1
        keys, wanted = self.owner * width + self.token, owner * width + token
        place = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
        return np.where(keys[place] == wanted, place, -1)

    def groups(self) -> list[Group]:
        """Return the groups of neighbouring segments."""
        segments, chosen = self.segments, self.chosen
        lengths = np.bincount(self.owner, minlength=len(chosen))
        offset = np.cumsum(lengths) - lengths
        keys = np.stack([segments.start[chosen], segments.kind[chosen], segments.slot[chosen]], 1)
        edges = np.flatnonzero((keys[1:] != keys[:-1]).any(1)) + 1
        firsts = np.r_[0, edges]
        counts = np.diff(np.r_[firsts, len(chosen)])
        # Prompts side by side that have equally many such segments form one group.
        alike = (keys[firsts][1:, :2] == keys[firsts][:-1, :2]).all(1) & (counts[1:] == counts[:-1])
        bounds = np.r_[0, np.flatnonzero(~alike) + 1, len(firsts)]
        found = []
        for begin, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            segment = firsts[begin]
            rows = slice(offset[segment], offset[segment] + lengths[segment])
            slots = keys[firsts[begin:end], 2]
            start = int(keys[segment, 0])
            found.append(Group(int(offset[segment]), slots, int(counts[begin]), start, self.token[rows]))
        return found


def cut(lengths: Int[np.ndarray, " item"], most: int) -> Iterator[slice]:
    """Yield slices of items of at most so many rows together, or of one item; all of about the same size."""
    if not len(lengths):
        return
    ends = np.cumsum(lengths)
    # Even parts: a small rest would run a matrix product at a fraction of its speed.
    even = -(-int(ends[-1]) // -(-int(ends[-1]) // most))
    begin = 0
    while begin < len(lengths):
        done = int(ends[begin - 1]) if begin else 0
        stop = int(np.searchsorted(ends, done + even, side="left")) + 1
        if stop - begin > 1 and int(ends[min(stop, len(ends)) - 1]) - done > most:
            stop -= 1
        stop = min(max(begin + 1, stop), len(lengths))
        yield slice(begin, stop)
        begin = stop


def trim(place: Placement, keep: Bool[np.ndarray, " element"]) -> Placement | None:
    """Return the elements of a placement that are kept, or None if there are none."""
    if not keep.any():
        return None
    return place if keep.all() else Placement(place.base[keep], place.start[keep], place.stop[keep])
