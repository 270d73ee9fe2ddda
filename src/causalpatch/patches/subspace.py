"""Values inside a linear subspace: the rest of the site stays as it is.

``new = current + P (value - current)`` with P the orthogonal projection on the subspace and value what another value
puts in, the source's by default: the part of the site inside the subspace is replaced, the part outside is kept.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from causalpatch.base.errors import PatchError
from causalpatch.patches.direction import ProjectOut, Steer
from causalpatch.patches.elsewhere import From
from causalpatch.patches.fixed import Constant, Function, Identity, Interpolate, Source, Zero, plain_array
from causalpatch.patches.given import Given
from causalpatch.patches.sampled import Fitted, FittedOn, Mean, Noise, Optimal, Resample, hash_of

Whole = (
    Source
    | Identity
    | Interpolate
    | Zero
    | Constant
    | Function
    | Mean
    | Resample
    | Noise
    | Optimal
    | Fitted
    | Given
    | From
    | Steer
    | ProjectOut
)
"""Values of a whole site; any of them can be put into a subspace of it."""

_ALIKE = 1e-6
"""Directions of length 1 of which a combination is this short span fewer dimensions than they are."""
_ROUNDING = 1e-12
"""Products of orthonormal directions may be off by so much; such a basis is kept to the last bit."""


@dataclass(frozen=True, eq=False)
class Subspace:
    """A value that is put in only inside a subspace: ``current + P (value - current)``.

    Args:
        basis: Directions that span the subspace, axes (dimension, the site's value axes), of any lengths and angles;
            one direction may come without its first axis. They are made orthonormal (QR in float64). For all units of
            a layer together, such as ``mlp_post.3`` or ``z.3``, the axis of units comes before the value axes.
        of: The value whose part inside the subspace is put in: the source's by default, ``Zero()`` takes the subspace
            out, ``Mean()`` sets it to its mean.
        on: The pairs that the subspace was learnt on, if it was.

    Raises:
        PatchError: The directions are not finite or not independent, or there are none; or a value inside a subspace is
            put into another.

    References:
        Geiger et al. 2023, "Finding Alignments Between Interpretable Causal Variables and Distributed Neural
        Representations", 2303.02536 (distributed interchange).
    """

    basis: np.ndarray = field(repr=False)
    of: Whole = field(default_factory=Source)
    on: FittedOn | None = None

    def __post_init__(self) -> None:
        array = plain_array(self.basis, "the basis of a subspace", "give finite numbers")
        if array.ndim == 1:
            array = array[None]
        if array.ndim == 0 or not array.size:
            raise PatchError(
                "a subspace needs a basis",
                facts=[("basis", f"shape {array.shape}"), ("needed", "(dimension, the site's value axes)")],
                fix="Subspace(direction), or Subspace(numpy.stack([one, other]))",
            )
        rows = _orthonormal(array.reshape(len(array), -1)).reshape(array.shape)
        object.__setattr__(self, "basis", rows)

    @property
    def dimension(self) -> int:
        """How many dimensions the subspace has."""
        return len(self.basis)

    @cached_property
    def rows(self) -> np.ndarray:
        """The basis with all value axes in one, ``(dimension, width)``; its rows are orthonormal."""
        rows: np.ndarray = self.basis.reshape(len(self.basis), -1)
        return rows

    @cached_property
    def hash(self) -> str:
        """Hash of the orthonormal basis: its shape and its numbers."""
        return hash_of(self.basis)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Subspace) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return (self.hash, self.of, self.on)

    def __str__(self) -> str:
        return self.describe(self.of)

    def describe(self, value: object) -> str:
        """Return in words what putting a value into this subspace is."""
        learnt = f" learnt on {self.on.name!r}" if self.on else ""
        return f"{value} inside subspace {self.hash[:8]} of dimension {self.dimension}{learnt}"


def _orthonormal(rows: np.ndarray) -> np.ndarray:
    """Return an orthonormal basis of what some directions span; one that is orthonormal already as it is.

    Args:
        rows: The directions, (dimension, width).
    """
    n, width = rows.shape
    if n <= width and np.abs(rows @ rows.T - np.eye(n)).max() <= _ROUNDING:
        return rows.copy()
    # Scaled first: squares of very small or large numbers would leave float64.
    largest = np.abs(rows).max(axis=1, keepdims=True)
    scaled = np.divide(rows, largest, out=np.zeros_like(rows), where=largest > 0)
    lengths = np.linalg.norm(scaled, axis=1, keepdims=True)
    scaled = np.divide(scaled, lengths, out=scaled, where=lengths > 0)
    rank = int((np.linalg.svd(scaled, compute_uv=False) > _ALIKE).sum())
    if rank < n:
        raise PatchError(
            f"{n} directions span {rank} dimensions" if rank else "a direction of length 0 spans no subspace",
            facts=[("basis", f"{n} directions of {width} numbers"), ("needed", "independent directions")],
            fix="leave out those that the others give, or take fewer: numpy.linalg.svd(basis)[2][:rank]",
        )
    made, upper = np.linalg.qr(scaled.T)
    # Each direction keeps its sign, so that one direction stays what it was.
    return np.ascontiguousarray((made * np.sign(np.diag(upper))).T)
