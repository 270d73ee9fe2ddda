"""Suggestions for names that were not found."""

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` known names that resemble ``word``, best first."""
    return difflib.get_close_matches(word, sorted(set(known)), n=count, cutoff=0.5)
