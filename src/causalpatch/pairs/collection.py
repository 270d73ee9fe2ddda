"""Pairs: all pairs of an experiment, with what they share.

Their name, their tokenizer, how their positions align, and which of them hang together. Nothing here ever changes in
place; every method that selects or alters returns new ``Pairs``.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, Literal, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError, SettingError
from causalpatch.base.spec import to_json
from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs import align, batch, check, components, positions, split
from causalpatch.pairs.align import Alignment, Mapped
from causalpatch.pairs.batch import Batch, PaddingSide
from causalpatch.pairs.check import PairReport
from causalpatch.pairs.pair import Answers, Array, Pair, as_numbers, digest, pairs_of_arrays, require_same_streams
from causalpatch.pairs.role import ROLES, Role, as_role, other
from causalpatch.pairs.selection import index_of, where
from causalpatch.sites.site import Every, Position

Kind: TypeAlias = Literal["tokens", "arrays"]
Stream: TypeAlias = Literal["encoder", "decoder"]


class Pairs(Sequence[Pair]):
    """Clean and corrupted inputs that belong together.

    Args:
        pairs: At least one.
        name: How messages and results call them.
        kind: ``"tokens"`` for prompts of token ids, ``"arrays"`` for inputs of other models.
        tokenizer: What turns ids into labels; None shows ids.
        alignment: How positions align; by default by position where clean and corrupted prompts are equally long.
        of_encoder: The same for the encoder's prompts, of pairs that have such beside the decoder's.

    Raises:
        PairError: There is not even one pair, or only some have a prompt for an encoder.

    Examples:
        >>> pairs = Pairs([Pair(np.array([1, 5]), np.array([1, 6]), answer=((7,),))], name="tiny")
        >>> len(pairs), pairs.lengths("clean").tolist(), pairs.tokens("corrupt", 0)
        (1, [2], ['1', '6'])
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        *,
        name: str = "pairs",
        kind: Kind = "tokens",
        tokenizer: Tokenizer | None = None,
        alignment: Alignment | None = None,
        of_encoder: Alignment | None = None,
    ) -> None:
        if not pairs:
            raise PairError(f"no pairs are left of '{name}'", fix="select at least one")
        if kind not in ("tokens", "arrays"):
            raise SettingError(f"{kind!r} is not a kind of pairs", fix='kind="tokens" or kind="arrays"')
        self.pairs = tuple(pairs)
        self.name = name
        self.kind: Kind = kind
        self.tokenizer = tokenizer
        self._alignment = alignment
        self._of_encoder = of_encoder
        require_same_streams(self.pairs, name)

    @classmethod
    def from_arrays(
        cls,
        clean: Sequence[Any],
        corrupt: Sequence[Any],
        answer: Sequence[int] | None = None,
        wrong_answer: Sequence[int] | None = None,
        *,
        group: Sequence[str] | None = None,
        name: str = "arrays",
    ) -> "Pairs":
        """Pair inputs of a model that is not text, such as images.

        Args:
            clean: Clean inputs, axes (pair, …): an array or tensor, or a list of them.
            corrupt: Corrupted inputs, likewise.
            answer: The right class of each clean input, axis (pair,).
            wrong_answer: The class of each corrupted input, axis (pair,).
            group: What ties pairs together, such as the person who wrote the digits, axis (pair,).
            name: How messages and results call them.

        Raises:
            PairError: The lists are not equally long.

        Examples:
            >>> images = np.zeros((2, 1, 28, 28))
            >>> Pairs.from_arrays(images, images + 1, answer=[3, 5], wrong_answer=[8, 6])
            Pairs('arrays', 2 pairs of arrays (1, 28, 28))
        """
        n_pairs = len(clean)
        given = {"corrupt": corrupt, "answer": answer, "wrong_answer": wrong_answer, "group": group}
        for word, values in given.items():
            if values is not None and len(values) != n_pairs:
                raise PairError(
                    f"'{name}' has {n_pairs} clean inputs and {len(values)} of {word}", fix="give one of each per pair"
                )
        pairs = pairs_of_arrays(clean, corrupt, (answer, wrong_answer), group)
        return cls(pairs, name=name, kind="arrays")

    def __len__(self) -> int:
        return len(self.pairs)

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.pairs)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> "Pairs": ...
    def __getitem__(self, index: int | slice) -> "Pair | Pairs":
        if isinstance(index, slice):
            return self.take(range(len(self))[index])
        return self.pairs[index]

    def __repr__(self) -> str:
        if self.kind == "arrays":
            return f"Pairs({self.name!r}, {len(self)} pairs of arrays {self.pairs[0].clean.shape})"
        lengths = np.concatenate([self.lengths("clean"), self.lengths("corrupt")])
        shown = f"{lengths.min()} to {lengths.max()} tokens"
        if self.encoder is not None:
            inner = np.concatenate([self.encoder.lengths("clean"), self.encoder.lengths("corrupt")])
            shown = f"{inner.min()} to {inner.max()} tokens in the encoder, {shown} in the decoder"
        return f"Pairs({self.name!r}, {len(self)} pairs of {shown})"

    @cached_property
    def encoder(self) -> "Pairs | None":
        """What the encoder of a model is given, as pairs of their own; None where there is no encoder's prompt."""
        inner = [pair.encoder for pair in self.pairs if pair.encoder is not None]
        if not inner:
            return None
        more: dict[str, Any] = {"tokenizer": self.tokenizer, "alignment": self._of_encoder}
        return Pairs(inner, name=self.name, kind=self.kind, **more)

    def of(self, stream: str | None) -> "Pairs":
        """Return the pairs of a stream's prompts: the encoder's, or these.

        Args:
            stream: ``"encoder"``, ``"decoder"``, or None where there is one stream.
        """
        return self.encoder if stream == "encoder" and self.encoder is not None else self

    @property
    def ids(self) -> list[str]:
        """Names of the pairs, in order."""
        return [pair.id for pair in self.pairs]

    @cached_property
    def components(self) -> NDArray[np.int64]:
        """Independent component of each pair, from 0, axis (pair,).

        Two pairs are in one component when they share a prompt, an entity or a group, directly or through others.
        """
        return components.connected(map(components.vertices, self.pairs))

    @cached_property
    def content_hash(self) -> str:
        """Hash of all pairs, their order and their alignment; the name does not count."""
        chosen = self._alignment
        aligned = None if chosen is None else (chosen.how, digest(chosen.columns))
        streams = [] if self.encoder is None else [self.encoder.content_hash]
        plain = to_json([self.kind, aligned, [pair.content_hash for pair in self.pairs], *streams])
        return hashlib.sha256(plain.encode()).hexdigest()[:16]

    def take(self, indices: Sequence[int] | NDArray[Any]) -> "Pairs":
        """Return some of the pairs, in the order of ``indices``, which may repeat.

        Args:
            indices: Indices of pairs, or one truth value per pair.
        """
        chosen = np.asarray(indices)
        chosen = np.flatnonzero(chosen) if chosen.dtype == bool else chosen.astype(np.int64)
        rows = chosen.tolist()
        both = [None if one is None else one.take(rows) for one in (self._alignment, self._of_encoder)]
        return self._with([self.pairs[i] for i in rows], *both)

    def drop(self, which: int | str) -> "Pairs":
        """Return all pairs but one.

        Args:
            which: Its index, or its id.

        Raises:
            PairError: There is no such pair.
        """
        index = index_of(self.pairs, which, self.name)
        return self.take([i for i in range(len(self)) if i != index])

    def where(self, **columns: object) -> "Pairs":
        """Return the pairs whose columns have the given values.

        Args:
            columns: Value by name of a column: ``id``, ``group``, ``split``, or another column of the file.

        Raises:
            PairError: A column does not exist, or no pair has these values.

        Examples:
            >>> rows = [Pair(np.array([k]), np.array([k + 1]), extra={"kind": "ab"[k % 2]}) for k in range(5)]
            >>> len(Pairs(rows).where(kind="a"))
            3
        """
        return self.take(where(self.pairs, columns, self.name))

    def swapped(self) -> "Pairs":
        """Return the pairs with clean and corrupted inputs exchanged, and with them texts and spans; answers stay."""
        both = [None if one is None else one.swapped() for one in (self._alignment, self._of_encoder)]
        return self._with([pair.swapped() for pair in self.pairs], *both)

    def with_answers(self, answers: Sequence[Answers]) -> "Pairs":
        """Return the pairs with other sets of answers, one per pair, and no wrong ones."""
        both = zip(self.pairs, answers, strict=True)
        made = [dataclasses.replace(pair, answer=tuple(one), wrong_answer=()) for pair, one in both]
        return self._with(made, self._alignment, self._of_encoder)

    def transformed(self, function: Callable[[Array], Any]) -> "Pairs":
        """Return pairs of arrays with a function applied to every input, such as the scaling of images.

        Args:
            function: Takes one input and returns the array (or tensor) that the model is given.

        Raises:
            PairError: These are pairs of prompts.
        """
        if self.kind != "arrays":
            raise PairError(
                f"'{self.name}' holds prompts; only inputs that are arrays can be transformed", fix="change the texts"
            )
        changed = [
            dataclasses.replace(
                pair, clean=as_numbers(function(pair.clean)), corrupt=as_numbers(function(pair.corrupt))
            )
            for pair in self.pairs
        ]
        return self._with(changed, None)

    def sizes(self, role: Role) -> NDArray[np.int64]:
        """Return the number of real tokens that a run of each pair has, its encoder's with its decoder's."""
        return self.lengths(role) + (0 if self.encoder is None else self.encoder.lengths(role))

    def lengths(self, role: Role) -> NDArray[np.int64]:
        """Return the number of real tokens of each prompt, special ones included, axis (pair,); 1 for arrays."""
        if self.kind == "arrays":
            return np.ones(len(self), dtype=np.int64)
        return np.array([len(pair.input(role)) for pair in self.pairs], dtype=np.int64)

    def tokens(self, role: Role, index: int) -> list[str]:
        """Return the tokens of one prompt as a person reads them.

        Args:
            role: ``"clean"`` or ``"corrupt"``.
            index: Index of the pair.
        """
        self._need_tokens()
        return [align.label(self.tokenizer, int(token)) for token in self.pairs[index].input(role)]

    @cached_property
    def alignment(self) -> Alignment | None:
        """Aligned columns; None for arrays, and where prompts differ in length and no alignment was chosen."""
        unequal = self.kind == "arrays" or align.first_unequal(self.pairs) is not None
        if self._alignment is not None or unequal:
            return self._alignment
        return align.build(self.pairs, "position", name=self.name, tokenizer=self.tokenizer)

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
            >>> pairs = Pairs([Pair(np.array([1, 5, 9]), np.array([1, 6, 7, 9]))])
            >>> pairs.align("difference").alignment.columns[0].tolist()
            [[0, 0], [-1, -1], [2, 3]]
        """
        self._need_tokens()
        if self.encoder is not None and stream != "decoder":
            of_encoder = self.encoder.align(how, spans=spans, mapping=mapping)._alignment
            made = self._with(self.pairs, self._alignment, of_encoder)
            return made if stream or how in ("spans", "map") else made.align(how, stream="decoder")
        made_here = align.build(self.pairs, how, name=self.name, tokenizer=self.tokenizer, spans=spans, mapping=mapping)
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
        self._need_tokens()
        if position is None or isinstance(position, Every):
            columns = self.aligned().columns[index]
            base_side = ROLES.index(as_role(base))
            kept = columns[columns[:, 0] >= 0]
            return kept[:, base_side].copy(), kept[:, 1 - base_side].copy()
        where = f"pair {index} of '{self.name}'"
        return (
            positions.resolve(self.pairs[index], position, as_role(base), where),
            positions.resolve(self.pairs[index], position, other(base), where),
        )

    def batch(
        self,
        role: Role,
        indices: Sequence[int] | NDArray[Any] | None = None,
        *,
        padding_side: PaddingSide = "right",
        continuations: Sequence[Sequence[int]] | None = None,
    ) -> Batch:
        """Lay inputs of several pairs into one batch, each row with its own mask and position ids.

        Args:
            role: ``"clean"`` or ``"corrupt"``.
            indices: Which pairs, in this order; they may repeat. None for all.
            padding_side: ``"right"`` or ``"left"``; the real tokens and their position ids are the same.
            continuations: Ids that follow each prompt, such as the tokens of an answer; one list per row.
        """
        rows = [self.pairs[int(i)].input(role) for i in (range(len(self)) if indices is None else indices)]
        if self.kind == "arrays":
            made = batch.stack(rows, self.name)
        else:
            pad_id = 0 if self.tokenizer is None else self.tokenizer.pad_id
            made = batch.pad(rows, pad_id=pad_id, padding_side=padding_side, continuations=continuations)
        of_encoder = None if self.encoder is None else self.encoder.batch(role, indices, padding_side=padding_side)
        return dataclasses.replace(made, role=as_role(role), encoder=of_encoder)

    def one_sided(self, role: Role) -> "Pairs":
        """Return the pairs with the prompts of one side on both, to compare two models on the same prompts.

        Args:
            role: Whose prompts; answers stay.
        """
        return self._with([pair.one_sided(role) for pair in self.pairs], None)

    def check(self) -> PairReport:
        """Report what would make the numbers mean less than they seem to.

        Returns:
            Independent components, mirrored share, duplicates, equal inputs, unequal lengths, tokens per answer, and
            components that stand in several given splits. ``print()`` it. Nothing is dropped.
        """
        return check.report(self)

    def split(self, fraction: float = 0.5, seed: int = 0) -> tuple["Pairs", "Pairs"]:
        """Divide the pairs in two by whole components, so that the sides share no prompt, entity or group.

        Args:
            fraction: Share of the pairs meant for the first side, between 0 and 1. Components stay whole, so the
                share that results can differ.
            seed: Seed of the draw. The order of the pairs does not matter.

        Raises:
            PairError: There are fewer than two components for each side.
        """
        hashes = [pair.content_hash for pair in self.pairs]
        first, second = split.by_component(self.components, hashes, fraction, seed, self.name)
        return self.take(first), self.take(second)

    def split_by_column(self) -> dict[str, "Pairs"]:
        """Divide the pairs as their column ``split`` says.

        Returns:
            The pairs of each split, by its name.

        Raises:
            PairError: A pair has no split, or a component stands in several of them.
        """
        return {name: self.take(indices) for name, indices in split.by_column(self).items()}

    def _with(self, pairs: Sequence[Pair], alignment: Alignment | None, of_encoder: Alignment | None = None) -> "Pairs":
        more: dict[str, Any] = {"alignment": alignment, "of_encoder": of_encoder}
        return Pairs(pairs, name=self.name, kind=self.kind, tokenizer=self.tokenizer, **more)

    def _need_tokens(self) -> None:
        if self.kind != "tokens":
            raise PairError(
                f"'{self.name}' holds arrays, which have no token positions",
                fix="leave the position out of the site, or name the axes of the module: axes=(…)",
            )
