"""Pairs and their tokens: how many there are, how they align, what a position means in each pair.

Of a model with several streams of tokens, ``of(stream)`` gives the pairs as the tokens of one of them. Pictures have
the tokens that a model makes of them, which is for the model to say: ``seen_as``.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError
from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs import align, positions
from causalpatch.pairs.align import Alignment, Mapped
from causalpatch.pairs.pair import PROMPT, Pair
from causalpatch.pairs.role import ROLES, Role, as_role, other
from causalpatch.sites.site import Every, Position

if TYPE_CHECKING:
    from causalpatch.pairs.collection import Pairs

Kind: TypeAlias = Literal["tokens", "arrays"]
Stream: TypeAlias = Literal["encoder", "decoder"]


class Places:
    """The tokens of a picture as a tokenizer has them: the number of each is its id.

    Args:
        labels: What a person calls each.
    """

    pad_id = 0

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self.labels)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the token of this name, where there is one."""
        del special
        return [self.labels.index(text)] if text in self.labels else []

    def encode_with_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the token of this name, and its span of characters."""
        ids = self.encode(text)
        return ids, [(0, len(text))] * len(ids)

    def label(self, token_id: int) -> str:
        """Return what a person calls the token."""
        return self.labels[token_id]


class Placed(Sequence[Pair]):
    """What ``Pairs`` know of their tokens."""

    pairs: tuple[Pair, ...]
    name: str
    kind: Kind
    tokenizer: Tokenizer | None
    places: tuple[str, ...] = ()
    """What a person calls the tokens that a model makes of each picture; see ``seen_as``."""
    _alignment: Alignment | None
    _of_encoder: Alignment | None

    @abstractmethod
    def _with(
        self, pairs: Sequence[Pair], alignment: Alignment | None, of_encoder: Alignment | None = None, **changed: Any
    ) -> "Pairs":
        """Return other pairs, all else being as it is here but for what is changed."""

    @cached_property
    def encoder(self) -> "Pairs | None":
        """What the encoder of a model is given, as pairs of their own; None where there is no encoder's prompt."""
        inner = [replace(p.encoder, stands_for=p.content_hash) for p in self.pairs if p.encoder is not None]
        if not inner:
            return None
        tokenizer = self.tokenizer if inner[0].is_called == PROMPT else None
        return self._with(inner, self._of_encoder, common={}, places=(), tokenizer=tokenizer)

    @cached_property
    def pictures(self) -> "Pairs | None":
        """The tokens that a model makes of the pictures, as pairs of prompts; None where they are not known."""
        if not self.places:
            return None
        tokens, is_whole = np.arange(len(self.places)), self.kind == "arrays"
        inner = [
            replace(
                Pair(tokens, tokens, id=p.id, group=p.group, spans=p.spans if is_whole else {}),
                is_called="picture",
                stands_for=p.content_hash,
            )
            for p in self.pairs
        ]
        more: dict[str, Any] = {"kind": "tokens", "tokenizer": Places(self.places), "common": {}, "places": ()}
        return self._with(inner, self._alignment if is_whole else None, **more)

    def seen_as(self, places: Sequence[str]) -> "Pairs":
        """Return the pairs with what a person calls the tokens that a model makes of each picture.

        Args:
            places: Such as ``["CLS", "patch 0,0", …]``; none where they are not known.
        """
        return self._with(self.pairs, self._alignment, self._of_encoder, places=tuple(places))

    def of(self, stream: str | None) -> "Pairs":
        """Return the pairs as the tokens of a stream: the encoder's, those of the pictures, or these.

        Args:
            stream: ``"encoder"``, ``"decoder"``, ``"vision"``, or None where there is one stream.
        """
        others = {"encoder": self.encoder, "vision": self.pictures}
        return others.get(stream or "") or cast("Pairs", self)

    @property
    def in_tokens(self) -> "Pairs":
        """The pairs as tokens: of pictures those that a model makes of them, where they are known."""
        return cast("Pairs", self) if self.kind == "tokens" or self.pictures is None else self.pictures

    def sizes(self, role: Role) -> NDArray[np.int64]:
        """Return the number of real tokens that a run of each pair has, its encoder's with its decoder's."""
        return self.lengths(role) + (0 if self.encoder is None else self.encoder.lengths(role))

    def lengths(self, role: Role) -> NDArray[np.int64]:
        """Return the number of real tokens of each prompt, special ones included, axis (pair,); 1 for other arrays."""
        if self.kind == "arrays":
            return np.full(len(self), max(1, len(self.places)), dtype=np.int64)
        return np.array([len(pair.input(role)) for pair in self.pairs], dtype=np.int64)

    def tokens(self, role: Role, index: int) -> list[str]:
        """Return the tokens of one prompt as a person reads them.

        Args:
            role: ``"clean"`` or ``"corrupt"``.
            index: Index of the pair.
        """
        held = self._need_tokens()
        return [align.label(held.tokenizer, int(token)) for token in held.pairs[index].input(role)]

    @cached_property
    def alignment(self) -> Alignment | None:
        """Aligned columns; None for arrays, and where prompts differ in length and no alignment was chosen."""
        held = self.in_tokens
        unequal = held.kind == "arrays" or align.first_unequal(held.pairs) is not None
        if self._alignment is not None or unequal:
            return self._alignment
        return align.build(held.pairs, "position", name=self.name, tokenizer=held.tokenizer)

    def aligned(self) -> Alignment:
        """Return the aligned columns.

        Raises:
            PairError: Prompts of a pair differ in length and no alignment was chosen; both are shown.
        """
        self._need_tokens()
        if self.alignment is None:
            unequal = align.first_unequal(self.pairs) or 0
            raise align.cannot_align(self.pairs, unequal, self.name, self.tokenizer)
        return self.alignment

    def align(
        self,
        how: Literal["position", "difference", "spans", "map"],
        *,
        spans: Sequence[str] | None = None,
        mapping: Mapped | None = None,
        stream: Stream | None = None,
    ) -> "Pairs":
        """Return the pairs with their positions aligned in another way.

        Args:
            how: ``"position"``: token k with token k. ``"difference"``: by the tokens that both prompts share.
                ``"spans"``: the tokens of named spans in order. ``"map"``: by the positions in ``mapping``.
            spans: For ``"spans"``, which of them, in this order; by default all that every pair has.
            mapping: For ``"map"``, (clean, corrupted) positions of each pair, by pair id or one list per pair.
            stream: Of pairs for a model with an encoder and a decoder, whose prompts; by default the encoder's, and by
                ``"position"`` and ``"difference"`` the decoder's as well.

        Raises:
            PairError: The pairs cannot be aligned in this way; the first that cannot is shown.
            SettingError: There is no such way.

        Examples:
            >>> from causalpatch.pairs import Pairs
            >>> pairs = Pairs([Pair(np.array([1, 5, 9]), np.array([1, 6, 7, 9]))])
            >>> pairs.align("difference").alignment.columns[0].tolist()
            [[0, 0], [-1, -1], [2, 3]]
        """
        held = self._need_tokens()
        if self.encoder is not None and stream != "decoder":
            of_encoder = self.encoder.align(how, spans=spans, mapping=mapping)._alignment
            made = self._with(self.pairs, self._alignment, of_encoder)
            return made if stream or how in ("spans", "map") else made.align(how, stream="decoder")
        made_here = align.build(held.pairs, how, name=self.name, tokenizer=held.tokenizer, spans=spans, mapping=mapping)
        return self._with(self.pairs, made_here, self._of_encoder)

    def positions(
        self, index: int, position: Position | None, base: Role
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return which tokens of the base and of the source a site's position means in one pair.

        Args:
            index: Index of the pair.
            position: A position of a site; None and ``EVERY`` mean all aligned columns.
            base: The role of the run that is changed.

        Returns:
            Positions in the base and in the source, in real tokens from 0. Each prompt counts its own tokens. A span or
            range may hold more tokens in one than in the other; then the two arrays differ in length.

        Raises:
            PairError: A prompt has no such token, the pair has no such span, or the pairs are not aligned.
        """
        held = self._need_tokens()
        if position is None or isinstance(position, Every):
            columns = self.aligned().columns[index]
            base_side = ROLES.index(as_role(base))
            kept = columns[columns[:, 0] >= 0]
            return kept[:, base_side].copy(), kept[:, 1 - base_side].copy()
        where = f"pair {index} of '{self.name}'"
        return (
            positions.resolve(held.pairs[index], position, as_role(base), where),
            positions.resolve(held.pairs[index], position, other(base), where),
        )

    def _need_tokens(self) -> "Pairs":
        """Return the pairs as tokens."""
        if self.in_tokens.kind != "tokens":
            raise PairError(
                f"'{self.name}' holds arrays, which have no token positions",
                fix="leave the position out of the site, or name the axes of the module: axes=(…)",
            )
        return self.in_tokens
