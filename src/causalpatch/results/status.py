"""How the number of one cell and pair was obtained: a cell that was not run says so, and never holds a zero."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum

import numpy as np


class Status(IntEnum):
    """How the metric of one cell (one intervention on one pair) was obtained."""

    MEASURED = 0
    """The patched run was made."""
    DERIVED = 1
    """Exact without a run of its own, because another run has the same result."""
    SCREENED = 2
    """The patched run was made in reduced precision."""
    UNALIGNED = 3
    """The pair has no token at this position."""
    SKIPPED = 4
    """Not run: the sweep was stopped, a budget was spent, or no path leads there."""
    FAILED = 5
    """The run was tried and gave no number."""

    @property
    def text(self) -> str:
        """The word that tables and legends show."""
        return self.name.lower()


def has_number(status: np.ndarray) -> np.ndarray:
    """Say where a status stands for a number that may be averaged.

    Args:
        status: Codes of ``Status``, any shape.

    Returns:
        Booleans of the same shape, true for measured, derived and screened.
    """
    return np.asarray(status <= Status.SCREENED)


def counts(status: np.ndarray) -> dict[Status, int]:
    """Count each status that occurs, in the order of the codes."""
    codes, numbers = np.unique(status, return_counts=True)
    return {Status(int(code)): int(number) for code, number in zip(codes, numbers, strict=True)}


def describe(numbers: Mapping[Status, int]) -> str:
    """Return the text of one cell's statuses over its pairs: ``measured``, or ``measured; 8 unaligned``.

    Args:
        numbers: How many pairs have each status.
    """
    present = [(status, number) for status, number in sorted(numbers.items()) if number]
    if not present:
        return Status.SKIPPED.text
    first, *others = present
    if first[0] > Status.SCREENED and others:
        return "; ".join(f"{number} {status.text}" for status, number in present)
    return "; ".join([first[0].text, *(f"{number} {status.text}" for status, number in others)])


def describe_cells(status: np.ndarray) -> list[str]:
    """Return the text of every cell.

    Args:
        status: Codes, axes cell and pair.
    """
    numbers = np.stack([(status == code).sum(axis=-1) for code in Status], axis=-1)
    rows, place = np.unique(numbers.reshape(-1, len(Status)), axis=0, return_inverse=True)
    texts = [describe(dict(zip(Status, map(int, row), strict=True))) for row in rows]
    return [texts[index] for index in place.ravel()]
