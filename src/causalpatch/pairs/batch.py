"""Batches: rows of different lengths in one rectangle, each with its own mask and position ids.

Padding never changes what a real token sees: it is masked, and the position ids of a row count its own real tokens
from 0, on whichever side the padding stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError, SettingError
from causalpatch.pairs.role import Role

PaddingSide: TypeAlias = Literal["right", "left"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Inputs of several pairs, ready for a model.

    Args:
        ids: Token ids, axes (row, position); the pad id where the mask is False. No positions for pairs of arrays.
        mask: True at real tokens, axes (row, position).
        position_ids: Real tokens of each row counted from 0, axes (row, position); 0 at padding.
        start: First real column of each row, axis (row,).
        lengths: Number of prompt tokens of each row, without its continuation, axis (row,).
        values: Stacked inputs of pairs of arrays, axes (row, …); None for text.
        role: Whose inputs they are, where they are those of pairs.
        beside: Stacked further arguments of the model's forward by name, axes (row, …).
        common: Further arguments that are the same for all rows, as they are.
        encoder: The encoder's prompts of the same rows, where a decoder has these.
        seen: The tokens of the pictures that stand beside the prompts of the same rows.
    """

    ids: NDArray[np.int64]
    mask: NDArray[np.bool_]
    position_ids: NDArray[np.int64]
    start: NDArray[np.int64]
    lengths: NDArray[np.int64]
    values: NDArray[np.generic] | None = None
    role: Role | None = None
    beside: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    common: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    encoder: "Batch | None" = None
    seen: "Batch | None" = None

    def of(self, stream: str | None) -> "Batch":
        """Return the tokens of a stream: the encoder's, those of the pictures beside prompts, or these.

        Args:
            stream: ``"encoder"``, ``"decoder"``, ``"vision"``, or None where there is one stream.
        """
        other = {"encoder": self.encoder, "vision": self.seen}.get(stream or "")
        return self if other is None else other

    def __len__(self) -> int:
        return len(self.start)

    def take(self, rows: NDArray[np.int64]) -> "Batch":
        """Return some of the rows, laid out as they are here."""
        return replace(
            self,
            ids=self.ids[rows],
            mask=self.mask[rows],
            position_ids=self.position_ids[rows],
            start=self.start[rows],
            lengths=self.lengths[rows],
            values=None if self.values is None else self.values[rows],
            beside={name: values[rows] for name, values in self.beside.items()},
            encoder=self.encoder and self.encoder.take(rows),
            seen=self.seen and self.seen.take(rows),
        )

    def column(self, row: int | NDArray[np.int64], real_position: int | NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the column of a real token, which padding on the left shifts.

        Args:
            row: One row, or an array of them.
            real_position: The position counted in real tokens from 0, one or an array that fits ``row``.
        """
        return np.asarray(self.start[row] + real_position, dtype=np.int64)


def pad(
    prompts: Sequence[NDArray[np.int64]],
    *,
    pad_id: int = 0,
    padding_side: PaddingSide = "right",
    continuations: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Lay prompts of different lengths into one rectangle.

    Args:
        prompts: Token ids of each row.
        pad_id: Id that fills the padding; masked, so its value never matters.
        padding_side: Where the padding stands.
        continuations: Ids that follow each prompt, such as the tokens of an answer; one list per row.

    Raises:
        SettingError: The side is unknown, or there is not one continuation per row.
    """
    if padding_side not in ("right", "left"):
        raise SettingError(
            f"{padding_side!r} is not a side to pad on", facts=[("known", "right, left")], fix='padding_side="right"'
        )
    if continuations is None:
        continuations = [()] * len(prompts)
    if len(continuations) != len(prompts):
        raise SettingError(
            "every row needs its own continuation",
            facts=[("rows", len(prompts)), ("continuations", len(continuations))],
            fix="give one list of ids per row, an empty one where nothing follows",
        )
    rows = [np.concatenate([p, np.asarray(c, dtype=np.int64)]) for p, c in zip(prompts, continuations, strict=True)]
    sizes = np.array([len(row) for row in rows], dtype=np.int64)
    width = int(sizes.max(initial=0))
    start = width - sizes if padding_side == "left" else np.zeros_like(sizes)
    ids = np.full((len(rows), width), pad_id, dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, start[index] : start[index] + len(row)] = row
    counted = np.arange(width)[None, :] - start[:, None]
    mask = (counted >= 0) & (counted < sizes[:, None])
    lengths = np.array([len(prompt) for prompt in prompts], dtype=np.int64)
    return Batch(ids, mask, np.where(mask, counted, 0), start, lengths)


def stack(values: Sequence[NDArray[np.generic]], name: str, n_tokens: int = 0) -> Batch:
    """Stack inputs that are not text.

    Args:
        values: One array per row, all of one shape.
        name: Name of the pairs, for the error.
        n_tokens: How many tokens the model makes of each, where that is known; they have no ids of their own.

    Raises:
        PairError: The arrays have different shapes.
    """
    zeros = np.zeros(len(values), dtype=np.int64)
    places = np.tile(np.arange(n_tokens), (len(values), 1))
    fix = "bring them to one shape first: pairs.transformed(function)"
    stacked = _stacked(values, f"inputs of '{name}'", fix)
    return Batch(places, np.ones(places.shape, dtype=bool), places, zeros, zeros + n_tokens, stacked)


def stack_beside(rows: Sequence[Mapping[str, NDArray[np.generic]]], name: str) -> dict[str, NDArray[np.generic]]:
    """Stack the further arguments of several runs.

    Args:
        rows: The arguments of each row, by name; the same names in all rows.
        name: Name of the pairs, for the error.

    Raises:
        PairError: The arrays of one argument have different shapes.
    """
    return {
        argument: _stacked(
            [row[argument] for row in rows], f"'{argument}' of '{name}'", "bring its arrays to one shape first"
        )
        for argument in (rows[0] if rows else ())
    }


def _stacked(values: Sequence[NDArray[np.generic]], what: str, fix: str) -> NDArray[np.generic]:
    shapes = sorted({value.shape for value in values})
    if len(shapes) > 1:
        raise PairError(
            f"{what} cannot stand in one batch: their shapes differ",
            facts=[("shapes", ", ".join(map(str, shapes[:5])))],
            fix=fix,
        )
    return np.stack(values)
