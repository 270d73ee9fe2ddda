"""What the rooms below the models ask of a tokenizer."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Tokenizer(Protocol):
    """The few things that pairs need from a tokenizer; ``models`` wraps a real one in this."""

    @property
    def pad_id(self) -> int:
        """Id that fills padded positions; masked, so its value never matters."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text, with the model's special tokens once if ``special``."""

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids with special tokens, and each one's half-open span of characters ((0, 0) if special)."""

    def label(self, token_id: int) -> str:
        """Return the token as a person reads it, leading space kept."""
