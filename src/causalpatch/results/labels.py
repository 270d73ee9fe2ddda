"""Texts for cells and tokens: what stands on an axis, in a table's margin, in a sentence."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping
from typing import Any

# Longer runs of spaces (indentation in code) are counted instead of drawn.
LONGEST_DRAWN_RUN = 3
# The middle dot of editors: unlike U+2423 (open box) it is in the fonts that pictures are drawn with.
SPACE = "·"
# What stands for a token where pairs differ.
VARIES = "(varies)"
_RUNS = re.compile(r"^ +| +$| {2,}")
_ESCAPES = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}
# Control, format, surrogate, private, unassigned; line and paragraph separators; spaces other than U+0020.
_INVISIBLE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}


def visible(token: str) -> str:
    r"""Return a token so that a reader sees every character of it.

    A space at either end and every run of spaces is drawn as ``·``, a line feed as ``\n``, a character that has no
    shape of its own as its code; a token of nothing but spaces says so in words. Nothing is cut.

    Examples:
        >>> [visible(token) for token in (" the", "\n\n", " ", "        ", "<s>", "")]
        ['·the', '\\n\\n', '(space)', '(8 spaces)', '<s>', '""']
    """
    if not token:
        return '""'
    if not token.strip(" "):
        return "(space)" if len(token) == 1 else f"({len(token)} spaces)"
    text = _RUNS.sub(_draw_run, token)
    if unicodedata.category(text[0]).startswith("M"):
        text = "◌" + text
    return "".join(map(_draw, text))


def axis_text(value: Any, label: str | None = None) -> str:
    """Return what stands at one place of an axis: its index, and its token where it has one.

    The index makes repeated tokens different, so that each keeps its own place.

    Examples:
        >>> axis_text(3, " the")
        '3 ·the'
    """
    return str(value) if label is None else f"{value} {visible(label)}"


def cell_text(values: Mapping[str, Any], labels: Mapping[str, str] | None = None) -> str:
    """Return the name of one cell in words.

    Args:
        values: Its coordinate on each axis.
        labels: Its label on the axes that have labels.

    Examples:
        >>> cell_text({"layer": 4, "head": 7})
        'layer 4, head 7'
        >>> cell_text({"layer": 4, "position": 3}, {"position": " the"})
        'layer 4, position 3 ·the'
    """
    labels = labels or {}
    parts = []
    for axis, value in values.items():
        text = axis_text(value, labels.get(axis))
        parts.append(text if axis == "intervention" else f"{axis.replace('_', ' ')} {text}")
    return ", ".join(parts)


def _draw_run(match: re.Match[str]) -> str:
    length = len(match.group())
    return SPACE * length if length <= LONGEST_DRAWN_RUN else f"{SPACE}x{length}"


def _draw(character: str) -> str:
    if character in _ESCAPES:
        return _ESCAPES[character]
    if character != " " and unicodedata.category(character) in _INVISIBLE:
        code = ord(character)
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return character
