"""Values along a direction: steering adds a vector, projection takes a direction out.

Both change the site's current value, so that they see what earlier patches of the same intervention have written.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from causalpatch.base.errors import PatchError
from causalpatch.patches.fixed import finite, plain_array
from causalpatch.patches.sampled import hash_of


@dataclass(frozen=True, eq=False)
class _Along:
    """What both have in common: an array over the site's value axes, compared by content."""

    array: np.ndarray | float = field(repr=False)

    @cached_property
    def hash(self) -> str:
        """Hash of the array: its shape and its numbers."""
        return hash_of(np.asarray(self.array))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, _Along) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[object, ...]:
        return (self.hash,)


@dataclass(frozen=True, eq=False)
class Steer(_Along):
    """Steering: ``current + strength * vector`` at every patched token.

    Args:
        array: The vector, which broadcasts to the site's value axes (``width``, ``head_width``, …).
        strength: By how much it is multiplied; any finite number.

    References:
        Turner et al. 2023, "Activation Addition: Steering Language Models Without Optimization", 2308.10248.
    """

    strength: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "array", plain_array(self.array, "a steering vector", "give finite numbers"))
        strength = finite(self.strength, "the strength of steering", "Steer(vector, strength=1.0)")
        object.__setattr__(self, "strength", strength)

    @property
    def _key(self) -> tuple[object, ...]:
        return (self.hash, self.strength)

    def __str__(self) -> str:
        return f"steering by {self.strength:g} x vector {self.hash[:8]}"


@dataclass(frozen=True, eq=False)
class ProjectOut(_Along):
    """Projection out of a direction: ``current - (current . d) d`` with d the direction at length 1.

    Args:
        array: The direction, of any length but 0; its shape is that of the site's value axes.

    References:
        Arditi et al. 2024, "Refusal in Language Models Is Mediated by a Single Direction", 2406.11717 (directional
        ablation).
    """

    def __post_init__(self) -> None:
        array = plain_array(self.array, "a direction", "give finite numbers")
        if not array.any():
            raise PatchError(
                "a direction of length 0 points nowhere",
                facts=[("direction", f"shape {array.shape}, all zero")],
                fix="give the direction itself, such as a difference of two means",
            )
        object.__setattr__(self, "array", array)

    @property
    def unit(self) -> np.ndarray:
        """The direction at length 1."""
        array = np.asarray(self.array)
        # Scaled first: squares of very small or large numbers would leave float64.
        scaled = array / np.abs(array).max()
        return np.asarray(scaled / np.linalg.norm(scaled))

    def __str__(self) -> str:
        return f"projection out of direction {self.hash[:8]}"
