"""Chats as prompts: messages through the tokenizer's own template, with the turns of each role as spans.

A prompt may be a list of ``{"role": …, "content": …}``. The template writes all special tokens that it wants, so its
text is given none beside these. A chat that ends with the assistant's words goes on behind them; any other ends where
the assistant's turn has been opened.

Spans: ``system``, ``user`` and ``assistant`` are the words of the last turn of each role, and ``user_1``, ``user_2`` …
every turn of a role that has several. Where the assistant has said nothing yet, ``assistant`` is what opens its turn.

Where the words stand is found by writing the same chat with marks in place of them; that is believed only if putting
the words back gives the chat itself.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, TypeAlias, TypeGuard, runtime_checkable

from causalpatch.base.errors import PairError
from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs.prompts import Prompts

Messages: TypeAlias = Sequence[Mapping[str, str]]
Ranges: TypeAlias = dict[str, tuple[int, int]]

ROLES: Final = ("system", "user", "assistant")
_MARK: Final = "\u241e{}\u241e"  # the sign for a record separator, which no template writes


@runtime_checkable
class ChatTokenizer(Protocol):
    """A tokenizer that can write chats."""

    def chat(self, messages: Messages, *, opens: bool = True) -> str | None:
        """Return the text of a chat, with the assistant's turn opened if asked; None where there is no template."""

    def encode_templated(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a text with no special tokens beside those it writes out, and each one's characters."""


class ChatPrompts:
    """Chats to token ids.

    Args:
        tokenizer: The model's tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.prompts = Prompts(_Templated(tokenizer)) if isinstance(tokenizer, ChatTokenizer) else None

    def read(self, messages: Messages, where: str) -> tuple[str, Ranges]:
        """Return the text of a chat, and the range of tokens of each role's turns.

        Args:
            messages: The chat.
            where: How errors call it.

        Raises:
            PairError: A role is not known, the tokenizer has no template, or the words of a turn are not found in what
                the template writes.
        """
        _check(messages, where)
        text = self._tokenizer.chat(messages) if isinstance(self._tokenizer, ChatTokenizer) else None
        if text is None or self.prompts is None:
            raise PairError(
                f"{where} is a chat, but the model's tokenizer has no chat template",
                facts=[("roles", ", ".join(message["role"] for message in messages))],
                fix="set tokenizer.chat_template, or write the prompt out as one text",
            )
        found = {}
        for name, (start, stop) in self._turns(messages, text, where).items():
            if text[start:stop].strip():
                found[name] = self.prompts.covering(text, start, stop, name, where)
        return text, found

    def _turns(self, messages: Messages, text: str, where: str) -> Ranges:
        """Return the characters of each role's turns."""
        contents = [message["content"] for message in messages]
        places = self._places(messages, contents, text) or _in_order(contents, text)
        if places is None:
            raise PairError(
                f"the words of a turn of {where} do not stand in what the chat template writes",
                facts=[("template writes", repr(text[:60]))],
                fix="write the prompt out as one text, and give spans of your own",
            )
        of_role: dict[str, list[tuple[int, int]]] = {}
        for message, place in zip(messages, places, strict=True):
            of_role.setdefault(message["role"], []).append(place)
        named = {role: turns[-1] for role, turns in of_role.items()}
        for role, turns in of_role.items():
            named |= {f"{role}_{k}": turn for k, turn in enumerate(turns, start=1) if len(turns) > 1}
        if "assistant" not in named and places[-1][1] < len(text):
            named["assistant"] = (self._opening(messages, text, places[-1][1]), len(text))
        return named

    def _places(self, messages: Messages, contents: list[str], text: str) -> list[tuple[int, int]] | None:
        """Return where each turn's words stand, by a chat of marks; None where the template treats these otherwise."""
        marked = [{**message, "content": _MARK.format(k)} for k, message in enumerate(messages)]
        written = self._tokenizer.chat(marked) if isinstance(self._tokenizer, ChatTokenizer) else None
        between = re.split("|".join(_MARK.format(k) for k in range(len(messages))), written or "")
        if len(between) != len(messages) + 1:
            return None
        for words in (contents, [content.strip() for content in contents]):
            places, made = [], between[0]
            for word, after in zip(words, between[1:], strict=True):
                places.append((len(made), len(made) + len(word)))
                made += word + after
            if made == text:
                return places
        return None

    def _opening(self, messages: Messages, text: str, end: int) -> int:
        """Return where the assistant's turn is opened: behind the text of the chat that asks for no answer."""
        closed = self._tokenizer.chat(messages, opens=False) if isinstance(self._tokenizer, ChatTokenizer) else None
        is_shorter = closed is not None and text.startswith(closed) and end <= len(closed) < len(text)
        return len(closed) if closed is not None and is_shorter else end


class _Templated:
    """A tokenizer that adds nothing to what a template wrote."""

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
        return self.encode_with_offsets(text)[0]

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        if not isinstance(self._tokenizer, ChatTokenizer):
            raise LookupError(text)  # only tokenizers that write chats are wrapped
        return self._tokenizer.encode_templated(text)

    def label(self, token_id: int) -> str:
        return self._tokenizer.label(token_id)


def is_chat(value: Any) -> TypeGuard[Messages]:
    """Say whether a value is a list of messages."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(one, Mapping) for one in value)


def shared_spans(clean: Ranges, corrupt: Ranges) -> dict[str, tuple[tuple[int, int], tuple[int, int]]]:
    """Return the spans that both prompts of a pair have, (clean, corrupted)."""
    return {name: (place, corrupt[name]) for name, place in clean.items() if name in corrupt}


def _check(messages: Messages, where: str) -> None:
    for message in messages:
        if not isinstance(message.get("content"), str) or message.get("role") not in ROLES:
            raise PairError(
                f"{where} holds something that is no message",
                facts=[("message", repr(dict(message))[:60]), ("roles", ", ".join(ROLES))],
                fix='write {"role": "user", "content": "…"}',
            )


def _in_order(contents: list[str], text: str) -> list[tuple[int, int]] | None:
    """Return where words stand one behind the other, each of which stands in the text just once."""
    places, end = [], 0
    for content in (content.strip() for content in contents):
        if not content or text.count(content) != 1 or text.index(content) < end:
            return None
        places.append((text.index(content), text.index(content) + len(content)))
        end = places[-1][1]
    return places
