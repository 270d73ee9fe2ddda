"""Pairs that were made from failing prompts, with the account of what was tried and dropped, and why."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from causalpatch.pairs.check import APPROXIMATE_GROUPS, FEW_GROUPS
from causalpatch.pairs.collection import Pairs

# Why a prompt or a partner was dropped.
ANSWERED_RIGHT: Final = "the prompt does not fail"
OTHER_CHOICE: Final = "the first choice is neither answer"
PARTNER_FAILS: Final = "the partner does not work"
OTHER_FAILS: Final = "the other model does not answer it right either"
NOT_AGAINST: Final = "the failing prompt does not prefer its wrong answer to the partner's"
UNREADABLE: Final = "cannot be read"
SAME_ANSWER: Final = "the partner's answer is the wrong answer"
SAME_TOKENS: Final = "the partner has the same tokens"
SHARED: Final = "shares an entity with a kept pair"


@dataclass(frozen=True)
class Dropped:
    """What was not kept.

    Args:
        failure: Name of the failing prompt.
        way: How its partner was made; None where the prompt itself was dropped.
        why: The reason, one of a few.
        prompt: The partner, or the failing prompt.
        detail: More about it, such as the two answers' logit difference.
    """

    failure: str
    way: str | None
    why: str
    prompt: str
    detail: str = ""


@dataclass(frozen=True)
class MadePairs:
    """Pairs made from failing prompts; ``str()`` is the account of what became of everything.

    Args:
        pairs: What was kept: clean is the partner that works, corrupted the prompt that fails.
        rows: The same as ``load_pairs`` reads them.
        model: Name of the model that they were made for.
        n_given: How many failing prompts were given.
        failing: Names of those that fail.
        tried: Number of partners that were tried, by how they were made.
        dropped: Everything that was not kept.
        untried: Number of partners that were not tried, by how they would have been made; of replacements by words
            their lengths were not looked at.
        is_of_templates: Whether no failing prompts were given: both prompts of a pair are answered by their own answer.
    """

    pairs: Pairs
    rows: tuple[Mapping[str, Any], ...] = field(repr=False)
    model: str
    n_given: int
    failing: tuple[str, ...] = field(repr=False)
    tried: Mapping[str, int]
    dropped: tuple[Dropped, ...] = field(default=(), repr=False)
    untried: Mapping[str, int] = field(default_factory=dict)
    is_of_templates: bool = False

    @property
    def n_components(self) -> int:
        """Number of independent components of the pairs."""
        return len(set(self.pairs.components.tolist()))

    @property
    def reasons(self) -> dict[str, int]:
        """How many prompts and partners were dropped, by reason, the most frequent first."""
        return dict(Counter(one.why for one in self.dropped).most_common())

    @property
    def alone(self) -> tuple[str, ...]:
        """Names of the prompts that fail and have no partner."""
        held = {str(pair.extra["failure"]) for pair in self.pairs}
        return tuple(name for name in self.failing if name not in held)

    def save(self, path: str | Path) -> Path:
        """Write the pairs as JSON lines, which ``load_pairs`` reads.

        Args:
            path: A file that ends in ``.jsonl``; its folder is made where missing.
        """
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows), encoding="utf-8")
        return path

    def __str__(self) -> str:
        kept = Counter(str(pair.extra["way"]) for pair in self.pairs)
        rows = [
            ("prompts", str(self.n_given)),
            *([] if self.is_of_templates else [("that fail", str(len(self.failing)))]),
            ("partners tried", _counted(self.tried)),
            ("pairs kept", _counted(kept)),
            ("independent components", str(self.n_components)),
            ("without a partner", _listed(self.alone)),
        ]
        if self.untried:
            rows.append(("partners not tried", _counted(self.untried)))
        width = max(len(word) for word, _ in rows)
        lines = [f"pairs of '{self.pairs.name}' for '{self.model}'", *(f"  {w:<{width}}  {v}" for w, v in rows)]
        lines += ["  dropped", *reasons_as_lines(self.reasons)] if self.dropped else []
        if self.n_components < FEW_GROUPS:
            lines.append(f"  note: fewer than {FEW_GROUPS} independent components: no interval can be given")
        elif self.n_components < APPROXIMATE_GROUPS:
            lines.append(f"  note: fewer than {APPROXIMATE_GROUPS} independent components: intervals are approximate")
        return "\n".join(lines)


def account(dropped: Sequence[Dropped], most: int = 2) -> list[tuple[str, str]]:
    """Return facts for an error: the most frequent reasons, each with one example."""
    facts = []
    for why, n in Counter(one.why for one in dropped).most_common(most):
        first = next(one for one in dropped if one.why == why)
        shown = first.prompt if len(first.prompt) < 50 else f"{first.prompt[:47]}…"
        facts.append((f"{n} dropped", f"{why}, such as {shown!r}{f' ({first.detail})' if first.detail else ''}"))
    return facts


def reasons_as_lines(reasons: Mapping[str, int]) -> list[str]:
    """Return reasons with how often each holds, one a line."""
    width = max((len(str(n)) for n in reasons.values()), default=0)
    return [f"    {n:>{width}}  {why}" for why, n in reasons.items()]


def _counted(by: Mapping[str, int]) -> str:
    total = sum(by.values())
    return str(total) if len(by) < 1 else f"{total}: {', '.join(f'{name} {n}' for name, n in by.items())}"


def _listed(names: Sequence[str]) -> str:
    if not names:
        return "0"
    return f"{len(names)}: {', '.join(names[:5])}{', …' if len(names) > 5 else ''}"
