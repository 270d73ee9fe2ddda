"""Views: how the value of a site lies in the tensor that a module receives or returns.

A view reads the value out and writes a new one in. It is pure tensor arithmetic: the engine decides when it runs, and
hands it a private copy of the tensor to write into. Leading axes (``row``, and ``position`` where there is one) are
kept by ``read`` and chosen by ``index`` in ``write``.

Some sites are not stored anywhere and are written by their difference, ``x += value - read(x)``: the stream in the
middle of a block is the sum of two tensors (``Sum``), what one head adds to the stream is one term of a matrix product
(``HeadShare``), and what a sublayer adds may be a multiple of what it returns (``Scaled``). Writing back the value that
was read adds an exact zero.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.nn import functional

Index = tuple[Int[Tensor, " n"], ...]
Companions = tuple[Shaped[Tensor, " row ..."], ...]


@runtime_checkable
class View(Protocol):
    """Reads a site's value out of a tensor and writes one in."""

    def read(self, x: Shaped[Tensor, " row *axes"], companions: Companions) -> Shaped[Tensor, " row *value"]:
        """Return the value of the site.

        Args:
            x: The tensor at the tap's port.
            companions: The tensors at the tap's other ports, in their order.

        Returns:
            The value; axes (row, position where there is one, the site's own axes). It may share memory with ``x``.
        """

    def write(
        self, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index, value: Shaped[Tensor, " n *value"]
    ) -> None:
        """Change ``x`` in place such that the model goes on as if the site were ``value`` at ``index``.

        Args:
            x: The tensor at the tap's port.
            companions: The tensors at the tap's other ports, in their order.
            index: For each indexed leading axis, ``n`` places: rows, or rows and positions.
            value: The new value; axes (n, the leading axes not indexed, the site's own axes).
        """


@dataclass(frozen=True)
class Whole:
    """The tensor itself."""

    def read(self, x: Shaped[Tensor, " row *axes"], companions: Companions) -> Shaped[Tensor, " row *axes"]:
        """Return the tensor."""
        del companions
        return x

    def write(
        self, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index, value: Shaped[Tensor, " n *value"]
    ) -> None:
        """Put the value at the index."""
        del companions
        x[index] = value


class ElementView(ABC):
    """A view that reads elements by themselves, without reading all."""

    @abstractmethod
    def at(self, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index) -> Shaped[Tensor, " n *value"]:
        """Return the value of each element.

        Args:
            x: The tensor at the tap's port.
            companions: The tensors at the tap's other ports.
            index: Places over the leading axes.
        """


@dataclass(frozen=True)
class Columns:
    """One unit's columns of the last axis: a head in q, k, v and z, or a neuron.

    Args:
        start: First column.
        width: Number of columns.
        squeeze: The unit is a single column and its value has no axis of its own.
    """

    start: int
    width: int
    squeeze: bool = False

    def read(self, x: Shaped[Tensor, " row *axes"], companions: Companions) -> Shaped[Tensor, " row *value"]:
        """Return the unit's columns."""
        del companions
        return x.select(-1, self.start) if self.squeeze else x.narrow(-1, self.start, self.width)

    def write(
        self, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index, value: Shaped[Tensor, " n *value"]
    ) -> None:
        """Put the value into the unit's columns at the index."""
        self.read(x, companions)[index] = value

    @property
    def place(self) -> int:
        """First column."""
        return self.start

    @property
    def kind(self) -> object:
        """What units that are read and written together have in common."""
        return (self.width, self.squeeze)

    def each(self, places: np.ndarray) -> "EachColumns":
        """Return the view of another unit for each element."""
        return EachColumns(places, self.width, self.squeeze)


@dataclass(frozen=True, eq=False)
class EachColumns(ElementView):
    """Columns of the last axis, of another unit for each element; its value has no axis where a unit is one column.

    Args:
        starts: First column of each element's unit, ``(element,)``.
        width: Number of columns of a unit.
        squeeze: A unit is a single column and its value has no axis of its own.
    """

    starts: np.ndarray
    width: int
    squeeze: bool = False

    def read(self, x: Shaped[Tensor, " row *axes"], companions: Companions) -> Shaped[Tensor, " row *axes"]:
        """Return the tensor, which holds the columns of all units."""
        del companions
        return x

    def at(self, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index) -> Shaped[Tensor, " n *value"]:
        """Return each element's columns."""
        del companions
        return x[self._places(index)]

    def write(
        self, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index, value: Shaped[Tensor, " n *value"]
    ) -> None:
        """Put the value into each element's columns."""
        del companions
        x[self._places(index)] = value

    def _places(self, index: Index) -> tuple[Int[Tensor, " *places"], ...]:
        starts = torch.as_tensor(self.starts, device=index[0].device)
        if self.squeeze:
            return (*index, starts)
        columns = starts[:, None] + torch.arange(self.width, device=starts.device)
        return (*(place[:, None] for place in index), columns)


