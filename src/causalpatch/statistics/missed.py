"""What a screen missed: how many components outside its top can matter, from a random sample stratified by score.

1. Components outside the top are ranked by the magnitude of their scores and cut into strata of neighbours. Of the
   ``N_h`` of stratum h, ``n_h`` are drawn without replacement and measured: ``x_h`` of them matter. Of all, ``M_h`` do.
2. ``x_h`` is hypergeometric, and so distributed as a sum of ``n_h`` independent trials of unequal chances (Vatutin and
   Mikhailov). So is ``x = sum x_h`` as one of ``n = sum n_h`` trials, with mean ``sum M_h n_h / N_h``.
3. Such a sum is at most ``c`` with no higher probability than a binomial number of the same mean, as long as ``c`` is
   no more than the mean less 1 (Hoeffding, theorem 4). So with Clopper and Pearson's upper limit ``p`` of x in n,

       sum M_h n_h / N_h <= max(n p, x + 1)

   holds with the probability stated, however what matters lies in the strata: no correction for their number is needed.
4. The bound is the largest ``sum M_h`` that agrees with this and with what was seen, ``x_h <= M_h <= N_h - n_h + x_h``.
   Where all strata are sampled alike it is ``p sum N_h``; a stratum that was measured whole is known, and is counted.

References:
    Clopper & Pearson 1934, Biometrika 26; Hoeffding 1956, "On the Distribution of the Number of Successes in
    Independent Trials", Annals of Mathematical Statistics 27; Vatutin & Mikhailov 1982, "Limit
    Theorems for the Number of Empty Cells in an Equiprobable Scheme for Group Allocation of Particles", Theory of
    Probability and its Applications 27.
"""

import bisect
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from causalpatch.base.errors import SettingError
from causalpatch.statistics.binomial import clopper_pearson
from causalpatch.statistics.clusters import FloatArray

MOST_STRATA: Final = 10
_FEWEST_OF_STRATUM: Final = 5  # drawn in each, so that a stratum is more than an anecdote


@dataclass(frozen=True, eq=False)
class Sample:
    """Some components of each stratum, drawn without replacement.

    Args:
        chosen: Numbers of the components, (drawn,).
        stratum: The stratum of each, (drawn,); 0 has the largest scores.
        sizes: Components in each stratum, (stratum,).
    """

    chosen: npt.NDArray[np.int64]
    stratum: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]

    @property
    def sampled(self) -> npt.NDArray[np.int64]:
        """How many were drawn from each stratum, (stratum,)."""
        return np.bincount(self.stratum, minlength=len(self.sizes))

    @property
    def weights(self) -> FloatArray:
        """How many components each that was drawn stands for, (drawn,)."""
        return np.asarray((self.sizes / np.maximum(self.sampled, 1))[self.stratum])


def draw_stratified(ranked: npt.ArrayLike, n_drawn: int, random: np.random.Generator) -> Sample:
    """Draw components from strata of neighbours in rank, of all strata the same share but for rounding.

    Args:
        ranked: Numbers of the components, that of the largest score first.
        n_drawn: How many to draw; all where there are no more.
        random: Where they come from.

    Returns:
        The sample, of at most ten strata with five draws or more in each.
    """
    components = np.asarray(ranked, dtype=np.int64)
    sizes, sampled = divide(len(components), n_drawn)
    chosen: list[np.ndarray] = []
    first = 0
    for size, count in zip(sizes.tolist(), sampled.tolist(), strict=True):
        chosen.append(components[first + np.sort(random.choice(size, count, replace=False))])
        first += size
    drawn = np.concatenate([np.zeros(0, dtype=np.int64), *chosen])
    return Sample(drawn, np.repeat(np.arange(len(sizes)), sampled), sizes)


