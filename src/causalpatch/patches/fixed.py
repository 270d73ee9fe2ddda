"""Values that need nothing but the two runs of a pair, or not even these.

=================  ======================================================================================
value              the site's new value
=================  ======================================================================================
``Source``         its value in the source run (clean when denoising, corrupted when noising)
``Identity``       its own value in the base run: measures the noise floor, must change nothing
``Interpolate``    between its value in the base run and that in the source run
``Zero``           zero
``Constant``       a given array
``Function``       any function of its current and its source value
=================  ======================================================================================
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from causalpatch.base.errors import PatchError


@dataclass(frozen=True)
class Source:
    """The value that the site has in the source run, at the aligned positions."""

    def __str__(self) -> str:
        return "source"


@dataclass(frozen=True)
class Identity:
    """The value that the site has in the base run itself: the control that must change nothing."""

    def __str__(self) -> str:
        return "identity"


@dataclass(frozen=True)
class Zero:
    """Zero ablation."""

    def __str__(self) -> str:
        return "zero"


@dataclass(frozen=True)
class Interpolate:
    """A value between the base run's and the source run's: ``base + alpha * (source - base)``.

    Several of them are a dose and its response: how much of the source is needed? With alpha 0 it is ``Identity``, with
    1 it is ``Source``, bit for bit; other patches of the same intervention do not enter.

    Args:
        alpha: Share of the source, any finite number; below 0 and above 1 the value lies outside of the two runs.
    """

    alpha: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "alpha", finite(self.alpha, "the alpha of an interpolation", "Interpolate(0.5)"))

    def __str__(self) -> str:
        return f"interpolation {self.alpha:g}"


@dataclass(frozen=True, eq=False)
class Constant:
    """A given value for every patched element.

    Args:
        array: A number, or an array that broadcasts to the site's value axes (``width``, ``head_width``, …).
    """

    array: np.ndarray | float

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", plain_array(self.array, "a constant patch", "give finite numbers"))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and np.array_equal(self.array, other.array)

    def __hash__(self) -> int:
        return hash(np.asarray(self.array).tobytes())

    def __str__(self) -> str:
        array = np.asarray(self.array)
        return f"constant {array.item():g}" if array.ndim == 0 else f"constant of shape {array.shape}"


@dataclass(frozen=True)
class Function:
    """Any function of the site's current and source values, element by element.

    An element is one token of one run; of a site without positions, one run. How many elements of how many runs the
    function is given at once depends on the engine and on memory, so each must get its value from itself and its
    source alone: ``current * 0.5`` and ``current @ projection`` do, ``current - current.mean(0)`` does not. Two
    elements are tried together and alone, and an unequal result is an error. A function that is random on purpose
    cannot be tried so. It may be used, but no two runs or engines then give the same numbers, also with a seed.

    Args:
        function: Takes ``current`` and ``source``, both ``[element, *value_axes]``, and returns the new value in the
            same shape. ``current`` is the value in the patched run itself, so earlier patches of the same
            intervention are seen.
        name: How the function is called in results; its own name by default. Results are only as reproducible as
            this name says.
        needs_source: Whether a source run is needed at all. If false, ``source`` is ``current``.
    """

    function: Callable[[Tensor, Tensor], Tensor] = field(repr=False)
    name: str = ""
    needs_source: bool = True

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise PatchError(
                f"{self.function!r} is not a function of (current, source)",
                fix="give for instance Function(lambda current, source: (current + source) / 2)",
            )
        if not self.name:
            object.__setattr__(self, "name", getattr(self.function, "__qualname__", "function"))

    def __str__(self) -> str:
        return f"function {self.name}"


def finite(number: float, what: str, fix: str) -> float:
    """Return a number as a float without the sign of zero.

    Raises:
        PatchError: It is NaN or infinite.
    """
    if not math.isfinite(number):
        raise PatchError(f"{what} is {number}", facts=[("needed", "a finite number")], fix=fix)
    return float(number) + 0.0


def plain_array(array: np.ndarray | float, what: str, fix: str) -> np.ndarray:
    """Return a copy of its own in float64 in which -0 is 0, so that equal arrays have equal hashes.

    Raises:
        PatchError: It holds NaN or infinity.
    """
    made = np.asarray(np.array(array, dtype=np.float64) + 0.0)
    if not np.isfinite(made).all():
        raise PatchError(f"{what} holds NaN or infinity", fix=fix)
    return made
