"""Indices of a site: which layers, which units, which positions, as text and as plain data.

=============  ====================================  =======================
text           data                                  layers, units, positions
=============  ====================================  =======================
``3``          ``3``                                 all (positions may be negative)
``2:5``        ``Range(2, 5)``, half open            all
``1,4,7``      ``(1, 4, 7)``                         layers and units
``subject``    ``Span("subject")``                   positions
``*``          ``EVERY``                             all
=============  ====================================  =======================
"""

import operator
import re
from dataclasses import dataclass
from typing import Final, TypeAlias

from causalpatch.base.errors import SiteSyntaxError

SPAN_NAME = re.compile(r"[^\W\d][\w.\-]*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_RANGE = re.compile(r"(-?[0-9]*):(-?[0-9]*)")


@dataclass(frozen=True)
class Every:
    """All of them, written ``*``."""

    def __str__(self) -> str:
        return "*"


EVERY: Final = Every()


@dataclass(frozen=True)
class Range:
    """A half-open range ``start:stop``; a missing end reaches as far as the model or the prompt does.

    Args:
        start: First index, or None for the beginning.
        stop: First index that is no longer in the range, or None for the end.
    """

    start: int | None = None
    stop: int | None = None

    def __post_init__(self) -> None:
        for end in ("start", "stop"):
            value = getattr(self, end)
            object.__setattr__(self, end, None if value is None else integer(value))

    def __str__(self) -> str:
        return f"{'' if self.start is None else self.start}:{'' if self.stop is None else self.stop}"


@dataclass(frozen=True)
class Span:
    """A position by the name of a span of tokens, such as ``subject``.

    Args:
        name: The span's name: a letter or underscore, then letters, digits, ``_``, ``-`` and ``.``.

    Raises:
        SiteSyntaxError: The name could be mistaken for a number or another part of a site.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not SPAN_NAME.fullmatch(self.name):
            raise SiteSyntaxError(
                f"{self.name!r} is not the name of a span",
                facts=[("allowed", "a letter or _, then letters, digits, '_', '-', '.'")],
                fix="rename the span, for instance @subject",
            )

    def __str__(self) -> str:
        return self.name


Position: TypeAlias = int | Range | Span | Every
Index: TypeAlias = int | Range | tuple[int, ...] | Every | None


def integer(value: object) -> int:
    """Return a whole number of any kind, numpy's too, as a plain int.

    Raises:
        SiteSyntaxError: The value is no whole number; a truth value is none either.
    """
    if not isinstance(value, bool):
        try:
            return operator.index(value)  # type: ignore[arg-type]  # index() itself tells what is a whole number
        except TypeError:
            pass
    raise SiteSyntaxError(
        f"{value!r} is not an index of a site", facts=[("allowed", "whole numbers")], fix="write for instance z.9.6@-1"
    )


def settle_position(value: object) -> Position | None:
    """Return a position in its one form: ``Range()`` is ``EVERY``, whole numbers are ints.

    Raises:
        SiteSyntaxError: The value is no position.
    """
    if value is None or isinstance(value, Span | Every):
        return value
    if isinstance(value, Range):
        return EVERY if value == Range() else value
    return integer(value)


def settle_index(value: object, axis: str) -> Index:
    """Return a layer or unit selection in its one form.

    ``Range()`` is ``EVERY``, a tuple is sorted without repeats, and a tuple of one is that one.

    Args:
        value: A whole number, ``Range``, tuple of whole numbers, ``EVERY``, or None where nothing was said.
        axis: Word for the error: layer, head, neuron…

    Raises:
        SiteSyntaxError: The value is no selection, is empty, or holds a negative number.
    """
    if value is None or isinstance(value, Every):
        return value
    settled: Index
    if isinstance(value, Range):
        settled = EVERY if value == Range() else value
        members = [end for end in (value.start, value.stop) if end is not None]
    elif isinstance(value, tuple | list):
        chosen = tuple(sorted({integer(item) for item in value}))
        members, settled = list(chosen), chosen[0] if len(chosen) == 1 else chosen
        if not chosen:
            raise SiteSyntaxError(f"an empty list selects no {axis}", fix="leave the index out to select all of them")
    else:
        settled = integer(value)
        members = [settled]
    if min(members, default=0) < 0:
        raise SiteSyntaxError(
            f"{axis} {min(members)} is negative",
            facts=[(f"{axis}s", "count from 0; only positions may be negative")],
            fix=f"give the number of the {axis}",
        )
    return settled


def index_text(index: Index) -> str:
    """Return a layer or unit selection as it stands in a site."""
    return ",".join(map(str, index)) if isinstance(index, tuple) else str(index)


def parse_index(text: str, axis: str) -> Index:
    """Read a layer or unit selection: ``3``, ``2:5``, ``1,4,7`` or ``*``.

    Raises:
        SiteSyntaxError: The text is none of these.
    """
    if text == "*":
        return EVERY
    if ends := _RANGE.fullmatch(text):
        return settle_index(_range(ends), axis)
    parts = text.split(",")
    if all(_INTEGER.fullmatch(part) for part in parts):
        return settle_index(tuple(map(int, parts)), axis)
    raise SiteSyntaxError(
        f"{text!r} does not say which {axis}", facts=[("allowed", "3   2:5   1,4,7   *")], fix="write one of these"
    )


def parse_position(text: str) -> Position:
    """Read a position: ``3``, ``-1``, ``2:5``, a span's name or ``*``.

    Raises:
        SiteSyntaxError: The text is none of these.
    """
    if text == "*":
        return EVERY
    if ends := _RANGE.fullmatch(text):
        return settle_position(_range(ends)) or EVERY
    if _INTEGER.fullmatch(text):
        return int(text)
    if SPAN_NAME.fullmatch(text):
        return Span(text)
    raise SiteSyntaxError(
        f"{text!r} is not a position", facts=[("allowed", "3   -1   2:5   :-1   subject   *")], fix="write one of these"
    )


def _range(ends: re.Match[str]) -> Range:
    numbers = []
    for text in ends.groups():
        if text == "-":
            raise SiteSyntaxError(
                f"{ends[0]!r} is not a range", facts=[("allowed", "2:5   :5   2:   -3:-1")], fix="write one of these"
            )
        numbers.append(int(text) if text else None)
    return Range(*numbers)
