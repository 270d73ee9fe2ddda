"""A tokenizer of transformers, seen through the few things that pairs ask of it."""

from collections.abc import Mapping, Sequence
from functools import cached_property

from jinja2 import TemplateError
from torch import nn
from transformers import PreTrainedTokenizerBase

from causalpatch.base.errors import ModelUnsupported

_SPACE = "\u2581"  # how SentencePiece writes a leading space


class WrappedTokenizer:
    """A ``base.tokens.Tokenizer`` around a tokenizer of transformers.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def __repr__(self) -> str:
        return f"WrappedTokenizer({type(self.tokenizer).__name__}, {self.vocab_size} ids)"

    @cached_property
    def pad_id(self) -> int:
        """Id of the padding token, else of the end of text, else 0; padding is masked, so its value never matters."""
        for token_id in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        return 0

    @property
    def mask_id(self) -> int | None:
        """Id of the token that stands for what a masked language model is to fill in; None where there is none."""
        found = self.tokenizer.mask_token_id
        return None if found is None else int(found)

    @cached_property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self.tokenizer)

    @cached_property
    def _frame_ids(self) -> frozenset[int]:
        """Ids that the tokenizer may put around a text."""
        tokenizer = self.tokenizer
        ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id)
        return frozenset(int(token_id) for token_id in ids if token_id is not None)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text.

        Args:
            text: The text; special tokens that it already writes out are not added a second time.
            special: Whether to add the tokenizer's special tokens.
        """
        ids = list(self.tokenizer.encode(text, add_special_tokens=special))
        start, stop = self._doubled(ids) if special else (0, len(ids))
        return ids[start:stop]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids with special tokens, and each token's half-open span of characters.

        Args:
            text: The text; special tokens that it already writes out are not added a second time.

        Returns:
            The ids and as many spans; (0, 0) for special tokens around the text.

        Raises:
            ModelUnsupported: The tokenizer does not know which characters its tokens cover.
        """
        self._require_offsets()
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        ids = list(encoded["input_ids"])
        spans = [(int(first), int(last)) for first, last in encoded["offset_mapping"]]
        spans = [(0, 0) if token_id in self._frame_ids else span for token_id, span in zip(ids, spans, strict=True)]
        start, stop = self._doubled(ids)
        return ids[start:stop], spans[start:stop]

    def chat(self, messages: Sequence[Mapping[str, str]], *, opens: bool = True) -> str | None:
        """Return the text of a chat by the tokenizer's own template; None where it has none.

        Args:
            messages: The turns. Where the assistant has the last word, the text ends with it.
            opens: Whether the assistant's turn is opened where another has the last word.

        Raises:
            ModelUnsupported: The template refuses these turns.
        """
        if not self.tokenizer.chat_template:
            return None
        is_open = messages[-1]["role"] == "assistant"
        turns = [dict(message) for message in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=opens and not is_open, continue_final_message=is_open
            )
        except TemplateError as error:
            raise ModelUnsupported(
                "the model's chat template refuses these messages",
                facts=[("roles", ", ".join(turn["role"] for turn in turns)), ("problem", error)],
                fix="leave out the role that it names, for instance by putting the system's words before the user's",
            ) from error
        return text

    def encode_templated(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text with no special tokens beside those that it writes out, and their characters.

        Args:
            text: What a chat template wrote.

        Raises:
            ModelUnsupported: The tokenizer does not know which characters its tokens cover.
        """
        self._require_offsets()
        encoded = self.tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
        return list(encoded["input_ids"]), [(int(first), int(last)) for first, last in encoded["offset_mapping"]]

    def label(self, token_id: int) -> str:
        """Return the token as a person reads it, leading space kept.

        Args:
            token_id: The id. One that the tokenizer does not know, as in a padded vocabulary, reads ``[id]``.
        """
        piece: str | None = (
            self.tokenizer.convert_ids_to_tokens(int(token_id)) if 0 <= token_id < self.vocab_size else None
        )
        if piece is None:
            return f"[{token_id}]"
        if _SPACE in piece:
            return piece.replace(_SPACE, " ")
        text: str = self.tokenizer.decode([int(token_id)], clean_up_tokenization_spaces=False)
        # A piece of a character decodes to the replacement sign, which all such pieces share.
        return piece if not text or "\ufffd" in text else text

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of some tokens, as it stands."""
        text: str = self.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    def _require_offsets(self) -> None:
        if not self.tokenizer.is_fast:
            raise ModelUnsupported(
                "this tokenizer does not say which characters its tokens cover",
                facts=[("tokenizer", type(self.tokenizer).__name__)],
                fix="give spans as token ranges [start, stop] rather than as text",
            )

    def _doubled(self, ids: list[int]) -> tuple[int, int]:
        """Return the part of the ids that leaves out a special token standing twice at either end."""
        start, stop = 0, len(ids)
        if self.tokenizer.num_special_tokens_to_add() == 0:
            return start, stop
        if len(ids) > 1 and ids[0] == ids[1] and ids[0] in self._frame_ids:
            start = 1
        if stop - start > 1 and ids[-1] == ids[-2] and ids[-1] in self._frame_ids:
            stop -= 1
        return start, stop


def find_stop_ids(module: nn.Module) -> tuple[int, ...]:
    """Return the ids of tokens that end a text, as a model's generation settings or its configuration say."""
    for settings in (getattr(module, name, None) for name in ("generation_config", "config")):
        ids = getattr(settings, "eos_token_id", None)
        if ids is not None:
            return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
    return ()


def find_decoder_prompt(module: nn.Module) -> tuple[int, ...]:
    """Return the ids that a decoder begins with: its start, and the token that is forced behind it where one is."""
    start = _setting(module, "decoder_start_token_id")
    forced = _setting(module, "forced_bos_token_id")
    return () if start is None else (start,) if forced is None else (start, forced)


def _setting(module: nn.Module, name: str) -> int | None:
    """Return an id of a model's generation settings, or else of its configuration."""
    for settings in (getattr(module, holder, None) for holder in ("generation_config", "config")):
        found = getattr(settings, name, None)
        if isinstance(found, int):
            return found
    return None


def find_end_id(module: nn.Module) -> int | None:
    """Return the id of the token at which a text is read as one vector, as the configuration of its tower says."""
    config = getattr(module, "config", None)
    end = getattr(getattr(config, "text_config", config), "eos_token_id", None)
    return end if isinstance(end, int) else None
