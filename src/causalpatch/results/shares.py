"""Effects and recovered shares: the arithmetic between patched runs, base runs and the gap.

1. ``effect[c, i] = m(patched)[c, i] - m(base)[i]`` for cell ``c`` and pair ``i``, where the run was made.
2. ``gap[i] = m(clean)[i] - m(reference)[i]``.
3. ``recovered[c] = sign * mean_i effect[c, i] / mean_i gap[i]``, both means over the pairs measured in that cell, with
   sign +1 for denoise and -1 for noise (the share removed). A ratio of means, never a mean of ratios: a pair with a
   tiny gap would drown the others.

A share means nothing where the gap is not above 0, so there is then an error and no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from causalpatch.base.errors import NoGap
from causalpatch.statistics.intervals import MIN_GROUPS, mean_interval

# Below this share of the metric's own size a gap is rounding of float32, not a difference.
ROUNDING = 1e-6
# A pair's own ratio is given only where its gap is at least this share of the mean |gap|.
SMALLEST_GAP_SHARE = 1e-3


@dataclass(frozen=True, eq=False)
class Numbers:
    """One metric's numbers, cells flattened.

    Args:
        metric: Name of the metric.
        effect: m(patched) - m(base), axes cell and pair; NaN where there is no run.
        gap: m(clean) - m(reference) of each pair.
        clean: Mean of m(clean), for messages.
        reference: Mean of m(reference), for messages.
        group: Independent component of each pair.
        sign: +1 for denoise, -1 for noise.
        rising: +1 where a larger metric is better, -1 where a smaller one is (loss, rank).
        no_share: Why the effects are a share of nothing, or an empty text: patches from the source and ablations in one
            run, say, have no one reference.
        instead: What can be read where there is no gap, for messages.
    """

    metric: str
    effect: np.ndarray
    gap: np.ndarray
    clean: np.ndarray
    reference: np.ndarray
    group: np.ndarray
    sign: int
    rising: int
    no_share: str = ""
    instead: str = "effects.effect()"

    @cached_property
    def measured(self) -> np.ndarray:
        """Where there is a run, axes cell and pair."""
        return np.asarray(np.isfinite(self.effect))

    @cached_property
    def n_pairs(self) -> np.ndarray:
        """Number of pairs measured in each cell."""
        return np.asarray(self.measured.sum(axis=1))

    @cached_property
    def n_groups(self) -> int:
        """Number of independent components among all pairs."""
        return len(np.unique(self.group))

    @cached_property
    def n_components(self) -> np.ndarray:
        """Number of independent components measured in each cell."""
        return np.asarray(component_sums(self.measured.astype(np.float64), self.group).astype(bool).sum(axis=1))

    @property
    def smallest_gap(self) -> float:
        """A pair's own ratio is NaN where its gap is smaller than this, in the metric's unit."""
        return SMALLEST_GAP_SHARE * float(np.abs(self.gap).mean())

    def mean_effect(self) -> np.ndarray:
        """Return the mean effect of each cell over its measured pairs; NaN where there is none."""
        return _divide(np.where(self.measured, self.effect, 0.0).sum(axis=1), self.n_pairs)

    def mean_gap(self) -> np.ndarray:
        """Return the mean gap over the pairs measured in each cell; NaN where there is none."""
        return _divide(self.measured @ self.gap, self.n_pairs)

    def recovered(self) -> np.ndarray:
        """Return each cell's share: ratio of means; NaN without runs, or where its pairs have no gap."""
        gap = self.mean_gap()
        kept = self.rising * gap > self.smallest_gap
        return self.sign * _divide(self.mean_effect(), np.where(kept, gap, 0.0))

    def recovered_per_pair(self, smallest_gap: float) -> np.ndarray:
        """Return each pair's own share, axes cell and pair; NaN where its gap is smaller than ``smallest_gap``."""
        gap = np.where(np.abs(self.gap) < smallest_gap, 0.0, self.gap)
        return self.sign * _divide(self.effect, gap[None])

    def require_gap(self) -> None:
        """Refuse shares of a gap that is not above 0.

        Raises:
            NoGap: The 95 % interval of the gap contains 0 or is negative; with fewer than 10 independent components,
                which allow no interval, its mean is not above 0. Or there is no one reference.
        """
        if self.no_share:
            raise NoGap(
                "these effects are a share of nothing",
                facts=[("because", self.no_share)],
                fix="read effects.effect(), or run what has one reference by itself",
            )
        gap = self.rising * self.gap
        mean = float(gap.mean())
        facts: list[tuple[str, object]] = [
            ("clean", f"{self.clean.mean():.4g} (mean of {len(gap)} pairs)"),
            ("reference", f"{self.reference.mean():.4g}"),
        ]
        scale = float(np.abs(self.clean).mean() + np.abs(self.reference).mean()) / 2
        absent = mean <= ROUNDING * scale
        if self.n_groups >= MIN_GROUPS:
            interval = mean_interval(gap, self.group, level=0.95)
            absent = absent or not interval.low > 0
            bounds = sorted((self.rising * interval.low, self.rising * interval.high))
            facts.append(("gap", f"{self.rising * mean:.4g}, 95 % interval {bounds[0]:.4g} to {bounds[1]:.4g}"))
        else:
            facts.append(("gap", f"{self.rising * mean:.4g}"))
        if self.rising < 0:
            facts.append(("expected", "a gap below 0: a smaller value of this metric is better"))
        if absent:
            raise NoGap(
                f"clean and reference runs have no gap in {self.metric!r}, so no share of it can be given",
                facts=facts,
                fix=f"read {self.instead} instead, or choose pairs that the model tells apart (pairs.check())",
            )


def component_sums(values: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return sums over the pairs of each component, axes cell and component (in sorted order)."""
    _, place = np.unique(group, return_inverse=True)
    membership = np.eye(place.max() + 1)[place.ravel()]
    return np.asarray(values @ membership, dtype=np.float64)


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    shape = np.broadcast_shapes(np.shape(top), np.shape(bottom))
    share = np.full(shape, np.nan)
    np.divide(top, bottom, out=share, where=np.broadcast_to(bottom != 0, shape))
    return share
