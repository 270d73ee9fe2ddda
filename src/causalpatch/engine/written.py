"""The targets of packed segments, by the layer in whose call they are written."""

from dataclasses import replace

import numpy as np
from jaxtyping import Int

from causalpatch.engine.resolve import Placement, Target
from causalpatch.engine.scene import Placed
from causalpatch.engine.values import Row


class TargetsByLayer:
    """The targets of segments by the layer whose call they are written in.

    Args:
        placed: The segments.
        n_layers: Number of layers, which also stands for what is behind them; -1 is what is in front.
    """

    def __init__(self, placed: Placed, n_layers: int) -> None:
        found: dict[int, dict[int, list[tuple[Target, Placement | None, int]]]] = {}
        for number, (row, entries) in enumerate(zip(placed.segments.rows, placed.entries, strict=True)):
            for (target, place), entry in zip(row.targets, entries, strict=True):
                layer = -1 if target.site.name in ("embed", "pos_embed") else entry.layer
                found.setdefault(layer, {}).setdefault(number, []).append((target, place, entry.stage))
        self.rows = placed.segments.rows
        self.by_layer = {layer: (np.array(list(segments)), [*segments.values()]) for layer, segments in found.items()}

    @property
    def embedded(self) -> Int[np.ndarray, " segment"]:
        """Segments that are patched in front of the layers."""
        return self.by_layer[-1][0] if -1 in self.by_layer else np.zeros(0, dtype=np.int64)

    def rows_at(
        self, layer: int, chosen: Int[np.ndarray, " segment"], stages: tuple[int, ...]
    ) -> tuple[Int[np.ndarray, " row"], list[Row]]:
        """Return the targets of chosen segments in a layer as rows, and for each row the index of its segment."""
        if layer not in self.by_layer or not len(chosen):
            return np.zeros(0, dtype=np.int64), []
        numbers, targets = self.by_layer[layer]
        place = np.minimum(np.searchsorted(chosen, numbers), len(chosen) - 1)
        is_here = np.flatnonzero(chosen[place] == numbers)
        owners, rows = [], []
        for index, owner in zip(is_here.tolist(), place[is_here].tolist(), strict=True):
            row = self.rows[int(numbers[index])]
            some = [each for each in targets[index] if each[2] in stages]
            if len(some) < len(row.targets):
                row = replace(row, targets=tuple((target, where) for target, where, _ in some))
            if some:
                owners.append(owner)
                rows.append(row)
        return np.array(owners, dtype=np.int64), rows

    def any_at(self, layer: int, chosen: Int[np.ndarray, " segment"], stages: tuple[int, ...]) -> bool:
        """Say whether one of the chosen segments has a target at some stages of a layer."""
        return bool(self.rows_at(layer, chosen, stages)[1])
