"""One pair: a clean and a corrupted input that belong together, with their answers; plain data."""

import dataclasses
import hashlib
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError
from causalpatch.base.spec import to_json
from causalpatch.pairs.role import Role, as_role

Array: TypeAlias = NDArray[Any]
Answers: TypeAlias = tuple[tuple[int, ...], ...]
TokenRange: TypeAlias = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Pair:
    """One clean and one corrupted input that belong together.

    Args:
        clean: Token ids, axis (position), special ones included; or any array of numbers.
        corrupt: The same for the corrupted input.
        answer: The set of right answers to the clean input, each of one or more token ids (or one class); empty where
            there is none.
        wrong_answer: The set of answers that the corrupted input suggests.
        id: Name of the pair, unique among those it was read with.
        group: What else ties pairs together, such as the person who wrote them; None where nothing does.
        split: The split that the file puts the pair in.
        spans: Name to half-open ranges of tokens, (clean, corrupted).
        entities: Names that the pair speaks of; pairs that share one are not independent.
        clean_text: The text that ``clean`` was read from.
        corrupt_text: The text that ``corrupt`` was read from.
        extra: Other columns, as they were.
        encoder: For a model with an encoder and a decoder what the encoder is given, with its spans and texts; what
            stands above is then the decoder's.
    """

    clean: Array
    corrupt: Array
    answer: Answers = ()
    wrong_answer: Answers = ()
    id: str = ""
    group: str | None = None
    split: str | None = None
    spans: Mapping[str, tuple[TokenRange, TokenRange]] = field(default_factory=dict)
    entities: tuple[str, ...] = ()
    clean_text: str | None = None
    corrupt_text: str | None = None
    extra: Mapping[str, object] = field(default_factory=dict)
    encoder: "Pair | None" = None

    def __post_init__(self) -> None:
        for role in ("clean", "corrupt"):
            array = np.array(getattr(self, role))
            array.setflags(write=False)
            object.__setattr__(self, role, array)

    def input(self, role: Role) -> Array:
        """Return the clean or the corrupted input."""
        return self.clean if as_role(role) == "clean" else self.corrupt

    def text(self, role: Role) -> str | None:
        """Return the text of the clean or the corrupted input, where there is one."""
        return self.clean_text if as_role(role) == "clean" else self.corrupt_text

    def swapped(self) -> "Pair":
        """Return the pair with its inputs exchanged, and with them texts and spans; answers stay."""
        return dataclasses.replace(
            self,
            clean=self.corrupt,
            corrupt=self.clean,
            clean_text=self.corrupt_text,
            corrupt_text=self.clean_text,
            spans={name: (corrupt, clean) for name, (clean, corrupt) in self.spans.items()},
            encoder=self.encoder and self.encoder.swapped(),
        )

    def one_sided(self, role: Role) -> "Pair":
        """Return the pair with one input, its text and its spans on both sides; answers stay."""
        whole, side = self.input(role), int(as_role(role) == "corrupt")
        spans = {name: (both[side], both[side]) for name, both in self.spans.items()}
        text, encoder = self.text(role), self.encoder and self.encoder.one_sided(role)
        made = dataclasses.replace(self, clean=whole, corrupt=whole, clean_text=text, corrupt_text=text, spans=spans)
        return dataclasses.replace(made, encoder=encoder)

    @cached_property
    def digests(self) -> tuple[str, str]:
        """Hashes of the clean and of the corrupted input, with the encoder's: type, shape and content."""
        own = (digest(self.clean), digest(self.corrupt))
        if self.encoder is None:
            return own
        clean, corrupt = (_joined(*both) for both in zip(self.encoder.digests, own, strict=True))
        return clean, corrupt

    @cached_property
    def content_hash(self) -> str:
        """Hash of everything that a measurement could depend on: all but the texts and extra columns."""
        plain = [self.id, self.answer, self.wrong_answer, self.group, self.split, self.spans, self.entities]
        plain += [] if self.encoder is None else [self.encoder.spans]
        return hashlib.sha256(to_json([*self.digests, *plain]).encode()).hexdigest()[:16]


def _joined(*digests: str) -> str:
    return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:32]


def digest(array: Array) -> str:
    """Return a hash of an array's type, shape and content."""
    head = f"{array.dtype.str}{array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()[:32]


def as_numbers(value: Any) -> Array:
    """Return an array, tensor or nested list as an array of numbers.

    Raises:
        PairError: It does not hold numbers, or its rows are not equally long.
    """
    if hasattr(value, "detach"):  # a tensor, without importing torch
        value = value.detach().cpu()
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise PairError(
            "an input cannot be read as an array", facts=[("problem", error)], fix="give rows of equal length"
        ) from error
    if array.dtype.kind not in "biuf":
        raise PairError(
            "an input holds something other than numbers", facts=[("value", repr(value)[:60])], fix="give numbers"
        )
    return array


def pairs_of_arrays(
    clean: Sequence[Any],
    corrupt: Sequence[Any],
    answers: tuple[Sequence[int] | None, Sequence[int] | None],
    group: Sequence[str] | None,
) -> list[Pair]:
    """Return pairs of inputs that are no text.

    Args:
        clean: Clean inputs, axes (pair, …).
        corrupt: Corrupted inputs, as many.
        answers: The right class of each clean input, and the class of each corrupted one.
        group: What ties pairs together.
    """
    right, wrong = answers
    return [
        Pair(
            as_numbers(clean[i]),
            as_numbers(corrupt[i]),
            answer=() if right is None else ((operator.index(right[i]),),),
            wrong_answer=() if wrong is None else ((operator.index(wrong[i]),),),
            id=str(i),
            group=None if group is None else str(group[i]),
        )
        for i in range(len(clean))
    ]


def require_same_streams(pairs: Sequence[Pair], name: str) -> None:
    """Make sure that all pairs have a prompt for an encoder, or none has.

    Raises:
        PairError: Some have one.
    """
    without = [number for number, pair in enumerate(pairs) if pair.encoder is None]
    if without and len(without) < len(pairs):
        raise PairError(
            f"pair {without[0]} of '{name}' has no prompt for an encoder, and others have",
            facts=[("without", f"{len(without)} of {len(pairs)}")],
            fix="give all of them one: Pair(…, encoder=Pair(clean, corrupt))",
        )
