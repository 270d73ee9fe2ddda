"""New values of patched sites, gathered for all rows of a forward at once.

Rows of one forward that patch the same site with the same kind of value are written together: their elements (row,
token) are concatenated, and one gather from the captured run gives the values.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from causalpatch.engine.capture import Captured, in_batch
from causalpatch.engine.changes import apart, called, from_fit, given_at, moved_inside, projected, spread
from causalpatch.engine.drawn import Computed, Donated, Draws, Scattered
from causalpatch.engine.hooks import Write
from causalpatch.engine.means import Means
from causalpatch.engine.resolve import Placement, Target
from causalpatch.models import Columns, Feature, FeatureView, KeyRow, Model, Sum, Tap, View
from causalpatch.pairs import Batch
from causalpatch.patches import (
    Constant,
    Fitted,
    From,
    Function,
    Given,
    Identity,
    Interpolate,
    Mean,
    Noise,
    Optimal,
    ProjectOut,
    Resample,
    Source,
    Steer,
    Zero,
)

AT_ONCE = 8_192
"""Tokens whose values in two runs are compared at once."""


@dataclass(frozen=True, slots=True)
class Row:
    """One run of a forward.

    Args:
        intervention: Index of the intervention.
        pair: Index of the pair.
        local: Index of the pair in its batch.
        targets: What is patched, with where it lies in the pair.
    """

    intervention: int
    pair: int
    local: int
    targets: tuple[tuple[Target, Placement | None], ...]


@dataclass(frozen=True)
class Known:
    """Values that are known before a patched forward.

    Args:
        source: The source runs of the batch of pairs.
        base: The base runs of the batch of pairs.
        means: Fitted means.
        tried: Functions that were seen to give each element its value by itself, or at random, by number.
        groups: The group of each pair in the batch.
        donors: Runs of the prompts that values are resampled from, one for each pair in the batch.
    """

    source: Captured
    base: Captured
    means: Means
    tried: set[int] = field(default_factory=set)
    groups: Sequence[str | None] = ()
    donors: Mapping[Donated, Captured] = field(default_factory=dict)

    @cached_property
    def draws(self) -> Draws:
        """The noise of the batch."""
        return Draws(self.base)

    def groups_of(self, local: np.ndarray) -> list[str | None]:
        """Return the group of each element's pair."""
        return [self.groups[number] for number in local.tolist()] if self.groups else [None] * len(local)


@dataclass(frozen=True)
class _Kind:
    """What targets have in common that are written together.

    Args:
        tap: The tap; of units side by side in one tensor that of the first of them.
        target: The target without its place.
        shared: What units have in common that are written together, else None.
    """

    tap: Tap
    target: Target
    shared: object = None

    @classmethod
    def of(cls, tap: Tap, target: Target) -> "_Kind":
        """Return the kind of a target."""
        bare = Target(target.site, None, None, target.value, None, target.has_position, target.inside)
        is_known = isinstance(target.value, Source | Identity | Interpolate | Zero | Donated | Computed)
        if isinstance(tap.view, Columns | Feature) and is_known and target.has_position:
            return cls(tap, bare, tap.view.kind)
        return cls(tap, bare)

    @property
    def key(self) -> tuple[object, ...]:
        """What must be equal for targets to be written together."""
        if self.shared is not None:
            return (self.tap.port, self.shared, self.target.value, self.target.inside)
        return (self.target,)


