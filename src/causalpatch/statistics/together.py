"""How often intervals that should hold for all cells at once do so, by simulation, and how skewed the cells are.

The critical value of ``max_t`` comes from flipped signs, so it supposes that the values of groups are symmetric. For
skewed ones each cell's interval misses too often on one side, and with many cells one of them nearly always does.

1. For normal and for exponential values (skewness 2), alike within a group or independent: draw a few sweeps of ``K``
   cells that are independent of each other, and take the critical value ``c`` of each by ``max_t``.
2. Draw many single cells: ``F(c)`` is the share of them with ``|t| <= c``.
3. All ``K`` intervals hold with probability ``F(c) ** K``, averaged over the sweeps; the lowest of the four populations
   is reported. (Simulating whole sweeps instead gives the same within .06, at a hundred times the cost.)

Cells that go together, as those of a real sweep do, hold together more often than independent ones; heavier tails than
the exponential's less often. As in ``coverage``, only sizes and distributions are simulated, never the data at hand.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

from causalpatch.base.seeds import generator
from causalpatch.statistics.clusters import FloatArray, group_sums
from causalpatch.statistics.coverage import absolute_t, populations
from causalpatch.statistics.permutation import max_t

MOST_CELLS: Final = 1000  # of a simulated sweep; of skewed values the share for more of them is lower still
_NUMBERS: Final = 2_000_000  # drawn for F: 20,000 cells of up to 100 groups, standard error .01 for 20 cells
_MOST_DRAWS: Final = 20_000
_FLIPS: Final = 499


def simulated_family_coverage(sizes: Sequence[int], n_cells: int, *, level: float = 0.95, seed: int = 0) -> float:
    """Return how often the intervals of all cells hold at once, in simulation.

    Args:
        sizes: Pairs in each group.
        n_cells: Cells whose intervals should hold together; more than 1,000 are simulated as 1,000.
        level: Nominal probability, as given to ``max_t``.
        seed: Seed of the simulation.

    Returns:
        The lowest probability over the four populations above.

    Examples:
        >>> round(simulated_family_coverage([1] * 25, 20), 1)
        0.7

    Cost:
        A third of a second with 100 groups, two seconds with 2,000; once for the same sizes and number of cells.
    """
    return _simulate(tuple(sorted(map(int, sizes))), min(int(n_cells), MOST_CELLS), float(level), seed)


@lru_cache(maxsize=512)
def _simulate(sizes: tuple[int, ...], n_cells: int, level: float, seed: int) -> float:
    counts = np.array(sizes, dtype=np.float64)
    group = np.repeat(np.arange(counts.size), sizes)
    random = generator(seed, "family", n_cells, *sizes)
    n_draws = int(np.clip(_NUMBERS // counts.size, 2000, _MOST_DRAWS))
    n_sweeps = int(np.clip(400 // n_cells, 3, 20))
    single = [np.sort(absolute_t(sums, counts)) for sums in populations(counts, n_draws, random)]
    held = np.empty((n_sweeps, len(single)))
    for sweep in range(n_sweeps):
        for place, sums in enumerate(populations(counts, n_cells, random)):
            values = (sums / counts)[:, group]
            critical = max_t(values, group, n_draws=_FLIPS, seed=seed + sweep, level=level)
            held[sweep, place] = np.mean(single[place] <= critical) ** n_cells
    return float(held.mean(axis=0).min())


def group_skewness(values: npt.ArrayLike, group: npt.ArrayLike) -> FloatArray:
    """Return how skewed each cell's deviations are between groups.

    Args:
        values: Values, (cell, pair); NaN where a pair was not measured.
        group: Number of the independent group of each pair, (pair,).

    Returns:
        The skewness of the linearised group sums of ``clusters``, (cell,): 0 for symmetric ones, 2 for exponential
        ones; NaN where groups do not differ.

    Raises:
        SettingError: Values and groups do not stand for the same pairs.
        NotFinite: A value is infinite.

    Examples:
        >>> group_skewness([[1.0, 2.0, 3.0], [0.0, 0.0, 9.0]], [0, 1, 2]).round(2).tolist()
        [0.0, 0.71]
    """
    data = group_sums((np.atleast_2d(np.asarray(values, dtype=np.float64)),), group)
    (sums,), (mean,), n_groups = data.sums, data.means(), np.maximum(data.n_groups, 1)
    moved = np.where(data.counts > 0, sums - np.nan_to_num(mean)[:, None] * data.counts, 0.0)
    spread = np.sqrt((moved**2).sum(axis=1) / n_groups)
    differs = spread > 1e-9 * np.abs(sums).max(axis=1)
    third = (moved**3).sum(axis=1) / n_groups
    return np.asarray(np.divide(third, spread**3, out=np.full_like(spread, np.nan), where=differs))
