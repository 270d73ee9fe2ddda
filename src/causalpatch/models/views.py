"""Views: how the value of a site lies in the tensor that a module receives or returns.

A view reads the value out and writes a new one in. It is pure tensor arithmetic: the engine decides when it runs, and
hands it a private copy of the tensor to write into. Leading axes (``row``, and ``position`` where there is one) are
kept by ``read`` and chosen by ``index`` in ``write``.

Some sites are not stored anywhere and are written by their difference, ``x += value - read(x)``: the stream in the
middle of a block is the sum of two tensors (``Sum``), what one head adds to the stream is one term of a matrix product
(``HeadShare``), and what a sublayer adds may be a multiple of what it returns (``Scaled``). Writing back the value that
was read adds an exact zero.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

Index = tuple[Int[Tensor, " n"], ...]
Companions = tuple[Shaped[Tensor, " row *rest"], ...]


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


@dataclass(frozen=True, eq=False)
class EachColumns:
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

    def at(self, x: Shaped[Tensor, " row *axes"], index: Index) -> Shaped[Tensor, " n *value"]:
        """Return each element's columns."""
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
    """The sum of the tensor, times a number, and its one companion, written by its difference.

    Args:
        factor: The number that the model multiplies the tensor by before it adds it.
    """

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
        """Change the tensor such that the sum is the value at the index; the companion stays."""
        here = x[index]
        x[index] = here + (value - (here * self.factor + companions[0][index])) / self.factor


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


@dataclass(frozen=True)
class ModuleUnit:
    """One entry of one axis of a module's tensor, such as a channel.

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
    return view.at(x, index) if isinstance(view, EachColumns) else view.read(x, companions)[index]