@dataclass(frozen=True)
class _Elements:
    """The elements of one write: flat, one entry per (row, token), or per row for sites without positions.

    Args:
        rows: Numbers of the rows.
        local: Their pairs in the batch.
        placement: Base tokens, and the source tokens that they take their value from.
        columns: The place of each element's unit, where units of one tensor are written together.
    """

    rows: np.ndarray
    local: np.ndarray
    placement: Placement | None
    columns: np.ndarray | None = None

    def tap(self, kind: _Kind) -> Tap:
        """Return the tap through which these elements are read and written."""
        view = kind.tap.view
        if self.columns is None or not isinstance(view, Columns | Feature):
            return kind.tap
        return replace(kind.tap, view=view.each(self.columns))

    def where(self, keep: Bool[np.ndarray, " element"]) -> "_Elements":
        """Return some of the elements."""
        place = self.placement
        if place is not None:
            place = Placement(place.base[keep], place.start[keep], place.stop[keep])
        return _Elements(self.rows[keep], self.local[keep], place, None if self.columns is None else self.columns[keep])

    def repeated(self, counts: np.ndarray) -> "_Elements":
        """Return the elements, each as often as its count says."""
        columns = None if self.columns is None else np.repeat(self.columns, counts)
        return _Elements(np.repeat(self.rows, counts), np.repeat(self.local, counts), None, columns)


_Entry = tuple[int, int, Placement | None, Tap]  # number of the row, local pair, where, how
Locate = Callable[[Target, np.ndarray, np.ndarray | None], tuple[np.ndarray, ...]]


def writes_of_rows(model: Model, known: Known, rows: Sequence[Row], batch: Batch) -> list[Write]:
    """Return the writes of one forward over whole prompts, in the order in which they are applied.

    Args:
        model: The model.
        known: Values known beforehand.
        rows: The rows of the forward.
        batch: Their inputs, for the columns in which real tokens stand.
    """
    starts = partial(_starts, model, batch)
    writes = writes_at(
        Taps(model), known, rows, lambda target, at, t: (at,) if t is None else (at, starts(target)[at] + t)
    )
    return [replace(write, tap=in_batch(model, write.tap, batch)) for write in writes]


def _starts(model: Model, batch: Batch, target: Target) -> np.ndarray:
    """Return the first column of each row's prompt, of the stream that a target stands in."""
    return batch.of(model.stream_of(target.site)).start