def divide(n_components: int, n_drawn: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the sizes of strata and how many are drawn from each, in one proportion but for rounding."""
    n_drawn = min(n_drawn, n_components)
    n_strata = int(np.clip(n_drawn // _FEWEST_OF_STRATUM, 1, MOST_STRATA)) if n_drawn else 1
    sampled = np.diff(np.arange(n_strata + 1) * n_drawn // n_strata)
    ends = np.cumsum(sampled) * n_components // max(n_drawn, 1) if n_drawn else np.array([n_components])
    return np.diff(ends, prepend=0), sampled


def most_missed(sizes: npt.ArrayLike, sampled: npt.ArrayLike, found: npt.ArrayLike, level: float = 0.95) -> int:
    """Return an upper bound on how many components of all strata matter, those that were found among them.

    Args:
        sizes: Components in each stratum, (stratum,).
        sampled: Components of each that were drawn and measured, (stratum,).
        found: Those of them that matter, (stratum,).
        level: With which probability the bound holds, at least.

    Raises:
        SettingError: More were found than sampled, or sampled than there are; or the level is not between 0.5 and 1.

    Examples:
        >>> most_missed([400], [100], [0])  # 400 times Clopper and Pearson's .0295
        11
        >>> most_missed([400, 50], [100, 50], [0, 3])  # the second stratum was measured whole
        14
    """
    size, drawn, seen = (np.asarray(each, dtype=np.int64) for each in (sizes, sampled, found))
    if not (size.shape == drawn.shape == seen.shape and ((seen >= 0) & (seen <= drawn) & (drawn <= size)).all()):
        raise SettingError(
            "a sample does not belong to its strata",
            facts=[("sizes", size.tolist()), ("sampled", drawn.tolist()), ("found", seen.tolist())],
            fix="give for each stratum its size, how many were drawn, and how many of these were found",
        )
    check_level(level)
    partly = drawn < size
    known, (size, drawn, seen) = int(seen[~partly].sum()), (each[partly] for each in (size, drawn, seen))
    n_drawn, n_found = int(drawn.sum()), int(seen.sum())
    if not n_drawn:
        return known + int(size.sum())
    one_sided = clopper_pearson(n_found, n_drawn, 2 * level - 1)[1]
    share = drawn / size
    left = max(n_drawn * one_sided, n_found + 1.0) - float((seen * share).sum())
    total = n_found
    for place in np.argsort(share, kind="stable"):  # what is least sampled can hide most
        room = int(size[place] - drawn[place])
        more = room if share[place] == 0 else min(room, max(left, 0.0) / share[place])
        left -= more * share[place]
        total += more
    return known + int(np.floor(total + 1e-9))


def sample_for(n_components: int, at_most: int, level: float = 0.95) -> int:
    """Return how large a sample bounds what matters outside the top, if none of it is found to.

    Args:
        n_components: Components outside the top.
        at_most: What the bound shall be.
        level: With which probability it holds.

    Raises:
        SettingError: The bound is below 0, or the level is not between 0.5 and 1.

    Examples:
        >>> sample_for(429, at_most=20)
        60
    """
    check_level(level)
    if at_most < 0:
        raise SettingError(f"there cannot be at most {at_most} components", fix="at_most=20")

    def suffices(n_drawn: int) -> bool:
        sizes, sampled = divide(n_components, n_drawn)
        return most_missed(sizes, sampled, np.zeros_like(sampled), level) <= at_most

    n_drawn = bisect.bisect_left(range(n_components), True, key=suffices)  # noqa: FBT003 - what is looked for
    while n_drawn and suffices(n_drawn - 1):  # strata are rounded, so that it may fail and hold again
        n_drawn -= 1
    return n_drawn


def check_level(level: float) -> None:
    """Make sure that a level is one.

    Raises:
        SettingError: It is not between 0.5 and 1.
    """
    if not 0.5 < level < 1:
        raise SettingError(
            f"a bound cannot hold with probability {level:g}",
            facts=[("allowed", "above .5, below 1")],
            fix="level=0.95",
        )
