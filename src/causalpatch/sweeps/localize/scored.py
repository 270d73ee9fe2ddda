"""Scores of all units, from a few runs for all of them: what may matter inside parts that have no effect themselves."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from causalpatch.results.scores import Scores
from causalpatch.sweeps.localize.parts import Part

ScoredBy = Literal["atp", "relp"] | None


@dataclass
class UnitScores:
    """|Importance| of units, by what they are and their layer.

    Args:
        rows: The scores of a layer's units, (unit,).
    """

    rows: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)

    @classmethod
    def of(cls, found: Mapping[str, Scores]) -> "UnitScores":
        """Take in what ``attribute`` returned for sets of units, over layers and units."""
        rows = {
            (scores.axes[1], int(layer)): row
            for scores in found.values()
            for layer, row in zip(
                scores.coordinates["layer"], np.abs(np.nan_to_num(scores.importance().values)), strict=True
            )
        }
        return cls(rows)

    def score(self, part: Part) -> float | None:
        """Return the score of a unit at all positions, whatever its own; None where it was not scored."""
        site = part.sites[0]
        row = self.rows.get((part.level, site.layer)) if isinstance(site.layer, int) else None
        return None if row is None or not isinstance(site.unit, int) else float(row[site.unit])

    def largest(self, units: Iterable[Part]) -> float | None:
        """Return the largest score of some units; None where there are none."""
        return max((self.score(unit) or 0.0 for unit in units), default=None) if self.rows else None

    def ranked(self, parts: list[Part]) -> list[Part]:
        """Return parts, those of the largest scores first."""
        return sorted(parts, key=lambda part: -(self.score(part) or 0.0))