class Taps:
    """Remembers where and how the targets of a job are read and written.

    Args:
        model: The model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self._known: dict[int, tuple[Target, _Kind]] = {}

    def kind(self, target: Target) -> _Kind:
        """Return how a target is written."""
        known = self._known.get(id(target))
        if known is None:
            # The target is kept with its number, so that no other can take that number.
            known = self._known[id(target)] = (target, _Kind.of(self.model.tap(target.site), target))
        return known[1]


def writes_at(taps: Taps, known: Known, rows: Sequence[Row], locate: Locate) -> list[Write]:
    """Return the writes of one forward, in the order in which they are applied.

    Args:
        taps: Where the targets are written.
        known: Values known beforehand.
        rows: The rows of the forward.
        locate: From a target, row numbers and real tokens to indices over the leading axes of its site's tensor;
            elements whose last index is negative are not written.
    """
    groups: dict[tuple[object, ...], tuple[_Kind, list[_Entry]]] = {}
    for number, row in enumerate(rows):
        ranks: dict[object, dict[object, int]] = {}
        for target, placement in row.targets:
            kind = taps.kind(target)
            tap = kind.tap
            # Writes that overlap are made in order: a unit after itself and after the whole, the whole after all.
            # Ports on one side of a module may be spellings of one tensor, such as output and output[0].
            at_port = ranks.setdefault((tap.port.path, tap.port.side), {})
            unit = None if kind.shared is None else tap.view
            before = [-1, *at_port.values()] if unit is None else [at_port.get(unit, -1), at_port.get(None, -1)]
            rank = at_port[unit] = max(before) + 1
            key = (_turn(tap.view), rank, *kind.key)
            groups.setdefault(key, (kind, []))[1].append((number, row.local, placement, tap))
    ordered = sorted(groups.items(), key=lambda item: item[0][:2])
    writes = [_write(taps.model, known, kind, entries, locate) for _, (kind, entries) in ordered]
    return [write for write in writes if write is not None]


def _turn(view: View) -> int:
    """Return when a site is written among those at one tensor.

    Features are read from what is there when all else is written. The middle of a block is a sum over the tensor, so
    that it comes after the tensor itself.
    """
    is_feature = isinstance(view, FeatureView)
    is_sum = isinstance(view.coded.written if isinstance(view, FeatureView) else view, Sum)
    return 2 * is_sum + is_feature


def unchanged(
    taps: Taps, known: Known, entries: Sequence[tuple[Target, int, Placement]]
) -> list[Bool[np.ndarray, " element"]]:
    """Say which elements would be given the value that they have in the base run already, bit for bit.

    Args:
        taps: Where the targets are read.
        known: The source and base runs; both hold the targets' sites.
        entries: Targets with value ``Source``, the local pair of each, and where it lies.

    Returns:
        For each entry, one answer per element.
    """
    groups: dict[tuple[object, ...], tuple[_Kind, list[int]]] = {}
    for number, (target, _, _) in enumerate(entries):
        kind = taps.kind(target)
        groups.setdefault(kind.key, (kind, []))[1].append(number)
    found: list[np.ndarray] = [np.zeros(0, dtype=bool)] * len(entries)
    for kind, numbers in groups.values():
        read = np.cumsum([int((entries[n][2].stop - entries[n][2].start).sum()) for n in numbers])
        for some in np.split(np.array(numbers), np.flatnonzero(np.diff((read - 1) // AT_ONCE)) + 1):
            answers = _are_same(taps, known, kind, [entries[n] for n in some.tolist()])
            for n, answer in zip(some.tolist(), answers, strict=True):
                found[n] = answer
    return found


def _are_same(
    taps: Taps, known: Known, kind: _Kind, entries: Sequence[tuple[Target, int, Placement]]
) -> Iterator[Bool[np.ndarray, " element"]]:
    elements = _flatten(kind, [(0, local, place, taps.kind(target).tap) for target, local, place in entries])
    source, base = _from_source(known, kind, elements), _gather(known.base, kind, _own(elements))
    # Batches have keys for their longest prompt.
    n_keys = max(source.shape[-1:], base.shape[-1:])
    same = _meeting(kind.tap, source, n_keys) == _meeting(kind.tap, base, n_keys)
    answer = same.reshape(len(same), -1).all(1).cpu().numpy()
    begin = 0
    for _, _, place in entries:
        end = begin + len(place.base)
        yield answer[begin:end]
        begin = end


def _write(model: Model, known: Known, kind: _Kind, entries: Sequence[_Entry], locate: Locate) -> Write | None:
    elements = _flatten(kind, entries)
    if not len(elements.rows):
        return None  # nothing is given for these runs
    places = locate(kind.target, elements.rows, None if elements.placement is None else elements.placement.base)
    is_here = places[-1] >= 0
    if not is_here.all():
        if not is_here.any():
            return None
        elements, places = elements.where(is_here), tuple(place[is_here] for place in places)
    index = tuple(torch.as_tensor(place, device=model.device) for place in places)
    value, inside = _value(known, kind, elements), kind.target.inside
    new = value if inside is None else partial(moved_inside, kind.target, inside, value)
    return Write(elements.tap(kind), index, new)


def _flatten(kind: _Kind, entries: Sequence[_Entry]) -> _Elements:
    counts = np.array([1 if place is None else len(place.base) for _, _, place, _ in entries])
    rows = np.repeat([number for number, _, _, _ in entries], counts)
    local = np.repeat([local for _, local, _, _ in entries], counts)
    if entries[0][2] is None:
        return _Elements(rows, local, None)
    places = [place for _, _, place, _ in entries if place is not None]
    joined = Placement(
        *(np.concatenate([getattr(place, name) for place in places]) for name in ("base", "start", "stop"))
    )
    columns = None
    if kind.shared is not None:
        units = [tap.view for _, _, _, tap in entries]
        columns = np.repeat([unit.place for unit in units if isinstance(unit, Columns | Feature)], counts)
    return _Elements(rows, local, joined, columns)


def _own(elements: _Elements) -> _Elements:
    """Return the elements such that each takes its value from the same token of its own run."""
    place = elements.placement
    return elements if place is None else replace(elements, placement=Placement(place.base, place.base, place.base + 1))


def _value(known: Known, kind: _Kind, elements: _Elements) -> Shaped[Tensor, "element *axes"] | Callable[..., Tensor]:
    """Return the new values of a write, or how they follow from the current ones."""
    target = kind.target
    match target.value:
        case Source():
            return _from_source(known, kind, elements)
        case Identity():
            return _gather(known.base, kind, _own(elements))
        case Interpolate(alpha=alpha):
            own, other = _gather(known.base, kind, _own(elements)), _from_source(known, kind, elements)
            return torch.lerp(own, _meeting(kind.tap, other, own.shape[-1:]), alpha)
        case Donated() as donated:
            return _gather(known.donors[donated], kind, elements)
        case Computed(run=run):
            return _gather(run, kind, elements)
        case Zero():
            return torch.zeros_like
        case Mean() as mean:
            return known.means.at(target.site, mean, elements.placement, known.groups_of(elements.local))
        case Function(function=function, needs_source=needs_source):
            source = _from_source(known, kind, elements) if needs_source else None
            change = partial(called, target, function)

            def new(current: Tensor) -> Tensor:
                given = current if source is None else _meeting(kind.tap, source, current.shape[-1:])
                return apart(known.tried, target, change, current, given)

            return new
        case _:
            return partial(_changed, known, target, elements)


def _changed(known: Known, target: Target, elements: _Elements, current: Tensor) -> Shaped[Tensor, "element *axes"]:
    """Return new values that follow from the current ones, or take their shape."""
    place = elements.placement
    match target.value:
        case Constant(array=array):
            return spread(target, np.asarray(array), current)
        case Steer(array=array, strength=strength):
            return current + strength * spread(target, np.asarray(array), current, "steering vector")
        case ProjectOut() as direction:
            return projected(target, direction, current)
        case Scattered() as noise:
            return current + known.draws.at(noise, elements.local, None if place is None else place.base, current)
        case Fitted() as fitted:
            return from_fit(target, fitted, place, known.groups_of(elements.local), current)
        case Given() as given if place is not None:
            return given_at(target, given, place.start, current)
        case From() | Noise() | Resample() | Optimal() as asked:
            raise AssertionError(f"{asked} was not drawn before the runs: fit_values")
    raise AssertionError(f"no new value is known for {target.value}")


def _from_source(known: Known, kind: _Kind, elements: _Elements) -> Shaped[Tensor, "element *axes"]:
    """Read a site's values of the source runs; of another model through its own weights, as a head's share needs."""
    run = known.source
    kind = kind if run.model is known.base.model else replace(kind, tap=run.model.tap(kind.target.site))
    return _gather(run, kind, elements)


def _gather(run: Captured, kind: _Kind, elements: _Elements) -> Shaped[Tensor, "element *axes"]:
    """Read a site's values of a captured run at the elements, each the mean over its range of tokens."""
    place = elements.placement
    if place is None:
        return run.value(kind.target.site)[torch.as_tensor(elements.local, device=run.model.device)]
    counts = place.stop - place.start
    if (counts == 1).all():
        return run.at(elements.tap(kind), elements.local, place.start)
    ends = np.cumsum(counts)
    steps = np.arange(ends[-1]) - np.repeat(ends - counts, counts)
    every = elements.repeated(counts)
    values = run.at(every.tap(kind), every.local, np.repeat(place.start, counts) + steps)
    return torch.stack([values[end - count : end].mean(0) for end, count in zip(ends, counts, strict=True)])


def _meeting(tap: Tap, value: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return a value over as many keys as another has; of sites without keys the value itself."""
    return tap.view.fit(value, sizes[-1]) if isinstance(tap.view, KeyRow) else value