@dataclass(frozen=True)
class Scaled:
    """The tensor times a number that the model multiplies it by later; written by its difference.

    Args:
        factor: The number.
    """

    factor: float

    def read(self, x: Float[Tensor, " row *axes"], companions: Companions) -> Float[Tensor, " row *axes"]:
        """Return the product."""
        del companions
        return x * self.factor

    def write(
        self, x: Float[Tensor, " row *axes"], companions: Companions, index: Index, value: Float[Tensor, " n *value"]
    ) -> None:
        """Change the tensor such that the product is the value at the index."""
        del companions
        here = x[index]
        x[index] = here + (value - here * self.factor) / self.factor


@dataclass(frozen=True)
class Sum:
    """The sum of the tensor times the model's ``factor`` and its one companion, written by its difference."""

    factor: float = 1.0

    def read(
        self, x: Float[Tensor, " row *axes"], companions: tuple[Float[Tensor, " row *axes"], ...]
    ) -> Float[Tensor, " row *axes"]:
        """Return the sum."""
        return x * self.factor + companions[0]

    def write(
        self,
        x: Float[Tensor, " row *axes"],
        companions: tuple[Float[Tensor, " row *axes"], ...],
        index: Index,
        value: Float[Tensor, " n *value"],
    ) -> None:
        """Change the tensor such that the sum is the value at the index; the companion stays.

        What is the value already stays bit for bit. Else the rounding of the new sum is taken back once, so that a
        stream that is set to zero is zero, and norms behind it have no rounding to blow up.
        """
        here, other = x[index], companions[0][index]
        left = value - (here * self.factor + other)
        new = (value - other) / self.factor
        again = new + (value - (new * self.factor + other)) / self.factor
        x[index] = torch.where(left == 0, here + left / self.factor, again)


@dataclass(frozen=True, eq=False)
class HeadShare:
    """What one head adds through the output projection: ``z[..., start:start+width] @ weight``, no bias.

    The tensor is the projection's output; the companion is its input, the heads side by side.

    Args:
        weight: The head's rows of the projection; axes (head_width, width).
        start: First column of the head in the companion.
        width: Number of columns of the head, head_width.
    """

    weight: Float[Tensor, " head_width width"]
    start: int
    width: int

    def read(
        self, x: Float[Tensor, " row *lead width"], companions: tuple[Float[Tensor, " row *lead heads"], ...]
    ) -> Float[Tensor, " row *lead width"]:
        """Return the head's term of the projection."""
        del x
        return companions[0].narrow(-1, self.start, self.width) @ self.weight

    def write(
        self,
        x: Float[Tensor, " row *lead width"],
        companions: tuple[Float[Tensor, " row *lead heads"], ...],
        index: Index,
        value: Float[Tensor, " n *value"],
    ) -> None:
        """Replace the head's term in the projection's output at the index."""
        # The term is computed for all rows and then indexed: a product over fewer rows may round differently, and
        # writing back what was read would no longer change nothing.
        x[index] = x[index] + (value - self.read(x, companions)[index])


@dataclass(frozen=True, eq=False)
class BiasTerm:
    """A bias, which a projection adds to its output at each token; written by its difference.

    The tensor is the projection's output.

    Args:
        bias: The bias, or one unit's part of it.
        start: Its first column.
    """

    bias: Float[Tensor, " column"]
    start: int

    def read(self, x: Float[Tensor, " row *axes"], companions: Companions) -> Float[Tensor, " row *value"]:
        """Return the bias, once for each token."""
        del companions
        return self.bias.expand(*x.shape[:-1], len(self.bias))

    def write(
        self, x: Float[Tensor, " row *axes"], companions: Companions, index: Index, value: Float[Tensor, " n *value"]
    ) -> None:
        """Change the output by what the new value differs from the bias at the index."""
        del companions
        part = x.narrow(-1, self.start, len(self.bias))
        part[index] = part[index] + (value - self.bias)


