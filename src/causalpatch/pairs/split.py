"""Splits by whole components, so that no prompt, entity or group stands on both sides."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError, SettingError
from causalpatch.base.seeds import generator
from causalpatch.pairs.check import leaking

if TYPE_CHECKING:
    from causalpatch.pairs.collection import Pairs

LEAST = 2  # components per side: with one there is no spread between components


def by_component(
    components: NDArray[np.int64], names: Sequence[str], fraction: float, seed: int, name: str
) -> tuple[list[int], list[int]]:
    """Divide pairs into two sides.

    Components are drawn in random order; each goes to the side that lacks most of its share of the pairs.

    Args:
        components: Component of each pair, axis (pair,).
        names: A content hash of each pair; the draw depends on these, not on the order of the pairs.
        fraction: Share of the pairs meant for the first side, between 0 and 1.
        seed: Seed of the draw.
        name: Name of the pairs, for errors.

    Returns:
        Indices of the pairs of the first and of the second side, in order.

    Raises:
        PairError: There are too few components for two on each side.
        SettingError: The fraction is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise SettingError(
            f"a split cannot put a share of {fraction} on its first side",
            facts=[("allowed", "between 0 and 1")],
            fix="fraction=0.5",
        )
    members: dict[int, list[int]] = {}
    for index, component in enumerate(components.tolist()):
        members.setdefault(component, []).append(index)
    groups = sorted(members.values(), key=lambda held: min(names[i] for i in held))
    if len(groups) < 2 * LEAST:
        raise PairError(
            f"'{name}' has {len(groups)} independent components, too few to split",
            facts=[("pairs", len(components)), ("needed", f"{2 * LEAST} components, {LEAST} on each side")],
            fix="add pairs that share no prompt, entity or group with these",
        )
    order = generator(seed, "split").permutation(len(groups))
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    lack = [fraction * len(components), (1 - fraction) * len(components)]
    for group in (groups[i] for i in order):
        side = int(lack[1] > lack[0])
        sides[side].append(group)
        lack[side] -= len(group)
    for short, long in (sides, sides[::-1]):
        while len(short) < LEAST:
            smallest = min(long, key=len)
            long.remove(smallest)
            short.append(smallest)
    first, second = (sorted(i for group in side for i in group) for side in sides)
    return first, second


def by_column(pairs: "Pairs") -> dict[str, list[int]]:
    """Divide pairs as their column ``split`` says.

    Args:
        pairs: The pairs.

    Returns:
        Indices of the pairs of each split, in order of first appearance.

    Raises:
        PairError: A pair has no split, or a component stands in several.
    """
    sides: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        if pair.split is None:
            raise PairError(
                f"pair {index} of '{pairs.name}' is in no split",
                facts=[("pair", pair.id)],
                fix="fill the column split, or divide by components: pairs.split()",
            )
        sides.setdefault(pair.split, []).append(index)
    leaks = leaking(pairs)
    if leaks:
        held = [pairs[i] for i in leaks[0]]
        one = held[0]
        two = next(pair for pair in held if pair.split != one.split)
        raise PairError(
            f"the splits of '{pairs.name}' leak: {len(leaks)} components stand in several of them",
            facts=[
                ("for instance", f"pair '{one.id}' in {one.split} and pair '{two.id}' in {two.split}"),
                ("shared", "prompts, entities or groups, directly or through other pairs"),
            ],
            fix="divide by components: pairs.split()",
        )
    return sides
