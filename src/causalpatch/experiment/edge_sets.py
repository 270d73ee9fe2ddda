"""Sets of edges that are run, each in a run of its own."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class EdgeSets:
    """Sets of edges that are run, those of one edge as its numbers alone.

    Args:
        labels: What results call the runs.
        single: Numbers of the runs of one edge.
        edges: The sender and the receiver of each of them, ``(edge, 2)``.
        masks: The edges of all other runs in order, booleans ``(mask, sender, receiver)``.
    """

    labels: Sequence[str]
    single: np.ndarray
    edges: np.ndarray
    masks: np.ndarray

    @classmethod
    def of_edges(cls, edges: np.ndarray, labels: Sequence[str]) -> "EdgeSets":
        """Return single edges, given as ``(edge, 2)``, each in a run of its own."""
        return cls(labels, np.arange(len(edges)), edges, np.zeros((0, 0, 0), dtype=bool))

    @classmethod
    def of_masks(cls, masks: np.ndarray, labels: Sequence[str]) -> "EdgeSets":
        """Return sets given as masks ``(mask, sender, receiver)``."""
        is_single = masks.sum((1, 2)) == 1
        return cls(labels, np.flatnonzero(is_single), np.argwhere(masks[is_single])[:, 1:], masks[~is_single])

    @property
    def several(self) -> np.ndarray:
        """Numbers of all runs but those of one edge."""
        return np.setdiff1d(np.arange(len(self.labels)), self.single)

    def with_run_of(self, mask: np.ndarray) -> "EdgeSets":
        """Return these and one more set behind them, given as ``(sender, receiver)``."""
        masks = mask[None] if not len(self.masks) else np.concatenate([self.masks, mask[None]])
        return EdgeSets([*self.labels, "reference"], self.single, self.edges, masks)

    def take(self, runs: np.ndarray) -> "EdgeSets":
        """Return some of the runs, whose numbers go up."""
        alone, rest = np.isin(self.single, runs), np.isin(self.several, runs)
        single = np.searchsorted(runs, self.single[alone])
        return EdgeSets([self.labels[int(n)] for n in runs], single, self.edges[alone], self.masks[rest])

    def names(self) -> list[str]:
        """Return what names the edges of each run, whatever results call it."""
        found = [""] * len(self.labels)
        for number, (sender, receiver) in zip(self.single.tolist(), self.edges.tolist(), strict=True):
            found[number] = f"{sender}>{receiver}"
        for number, mask in zip(self.several.tolist(), self.masks, strict=True):
            found[number] = hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:32]
        return found
