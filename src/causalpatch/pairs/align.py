"""Alignment: which position of the clean prompt answers to which of the corrupted one.

A sweep over positions walks along *aligned columns*. Each column holds, for every pair, one clean and one corrupted
position, or nothing where the pair has no such column. Four ways to build them:

===============  ======================================================================================
``position``     column k is token k of both; every pair must have equally many clean and corrupted tokens
``difference``   tokens that both prompts share, found by ``difflib`` on the ids; a run of changed tokens is aligned
                 one to one if it is equally long on both sides; column k is token k of the clean prompt
``spans``        the tokens of the named spans in order: ``subject[0]``, ``subject[1]`` …
``map``          the user's own pairs of positions; column k is entry k
===============  ======================================================================================

Positions that find no partner are listed in ``Alignment.unmatched``, never padded over.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError, SettingError
from causalpatch.base.tokens import Tokenizer
from causalpatch.pairs.pair import Pair
from causalpatch.pairs.role import ROLES, Role, as_role

Match: TypeAlias = tuple[int, int]
Ids: TypeAlias = NDArray[np.int64]
Mapped: TypeAlias = Mapping[str, Sequence[Match]] | Sequence[Sequence[Match]]

HOWS = ("position", "difference", "spans", "map")
NO_MATCH: Match = (-1, -1)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Aligned columns of all pairs.

    Args:
        how: Which of the four ways built it.
        columns: Axes (pair, column, 2): clean position, corrupted position, counted in real tokens from 0; -1 where the
            pair has no such column.
        inputs: The ids of each pair's clean and corrupted prompt.
        names: Names of the columns where the alignment gives them (spans), else None.
        tokenizer: What turns ids into labels; None shows the ids.
    """

    how: str
    columns: NDArray[np.int64]
    inputs: tuple[tuple[Ids, Ids], ...] = field(repr=False)
    names: tuple[str, ...] | None = None
    tokenizer: Tokenizer | None = field(default=None, repr=False)

    @property
    def n_columns(self) -> int:
        """Number of aligned columns."""
        return int(self.columns.shape[1])

    def labels(self, role: Role = "clean") -> list[str]:
        """Return a label per column: the token where all pairs that have the column share it, else ``(varies)``.

        Columns of spans are labelled by name (``subject[0]``); a column that no pair has is ``(unmatched)``.

        Args:
            role: Whose tokens label the axis.
        """
        if self.names is not None:
            return list(self.names)
        side = int(as_role(role) == "corrupt")
        labels = []
        for column in range(self.n_columns):
            places = self.columns[:, column, side].tolist()
            found = {int(ids[side][place]) for ids, place in zip(self.inputs, places, strict=True) if place >= 0}
            if not found:
                labels.append("(unmatched)")
            elif len(found) > 1:
                labels.append("(varies)")
            else:
                labels.append(label(self.tokenizer, found.pop()))
        return labels

    def unmatched(self, role: Role) -> list[list[int]]:
        """Return for each pair the positions of its prompt that stand in no column.

        Args:
            role: Whose positions.
        """
        side = int(as_role(role) == "corrupt")
        used = [set(row.tolist()) for row in self.columns[:, :, side]]
        return [
            [p for p in range(len(ids[side])) if p not in taken] for ids, taken in zip(self.inputs, used, strict=True)
        ]

    def take(self, indices: Sequence[int]) -> "Alignment":
        """Return the alignment of some of the pairs."""
        inputs = tuple(self.inputs[i] for i in indices)
        return Alignment(self.how, self.columns[list(indices)], inputs, self.names, self.tokenizer)

    def swapped(self) -> "Alignment":
        """Return the alignment with clean and corrupted exchanged."""
        inputs = tuple((corrupt, clean) for clean, corrupt in self.inputs)
        return Alignment(self.how, self.columns[:, :, ::-1].copy(), inputs, self.names, self.tokenizer)

    def __str__(self) -> str:
        clean, corrupt = (sum(bool(places) for places in self.unmatched(role)) for role in ROLES)
        n_pairs = len(self.inputs)
        report = "every token has a partner"
        if clean or corrupt:
            report = f"tokens without a partner in {clean} clean and {corrupt} corrupted prompts of {n_pairs}"
        return f"{self.n_columns} columns aligned by {self.how}: {report}"


def label(tokenizer: Tokenizer | None, token_id: int) -> str:
    """Return a token as a person reads it; its id where there is no tokenizer."""
    return str(token_id) if tokenizer is None else tokenizer.label(token_id)