@dataclass(frozen=True, eq=False)
class KeyRow(ElementView):
    """One head's rows of scores or weights, each over the keys of a query.

    The tensor holds ``[row, query_position, head, key_position]`` in the columns of a padded batch; values hold the
    keys in real tokens of each row's prompt, from 0. The companion says which keys the mask lets a query see. What it
    hides reads as ``hidden`` and stays as it is, whatever is written there. Keys beyond the prompt's end are hidden.

    Args:
        head: The head.
        hidden: What a hidden key reads as: minus infinity among scores, 0 among weights.
        starts: The column of each row's first real token; None where prompts begin at the first column.
    """

    head: int
    hidden: float
    starts: Int[np.ndarray, " row"] | None = None

    def read(
        self, x: Float[Tensor, "row query head key"], companions: tuple[Bool[Tensor, "row query one key"], ...]
    ) -> Float[Tensor, "row query key"]:
        """Return the rows of all queries."""
        rows, queries = (place.reshape(-1) for place in torch.meshgrid(*map(torch.arange, x.shape[:2]), indexing="ij"))
        index = (rows.to(x.device), queries.to(x.device))
        return self.at(x, companions, index).reshape(*x.shape[:2], x.shape[-1])

    def at(
        self,
        x: Float[Tensor, "row query head key"],
        companions: tuple[Bool[Tensor, "row query one key"], ...],
        index: Index,
    ) -> Float[Tensor, "n key"]:
        """Return the rows at the index."""
        rows, queries = index
        n_keys = x.shape[-1]
        value = x[rows, queries, self.head].masked_fill(~companions[0][rows, queries, 0], self.hidden)
        columns = torch.arange(n_keys, device=x.device) + self._starts(x)[rows][:, None]
        return value.gather(-1, columns.clamp(max=n_keys - 1)).masked_fill(columns >= n_keys, self.hidden)

    def write(
        self,
        x: Float[Tensor, "row query head key"],
        companions: tuple[Bool[Tensor, "row query one key"], ...],
        index: Index,
        value: Float[Tensor, "n keys"],
    ) -> None:
        """Put rows at the index, over as many keys as there are; hidden keys keep what they have."""
        rows, queries = index
        n_keys = x.shape[-1]
        tokens = torch.arange(n_keys, device=x.device) - self._starts(x)[rows][:, None]
        new = self.fit(value, n_keys).gather(-1, tokens.clamp(min=0))
        is_seen = companions[0][rows, queries, 0] & (tokens >= 0)
        x[rows, queries, self.head] = torch.where(is_seen, new, x[rows, queries, self.head])

    def fit(self, value: Float[Tensor, "*axes key"], n_keys: int) -> Float[Tensor, "*axes keys"]:
        """Return a value over another number of keys: further ones are hidden."""
        more = n_keys - value.shape[-1]
        return functional.pad(value, (0, more), value=self.hidden) if more > 0 else value[..., :n_keys]

    def bound(self, starts: Int[np.ndarray, " row"]) -> "KeyRow":
        """Return the view for a batch whose prompts begin at these columns."""
        return replace(self, starts=starts)

    def _starts(self, x: Float[Tensor, "row *axes"]) -> Int[Tensor, " row"]:
        starts = np.zeros(len(x), dtype=np.int64) if self.starts is None else self.starts
        return torch.as_tensor(starts, device=x.device)


@dataclass(frozen=True)
class ModuleUnit:
    """One entry of one axis of a tensor, such as a channel, or a head where heads have an axis.

    Args:
        axis: The axis, counted in the whole tensor: 1 is the first after the row.
        index: Which entry.
    """

    axis: int
    index: int

    def read(self, x: Shaped[Tensor, " row *axes"], companions: Companions) -> Shaped[Tensor, " row *value"]:
        """Return the entry, without its axis."""
        del companions
        return x.select(self.axis, self.index)

    def write(
        self, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index, value: Shaped[Tensor, " n *value"]
    ) -> None:
        """Put the value into the entry at the index."""
        self.read(x, companions)[index] = value


@dataclass(frozen=True)
class PositionAt:
    """A tensor whose positions are not on its second axis, seen as if they were.

    Args:
        axis: The axis of positions, counted in the whole tensor.
        view: The view of the tensor with positions moved to the second axis.
    """

    axis: int
    view: View

    def read(self, x: Shaped[Tensor, " row *axes"], companions: Companions) -> Shaped[Tensor, " row *value"]:
        """Return the value with positions on its second axis."""
        return self.view.read(x.movedim(self.axis, 1), companions)

    def write(
        self, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index, value: Shaped[Tensor, " n *value"]
    ) -> None:
        """Put the value at the index, whose positions count along the named axis."""
        self.view.write(x.movedim(self.axis, 1), companions, index, value)


def bound(view: View, starts: Int[np.ndarray, " row"]) -> View:
    """Return a view for a padded batch, where its values are counted in real tokens.

    Args:
        view: The view.
        starts: The column of each row's first real token.
    """
    return view.bound(starts) if isinstance(view, KeyRow) else view


def take(
    view: View, x: Shaped[Tensor, " row *axes"], companions: Companions, index: Index
) -> Shaped[Tensor, " n *value"]:
    """Return the value of a site at elements.

    Args:
        view: How the site lies in the tensor.
        x: The tensor at the tap's port.
        companions: The tensors at the tap's other ports.
        index: Places over the leading axes.
    """
    return view.at(x, companions, index) if isinstance(view, ElementView) else view.read(x, companions)[index]
