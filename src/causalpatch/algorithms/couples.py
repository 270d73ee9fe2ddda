"""Couples: which input is the base and which the source of an interchange, drawn with a seed.

1. From a pool made of an algorithm, every ordered couple of different inputs is possible. Couples are drawn from all
   of them, each draw by itself, so that each is one observation.
2. From a pool of pairs, independent components are matched two by two, and couples go from one to the other. A couple
   of components is one observation, however many draws it gives; no prompt stands in two of them.
3. An interchange that leaves the algorithm's output as it was is passed by a network in which it does nothing. So half
   of the draws are of couples whose output changes (the *changing* ones), and both shares are reported.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from causalpatch.algorithms.hypothesis import Hypothesis
from causalpatch.algorithms.pool import Pool
from causalpatch.base.errors import AlgorithmError
from causalpatch.base.seeds import generator

MOST_COUPLES = 20_000
"""Most couples that are looked at for whether their output changes; of more, so many are drawn."""


@dataclass(frozen=True, eq=False)
class Couples:
    """Bases and sources.

    Args:
        base: Number of the base of each couple in the pool, ``(couple,)``.
        source: Number of its source.
        group: What counts as one observation, ``(couple,)``.
        expected: The algorithm's counterfactual output of each.
        is_changing: Whether it differs from the output at the base, ``(couple,)``.
        changing_share: Share of all possible couples whose output changes.
    """

    base: np.ndarray
    source: np.ndarray
    group: np.ndarray
    expected: tuple[Any, ...]
    is_changing: np.ndarray
    changing_share: float

    def __len__(self) -> int:
        return len(self.base)


def possible(pool: Pool, seed: int, *, equally_long: bool) -> np.ndarray:
    """Return couples that can be drawn, ``(couple, 3)``: base, source, and what counts as one observation.

    Args:
        pool: The inputs.
        seed: Seed of the draw where there are too many, and of the matches between components.
        equally_long: Whether base and source must have equally many tokens.

    Raises:
        AlgorithmError: There are none.
    """
    stream = generator(seed, "couples", pool.name)
    if pool.unit == "component":
        found = _between_components(pool, stream, equally_long=equally_long)
    else:
        found = _all(pool, stream, equally_long=equally_long)
    if not len(found):
        why = "prompts of equal length" if equally_long else "independent components"
        raise AlgorithmError(
            f"no two inputs of '{pool.name}' can be interchanged",
            facts=[("inputs", len(pool)), ("needed", f"two {why}")],
            fix="name positions, such as @-1, so that lengths may differ" if equally_long else "give more pairs",
        )
    return found


def draw_couples(
    pool: Pool, hypothesis: Hypothesis, variables: Sequence[str], found: np.ndarray, n: int, seed: int
) -> Couples:
    """Draw couples for the interchange of some variables, half of them such that the output changes.

    Args:
        pool: The inputs.
        hypothesis: The algorithm.
        variables: What is interchanged, all from one source.
        found: Couples that can be drawn; see ``possible``.
        n: How many are drawn.
        seed: Seed of the draw.

    Raises:
        AlgorithmError: No interchange of these variables changes the output.
    """
    algorithm = hypothesis.algorithm
    known: dict[tuple[int, tuple[Any, ...]], Any] = {}

    def counterfactual(base: int, source: int) -> Any:
        held = {name: pool.values[source][name] for name in variables}
        key = (base, tuple(held.values()))
        if key not in known:
            inputs = {name: pool.values[base][name] for name in algorithm.inputs}
            known[key] = algorithm.run_with(inputs, held)[algorithm.output]
        return known[key]

    outputs = pool.outputs(hypothesis)
    expected = [counterfactual(base, source) for base, source, _ in found.tolist()]
    changes = np.array([out != outputs[base] for out, base in zip(expected, found[:, 0].tolist(), strict=True)])
    if not changes.any():
        raise AlgorithmError(
            f"no interchange of {' and '.join(map(repr, variables))} changes the output of '{algorithm.name}'",
            facts=[("couples tried", len(found)), ("outputs", ", ".join(map(repr, dict.fromkeys(outputs)))[:88])],
            fix="give inputs at which the variable matters, or leave it out",
        )
    stream = generator(seed, "interchange", pool.name, *variables)
    pick = _with_repeats if pool.unit == "draw" else _without_repeats
    n_changing = n if changes.all() else -(-n // 2)
    rows = np.concatenate(
        [pick(np.flatnonzero(changes), n_changing, stream), pick(np.flatnonzero(~changes), n - n_changing, stream)]
    )
    group = np.arange(len(rows)) if pool.unit == "draw" else found[rows, 2]
    return Couples(
        found[rows, 0],
        found[rows, 1],
        group,
        tuple(expected[row] for row in rows.tolist()),
        changes[rows],
        float(changes.mean()),
    )


def draw_any(pool: Pool, found: np.ndarray, n: int, seed: int) -> Couples:
    """Draw couples whatever their outputs are; what is expected is the base's own output, so nothing changes."""
    pick: Callable[..., np.ndarray] = _with_repeats if pool.unit == "draw" else _without_repeats
    rows = pick(np.arange(len(found)), n, generator(seed, "resampled", pool.name))
    group = np.arange(len(rows)) if pool.unit == "draw" else found[rows, 2]
    return Couples(found[rows, 0], found[rows, 1], group, (), np.zeros(len(rows), dtype=bool), 0.0)


def _with_repeats(rows: np.ndarray, n: int, stream: np.random.Generator) -> np.ndarray:
    return stream.choice(rows, n) if len(rows) and n else rows[:0]


def _without_repeats(rows: np.ndarray, n: int, stream: np.random.Generator) -> np.ndarray:
    return np.sort(stream.permutation(rows)[:n])


def _all(pool: Pool, stream: np.random.Generator, *, equally_long: bool) -> np.ndarray:
    size = len(pool)
    if size * (size - 1) <= MOST_COUPLES:
        base, source = (each.ravel() for each in np.meshgrid(np.arange(size), np.arange(size), indexing="ij"))
    else:
        base, source = stream.integers(0, size, (2, 4 * MOST_COUPLES))
    fits = base != source
    if equally_long:
        fits &= pool.lengths[base] == pool.lengths[source]
    made = np.stack([base[fits], source[fits], np.zeros(int(fits.sum()), dtype=np.int64)], axis=1)
    return made[:MOST_COUPLES]


def _between_components(pool: Pool, stream: np.random.Generator, *, equally_long: bool) -> np.ndarray:
    """Match components and return the couples between the two of each match, both ways."""
    members: dict[int, list[int]] = {}
    for number, component in enumerate(pool.components.tolist()):
        members.setdefault(component, []).append(number)
    order = [list(members)[i] for i in stream.permutation(len(members)).tolist()]
    made, n_matches = [], 0
    while order:
        one = order.pop()
        for place, other in enumerate(order):
            both = [
                (base, source, n_matches)
                for here, there in ((one, other), (other, one))
                for base in members[here]
                for source in members[there]
                if not equally_long or pool.lengths[base] == pool.lengths[source]
            ]
            if both:
                made += both
                n_matches += 1
                del order[place]
                break
    return np.array(made, dtype=np.int64).reshape(-1, 3)
