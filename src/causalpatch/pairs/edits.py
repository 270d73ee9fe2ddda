"""What can be changed in a prompt: words of a text, or of the turns of a chat, and how two prompts differ in them."""

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from causalpatch.base.errors import PairError
from causalpatch.pairs.chat import Messages, is_chat

_PIECES = re.compile(r"\s+|\w+|[^\w\s]")
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Place:
    """A stretch of characters of one part of a prompt.

    Args:
        part: Which part.
        start: The first character.
        stop: The one behind the last.
    """

    part: int
    start: int
    stop: int


@dataclass(frozen=True)
class Prompt:
    """A prompt that can be changed: one text, or the words of each turn of a chat.

    Args:
        parts: The texts.
        roles: Whose turn each is; None for a prompt that is no chat.
    """

    parts: tuple[str, ...]
    roles: tuple[str, ...] | None = None

    @classmethod
    def of(cls, value: Any, where: str) -> "Prompt":
        """Read a prompt.

        Args:
            value: A text, or a list of messages.
            where: How errors call it.

        Raises:
            PairError: It is neither.
        """
        if isinstance(value, Prompt):
            return value
        if isinstance(value, str) and value:
            return cls((value,))
        if is_chat(value) and all(isinstance(one.get("content"), str) for one in value):
            return cls(tuple(one["content"] for one in value), tuple(str(one.get("role")) for one in value))
        raise PairError(
            f"the prompt of {where} is neither a text nor a list of messages",
            facts=[("value", repr(value)[:60])],
            fix='write "prompt": "…", or "prompt": [{"role": "user", "content": "…"}]',
        )

    @property
    def given(self) -> str | Messages:
        """The prompt as ``load_pairs`` reads it."""
        if self.roles is None:
            return self.parts[0]
        return [{"role": role, "content": part} for role, part in zip(self.roles, self.parts, strict=True)]

    @property
    def words(self) -> list[Place]:
        """Where words stand."""
        return [Place(k, *found.span()) for k, part in enumerate(self.parts) for found in _WORD.finditer(part)]

    def __str__(self) -> str:
        return " / ".join(self.parts)

    def text(self, place: Place) -> str:
        """Return what stands at a place."""
        return self.parts[place.part][place.start : place.stop]

    def replaced(self, place: Place, text: str) -> "Prompt":
        """Return the prompt with another text at a place."""
        part = self.parts[place.part]
        parts = list(self.parts)
        parts[place.part] = part[: place.start] + text + part[place.stop :]
        return replace(self, parts=tuple(parts))

    def find(self, text: str, name: str, where: str) -> Place:
        """Return where a text stands.

        Args:
            text: The text of a span.
            name: The span's name.
            where: How errors call the prompt.

        Raises:
            PairError: It does not stand in the prompt, or stands there more than once.
        """
        starts = [(k, i) for k, part in enumerate(self.parts) for i in range(len(part)) if part.startswith(text, i)]
        if not text or len(starts) != 1:
            times = f"occurs {len(starts)} times" if text and starts else "does not occur"
            raise PairError(
                f"span '{name}' ({text!r}) {times} in {where}",
                facts=[("prompt", repr(str(self) if len(str(self)) < 90 else str(self)[:87] + "…"))],
                fix="name a text that stands in it once, with as many words around it as that takes",
            )
        ((part, start),) = starts
        return Place(part, start, start + len(text))


def differences(one: Prompt, other: Prompt) -> list[tuple[Place, str]]:
    """Return the stretches of words in which two prompts differ: where they stand in one, what the other has there.

    Args:
        one: The prompt that places are counted in.
        other: What it is compared with.

    Returns:
        None where they are equal, or are chats of other turns.

    Examples:
        >>> differences(Prompt(("A dog ran home.",)), Prompt(("A cat ran far.",)))
        [(Place(part=0, start=2, stop=5), 'cat'), (Place(part=0, start=10, stop=14), 'far')]
    """
    if one.roles != other.roles:
        return []
    return [found for k in range(len(one.parts)) for found in _of_part(k, one.parts[k], other.parts[k])]


def _of_part(part: int, one: str, other: str) -> list[tuple[Place, str]]:
    a, b = _PIECES.findall(one), _PIECES.findall(other)
    found = []
    for tag, i0, i1, j0, j1 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        if tag != "equal":
            start = len("".join(a[:i0]))
            found.append((Place(part, start, start + len("".join(a[i0:i1]))), "".join(b[j0:j1])))
    return found


def words_of(texts: Sequence[str]) -> list[str]:
    """Return the words that stand in texts, each once, in order."""
    return list(dict.fromkeys(word for text in texts for word in _WORD.findall(text)))
