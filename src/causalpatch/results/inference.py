"""What is inferred from one metric's numbers: p of every cell, its interval alone, and intervals that hold together.

Each is computed once and kept: a sweep's numbers never change, and to flip signs over thousands of cells takes seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from causalpatch.results.shares import Numbers
from causalpatch.statistics.agreement import sign_agreement
from causalpatch.statistics.clusters import group_sums
from causalpatch.statistics.coverage import effective_groups
from causalpatch.statistics.families import benjamini_hochberg
from causalpatch.statistics.intervals import MIN_GROUPS, Interval, ratio_intervals
from causalpatch.statistics.permutation import max_t, sign_flip
from causalpatch.statistics.together import group_skewness, simulated_family_coverage

# With fewer groups, or cells more skewed between groups, intervals that hold together are called approximate.
GROUPS_FOR_MAX_T = 20
LARGEST_SKEW = 1.0


@dataclass(frozen=True, eq=False)
class Spans:
    """An interval of the share of every cell.

    Args:
        low: Lower ends, (cell,); NaN where there is no interval.
        high: Upper ends, (cell,).
        n_rough: How many of the intervals are approximate.
        rough_note: What to say of the roughest of them.
        refused: How many cells have no interval for which reason.
    """

    low: np.ndarray
    high: np.ndarray
    n_rough: int
    rough_note: str
    refused: dict[str, int]


@dataclass(frozen=True)
class Together:
    """Whether intervals that should hold for all cells together can be believed to.

    Args:
        n_cells: Cells that have a part in it.
        n_groups: Independent groups in the cell that has fewest.
        n_skewed: Cells that are skewed between groups.
        coverage: How often all of them hold in simulation, where they are only approximate.
    """

    n_cells: int
    n_groups: int
    n_skewed: int
    coverage: float | None


@dataclass(frozen=True, eq=False)
class Inference:
    """One metric's numbers and all that follows from them.

    Args:
        numbers: The numbers, cells flattened.
        seed: Of the random sign flips and of simulations.
    """

    numbers: Numbers
    seed: int
    _kept: dict[tuple[str, float], Spans] = field(default_factory=dict)

    @property
    def found(self) -> np.ndarray:
        """Cells with a measured pair, (cell,)."""
        return np.asarray(self.numbers.n_pairs > 0)

    @cached_property
    def p(self) -> np.ndarray:
        """Screening p of each cell's effect being 0, (cell,); NaN where it cannot be tested."""
        p = np.full(len(self.found), np.nan)
        if self.found.any():
            p[self.found] = sign_flip(self.numbers.effect[self.found], self.numbers.group, seed=self.seed)
        return p

    @cached_property
    def p_bh(self) -> np.ndarray:
        """The same, adjusted over all cells (Benjamini-Hochberg)."""
        return benjamini_hochberg(self.p)

    @cached_property
    def agreement(self) -> np.ndarray:
        """Share of pairs whose effect has the sign of the mean, (cell,)."""
        return sign_agreement(self.numbers.effect)

    @property
    def has_intervals(self) -> bool:
        """Whether there are enough independent groups for an interval of anything."""
        return self.numbers.n_groups >= MIN_GROUPS

    def alone(self, level: float) -> Spans:
        """Return intervals that hold each by itself."""
        if ("alone", level) not in self._kept:
            self._kept["alone", level] = self._spans(level, None)
        return self._kept["alone", level]

    def together(self, level: float) -> Spans:
        """Return intervals that hold for all cells together, as far as ``trust`` says."""
        if ("together", level) not in self._kept:
            critical = np.nan
            if self.found.any() and self.has_intervals:
                critical = max_t(self._left()[self.found], self.numbers.group, seed=self.seed, level=level)
            # NaN: no cell varies between groups, so that each interval is a point whatever the critical value.
            self._kept["together", level] = self._spans(level, None if np.isnan(critical) else critical)
        return self._kept["together", level]

    def trust(self, level: float) -> Together:
        """Say how far intervals hold together."""
        n_cells, n_skewed, sizes = self._tested
        if not n_cells:
            return Together(0, self.numbers.n_groups, 0, None)
        coverage = None
        if len(sizes) < GROUPS_FOR_MAX_T or n_skewed:
            coverage = simulated_family_coverage(sizes, n_cells, level=level, seed=self.seed)
        return Together(n_cells, len(sizes), n_skewed, coverage)

    @cached_property
    def _tested(self) -> tuple[int, int, tuple[int, ...]]:
        """Cells whose interval has a width, how many of them are skewed, and group sizes where groups are fewest."""
        counts = group_sums((self.numbers.effect,), self.numbers.group).counts
        skew = group_skewness(self._left(), self.numbers.group)
        tested = ((counts > 0).sum(axis=1) >= MIN_GROUPS) & np.isfinite(skew)
        if not tested.any():
            return 0, 0, ()
        worst = counts[tested][np.argmin(effective_groups(counts[tested]))]
        sizes = tuple(int(size) for size in worst[worst > 0])
        return int(tested.sum()), int((np.abs(skew[tested]) > LARGEST_SKEW).sum()), sizes

    def _left(self) -> np.ndarray:
        """Return what the ratio's own t looks at: the effect less the cell's share of the gap."""
        share = np.nan_to_num(self.numbers.recovered())[:, None]
        return np.asarray(self.numbers.sign * self.numbers.effect - share * self.numbers.gap)

    def _spans(self, level: float, critical: float | None) -> Spans:
        numbers, share = self.numbers, self.numbers.recovered()
        low, high = np.full(len(share), np.nan), np.full(len(share), np.nan)
        found: list[Interval] = []
        if self.found.any():
            tops = numbers.sign * numbers.effect[self.found]
            found = ratio_intervals(tops, numbers.gap, numbers.group, level=level, critical=critical, seed=self.seed)
            bounded = np.array([interval.is_bounded for interval in found]) & np.isfinite(share[self.found])
            low[self.found] = np.where(bounded, [interval.low for interval in found], np.nan)
            high[self.found] = np.where(bounded, [interval.high for interval in found], np.nan)
        rough = [interval for interval in found if interval.coverage is not None]
        worst = min(rough, key=lambda interval: interval.coverage or 0.0) if rough else None
        refused: dict[str, int] = {}
        for interval in found:
            if interval.status == "none" and interval.note:
                refused[interval.note] = refused.get(interval.note, 0) + 1
        return Spans(low, high, len(rough), worst.note if worst else "", refused)
