"""From what was asked to what is written: sets expanded, spans and columns turned into tokens of each prompt.

An intervention becomes a tuple of ``Target`` (one site each). For each pair a target's positions become a
``Placement``: base tokens, and for each of them the range of source tokens whose mean it receives (a single token,
but for spans of unequal lengths aligned by their mean). Tokens are counted in real tokens of each prompt, from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from causalpatch.base.errors import PairError, PatchError, SiteNotFound
from causalpatch.engine.drawn import Donated, Scattered
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.positions import resolve
from causalpatch.patches import Function, Identity, Interpolate, Intervention, Patch, Source, Value
from causalpatch.patches.patch import Alignment
from causalpatch.sites import Every, Position, Site, Span, expand

Role = Literal["clean", "corrupt"]


@dataclass(frozen=True)
class Target:
    """One site of an intervention.

    Args:
        site: The site without its position.
        position: Where in each prompt; None for all positions.
        column: The aligned column instead, or None.
        value: Its new value; what is drawn is made ready before the runs.
        align: How spans of unequal lengths meet.
        has_position: Whether the site's tensor has a position axis.
    """

    site: Site
    position: Position | None
    column: int | None
    value: Value | Donated | Scattered
    align: Alignment | None
    has_position: bool

    @property
    def needs_source(self) -> bool:
        """Whether the new value is computed from the source run."""
        is_function = isinstance(self.value, Function) and self.value.needs_source
        return is_function or isinstance(self.value, Source | Interpolate)

    @property
    def needs_base(self) -> bool:
        """Whether the new value is computed from what the base run has there."""
        return isinstance(self.value, Identity | Interpolate)


@dataclass(frozen=True)
class Placement:
    """Where one target lies in one pair.

    Args:
        base: Base tokens that are written, ``(element,)``.
        start: First source token of each element, ``(element,)``.
        stop: One past the last source token of each element, ``(element,)``.
    """

    base: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def targets_of(model: Model, intervention: Intervention) -> tuple[Target, ...]:
    """Expand an intervention's site sets into one target per site.

    Raises:
        SiteNotFound: A site is not in the model, or has a position where its tensor has none.
        SiteUnsupported: The model does not have the site.
        PatchError: Two patches of the intervention write the same place.
    """
    targets = [target for patch in intervention.patches for target in _targets_of_patch(model, patch)]
    seen: set[tuple[Site, object, object]] = set()
    for target in targets:
        key = (target.site, target.position, target.column)
        if key in seen:
            raise PatchError(
                f"intervention '{intervention}' writes '{target.site}' twice",
                facts=[("patches", len(intervention.patches))],
                fix="name every site once per intervention",
            )
        seen.add(key)
    return tuple(targets)


def _targets_of_patch(model: Model, patch: Patch) -> list[Target]:
    targets = []
    for site in expand(patch.site, model.shape):
        has_position = site.module is None or model.tap(site).has_position
        position = None if isinstance(site.position, Every) else site.position
        if not has_position and (position is not None or patch.column is not None):
            raise SiteNotFound(
                f"site '{site}' has no positions in '{model.name}'",
                facts=[("its axes", "are not named" if site.module and not site.module.axes else "have no position")],
                fix="leave the position out, or name the axes: axes=(position,width)",
            )
        targets.append(Target(site.at(None), position, patch.column, patch.value, patch.align, has_position))
    return targets


class Placer:
    """Finds and remembers where targets lie in pairs.

    Args:
        pairs: The pairs.
        base: Which side is the base run's.
    """

    def __init__(self, pairs: Pairs, base: Role) -> None:
        self.pairs = pairs
        self.base: Role = base
        self._known: dict[tuple[object, ...], dict[int, Placement | None]] = {}

    def place(self, target: Target, pair: int) -> Placement | None:
        """Return where a target lies in a pair; None where the pair has no such aligned column.

        Raises:
            PairError: A position is outside the prompt, a span is missing or empty, the pair needs an alignment, or it
                holds arrays.
        """
        return self.places(target, [pair])[0]

    def places(self, target: Target, pairs: Sequence[int]) -> list[Placement | None]:
        """Return where a target lies in each of some pairs; see ``place``."""
        donated = target.value if isinstance(target.value, Donated) else None
        key = (target.position, target.column, target.align, target.needs_source, donated)
        known = self._known.setdefault(key, {})
        for pair in pairs:
            if pair not in known:
                known[pair] = self._find(target, pair)
        return [known[pair] for pair in pairs]

    def _find(self, target: Target, pair: int) -> Placement | None:
        if self.pairs.kind != "tokens":
            raise PairError(
                f"'{target.site}' has positions, but '{self.pairs.name}' holds arrays",
                fix="name that axis otherwise, such as axes=(channel,column): the whole tensor is then patched",
            )
        if target.column is not None:
            return self._find_column(target, target.column, pair)
        if isinstance(target.value, Donated):
            base, source = self._meet_donor(target, target.value, pair)
        elif target.needs_source:
            base, source = self.pairs.positions(pair, target.position, self.base)
        else:
            base = source = self._base_tokens(pair, target.position)
        if not (len(base) and len(source)):
            self._refuse_empty_span(target, pair)
            return None
        if len(base) == len(source):
            return Placement(base, source, source + 1)
        return self._align(target, pair, base, source)

    def _refuse_empty_span(self, target: Target, pair: int) -> None:
        """Tell a pair none of whose tokens is aligned, which is no error, from a span that holds no token."""
        if isinstance(target.position, Span):
            raise PairError(
                f"span '{target.position}' of pair {pair} of '{self.pairs.name}' holds no token",
                facts=[("spans", dict(self.pairs[pair].spans))],
                fix=f"drop it (pairs.drop({pair})) or give the span a token on both sides",
            )

    def _find_column(self, target: Target, column: int, pair: int) -> Placement | None:
        columns = self.pairs.aligned().columns
        if not 0 <= column < columns.shape[1]:
            raise PairError(
                f"'{self.pairs.name}' has no aligned column {column}",
                facts=[("columns", f"0 to {columns.shape[1] - 1}")],
                fix="give one of these, or a position in the site",
            )
        side = 0 if self.base == "clean" else 1
        base, source = columns[pair, column, side], columns[pair, column, 1 - side]
        if isinstance(target.value, Donated):
            of_donor = target.value.columns(self.pairs[pair])
            source = -1 if of_donor is None else of_donor[column]
        if base < 0 or (source < 0 and (target.needs_source or isinstance(target.value, Donated))):
            return None
        return Placement(np.array([base]), np.array([source]), np.array([source + 1]))

    def _base_tokens(self, pair: int, position: Position | None) -> np.ndarray:
        """Return the base prompt's tokens at a position, whatever the source prompt looks like."""
        if position is None or isinstance(position, Every):
            return np.arange(len(self.pairs[pair].input(self.base)))
        return resolve(self.pairs[pair], position, self.base, f"pair {pair} of '{self.pairs.name}'")

    def _meet_donor(self, target: Target, value: Donated, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the base's tokens, and those of the donor's prompt that they take their values from."""
        own, number = self.pairs[pair], value.donor(self.pairs[pair])
        donor, side = value.pool[number], value.value.side
        if target.position is not None and not isinstance(target.position, Every):
            where = f"pair {number} of '{value.pool.name}', from which pair {pair} is resampled,"
            return self._base_tokens(pair, target.position), resolve(donor, target.position, side, where)
        n_own, n_donor = len(own.input(self.base)), len(donor.input(side))
        if n_own == n_donor:
            return np.arange(n_own), np.arange(n_donor)
        alignment, theirs = self.pairs.alignment, value.columns(own)
        if alignment is None or alignment.how == "position" or theirs is None:
            raise PairError(
                f"pair {pair} of '{self.pairs.name}' cannot be resampled at all positions: no other prompt is as long",
                facts=[("its prompt", f"{n_own} tokens"), ("drawn", f"pair {number} of {n_donor} tokens")],
                fix=f"name where, such as '{target.site}@-1' or a span, or align the pairs: pairs.align(\"spans\")",
            )
        mine = alignment.columns[pair, :, 0 if self.base == "clean" else 1]
        both = (mine >= 0) & (theirs >= 0)
        return mine[both], theirs[both]

    def _align(self, target: Target, pair: int, base: np.ndarray, source: np.ndarray) -> Placement:
        if target.align == "mean":
            start = np.full(len(base), source[0])
            return Placement(base, start, np.full(len(base), source[-1] + 1))
        if target.align in ("first", "last"):
            n = min(len(base), len(source))
            part = slice(0, n) if target.align == "first" else slice(-n, None)
            return Placement(base[part], source[part], source[part] + 1)
        raise PairError(
            f"pair {pair} of '{self.pairs.name}' has {len(base)} and {len(source)} tokens at '@{target.position}'",
            facts=[("base", f"tokens {base.tolist()}"), ("source", f"tokens {source.tolist()}")],
            fix=f"say how they meet: Patch('{target.site}@{target.position}', align='first'), 'last' or 'mean'",
        )
