"""Tests of hypotheses on circuits by Shi et al., under their own names and nulls, on independent groups of pairs.

*Non-equivalence*: the null is that a circuit does better than the model on a share of inputs within 1/2 +- epsilon. A
small p says that they differ; a large one shows nothing, above all not that they are alike.

*Dependence*: the null is that what all other edges do is independent of what the model does. A small p says that
something of the behaviour is outside the circuit; a large one, again, shows nothing.

References:
    Shi et al. 2024, "Hypothesis Testing the Circuit Hypothesis in LLMs", 2410.13032; Gretton et al. 2007, "A Kernel
    Statistical Test of Independence" (HSIC).
"""

import math
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt

from causalpatch.base.extras import lazy
from causalpatch.base.seeds import generator
from causalpatch.statistics.clusters import FloatArray

if TYPE_CHECKING:
    from scipy import special
else:
    special = lazy("scipy.special")

N_DRAWS: Final = 999


def non_equivalence(
    circuit: npt.ArrayLike, model: npt.ArrayLike, group: npt.ArrayLike, *, epsilon: float = 0.1
) -> float:
    """Return the two-sided p of a circuit doing better than the model about as often as worse, by a sign test.

    Args:
        circuit: The metric with the circuit alone, (pair,).
        model: The metric of the model, (pair,).
        group: Independent group of each pair; means over its pairs are compared, and those that are equal left out.
        epsilon: How far the share may be from 1/2; that of the paper unless given. With 0 it is the exact sign test.

    Examples:
        >>> round(non_equivalence([1, 2, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5], range(6), epsilon=0), 4)
        0.0312
    """
    difference = _means(circuit, group) - _means(model, group)
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    total, fewer = better + worse, min(better, worse)
    if 2 * fewer == total:
        return 1.0
    # Of all shares within the null, those at its ends are least at odds with what was seen.
    return float(special.bdtr(fewer, total, 0.5 - epsilon) + special.bdtr(fewer, total, 0.5 + epsilon))


def smallest_dependence(n_groups: int, n_draws: int = N_DRAWS) -> float:
    """Return the least p that ``dependence`` can give: few groups have few orders.

    Args:
        n_groups: Independent groups.
        n_draws: Permutations.

    Examples:
        >>> round(smallest_dependence(4), 4), smallest_dependence(30)
        (0.0417, 0.001)
    """
    return max(1 / (1 + n_draws), 1 / math.factorial(min(n_groups, 20)))


def dependence(
    rest: npt.ArrayLike, model: npt.ArrayLike, group: npt.ArrayLike, *, n_draws: int = N_DRAWS, seed: int = 0
) -> float:
    """Return the p of all other edges' metric being independent of the model's, by HSIC with permuted groups.

    Args:
        rest: The metric with everything but the circuit, (pair,).
        model: The metric of the model, (pair,).
        group: Independent group of each pair; means over its pairs are compared.
        n_draws: Permutations.
        seed: Of the permutations.

    Examples:
        >>> rising = list(range(20))
        >>> dependence(rising, rising, range(20))
        0.001
    """
    first, second = (_centred(_kernel(_means(each, group))) for each in (rest, model))
    observed = float((first * second).sum())
    draw = generator(seed, "dependence")
    slack = 1e-12 * abs(observed)
    reached = 0
    for _ in range(n_draws):
        order = draw.permutation(len(first))
        reached += float((first[np.ix_(order, order)] * second).sum()) >= observed - slack
    return (1 + reached) / (1 + n_draws)


def _means(values: npt.ArrayLike, group: npt.ArrayLike) -> FloatArray:
    """Return the mean of each group."""
    _, place = np.unique(np.asarray(group), return_inverse=True)
    return np.asarray(np.bincount(place, weights=np.asarray(values, dtype=np.float64)) / np.bincount(place))


def _kernel(values: FloatArray) -> FloatArray:
    """Return Gaussian similarities, as wide as the median distance."""
    apart = np.abs(values[:, None] - values[None])
    width = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0
    return np.asarray(np.exp(-((apart / width) ** 2) / 2))


def _centred(kernel: FloatArray) -> FloatArray:
    return np.asarray(kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean())
