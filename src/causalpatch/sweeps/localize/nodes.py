"""Parts that were measured, and which of them count as found."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from causalpatch.results.localization import Cell
from causalpatch.results.words import counted
from causalpatch.sweeps.localize.parts import Part


@dataclass
class Node:
    """A part that was measured, and what became of it.

    Beside what a ``Cell`` holds: its effect on every pair in the direction of the gap (``moved``), the parts that are
    patched beside it (``context``) and their own effect, and in which way it is opened next (``next_group``).
    """

    part: Part
    above: int
    effect: float
    n_pairs: int
    delta: float
    moved: np.ndarray
    score: float | None = None
    half: float | None = None
    opened: str = ""
    found: str = "search"
    together: int = -1
    number: int = -1
    context: tuple[Part, ...] = ()
    of_context: float = 0.0
    next_group: int = 0
    ways: tuple[int, ...] = ()
    is_spread: bool = False

    @property
    def matters(self) -> bool:
        """Whether its effect is above delta, or that of a set that it belongs to."""
        return abs(self.effect) > self.delta or self.together >= 0


def cells_of(nodes: Sequence[Node]) -> list[Cell]:
    """Return what was measured, with what counts as found: it matters, and nothing that it is made of does."""
    accounted: set[int] = set()
    for node in nodes:
        # What a sample found does not account for what it is a part of, which was not opened.
        above = node.above if node.matters and node.found == "search" else -1
        while above >= 0 and above not in accounted:
            accounted.add(above)
            above = nodes[above].above
    return [
        Cell(
            name=node.part.name,
            level=node.part.level,
            above=node.above,
            effect=node.effect,
            delta=node.delta,
            n_pairs=node.n_pairs,
            score=node.score,
            half=node.half,
            opened=node.opened,
            found=node.found,
            together=node.together,
            ways=node.ways,
            is_spread=node.is_spread,
            is_component=node.matters and (number not in accounted or (node.is_spread and node.together < 0)),
        )
        for number, node in enumerate(nodes)
    ]


def is_plain(node: Node, children: Sequence[Node]) -> bool:
    """Say whether it is clear without a run that parts account for what they are parts of."""
    found = [child for child in children if child.matters]
    if len(found) == 1 and not node.context:
        return abs(node.effect - found[0].effect) <= node.delta
    return not found and not node.context and abs(node.effect) <= node.delta


def describe_waiting(node: Node, parts: Sequence[Part]) -> str:
    """Return what is said of a part that was to be opened, and how much of it was not measured."""
    noun = "position" if parts[0].level == node.part.level else parts[0].level
    return f"{node.part.name} ({counted(len(parts), noun)})"
