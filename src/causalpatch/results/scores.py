"""Scores of nodes: a labelled array of approximate effects, every pair kept; never called effect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.results.confirmation import Confirmable
from causalpatch.results.score_words import importance_of, unit_of
from causalpatch.results.top import TopTable

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd = lazy("pandas")
    xr = lazy("xarray")


class Scores(Confirmable):
    """An approximate effect for every cell of a grid, by gradients.

    Args:
        values: Scores in the metric's unit, axes those of the grid, then pair; NaN where a pair lacks a position.
        axes: Coordinates by axis.
        pair_ids: Id of each pair.
        provenance: How they came to be.
        labels: Labels along axes, such as tokens along ``position``.
    """

    format = "causalpatch scores"

    def __init__(
        self,
        values: np.ndarray,
        axes: Mapping[str, Sequence[Any]],
        pair_ids: Sequence[str],
        provenance: Mapping[str, Any],
        labels: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        self.values = values
        self.coordinates = {axis: list(held) for axis, held in axes.items()}
        self.pair_ids = list(pair_ids)
        self.provenance = dict(provenance)
        self.labels = {axis: list(held) for axis, held in (labels or {}).items()}

    @property
    def axes(self) -> tuple[str, ...]:
        """Axes of the grid, without the pair."""
        return tuple(self.coordinates)

    @property
    def dims(self) -> tuple[str, ...]:
        """Axes of the numbers: those of the grid, then ``pair``."""
        return (*self.coordinates, "pair")

    @property
    def is_signed(self) -> bool:
        """Whether scores have the sign of the effect; those of AtP* are magnitudes."""
        return not self.provenance.get("unsigned", False)

    def score(self, *, per_pair: bool = False) -> xr.DataArray:
        """Return scores in the metric's unit, with the sign of the effect on it.

        Args:
            per_pair: Keep the pair axis instead of averaging over the pairs that have the cell.

        Returns:
            Axes of the grid, and pair if asked; NaN where no pair has the cell.
        """
        return self._labelled("score", self.values if per_pair else self._mean(), per_pair=per_pair)

    def importance(self) -> xr.DataArray:
        """Return mean score / (mean m(source) - mean m(base)): positive where a cell moves m towards the source.

        Raises:
            NoGap: Both runs have the same mean.
            SettingError: Scores of this method have no sign.
        """
        return self._labelled("importance", importance_of(self._mean(), self.provenance))

    def top(self, k: int = 10) -> TopTable:
        """Return the cells with the largest |score|, as a table.

        Args:
            k: How many; ties are broken by the order of cells.
        """
        frame = self._frame()
        chosen = frame.loc[frame["score"].abs().sort_values(ascending=False, kind="stable").index[:k]]
        words = f"{len(chosen)} of {len(frame):,} cells of {self.provenance.get('site')} by |score| " + (
            f"({self.provenance.get('method')}: approximate, exploratory)"
        )
        return TopTable(
            chosen.reset_index(drop=True), words, unit_of(self.provenance), self.provenance.get("notes", [])
        )

    def to_dataframe(self) -> pd.DataFrame:
        """Return a row per cell and pair: coordinates, pair, score."""
        index = pd.MultiIndex.from_product([*self.coordinates.values(), self.pair_ids], names=self.dims)
        return pd.DataFrame({"score": self.values.reshape(-1)}, index=index).reset_index()

    def _parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        about = {
            "axes": {axis: list(map(_plain, held)) for axis, held in self.coordinates.items()},
            "order": list(self.coordinates),
            "pairs": self.pair_ids,
            "labels": self.labels,
            "provenance": self.provenance,
        }
        return {"values": self.values}, about

    @classmethod
    def _of_parts(cls, held: dict[str, np.ndarray], about: dict[str, Any]) -> Self:
        axes = {axis: about["axes"][axis] for axis in about["order"]}
        return cls(held["values"], axes, about["pairs"], about["provenance"], about["labels"])

    def sel(self, **coordinates: Any) -> float:
        """Return the mean score of one cell.

        Raises:
            SettingError: There is no such cell.
        """
        place = []
        for axis, held in self.coordinates.items():
            if coordinates.get(axis) not in held:
                raise SettingError(
                    f"there is no cell {axis}={coordinates.get(axis)!r} among these scores",
                    facts=[(axis, ", ".join(map(str, held[:8])) + (" …" if len(held) > 8 else ""))],
                    fix=f"name every axis: {', '.join(self.coordinates)}",
                )
            place.append(held.index(coordinates[axis]))
        return float(self._mean()[tuple(place)])

    def __repr__(self) -> str:
        sizes = " x ".join(f"{axis} {len(held)}" for axis, held in self.coordinates.items())
        return f"Scores({self.provenance.get('site')}, {self.provenance.get('method')}, {sizes})"

    def _mean(self) -> np.ndarray:
        there = np.isfinite(self.values)
        total = np.where(there, self.values, 0.0).sum(-1)
        count = there.sum(-1)
        found: np.ndarray = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
        return found

    def _frame(self) -> pd.DataFrame:
        frame: pd.DataFrame = self.score().to_dataframe().reset_index()[[*self.coordinates, "score"]]
        shares = importance_of(self._mean(), self.provenance, is_strict=False)
        if "position" in self.labels:
            frame.insert(
                list(frame.columns).index("position") + 1,
                "token",
                [self.labels["position"][p] for p in frame["position"]],
            )
        frame["importance"] = shares.reshape(-1)
        return frame

    def _labelled(self, name: str, values: np.ndarray, *, per_pair: bool = False) -> xr.DataArray:
        coordinates: dict[str, Any] = dict(self.coordinates)
        if per_pair:
            coordinates["pair"] = self.pair_ids
        made = xr.DataArray(
            values, dims=list(coordinates), coords=coordinates, name=name, attrs={"unit": unit_of(self.provenance)}
        )
        for axis, labels in self.labels.items():
            made = made.assign_coords({f"{axis}_label": (axis, labels)})
        return made


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value