def first_unequal(pairs: Sequence[Pair]) -> int | None:
    """Return the index of the first pair whose prompts have different lengths, or None."""
    return next((i for i, pair in enumerate(pairs) if len(pair.clean) != len(pair.corrupt)), None)


def build(
    pairs: Sequence[Pair],
    how: str,
    *,
    name: str,
    tokenizer: Tokenizer | None = None,
    spans: Sequence[str] | None = None,
    mapping: Mapped | None = None,
) -> Alignment:
    """Align all pairs in one of the four ways.

    Args:
        pairs: The pairs, of token ids.
        how: ``position``, ``difference``, ``spans`` or ``map``.
        name: Name of the pairs, for errors.
        tokenizer: What turns ids into labels.
        spans: Names of spans to use, in this order; by default those that every pair has.
        mapping: For ``map``: (clean, corrupted) positions of each pair, by pair id or one list per pair.

    Raises:
        PairError: The pairs cannot be aligned in this way; the first that cannot is shown.
        SettingError: The way is unknown.
    """
    if how not in HOWS:
        raise SettingError(
            f"pairs cannot be aligned by {how!r}", facts=[("known", ", ".join(HOWS))], fix='pairs.align("difference")'
        )
    names = None
    if how == "position":
        matches = _by_position(pairs, name, tokenizer)
    elif how == "difference":
        matches = [difference(pair.clean, pair.corrupt) for pair in pairs]
    elif how == "spans":
        matches, names = _by_spans(pairs, name, spans)
    else:
        matches = _by_map(pairs, name, mapping)
    width = max(map(len, matches), default=0)
    columns = np.full((len(pairs), width, 2), -1, dtype=np.int64)
    for index, row in enumerate(matches):
        columns[index, : len(row)] = np.asarray(row, dtype=np.int64).reshape(-1, 2)
    return Alignment(how, columns, tuple((p.clean, p.corrupt) for p in pairs), names, tokenizer)


def difference(clean: Ids, corrupt: Ids) -> list[Match]:
    """Align two prompts by their tokens.

    Runs of equal tokens meet, and so do runs of changed tokens where they are equally long; other tokens meet nothing.

    Args:
        clean: Ids of the clean prompt.
        corrupt: Ids of the corrupted prompt.

    Returns:
        One entry per clean token: (clean, corrupted) position, or (-1, -1) where it has no partner.

    Examples:
        >>> difference(np.array([1, 5, 9]), np.array([1, 6, 7, 9]))
        [(0, 0), (-1, -1), (2, 3)]
    """
    matcher = difflib.SequenceMatcher(None, clean.tolist(), corrupt.tolist(), autojunk=False)
    found = [NO_MATCH] * len(clean)
    for _, i0, i1, j0, j1 in matcher.get_opcodes():
        if i1 - i0 == j1 - j0:
            found[i0:i1] = list(zip(range(i0, i1), range(j0, j1), strict=True))
    return found


def changed_range(clean: Ids, corrupt: Ids) -> tuple[Match, Match]:
    """Return the half-open ranges from the first to the last token in which two prompts differ.

    Where one of them has nothing there, its range is the token behind the place, or the last.

    Args:
        clean: Ids of the clean prompt.
        corrupt: Ids of the corrupted prompt, which differs.

    Examples:
        >>> changed_range(np.array([1, 5, 9]), np.array([1, 6, 7, 9]))
        ((1, 2), (1, 3))
    """
    n_shared = min(len(clean), len(corrupt))
    before = int(np.argmin(np.append(clean[:n_shared] == corrupt[:n_shared], False)))
    left = n_shared - before
    after = int(np.argmin(np.append(clean[::-1][:left] == corrupt[::-1][:left], False)))
    return _at_least_one(before, len(clean) - after), _at_least_one(before, len(corrupt) - after)


def _at_least_one(start: int, stop: int) -> Match:
    return (start, stop) if stop > start else (start - int(start > 0), max(start, 1))


def cannot_align(pairs: Sequence[Pair], index: int, name: str, tokenizer: Tokenizer | None) -> PairError:
    """Return the error for a pair whose prompts have different lengths, showing both where they part."""
    pair = pairs[index]
    i0, i1, j0, j1 = _first_change(pair.clean, pair.corrupt)
    have_spans = all(one.spans for one in pairs)
    instead = 'span (pairs.align("spans"))' if have_spans else 'token difference (pairs.align("difference"))'
    return PairError(
        f"pair {index} of '{name}' cannot be aligned by position",
        facts=[
            ("clean", f"{len(pair.clean)} tokens: {_window(pair.clean, i0, i1, tokenizer)}"),
            ("corrupted", f"{len(pair.corrupt)} tokens: {_window(pair.corrupt, j0, j1, tokenizer)}"),
        ],
        fix=f"drop it (pairs.drop({index})) or align by {instead}",
    )


