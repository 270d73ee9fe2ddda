"""The smallest set of parts that does what all of them do: what can be left out, in ever smaller chunks.

References:
    Zeller & Hildebrandt 2002, "Simplifying and isolating failure-inducing input", IEEE Transactions on Software
    Engineering 28.
"""

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from causalpatch.patches import Intervention
from causalpatch.sweeps.localize.nodes import Node
from causalpatch.sweeps.localize.parts import Part, together

MOST_TOGETHER: Final = 4  # members of a set; what needs more is spread over many parts

Measured = Callable[[Sequence[Intervention]], np.ndarray | None]
"""Effects of interventions as shares of the gap, (intervention,); None where they do not fit into the budget."""


def smallest_set(
    measured: Measured, held: Sequence[Part], rest: Sequence[Node], target: float, near: float
) -> tuple[list[Node], float] | None:
    """Return a smallest set that, with what is held, has an effect, and that effect; None where more than four have it.

    A set of ``MOST_TOGETHER`` lies in as many of twice as many chunks, so that at least one other can be left out; of
    what cannot be divided so, no member can be left out by itself.

    Args:
        measured: Measures interventions.
        held: Parts that are patched in all of them.
        rest: Where the set is looked for.
        target: The effect, as a share of the gap.
        near: How far from it an effect may be.

    Cost:
        15 runs per pair where there is no such set, and about 8 log2 of the number of parts where there is one.
    """
    kept, n_chunks = list(rest), 2
    whole = measured([together([*held, *(node.part for node in kept)], "all of them")])
    if whole is None or abs(float(whole[0]) - target) > near:
        return None
    effect = float(whole[0])
    while len(kept) > 1:
        n_chunks = min(n_chunks, len(kept))
        chunks = [chunk.tolist() for chunk in np.array_split(np.arange(len(kept)), n_chunks)]
        without = [[node for n, node in enumerate(kept) if n not in chunk] for chunk in chunks]
        asked = [together([*held, *(node.part for node in each)], f"set {n}") for n, each in enumerate(without)]
        effects = measured(asked)
        if effects is None:
            return None
        fits = np.flatnonzero(np.abs(effects - target) <= near)
        if len(fits):
            best = int(fits[np.argmin(np.abs(effects[fits] - target))])
            kept, effect = without[best], float(effects[best])
            n_chunks = max(n_chunks - 1, 2)
        elif n_chunks == len(kept) or n_chunks >= 2 * MOST_TOGETHER:
            break
        else:
            n_chunks *= 2
    return (kept, effect) if len(kept) <= MOST_TOGETHER else None
