"""Scores of edges: an array over senders and receivers, its largest entries as a table, and its file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from causalpatch.base.errors import PathError, SettingError
from causalpatch.base.extras import lazy
from causalpatch.results.confirmation import Confirmable
from causalpatch.results.score_words import LEARNT, importance_of, unit_of
from causalpatch.results.top import TopTable
from causalpatch.sites.graph import Graph

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd = lazy("pandas")
    xr = lazy("xarray")


class EdgeScores(Confirmable):
    """A score for every edge of a model: an approximate effect, by gradients, or a gate that was learnt.

    Args:
        graph: The components and their edges.
        values: Scores ``(sender, receiver)``, or ``(position, sender, receiver)``: means over pairs, with the sign of
            the effect on the metric. What is no edge is NaN.
        provenance: How they came to be.
        labels: Labels of positions.
    """

    format = "causalpatch edge scores"

    def __init__(
        self, graph: Graph, values: np.ndarray, provenance: Mapping[str, Any], labels: Sequence[str] | None = None
    ) -> None:
        self.graph = graph
        self.values: np.ndarray = np.where(graph.exists, values, np.nan)
        self.provenance = dict(provenance)
        self.labels = None if labels is None else list(labels)

    @property
    def has_positions(self) -> bool:
        """Whether positions of receivers are told apart."""
        return self.values.ndim == 3

    def score(self) -> xr.DataArray:
        """Return the scores in the metric's unit, with the sign of the effect; NaN where there is no edge.

        Returns:
            Axes sender, receiver, labelled; position before them where it is told apart.
        """
        return self._labelled("score", self.values)

    def importance(self) -> xr.DataArray:
        """Return score / (mean m(source) - mean m(base)): positive where an edge moves the metric towards the source.

        Raises:
            NoGap: Both runs have the same mean.
        """
        return self._labelled("importance", importance_of(self.values, self.provenance))

    def over_positions(self) -> EdgeScores:
        """Return the scores summed over positions."""
        if not self.has_positions:
            return self
        return EdgeScores(self.graph, self.values.sum(0), self.provenance).confirmed_by(self._confirms)

    def top(self, k: int = 10, *, by: str = "magnitude") -> TopTable:
        """Return the edges with the largest scores, as a table.

        Args:
            k: How many; ties are broken by the order of edges.
            by: ``"magnitude"``: largest |score|; ``"importance"``: those that move the metric most to the source.

        Raises:
            SettingError: There is no such order.
        """
        frame = self.to_dataframe()
        if by not in ("magnitude", "importance"):
            raise SettingError(
                f"edges cannot be ordered by {by!r}", facts=[("known", "magnitude, importance")], fix='by="importance"'
            )
        key = frame["score"].abs() if by == "magnitude" else frame["importance"]
        chosen = frame.loc[key.sort_values(ascending=False, kind="stable").index[:k]].reset_index(drop=True)
        how = "gates, learnt together" if LEARNT in self.provenance else "scores from gradients: approximate"
        words = f"{len(chosen)} of {len(frame):,} edges by {by} ({how}; exploratory)"
        return TopTable(chosen, words, unit_of(self.provenance), self.provenance.get("notes", []))

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per edge: its name, sender, receiver, score and importance, sender by sender."""
        edges = self.graph.edges
        importance = importance_of(self.values, self.provenance, is_strict=False)
        names, senders, receivers = self.graph.names(edges), self.graph.sender_labels, self.graph.receiver_labels

        def table(values: np.ndarray, shares: np.ndarray, **more: Any) -> pd.DataFrame:
            at = (edges[:, 0], edges[:, 1])
            return pd.DataFrame(
                {
                    "edge": names,
                    "sender": [senders[n] for n in edges[:, 0]],
                    "receiver": [receivers[n] for n in edges[:, 1]],
                    **more,
                    "score": values[at],
                    "importance": shares[at],
                }
            )

        if not self.has_positions:
            return table(self.values, importance)
        texts = self.labels or [""] * len(self.values)
        parts = [table(self.values[n], importance[n], position=n, token=text) for n, text in enumerate(texts)]
        return pd.concat(parts, ignore_index=True)

    def __getitem__(self, edge: str) -> float:
        """Return the score of an edge by its name, summed over positions.

        Raises:
            PathError: There is no such edge.
        """
        if not isinstance(edge, str):
            raise PathError(f"{edge!r} is not the name of an edge", fix='scores["a0.h3 -> a2.h1<q>"]')
        values = self.values.sum(0) if self.has_positions else self.values
        return float(values[self.graph.parse(edge)])

    def __repr__(self) -> str:
        return f"EdgeScores({self.graph.n_edges:,} edges, {self.provenance.get('method')}, {self._model})"

    @property
    def _model(self) -> str:
        return f"'{self.provenance.get('model', {}).get('name', '')}'"

    def _parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        about = {"graph": self.graph.plain(), "labels": self.labels, "provenance": self.provenance}
        return {"values": self.values}, about

    @classmethod
    def _of_parts(cls, held: dict[str, np.ndarray], about: dict[str, Any]) -> Self:
        return cls(Graph(*about["graph"]), held["values"], about["provenance"], about["labels"])

    def _labelled(self, name: str, values: np.ndarray) -> xr.DataArray:
        coordinates: dict[str, Any] = {"sender": self.graph.sender_labels, "receiver": self.graph.receiver_labels}
        dims = ["sender", "receiver"]
        if self.has_positions:
            dims, coordinates = ["position", *dims], {"position": list(range(len(values))), **coordinates}
        return xr.DataArray(values, dims=dims, coords=coordinates, name=name, attrs={"unit": unit_of(self.provenance)})
