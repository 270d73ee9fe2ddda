"""New values of patched sites, gathered for all rows of a forward at once.

Rows of one forward that patch the same site with the same kind of value are written together: their elements (row,
token) are concatenated, and one gather from the captured run gives the values.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from causalpatch.base.errors import PatchError
from causalpatch.engine.capture import Captured
from causalpatch.engine.hooks import Write
from causalpatch.engine.means import Means
from causalpatch.engine.memory import is_out_of_memory
from causalpatch.engine.resolve import Placement, Target
from causalpatch.models import Model
from causalpatch.models.views import Sum
from causalpatch.pairs import Batch
from causalpatch.patches import Constant, Function, Identity, Mean, Source, Zero


@dataclass(frozen=True)
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
    """

    source: Captured
    base: Captured
    means: Means


@dataclass(frozen=True)
class _Elements:
    """The elements of one write: flat, one entry per (row, token), or per row for sites without positions."""

    rows: np.ndarray
    local: np.ndarray
    placement: Placement | None


Locate = Callable[[np.ndarray, np.ndarray | None], tuple[np.ndarray, ...]]


def writes_of_rows(model: Model, known: Known, rows: Sequence[Row], batch: Batch) -> list[Write]:
    """Return the writes of one forward over whole prompts, in the order in which they are applied.

    Args:
        model: The model.
        known: Values known beforehand.
        rows: The rows of the forward.
        batch: Their inputs, for the columns in which real tokens stand.
    """

    def locate(rows: np.ndarray, tokens: np.ndarray | None) -> tuple[np.ndarray, ...]:
        return (rows,) if tokens is None else (rows, batch.start[rows] + tokens)

    return writes_at(model, known, rows, locate)


def writes_at(model: Model, known: Known, rows: Sequence[Row], locate: Locate) -> list[Write]:
    """Return the writes of one forward, in the order in which they are applied.

    Args:
        model: The model.
        known: Values known beforehand.
        rows: The rows of the forward.
        locate: From row numbers and real tokens to indices over the leading axes of a site's tensor.
    """
    groups: dict[tuple[int, int, Target], list[tuple[int, Row, Placement | None]]] = {}
    for number, row in enumerate(rows):
        ranks: dict[object, int] = {}
        for target, placement in row.targets:
            tap = model.tap(target.site)
            rank = ranks[tap.port] = ranks.get(tap.port, -1) + 1
            # The middle of a block is a sum over this tensor, so it is written after the tensor itself.
            key = (int(isinstance(tap.view, Sum)), rank, _without_place(target))
            groups.setdefault(key, []).append((number, row, placement))
    return [
        _write(model, known, target, entries, locate) for (_, _, target), entries in sorted(groups.items(), key=_order)
    ]


def _order(item: tuple[tuple[int, int, Target], object]) -> tuple[int, int]:
    return item[0][:2]


def _without_place(target: Target) -> Target:
    return Target(target.site, None, None, target.value, None, target.has_position)


def _write(
    model: Model, known: Known, target: Target, entries: Sequence[tuple[int, Row, Placement | None]], locate: Locate
) -> Write:
    elements = _flatten(entries)
    places = locate(elements.rows, None if elements.placement is None else elements.placement.base)
    index = tuple(torch.as_tensor(place, device=model.device) for place in places)
    return Write(model.tap(target.site), index, _value(known, target, elements))


def _flatten(entries: Sequence[tuple[int, Row, Placement | None]]) -> _Elements:
    counts = [1 if place is None else len(place.base) for _, _, place in entries]
    rows = np.repeat([number for number, _, _ in entries], counts)
    local = np.repeat([row.local for _, row, _ in entries], counts)
    if entries[0][2] is None:
        return _Elements(rows, local, None)
    places = [place for _, _, place in entries if place is not None]
    joined = Placement(
        *(np.concatenate([getattr(place, name) for place in places]) for name in ("base", "start", "stop"))
    )
    return _Elements(rows, local, joined)


def _value(
    known: Known, target: Target, elements: _Elements
) -> Shaped[Tensor, "element *axes"] | Callable[[Tensor], Tensor]:
    """Return the new values of a write, or how they follow from the current ones."""
    match target.value:
        case Source():
            return _gather(known.source, target, elements)
        case Identity():
            place = elements.placement
            own = None if place is None else Placement(place.base, place.base, place.base + 1)
            return _gather(known.base, target, _Elements(elements.rows, elements.local, own))
        case Zero():
            return torch.zeros_like
        case Constant(array=array):
            return lambda current: _broadcast(target, np.asarray(array), current)
        case Mean() as mean:
            return known.means.at(target.site, mean, elements.placement, len(elements.rows))
        case Function(function=function, needs_source=needs_source):
            source = _gather(known.source, target, elements) if needs_source else None
            return lambda current: _call(target, function, current, current if source is None else source)


def _gather(run: Captured, target: Target, elements: _Elements) -> Shaped[Tensor, "element *axes"]:
    """Read a site's values of a captured run at the elements, each the mean over its range of tokens."""
    values = run.value(target.site)
    place = elements.placement
    if place is None:
        return values[torch.as_tensor(elements.local, device=values.device)]
    offset = run.batch.start[elements.local]
    start, stop = offset + place.start, offset + place.stop
    if (stop - start == 1).all():
        index = (torch.as_tensor(elements.local, device=values.device), torch.as_tensor(start, device=values.device))
        return values[index]
    means = [values[row, a:b].mean(0) for row, a, b in zip(elements.local, start, stop, strict=True)]
    return torch.stack(means)


def _broadcast(target: Target, array: np.ndarray, current: Tensor) -> Tensor:
    sizes = tuple(current.shape[1:])
    # Checked by itself: an array with one axis more would fit whenever there are as many elements by chance.
    meets = zip(reversed(array.shape), reversed(sizes), strict=False)
    if array.ndim > len(sizes) or any(n not in (1, size) for n, size in meets):
        raise PatchError(
            f"the constant for '{target.site}' does not fit",
            facts=[("constant", f"shape {array.shape}"), ("site", f"shape {sizes} per token")],
            fix="give a number, or an array over the site's value axes",
        )
    return torch.as_tensor(array, dtype=current.dtype, device=current.device).expand_as(current)


def _call(target: Target, function: Callable[[Tensor, Tensor], Tensor], current: Tensor, source: Tensor) -> Tensor:
    try:
        value = function(current.clone(), source)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise PatchError(
            f"{target.value} for '{target.site}' failed",
            facts=[("given", f"shape {tuple(current.shape)}"), ("error", f"{type(error).__name__}: {error}")],
            fix="call it yourself on two tensors of that shape",
        ) from error
    if not isinstance(value, Tensor) or value.shape != current.shape:
        got = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        raise PatchError(
            f"{target.value} for '{target.site}' did not return the shape it was given",
            facts=[("given", f"shape {tuple(current.shape)}"), ("returned", got)],
            fix="return the new value of every element, such as current * 0.5",
        )
    return value
