"""Prompts of a decoder that reads an encoder: what it begins with, and answers as they follow that.

A decoder's prompt begins with the ids that the model's settings name, and goes on with a text that gets no special
tokens. Ids are taken as they are, the beginning included. Without either it is the beginning alone.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol

import numpy as np

from causalpatch.base.errors import PairError
from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs.pair import Array, Pair
from causalpatch.pairs.prompts import Prompts
from causalpatch.pairs.role import Role

DECODER_COLUMNS: Final = ("decoder", "clean_decoder", "corrupt_decoder", "decoder_spans")


class DecoderPrompts:
    """The prompts of a decoder.

    Args:
        tokenizer: The model's tokenizer; None for ids.
        start: The ids that a prompt begins with; empty where the model names none.
    """

    def __init__(self, tokenizer: Tokenizer | None, start: Sequence[int]) -> None:
        self.start = tuple(start)
        self.prompts = None if tokenizer is None else Prompts(_Bare(tokenizer))

    def read(self, values: Mapping[str, Any], role: Role, where: str) -> tuple[Any, str | None]:
        """Return a prompt's ids, as far as they can be read, and its text behind the beginning.

        Args:
            values: A row's values by column.
            role: Whose prompt.
            where: How errors call the row.

        Raises:
            PairError: The model names no beginning and the row gives no ids, or a text comes without a tokenizer.
        """
        given = values.get(f"{role}_decoder")
        given = values.get("decoder") if given is None else given
        if given is not None and not isinstance(given, str):
            return given, None
        if not self.start:
            raise PairError(
                f"{where} has no prompt for the decoder to begin with",
                facts=[("model", "its settings name no decoder_start_token_id")],
                fix="give its token ids in a column decoder, the first token included",
            )
        if given is not None and self.prompts is None:
            raise PairError(
                f"the decoder's prompt of {where} is a text, but the model has no tokenizer",
                facts=[("text", repr(given[:60]))],
                fix="open_model(…, tokenizer=…), or give token ids",
            )
        text = given or ""
        more = [] if self.prompts is None else self.prompts.ids(text)
        return [*self.start, *more], None if self.prompts is None else text


class Sound(Protocol):
    """The array that an encoder is given instead of tokens."""

    @property
    def argument(self) -> str:
        """The forward's argument that takes it."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape for one input."""

    @property
    def n_frames(self) -> int:
        """How many positions the encoder makes of it."""


def frames_of(sound: Sound | None, arrays: tuple[Array, Array], where: str) -> tuple[Pair, str]:
    """Return the frames that an encoder makes of sound as its tokens, and the argument that takes the sound.

    Args:
        sound: What the encoder takes; None where it takes tokens.
        arrays: The clean and the corrupted input.
        where: How errors call the row.

    Raises:
        PairError: The encoder takes no such arrays.
    """
    if sound is None or any(array.shape != tuple(sound.shape) for array in arrays):
        odd = next((each for each in arrays if sound is None or each.shape != tuple(sound.shape)), arrays[0])
        wanted = "token ids or text" if sound is None else f"arrays of shape {tuple(sound.shape)}"
        raise PairError(
            f"the model's encoder cannot be given what {where} holds",
            facts=[("given", f"an array of shape {odd.shape}"), ("takes", wanted)],
            fix="make it by the model's own processor",
        )
    numbers = np.arange(sound.n_frames)
    return Pair(numbers, numbers, is_called="sound"), sound.argument


class _Bare:
    """A tokenizer that puts no special tokens around a text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    @property
    def pad_id(self) -> int:
        return self._tokenizer.pad_id

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.vocab_size

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        del special
        return self._tokenizer.encode(text, special=False)

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids, spans = self._tokenizer.encode_with_offsets(text)
        kept = [number for number, (start, stop) in enumerate(spans) if stop > start]
        return [ids[number] for number in kept], [spans[number] for number in kept]

    def label(self, token_id: int) -> str:
        return self._tokenizer.label(token_id)
