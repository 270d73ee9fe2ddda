"""Pairs: all pairs of an experiment, with what they share.

Their name, their tokenizer, how their positions align, and which of them hang together. Nothing here ever changes in
place; every method that selects or alters returns new ``Pairs``.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError, SettingError
from causalpatch.base.spec import to_json
from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs import arrays, batch, check, components, split
from causalpatch.pairs.align import Alignment
from causalpatch.pairs.batch import Batch, PaddingSide
from causalpatch.pairs.check import PairReport
from causalpatch.pairs.pair import Answers, Array, Pair, digest, require_same_streams
from causalpatch.pairs.placed import Kind, Placed
from causalpatch.pairs.role import Role, as_role
from causalpatch.pairs.selection import index_of, where


class Pairs(Placed):
    """Clean and corrupted inputs that belong together.

    Args:
        pairs: At least one.
        name: How messages and results call them.
        kind: ``"tokens"`` for prompts of token ids, ``"arrays"`` for inputs of other models.
        tokenizer: What turns ids into labels; None shows ids.
        alignment: How positions align; by default by position where clean and corrupted prompts are equally long.
        of_encoder: The same for the encoder's prompts, of pairs that have such beside the decoder's.
        common: Further arguments of the model's forward that are the same in every run, by name; see ``with_common``.

    Raises:
        PairError: There is not even one pair, or not all pairs have the same further arguments, or only some have a
            prompt for an encoder.

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
        common: Mapping[str, Any] | None = None,
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
        self.common = arrays.as_common(common or {})
        require_same_streams(self.pairs, name)
        arrays.check_names(self.pairs, self.common, name)

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
        return cls(arrays.pair_up(clean, corrupt, answer, wrong_answer, group, name=name), name=name, kind="arrays")

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
        more: list[Any] = [] if self.encoder is None else [self.encoder.content_hash]
        more += [{name: digest(array) for name, array in self.common.items()}] if self.common else []
        plain = to_json([self.kind, aligned, [pair.content_hash for pair in self.pairs], *more])
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

    def with_beside(self, **arguments: Any) -> "Pairs":
        """Return the pairs with further arguments of the model's forward, such as the picture that a prompt speaks of.

        Args:
            arguments: By the name of the argument, a tuple of the values of the clean and of the corrupted runs, each
                with axes (pair, …); or one array or list for both. Pairs that share an array are not independent.

        Raises:
            PairError: There is not one for each pair, or they hold no numbers.

        Examples:
            >>> pairs = Pairs([Pair(np.array([1, 5]), np.array([1, 6]))])
            >>> pairs.with_beside(pixel_values=np.zeros((1, 3, 8, 8)))[0].beside["pixel_values"][1].shape
            (3, 8, 8)
        """
        made = arrays.put_beside(self.pairs, arguments, self.name)
        return self._with(made, self._alignment, self._of_encoder)

    def with_common(self, **arguments: Any) -> "Pairs":
        """Return the pairs with further arguments of the model's forward that are the same in every run.

        Args:
            arguments: By the name of the argument, what is handed over as it is, without an axis for the rows: such as
                the texts that each picture is compared with.
        """
        return self._with(self.pairs, self._alignment, self._of_encoder, common={**self.common, **arguments})

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
        return self._with(arrays.transform(self.pairs, function), None)

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
        chosen = [self.pairs[int(i)] for i in (range(len(self)) if indices is None else indices)]
        rows = [pair.input(role) for pair in chosen]
        if self.kind == "arrays":
            made = batch.stack(rows, self.name, len(self.places))
        else:
            pad_id = 0 if self.tokenizer is None else self.tokenizer.pad_id
            made = batch.pad(rows, pad_id=pad_id, padding_side=padding_side, continuations=continuations)
        of_encoder = None if self.encoder is None else self.encoder.batch(role, indices, padding_side=padding_side)
        beside = batch.stack_beside([pair.besides(role) for pair in chosen], self.name)
        more: dict[str, Any] = {"encoder": of_encoder, "beside": beside, "common": self.common}
        if self.kind == "tokens" and self.pictures is not None:
            more["seen"] = self.pictures.batch(role, indices)
        return dataclasses.replace(made, role=as_role(role), **more)

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

    def split(self, fraction: float = 0.5, seed: int = 0, *, by: str | Sequence[str] = ()) -> tuple["Pairs", "Pairs"]:
        """Divide the pairs in two by whole components, so that the sides share no prompt, entity or group.

        Args:
            fraction: Share of the pairs meant for the first side, between 0 and 1. Components stay whole, so the
                share that results can differ.
            seed: Seed of the draw. The order of the pairs does not matter.
            by: Columns of which the sides are to share no value either, such as ``"template"``.

        Raises:
            PairError: There are fewer than two components for each side, or no such column.

        Examples:
            >>> import causalpatch as cp
            >>> found_on, held_out = cp.load_pairs("ioi", cp.open_model("zoo:stories")).split(by="template")
            >>> {pair.extra["template"] for pair in found_on} & {pair.extra["template"] for pair in held_out}
            set()
        """
        hashes = [pair.content_hash for pair in self.pairs]
        columns = [by] if isinstance(by, str) else by
        whole = self.components if not columns else components.alike(self.pairs, columns, self.name)
        first, second = split.by_component(whole, hashes, fraction, seed, self.name)
        return self.take(first), self.take(second)

    def split_by_column(self) -> dict[str, "Pairs"]:
        """Divide the pairs as their column ``split`` says.

        Returns:
            The pairs of each split, by its name.

        Raises:
            PairError: A pair has no split, or a component stands in several of them.
        """
        return {name: self.take(indices) for name, indices in split.by_column(self).items()}

    def _with(
        self,
        pairs: Sequence[Pair],
        alignment: Alignment | None,
        of_encoder: Alignment | None = None,
        **changed: Any,
    ) -> "Pairs":
        more: dict[str, Any] = {"kind": self.kind, "tokenizer": self.tokenizer, "common": self.common}
        places = changed.pop("places", self.places)
        made = Pairs(pairs, name=self.name, alignment=alignment, of_encoder=of_encoder, **{**more, **changed})
        made.places = places
        return made