def _by_position(pairs: Sequence[Pair], name: str, tokenizer: Tokenizer | None) -> list[list[Match]]:
    unequal = first_unequal(pairs)
    if unequal is not None:
        raise cannot_align(pairs, unequal, name, tokenizer)
    return [[(k, k) for k in range(len(pair.clean))] for pair in pairs]


def _by_spans(
    pairs: Sequence[Pair], name: str, spans: Sequence[str] | None
) -> tuple[list[list[Match]], tuple[str, ...]]:
    """Lay the tokens of each named span side by side, as many columns as the longest shared part needs."""
    wanted = list(spans) if spans is not None else [s for s in pairs[0].spans if all(s in pair.spans for pair in pairs)]
    if not wanted:
        raise PairError(
            f"pairs of '{name}' cannot be aligned by span: no span is named in every pair",
            facts=[("spans of pair 0", ", ".join(pairs[0].spans) or "none")],
            fix='add a column spans, for instance {"subject": " Mary"}, or pairs.align("difference")',
        )
    for index, pair in enumerate(pairs):
        missing = [s for s in wanted if s not in pair.spans]
        if missing:
            raise PairError(
                f"pair {index} of '{name}' has no span '{missing[0]}'",
                facts=[("its spans", ", ".join(pair.spans) or "none")],
                fix=f'drop it (pairs.drop({index})) or name other spans (pairs.align("spans", spans=[…]))',
            )
    rows: list[list[Match]] = [[] for _ in pairs]
    names: list[str] = []
    for span in wanted:
        shared = [min(b - a for a, b in pair.spans[span]) for pair in pairs]
        width = max(shared)
        names += [f"{span}[{k}]" for k in range(width)]
        for row, pair, n_shared in zip(rows, pairs, shared, strict=True):
            (clean, _), (corrupt, _) = pair.spans[span]
            row += [(clean + k, corrupt + k) for k in range(n_shared)] + [NO_MATCH] * (width - n_shared)
    return rows, tuple(names)


def _by_map(pairs: Sequence[Pair], name: str, mapping: Mapped | None) -> list[list[Match]]:
    """Read the user's positions, negative ones counted from each prompt's own end."""
    if mapping is None:
        raise SettingError(
            "alignment by map needs a map", fix='pairs.align("map", mapping=[[(0, 0), (1, 2)], …]), one list per pair'
        )
    if isinstance(mapping, Mapping):
        absent = [pair.id for pair in pairs if pair.id not in mapping]
        if absent:
            raise PairError(
                f"the map has no entry for pair '{absent[0]}' of '{name}'",
                facts=[("missing", len(absent))],
                fix="give every pair's id a list of (clean, corrupted) positions",
            )
        mapping = [mapping[pair.id] for pair in pairs]
    if len(mapping) != len(pairs):
        raise PairError(
            f"the map of '{name}' has {len(mapping)} entries for {len(pairs)} pairs",
            fix="give one list of (clean, corrupted) positions per pair",
        )
    rows = []
    for index, (pair, entry) in enumerate(zip(pairs, mapping, strict=True)):
        sizes = (len(pair.clean), len(pair.corrupt))
        row = []
        for match in entry:
            if len(match) != 2 or any(not -size <= place < size for place, size in zip(match, sizes, strict=True)):
                raise PairError(
                    f"the map of pair {index} of '{name}' holds {tuple(match)}, which is no pair of positions in it",
                    facts=[("clean", f"{sizes[0]} tokens"), ("corrupted", f"{sizes[1]} tokens")],
                    fix="give (clean, corrupted) positions, counted in tokens from 0",
                )
            row.append((match[0] % sizes[0], match[1] % sizes[1]))
        rows.append(row)
    return rows


def _first_change(clean: Ids, corrupt: Ids) -> tuple[int, int, int, int]:
    codes = difflib.SequenceMatcher(None, clean.tolist(), corrupt.tolist(), autojunk=False).get_opcodes()
    return next(((i0, i1, j0, j1) for tag, i0, i1, j0, j1 in codes if tag != "equal"), (0, 0, 0, 0))


def _window(ids: Ids, start: int, stop: int, tokenizer: Tokenizer | None) -> str:
    """Show the changed tokens and the next one."""
    stop = min(stop + 1, start + 4, len(ids))
    shown = [repr(label(tokenizer, int(token))) for token in ids[start:stop]]
    return " ".join([*(["..."] if start else []), *shown, *(["..."] if stop < len(ids) else [])])
