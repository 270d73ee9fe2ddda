"""What a program means: the values of its variables on prompts, by exact selection and averaging, without weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from causalpatch.circuits.ground_truth.language import (
    Aggregate,
    Interpolate,
    Is,
    Lookup,
    Positions,
    Program,
    Select,
    Tokens,
    Variable,
)

Array = NDArray[np.float64]

# A gap of scores: exp(-40) is 4e-18, less than half of what float64 tells apart from 1.
SHARP: Final = 40.0


@dataclass(frozen=True)
class Scores:
    """The scores of a selection, ``table[query, key] + begin * [key position is 0] + later * key position``.

    Args:
        table: Axes (category of the query, category of the key); 1 long where nothing is shown.
        begin: What position 0 has more.
        later: What each position has more than the one before.
    """

    table: Array
    begin: float
    later: float


def scores_of(select: Select, length: int) -> Scores:
    """Return scores among which the softmax selects: what is not selected is at least ``SHARP`` lower.

    Args:
        select: The selection.
        length: Length of the longest prompt.
    """
    n_queries = select.queries.size if select.queries is not None else 1
    n_keys = select.keys.size if select.keys is not None else 1
    found = [[select.match(query, key) for key in range(n_keys)] for query in range(n_queries)]
    weights = np.array([[np.nan if each is None else float(each) for each in row] for row in found])
    is_match = ~np.isnan(weights)
    top = float(np.nanmax(weights)) if is_match.any() else 0.0
    later = {"all": 0.0, "latest": SHARP, "earliest": -SHARP}[select.prefer]
    spread = abs(later) * (length - 1) + (SHARP * (top - float(np.nanmin(weights))) if is_match.any() else 0.0)
    half = SHARP + spread
    table = np.where(is_match, 2 * half + SHARP * (np.nan_to_num(weights) - top), 0.0)
    begin = {"as any": 0.0, "if none": half, "always": 2 * half}[select.begin]
    return Scores(table, begin, later)


def evaluate(
    program: Program,
    prompts: Sequence[Sequence[int]] | NDArray[np.int64],
    given: Mapping[Variable, Array] | None = None,
) -> dict[Variable, Array]:
    """Return every variable's values ``[prompt, position, column]`` on prompts of one length.

    Args:
        program: The program.
        prompts: Token ids, axes (prompt, position).
        given: Values that some variables have instead of their own.
    """
    ids = np.array(prompts)
    values: dict[Variable, Array] = {}
    for variable in program.variables():
        if given is not None and variable in given:
            values[variable] = given[variable]
        elif isinstance(variable, Tokens):
            values[variable] = np.eye(variable.size)[ids]
        elif isinstance(variable, Positions):
            shown = np.eye(variable.size)[: ids.shape[1]]
            values[variable] = np.broadcast_to(shown, (len(ids), *shown.shape))
        elif isinstance(variable, Is):
            values[variable] = values[variable.source][..., [variable.category]]
        elif isinstance(variable, Lookup):
            values[variable] = _looked_up(variable, values)
        elif isinstance(variable, Interpolate):
            values[variable] = interpolated(variable, _summed(variable.sources, values)[..., 0])
        else:
            values[variable] = _aggregated(variable, values, ids.shape[1])
    return values


def table_of(lookup: Lookup) -> dict[tuple[int, ...], Array]:
    """Return what each combination of categories is looked up as, ``[column]``, without those that give zeros."""
    found: dict[tuple[int, ...], Array] = {}
    for categories in product(*(range(source.size) for source in lookup.sources)):
        result = lookup.function(*categories)
        if result is not None and (lookup.size > 1 or result != 0):
            found[categories] = np.eye(lookup.size)[int(result)] if lookup.size > 1 else np.array([float(result)])
    return found


def points_of(variable: Interpolate) -> tuple[Array, Array]:
    """Return the points of a piecewise linear function: sums, and what they become ``[point, column]``."""
    at = np.array(sorted(variable.points), dtype=float)
    to = [variable.points[each] for each in sorted(variable.points)]
    if variable.size > 1:
        return at, np.eye(variable.size)[np.array(to, dtype=int)]
    return at, np.array(to, dtype=float)[:, None]


def interpolated(variable: Interpolate, sums: Array) -> Array:
    """Return the values ``[…, column]`` of a piecewise linear function at sums ``[…]``."""
    at, to = points_of(variable)
    return np.stack([np.interp(sums, at, column) for column in to.T], axis=-1)


def _looked_up(lookup: Lookup, values: dict[Variable, Array]) -> Array:
    out = np.zeros((*values[lookup.sources[0]].shape[:2], lookup.size))
    for categories, result in table_of(lookup).items():
        is_here = np.sum([values[each][..., k] for each, k in zip(lookup.sources, categories, strict=True)], axis=0)
        out += np.maximum(is_here - (len(categories) - 1), 0.0)[..., None] * result
    return out


def _aggregated(aggregate: Aggregate, values: dict[Variable, Array], length: int) -> Array:
    select = aggregate.select
    averaged = _summed(aggregate.values, values)
    scores = scores_of(select, length)
    one = np.ones((len(averaged), length, 1))
    queries = values[select.queries] if select.queries is not None else one
    keys = values[select.keys] if select.keys is not None else one
    at = np.arange(length)
    found = queries @ scores.table @ keys.transpose(0, 2, 1) + scores.begin * (at == 0) + scores.later * at
    found = np.where(at[:, None] >= at, found, -np.inf)
    is_selected = found > found.max(-1, keepdims=True) - SHARP / 2
    out: Array = is_selected / is_selected.sum(-1, keepdims=True) @ averaged
    return out


def _summed(variables: Sequence[Variable], values: Mapping[Variable, Array]) -> Array:
    total: Array = np.sum([values[each] for each in variables], axis=0)
    return total
