"""Where a patched site's new value comes from: plain data, computed by the engine.

=============  ==========================================================================================
value          the site's new value
=============  ==========================================================================================
``Source``     its value in the source run (clean when denoising, corrupted when noising)
``Identity``   its own value in the base run: measures the noise floor, must change nothing
``Zero``       zero
``Mean``       its mean over the prompts of one side, pads excluded, summed in float64
``Constant``   a given array
``Function``   any function of its current and its source value
=============  ==========================================================================================
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

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
class Mean:
    """Mean ablation: the site's mean over prompts.

    Args:
        over: ``"pairs"`` keeps positions apart: one mean per real-token position, over the prompts that have it.
            ``"positions"`` takes one mean over all prompts and all their real tokens.
        side: The prompts that the mean is taken over, ``"corrupt"`` or ``"clean"``.

    References:
        Wang et al. 2022, "Interpretability in the Wild", 2211.00593 (mean ablation).
    """

    over: Literal["pairs", "positions"] = "pairs"
    side: Literal["corrupt", "clean"] = "corrupt"

    def __post_init__(self) -> None:
        if self.over not in ("pairs", "positions"):
            raise PatchError(
                f"a mean cannot be taken over {self.over!r}",
                facts=[("known", "pairs, positions")],
                fix='Mean(over="pairs") keeps positions apart',
            )
        if self.side not in ("corrupt", "clean"):
            raise PatchError(
                f"a mean has no side {self.side!r}", facts=[("known", "corrupt, clean")], fix='Mean(side="corrupt")'
            )

    def __str__(self) -> str:
        return f"mean over {self.over} of the {self.side} side"


@dataclass(frozen=True, eq=False)
class Constant:
    """A given value for every patched element.

    Args:
        array: A number, or an array that broadcasts to the site's value axes (``width``, ``head_width``, …).
    """

    array: np.ndarray | float

    def __post_init__(self) -> None:
        # A copy of its own, in which -0 is 0, so that equal constants have equal hashes.
        array = np.array(self.array, dtype=np.float64) + 0.0
        if not np.isfinite(array).all():
            raise PatchError("a constant patch holds NaN or infinity", fix="give finite numbers")
        object.__setattr__(self, "array", array)

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


Value = Source | Identity | Zero | Mean | Constant | Function


def as_value(value: object) -> Value:
    """Accept a value, or its name as text (``"source"``, ``"zero"``, ``"mean"``, ``"identity"``) or a number.

    Raises:
        PatchError: It is none of these.
    """
    if isinstance(value, Source | Identity | Zero | Mean | Constant | Function):
        return value
    named: dict[str, Callable[[], Value]] = {"source": Source, "identity": Identity, "zero": Zero, "mean": Mean}
    if isinstance(value, str) and value in named:
        return named[value]()
    if isinstance(value, int | float | np.ndarray) and not isinstance(value, bool):
        return Constant(value)
    raise PatchError(
        f"{value!r} is not a value to patch in",
        facts=[("known", ", ".join([*named, "a number", "Constant(array)", "Mean(…)", "Function(…)"]))],
        fix='write for example Patch("z.9.6", "zero")',
    )
