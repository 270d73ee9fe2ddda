"""What the comparisons of all faults say together: the fault is the unit, and every arm stands against the located one.

For each kind of arm and each fault d = damage of located - damage of the other one (of random draws the mean of those
that reached the target), in nats of KL(base || tuned) per retain token. Over the faults in which both reached it: the
mean of d and the mean ratio (of logarithms) with 95 % intervals, the fault as the cluster. An arm that did not reach
the target has infinite damage; the sign test counts these faults too.

The *rank test* takes of each fault the rank p of located among its random draws. Were what was located a draw like the
others, p would be any of 1/(R + 1), …, 1 with equal chance; the probability of a mean so small is exact. It can show
what one fault cannot: with R = 15 draws no rank p lies below 1/16.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from scipy.stats import binomtest

from benchmarks.tuning_faults import Case
from causalpatch.statistics.intervals import Interval, mean_interval

KINDS: Final = ("random", "same layers", "lowest effect", "spread", "full", "prefix", "steering")
_LEAST: Final = 1e-6  # nat per token: what a ratio is taken of, at least


@dataclass(frozen=True)
class Contrast:
    """The located arms against the arms of a kind, over faults.

    Args:
        kind: The kind.
        n_made: Faults in which there is such an arm.
        n_reached: Faults in which it reached the target (of random draws: one of them did).
        difference: Mean of d over faults in which both reached it; None where these are fewer than two.
        ratio: Mean of the logarithm of the ratio, likewise.
        n_less: Faults in which located did less damage.
        n_more: Faults in which it did more.
        p: Of the sign test, two-sided; None where there is nothing to count.
    """

    kind: str
    n_made: int
    n_reached: int
    difference: Interval | None
    ratio: Interval | None
    n_less: int
    n_more: int
    p: float | None


def arms_of(case: Case, kind: str) -> list[Mapping[str, Any]]:
    """Return the arms of a kind."""
    return [arm for arm in case.report["arms"] if arm["kind"] == kind]


def located_of(case: Case) -> Mapping[str, Any]:
    """Return the arm in which what was located was changed."""
    return arms_of(case, "located")[0]


def damage(arm: Mapping[str, Any]) -> float:
    """Return the mean KL per retain token; infinite where the target was not reached."""
    return math.inf if arm["damage"] is None else float(arm["damage"])


def damage_of(case: Case, kind: str) -> float | None:
    """Return the damage of a kind: of several arms the mean of those that reached the target; None without an arm."""
    every = [damage(arm) for arm in arms_of(case, kind)]
    reached = [each for each in every if math.isfinite(each)]
    return (float(np.mean(reached)) if reached else math.inf) if every else None


def contrast(cases: Sequence[Case], kind: str) -> Contrast:
    """Hold the located arms against those of a kind."""
    both = [(damage(located_of(case)), damage_of(case, kind)) for case in cases]
    made = [(own, other) for own, other in both if other is not None]
    known = np.array([pair for pair in made if all(map(math.isfinite, pair))], dtype=np.float64).reshape(-1, 2)
    difference = ratio = None
    if len(known) > 1:
        faults = np.arange(len(known))
        difference = mean_interval(known[:, 0] - known[:, 1], faults)
        logs = np.log(np.maximum(known, _LEAST))
        ratio = mean_interval(logs[:, 0] - logs[:, 1], faults)
    n_less, n_more = sum(own < other for own, other in made), sum(own > other for own, other in made)
    n_signs = n_less + n_more
    p = float(binomtest(n_less, n_signs).pvalue) if n_signs else None
    n_reached = sum(math.isfinite(other) for _, other in made)
    return Contrast(kind, len(made), n_reached, difference, ratio, n_less, n_more, p)


def rank_test(cases: Sequence[Case]) -> tuple[float, float, float]:
    """Return the mean rank p over faults with random draws, its chance of being so small, and the least such chance."""
    ranks, sizes = [], []
    for case in cases:
        draws = [damage(arm) for arm in arms_of(case, "random")]
        if draws:
            ranks.append(1 + sum(each <= damage(located_of(case)) for each in draws))
            sizes.append(1 + len(draws))
    if not sizes:
        return math.nan, math.nan, math.nan
    unit = math.lcm(*sizes)
    chances = np.ones(1)  # of each sum of ranks, in parts of the unit
    for size in sizes:
        own = np.zeros(unit + 1)
        own[unit // size :: unit // size] = 1 / size
        chances = np.convolve(chances, own)
    total = sum(rank * (unit // size) for rank, size in zip(ranks, sizes, strict=True))
    mean = total / unit / len(sizes)
    return mean, float(chances[: total + 1].sum()), float(np.prod([1 / size for size in sizes]))
