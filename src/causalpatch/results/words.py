"""What a number of a sweep is, in words: a share of which gap, restored or removed by putting what where.

The column is always called ``recovered``. The words follow the direction: denoising *restores* a share of the gap
between the clean and the corrupted run, noising *removes* one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any, Final


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one.

    Examples:
        >>> counted(1, "independent group"), counted(0, "cell")
        ('1 independent group', '0 cells')
    """
    return f"{number} {noun}{'s' * (number != 1)}"


def joined(words: list[str]) -> str:
    """Return words as a sentence lists them.

    Examples:
        >>> joined(["one"]), joined(["one", "two", "three"])
        ('one', 'one, two and three')
    """
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def percent(share: float) -> str:
    """Return a share in whole percent where that is exact enough.

    Examples:
        >>> percent(0.95), percent(0.999)
        ('95%', '99.9%')
    """
    return f"{100 * share:.4g}%"


def short_name(name: str) -> str:
    """Return what a model is called in a heading: of a folder its own name alone.

    Examples:
        >>> short_name("/data/models/small"), short_name("zoo:stories"), short_name("openai-community/gpt2")
        ('small', 'zoo:stories', 'openai-community/gpt2')
    """
    return PurePath(name).name if name.startswith(("/", "./", "../", "~/")) else name


def is_noise(provenance: Mapping[str, Any]) -> bool:
    """Tell whether effects are shares removed, not restored."""
    return provenance.get("direction") == "noise"


def restored(provenance: Mapping[str, Any]) -> str:
    """Return ``restored`` or ``removed``."""
    return "removed" if is_noise(provenance) else "restored"


def recovered(provenance: Mapping[str, Any]) -> str:
    """Return the name of the share on an axis: ``recovered`` or ``removed``."""
    return "removed" if is_noise(provenance) else "recovered"


def restores(provenance: Mapping[str, Any]) -> str:
    """Return ``restores`` or ``removes``, for one cell."""
    return "removes" if is_noise(provenance) else "restores"


PAIRED: Final = "corrupted run"
"""What the far end of the gap is called where values come from the other run of a pair."""


def reference_run(provenance: Mapping[str, Any]) -> str:
    """Return what the far end of the gap is called: ``corrupted run``, ``zero at 40 places together``."""
    return str(provenance.get("reference") or "reference run")


def change(provenance: Mapping[str, Any], *, site: bool = True) -> str:
    """Return what was put where: ``clean values at z.*.* of the corrupted run``.

    Args:
        provenance: Of the effects.
        site: Name the site too.
    """
    origin, run = ("corrupted", "clean") if is_noise(provenance) else ("clean", "corrupted")
    kinds = str(provenance.get("value") or "source").split(", ")
    values = ", ".join(f"{origin} values" if kind == "source" else kind for kind in kinds)
    place = f"at {provenance.get('site') or 'the patched sites'} of" if site else "into"
    return f"{values} {place} the {run} run"


def share_words(provenance: Mapping[str, Any], metric: str) -> str:
    """Return what the column ``recovered`` is a share of.

    Args:
        provenance: Of the effects.
        metric: Name of the metric.

    Examples:
        >>> share_words({"direction": "denoise", "site": "z.*.*", "reference": "corrupted run"}, "logit_difference")
        'recovered: share of the gap in logit_difference from clean run to corrupted run, restored by putting clean \
values at z.*.* of the corrupted run (denoise)'
    """
    gap = f"share of the gap in {metric} from clean run to {reference_run(provenance)}"
    return f"recovered: {gap}, {restored(provenance)} by putting {change(provenance)} ({_direction(provenance)})"


def engine_of(provenance: Mapping[str, Any]) -> str:
    """Return which engine made the runs, and why that one; an empty text where this was not recorded."""
    record = provenance.get("engine") or {}
    return ": ".join(str(record[name]) for name in ("tier", "reason") if record.get(name))


def own_notes(provenance: Mapping[str, Any]) -> list[str]:
    """Return what the run itself had to say of its numbers."""
    return [str(note) for note in provenance.get("notes") or ()]


def _direction(provenance: Mapping[str, Any]) -> str:
    return "noise" if is_noise(provenance) else "denoise"
