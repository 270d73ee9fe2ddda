"""What a model says of pictures: which inputs it answers, and the tokens that it makes of them."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from causalpatch.models.families import Family
from causalpatch.models.table import FamilyTable
from causalpatch.models.tokens import find_end_id
from causalpatch.models.towers import Towers
from causalpatch.pairs.placed import Kind
from causalpatch.sites.select import ModelShape

_Seen = TypeVar("_Seen", bound="Seeing")


class Seeing(ABC):
    """The part of ``Model`` that knows of pictures."""

    module: nn.Module
    kind: Kind
    shape: ModelShape
    _table: FamilyTable | None
    _towers: Towers

    @abstractmethod
    def _make_shape(self) -> ModelShape:
        """Return which sites there are."""

    @property
    def family(self) -> Family | None:
        """The family's table of facts, or None for a generic model."""
        return self._table.family if self._table else None

    def reading(self: _Seen, kind: Kind) -> _Seen:
        """Return the model as it answers inputs of a kind: one that compares pictures with texts answers either.

        Args:
            kind: ``"arrays"`` for pictures, compared with the texts that all runs share; ``"tokens"`` the other way.
        """
        if not self._towers.are_compared or kind == self.kind:
            return self
        made = copy.copy(self)
        made._table, made.kind = self._towers.reading(kind), kind
        made.shape = made._make_shape()
        for known in ("vocab_size", "_forward"):
            made.__dict__.pop(known, None)
        return made

    def seeing(self: _Seen, shape: Sequence[int]) -> _Seen:
        """Return the model as it sees pictures of a shape: for another size than its own it makes other positions.

        Args:
            shape: The shape of the pictures, height and width last.
        """
        if self.picture is None or tuple(shape[-2:]) == self.picture[-2:]:
            return self
        made = copy.copy(self)
        made.shape = self._towers.at_other_size(self.shape)
        return made

    def places(self, shape: Sequence[int] | None = None) -> tuple[str, ...]:
        """Return what a person calls the tokens that the model makes of a picture; none where that is not known.

        Args:
            shape: The picture's shape; by default that which the model was made for.
        """
        return self._towers.places(shape)

    @property
    def picture(self) -> tuple[int, int, int] | None:
        """Channels, height and width of the pictures that the model was made for; None where it is given none."""
        return self._towers.picture

    @property
    def picture_token(self) -> tuple[int, int] | None:
        """Id of the token in prompts whose place a picture takes, and how many of them a picture takes."""
        return self._towers.token

    @property
    def compares(self) -> bool:
        """Whether the model compares pictures with texts, so that one of them is the same in all runs."""
        return self._towers.are_compared

    @property
    def end_id(self) -> int | None:
        """Id of the token whose vector stands for a text, in models that make one of it; else None."""
        return find_end_id(self.module) if self.family is not None and self.family.is_compared else None

    @property
    def _reads_pictures(self) -> bool:
        return self.family is not None and self.family.pictures is not None
