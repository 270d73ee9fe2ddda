"""One pair: a clean and a corrupted input that belong together, with their answers; plain data."""

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError
from causalpatch.base.spec import to_json
from causalpatch.pairs.role import ROLES, Role, as_role

Array: TypeAlias = NDArray[Any]
Answers: TypeAlias = tuple[tuple[int, ...], ...]
TokenRange: TypeAlias = tuple[int, int]
PROMPT: Final = "prompt"
Beside: TypeAlias = Mapping[str, tuple[Array, Array]]


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
        beside: Further arguments of the model's forward by name, (clean, corrupted), such as the picture that a prompt
            speaks of.
        encoder: For a model with an encoder and a decoder what the encoder is given, with its spans and texts; what
            stands above is then the decoder's. Where it is given sound, the numbers of its frames.
        is_called: What errors call an input: a prompt, or what its tokens stand for.
        stands_for: For an encoder's prompts and the tokens of a picture, the content hash of the pair that holds them.
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
    beside: Beside = field(default_factory=dict)
    encoder: "Pair | None" = None
    is_called: str = PROMPT
    stands_for: str = ""

    def __post_init__(self) -> None:
        for role in ("clean", "corrupt"):
            object.__setattr__(self, role, _kept(getattr(self, role)))
        both = {name: self.beside[name] for name in sorted(self.beside)}
        object.__setattr__(self, "beside", {name: _kept_both(*sides) for name, sides in both.items()})

    def input(self, role: Role) -> Array:
        """Return the clean or the corrupted input."""
        return self.clean if as_role(role) == "clean" else self.corrupt

    def besides(self, role: Role) -> dict[str, Array]:
        """Return the further arguments of the clean or the corrupted run, by name."""
        side = ROLES.index(as_role(role))
        return {name: both[side] for name, both in self.beside.items()}

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
            beside={name: (corrupt, clean) for name, (clean, corrupt) in self.beside.items()},
            encoder=self.encoder and self.encoder.swapped(),
        )

    def one_sided(self, role: Role) -> "Pair":
        """Return the pair with one input, its text, its spans and what stands beside it on both sides; answers stay."""
        whole, side, text = self.input(role), ROLES.index(as_role(role)), self.text(role)
        return dataclasses.replace(
            self,
            clean=whole,
            corrupt=whole,
            clean_text=text,
            corrupt_text=text,
            spans={name: (both[side], both[side]) for name, both in self.spans.items()},
            beside={name: (both[side], both[side]) for name, both in self.beside.items()},
            encoder=self.encoder and self.encoder.one_sided(role),
        )

    @cached_property
    def hashes(self) -> Mapping[str, tuple[str, str]]:
        """Hashes of the arrays of both sides: of inputs, called ``""``, what stands beside them, the encoder's."""
        arrays = {"": (self.clean, self.corrupt), **self.beside}
        found = {name: (digest(clean), digest(corrupt)) for name, (clean, corrupt) in arrays.items()}
        # Frames are numbered alike in all pairs; what they are made of stands beside.
        encoder = self.encoder.hashes if self.encoder is not None and self.encoder.is_called == PROMPT else {}
        return found | {f"encoder/{name}": both for name, both in encoder.items()}

    @cached_property
    def digests(self) -> tuple[str, str]:
        """Hashes of all that the clean and the corrupted run are given: types, shapes and contents."""
        if len(self.hashes) == 1:
            return self.hashes[""]
        sides = ([[name, both[side]] for name, both in self.hashes.items()] for side in range(len(ROLES)))
        clean, corrupt = (hashlib.sha256(to_json(held).encode()).hexdigest()[:32] for held in sides)
        return clean, corrupt

    @cached_property
    def content_hash(self) -> str:
        """Hash of everything that a measurement could depend on: all but the texts and extra columns."""
        if self.stands_for:
            return self.stands_for
        plain = [self.id, self.answer, self.wrong_answer, self.group, self.split, self.spans, self.entities]
        plain += [] if self.encoder is None else [self.encoder.spans]
        return hashlib.sha256(to_json([*self.digests, *plain]).encode()).hexdigest()[:16]


def _kept(value: Any) -> Array:
    """Return an array that nobody can change."""
    array = np.array(value)
    array.setflags(write=False)
    return array


def _kept_both(clean: Any, corrupt: Any) -> tuple[Array, Array]:
    """Return the arrays of both sides; what is the same for both is kept once."""
    kept = _kept(clean)
    return kept, kept if corrupt is clean else _kept(corrupt)


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
