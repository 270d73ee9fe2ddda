"""Values that were computed beforehand, one for each pair and token."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from causalpatch.base.errors import PatchError
from causalpatch.pairs import Pairs
from causalpatch.patches.sampled import hash_of


@dataclass(frozen=True, eq=False)
class Given:
    """A value of its own for each pair and each of its base prompt's tokens.

    Tokens for which there is none stay as they are in the run. Each pair is known by the hash of its content, so that
    any part of the pairs may be measured with it, in any order. ``Given.of`` makes one of an array per pair.

    Args:
        array: The values, ``(element, *value_axes)``.
        tokens: The base token that each is written at, from 0, ``(element,)``.
        bounds: First element of each pair, and one past the last of all, ``(pair + 1,)``.
        pairs: Hash of each pair's content.
        how: What they are, in words, for results.
        is_from_source: Whether they follow from the source runs, so that a share is one of the gap between the clean
            and the corrupted run.

    Raises:
        PatchError: The parts do not fit together, or there is NaN or infinity among the values.
    """

    array: np.ndarray = field(repr=False)
    tokens: np.ndarray = field(repr=False)
    bounds: np.ndarray = field(repr=False)
    pairs: tuple[str, ...] = field(repr=False)
    how: str = "given values"
    is_from_source: bool = False

    def __post_init__(self) -> None:
        for name in ("tokens", "bounds"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        n_elements = len(self.array)
        is_laid = len(self.bounds) == len(self.pairs) + 1 and self.bounds[0] == 0 and self.bounds[-1] == n_elements
        if not is_laid or len(self.tokens) != n_elements or (np.diff(self.bounds) < 0).any():
            raise PatchError(
                "given values do not fit their pairs and tokens",
                facts=[("values", n_elements), ("tokens", len(self.tokens)), ("pairs", len(self.pairs))],
                fix="Given.of(pairs, arrays), one array over the base prompt's tokens per pair",
            )
        if not np.isfinite(self.array).all():
            raise PatchError("given values hold NaN or infinity", fix="give finite numbers")

    @classmethod
    def of(cls, pairs: Pairs, arrays: Sequence[np.ndarray], how: str = "given values") -> "Given":
        """Make values of an array for each pair.

        Args:
            pairs: The pairs.
            arrays: For each pair values over its base prompt's tokens, ``(token, *value_axes)``; where all numbers of
                a token are NaN it stays as it is.
            how: What they are, in words.

        Raises:
            PatchError: There is not one array for each pair, arrays have different axes, or hold infinity or single
                NaN.

        Examples:
            >>> import causalpatch as cp
            >>> model = cp.open_model("zoo:stories")
            >>> pairs = cp.load_pairs("ioi", model).take(range(2))
            >>> arrays = [np.zeros((len(pair.corrupt), model.head_width)) for pair in pairs]
            >>> cp.Experiment(model, pairs).run([cp.Patch("z.2.1", Given.of(pairs, arrays))]).dims
            ('intervention', 'pair')
        """
        listed = [np.asarray(array) for array in arrays]
        shapes = {array.shape[1:] for array in listed if array.ndim}
        is_alike = len(shapes) == 1 and all(array.ndim for array in listed)
        if len(listed) != len(pairs) or not is_alike:
            n_arrays = f"{len(listed)} arrays are no values for {len(pairs)} pairs"
            raise PatchError(
                "arrays of different axes are no values of one site" if len(listed) == len(pairs) else n_arrays,
                facts=[("shapes", ", ".join(str(array.shape) for array in listed[:4]) or "none")],
                fix="give one array over (token, *value_axes) for each pair",
            )
        kept = [~np.isnan(array.reshape(len(array), -1)).all(1) for array in listed]
        return cls(
            np.concatenate([array[keep] for array, keep in zip(listed, kept, strict=True)]),
            np.concatenate([np.flatnonzero(keep) for keep in kept]),
            np.cumsum([0, *(int(keep.sum()) for keep in kept)]),
            tuple(pair.content_hash for pair in pairs),
            how,
        )

    @cached_property
    def hash(self) -> str:
        """Hash of the values and of what they belong to."""
        return "-".join(map(hash_of, (self.array, self.tokens, self.bounds, np.array(self.pairs))))

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.pairs)}

    def elements(self, pair: str) -> tuple[np.ndarray, int] | None:
        """Return the tokens of a pair that have a value, and the number of the first one's element.

        Args:
            pair: Hash of the pair's content.

        Returns:
            None where there is nothing for the pair.
        """
        number = self._numbers.get(pair)
        if number is None:
            return None
        first = int(self.bounds[number])
        return self.tokens[first : self.bounds[number + 1]], first

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and (self.hash, self.how, self.is_from_source) == (
            other.hash,
            other.how,
            other.is_from_source,
        )

    def __hash__(self) -> int:
        return hash(self.hash)

    def __str__(self) -> str:
        return self.how
