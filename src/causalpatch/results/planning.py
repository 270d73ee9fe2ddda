"""How many new independent components a claim would need, from the spread of a pilot: a plan, and never a result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from causalpatch.base.extras import lazy
from causalpatch.results.words import counted, percent
from causalpatch.statistics.power import MOST_GROUPS

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")


@dataclass(frozen=True, eq=False)
class Power:
    """Independent components of pairs that are needed, for each component of the model.

    Args:
        rows: For each: ``component``, ``spread`` of its share between independent components of pairs with ``low`` and
            ``high``, ``needed`` of these for the power with ``needed_low`` and ``needed_high``; None where more than
            100,000 are.
        curve: For some numbers of independent components, the power for the component that spreads most: ``n``,
            ``power``, and ``low`` and ``high`` by what the spread may be.
        effect: The share that is to be found.
        delta: Share that does not count.
        alpha: Probability of even one wrong *supported*.
        target: The power.
        level: Coverage of the bounds on the spread.
        pilot: Record of the pilot's pairs: name and number of independent components.
    """

    rows: tuple[Mapping[str, Any], ...]
    curve: tuple[Mapping[str, Any], ...]
    effect: float
    delta: float
    alpha: float
    target: float
    level: float
    pilot: Mapping[str, Any]

    @property
    def needed(self) -> int | None:
        """Independent components for all components of the model, by the pilot's estimates."""
        return _most([row["needed"] for row in self.rows])

    @property
    def needed_at_most(self) -> int | None:
        """The same where every spread is as large as it may be."""
        return _most([row["needed_high"] for row in self.rows])

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per component of the model."""
        return pd.DataFrame([dict(row) for row in self.rows])

    def __str__(self) -> str:
        what = f"a share of {self.effect:g} to be called more than {self.delta:g} with probability {self.target:g}"
        lines = [
            f"For {what}, {counted(len(self.rows), 'component')} tested together at alpha {self.alpha:g}:",
            f"  {_text(self.needed)} independent components of pairs, up to {_text(self.needed_at_most)} "
            f"as far as the pilot can tell ({percent(self.level)} bounds from {self.pilot['n_components']} of "
            f"'{self.pilot['name']}')",
        ]
        for row in self.rows:
            needed = f"{_text(row['needed'])} ({_text(row['needed_low'])} to {_text(row['needed_high'])})"
            spread = f"{row['spread']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
            lines.append(f"  {row['component']}: needs {needed}; spread {spread}")
        lines += [
            "  " + ", ".join(f"{point['n']}: {point['power']:.2f}" for point in self.curve) + "  (components: power)",
            "note: a plan for new pairs; it says nothing about effects in the pilot, and skewed pairs need more",
        ]
        return "\n".join(lines)


def _most(numbers: Sequence[int | None]) -> int | None:
    known = [number for number in numbers if number is not None]
    return None if len(known) < len(numbers) or not known else max(known)


def _text(number: int | None) -> str:
    return f"more than {MOST_GROUPS:,}" if number is None else f"{number:,}"
