"""From what was asked to what is written: sets expanded, spans and columns turned into tokens of each prompt.

An intervention becomes a tuple of ``Target`` (one site each). For each pair a target's positions become a
``Placement``: base tokens, and for each of them the range of source tokens whose mean it receives (a single token,
but for spans of unequal lengths aligned by their mean). Tokens are counted in real tokens of each prompt, from 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from causalpatch.base.errors import PairError, PatchError, SiteNotFound
from causalpatch.engine.drawn import Computed, Donated, Scattered
from causalpatch.engine.joined import is_joined, joined_patch
from causalpatch.engine.keys import require_keys
from causalpatch.engine.other_tokens import tokens_elsewhere, value_elsewhere
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.positions import resolve
from causalpatch.patches import (
    Constant,
    From,
    Function,
    Given,
    Identity,
    Interpolate,
    Intervention,
    Mean,
    Patch,
    Resample,
    Source,
    Subspace,
    Value,
    Zero,
)
from causalpatch.patches.patch import Alignment
from causalpatch.sites import Every, Position, Site, Span, expand
from causalpatch.sites.names import CROSS_SITES

Role = Literal["clean", "corrupt"]
_OF_ROWS = (Source, Identity, Interpolate, Zero, Constant, Mean, Function, Resample)


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
        inside: The subspace inside which the value is put in, or None for the whole site.
        anchor: The name of the site in whose tensor a feature is written; "" for all but features.
        sees_ahead: Whether queries see keys behind them.
        stream: The stream whose tokens the position counts, of a model with an encoder and a decoder.
    """

    site: Site
    position: Position | None
    column: int | None
    value: Value | Donated | Scattered | Computed
    align: Alignment | None
    has_position: bool
    inside: Subspace | None = None
    anchor: str = ""
    sees_ahead: bool = False
    stream: str | None = None

    @property
    def described(self) -> str:
        """The new value in words."""
        return str(self.value) if self.inside is None else self.inside.describe(self.value)

    @property
    def is_ahead(self) -> bool:
        """Whether its tokens are not those that are answered, but run before them: an encoder's, or a picture's."""
        return self.stream in ("encoder", "vision")

    @property
    def provable(self) -> str:
        """The name by which the site is proven: each stream, and each layer of a dictionary, by itself."""
        site = self.site
        name = site.name if site.stream is None else f"{site.stream}/{site.name}"
        return name if site.dictionary is None else f"{site.name}({site.dictionary}).{site.layer}"

    @property
    def needs_source(self) -> bool:
        """Whether the new value is computed from the source run."""
        is_function = isinstance(self.value, Function) and self.value.needs_source
        return is_function or isinstance(self.value, Source | Interpolate)

    @property
    def moves_to_source(self) -> bool:
        """Whether the new value moves the base run towards the source run, which shares then refer to."""
        if isinstance(self.value, Given):
            return self.value.is_from_source
        return self.needs_source or (isinstance(self.value, From) and self.value.moves_to_source)

    @property
    def needs_base(self) -> bool:
        """Whether the new value is computed from what the base run has there."""
        return isinstance(self.value, Identity | Interpolate)

    @property
    def key_stream(self) -> str | None:
        """The stream whose tokens are keys."""
        return "encoder" if self.site.name in CROSS_SITES else self.stream

    @property
    def meets_keys(self) -> bool:
        """Whether the new value is a row over the source prompt's keys, which must be those of the base prompt."""
        return self.site.info.has_keys and (self.needs_source or isinstance(self.value, Donated))


@dataclass(frozen=True)
class Placement:
    """Where one target lies in one pair.

    Args:
        base: Base tokens that are written, ``(element,)``.
        start: First source token of each element, ``(element,)``.
        stop: One past the last source token of each element, ``(element,)``.

    Of given values the source tokens are the numbers of their elements.
    """

    base: np.ndarray
    start: np.ndarray
    stop: np.ndarray


def crosses_positions(model: Model, pairs: Pairs, base: Role, targets: Sequence[tuple[Target, ...]]) -> Site | None:
    """Return a rotated site whose source value comes from a token at another place, or None where there is none.

    A rotary embedding turns queries and keys by their place, so that such a value brings its old place along.

    Args:
        model: The model; one with a position embedding has no rotary embedding.
        pairs: The pairs.
        base: Which side is the base run's.
        targets: What is patched.
    """
    if "pos_embed" not in model.shape.refused:
        return None
    placer = Placer(pairs, base)
    for target in (target for group in targets for target in group):
        takes = target.needs_source or isinstance(target.value, From)
        names = {target.site.name, target.value.parsed.name if isinstance(target.value, From) else ""}
        if takes and names & {"q_rot", "k_rot"}:
            for place in placer.places(target, range(len(pairs))):
                if place is not None and ((place.start != place.base) | (place.stop != place.base + 1)).any():
                    return target.site
    return None


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
    if isinstance(patch.value, Subspace) and is_joined(patch.site, patch.value):
        patch = joined_patch(model, patch, patch.value)
    for site in expand(patch.site, model.shape):
        has_position = site.module is None or model.tap(site).has_position
        position = None if isinstance(site.position, Every) else site.position
        if not has_position and (position is not None or patch.column is not None):
            raise SiteNotFound(
                f"site '{site}' has no positions in '{model.name}'",
                facts=[("its axes", "are not named" if site.module and not site.module.axes else "have no position")],
                fix="leave the position out, or name the axes: axes=(position,width)",
            )
        if isinstance(patch.value, Given | From) and not has_position:
            raise PatchError(
                f"'{site}' has no tokens to be given values",
                facts=[("given", str(patch.value))],
                fix="name its axes, such as axes=(position,width), or give a Constant",
            )
        if site.info.has_keys:
            _require_row(site, patch.value)
        inside = patch.value if isinstance(patch.value, Subspace) else None
        value = patch.value.of if isinstance(patch.value, Subspace) else patch.value
        value = value_elsewhere(model, site, value) if isinstance(value, From) else value
        anchor = "" if site.dictionary is None else model.anchor(site)
        rest = (patch.column, value, patch.align, has_position, inside, anchor, model.sees_ahead_at(site))
        targets.append(Target(site.at(None), position, *rest, model.stream_of(site)))
    return targets


def _require_row(site: Site, value: Value) -> None:
    """Make sure that a value can be a row over keys."""
    if isinstance(value, Mean) and value.over == "positions":
        raise PatchError(
            f"'{site}' has no mean over positions",
            facts=[("why not", "each query sees other keys, so that rows of different queries have no mean")],
            fix='take the mean of each query over prompts: Mean(over="pairs")',
        )
    if not isinstance(value, _OF_ROWS):
        raise PatchError(
            f"'{site}' cannot be given the value '{value}'",
            facts=[
                ("why not", "its value is a row over keys, of which each query has another number"),
                ("known", ", ".join(sorted(kind.__name__ for kind in _OF_ROWS))),
            ],
            fix="take one of these, such as a Function of the current row",
        )


class Placer:
    """Finds and remembers where targets lie in pairs.

    Args:
        pairs: The pairs.
        base: Which side is the base run's.
    """

    def __init__(self, pairs: Pairs, base: Role) -> None:
        self.pairs = pairs.in_tokens
        self.base: Role = base
        self._of_encoder = Placer(pairs.encoder, base) if pairs.encoder is not None else None
        is_beside = pairs.kind == "tokens" and pairs.pictures is not None
        self._of_pictures = Placer(pairs.of("vision"), base) if is_beside else None
        self._known: dict[tuple[object, ...], dict[int, Placement | None]] = {}

    def place(self, target: Target, pair: int) -> Placement | None:
        """Return where a target lies in a pair; None where the pair has no such aligned column.

        Raises:
            PairError: A position is outside the prompt, a span is missing or empty, the pair needs an alignment, it
                holds arrays, or keys of the source prompt are not those of the base prompt.
        """
        return self.places(target, [pair])[0]

    def places(self, target: Target, pairs: Sequence[int]) -> list[Placement | None]:
        """Return where a target lies in each of some pairs; see ``place``."""
        other = {"encoder": self._of_encoder, "vision": self._of_pictures}.get(target.stream or "")
        if other is not None:
            return other.places(target, pairs)
        # What says by itself where it lies.
        own = target.value if isinstance(target.value, Donated | Given | From) else None
        key = (target.position, target.column, target.align, target.needs_source, target.meets_keys, own)
        known = self._known.setdefault(key, {})
        for pair in pairs:
            if pair not in known:
                place = known[pair] = self._find(target, pair)
                if place is not None and target.meets_keys:
                    require_keys(self.pairs.of(target.key_stream), self.base, target, pair, place)
        return [known[pair] for pair in pairs]

    def _find(self, target: Target, pair: int) -> Placement | None:
        if self.pairs.kind != "tokens":
            raise PairError(
                f"'{target.site}' has positions, but '{self.pairs.name}' holds arrays",
                fix="name that axis otherwise, such as axes=(channel,column): the whole tensor is then patched",
            )
        if isinstance(target.value, Given):
            return self._find_given(target, target.value, pair)
        if target.column is not None and not isinstance(target.value, From):
            return self._find_column(target, target.column, pair)
        if isinstance(target.value, From):
            base, source = self._meet_elsewhere(target, target.value, pair)
        elif isinstance(target.value, Donated):
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
            of_donor = target.value.columns(self.pairs[pair], target.stream)
            source = -1 if of_donor is None else of_donor[column]
        if base < 0 or (source < 0 and (target.needs_source or isinstance(target.value, Donated))):
            return None
        return Placement(np.array([base]), np.array([source]), np.array([source + 1]))

    def _find_given(self, target: Target, value: Given, pair: int) -> Placement | None:
        """Return the tokens for which there is a value; there may be none. None where there is nothing for the pair."""
        found = value.elements(self.pairs[pair].content_hash)
        if found is None:
            return None
        tokens, first = found
        n_tokens = len(self.pairs[pair].input(self.base))
        if len(tokens) and tokens.max() >= n_tokens:
            raise PairError(
                f"the {value.how} for '{target.site}' do not fit pair {pair} of '{self.pairs.name}'",
                facts=[("values", f"up to token {tokens.max()}"), ("its base prompt", f"{n_tokens} tokens")],
                fix="compute them for the prompts of the run that is changed, or turn the direction",
            )
        numbers = np.arange(first, first + len(tokens))
        if target.column is not None:
            place = self._find_column(replace(target, value=Zero()), target.column, pair)
            wanted = np.zeros(0, dtype=np.int64) if place is None else place.base
        else:
            wanted = self._base_tokens(pair, target.position)
        keep = np.isin(tokens, wanted)
        return Placement(tokens[keep], numbers[keep], numbers[keep] + 1)

    def _base_tokens(self, pair: int, position: Position | None) -> np.ndarray:
        """Return the base prompt's tokens at a position, whatever the source prompt looks like."""
        if position is None or isinstance(position, Every):
            return np.arange(len(self.pairs[pair].input(self.base)))
        return resolve(self.pairs[pair], position, self.base, f"pair {pair} of '{self.pairs.name}'")

    def _meet_donor(self, target: Target, value: Donated, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the base's tokens, and those of the donor's prompt that they take their values from."""
        own, number = self.pairs[pair], value.donor(self.pairs[pair])
        donor, side = value.pool.of(target.stream).in_tokens[number], value.value.side
        if target.position is not None and not isinstance(target.position, Every):
            where = f"pair {number} of '{value.pool.name}', from which pair {pair} is resampled,"
            return self._base_tokens(pair, target.position), resolve(donor, target.position, side, where)
        n_own, n_donor = len(own.input(self.base)), len(donor.input(side))
        if n_own == n_donor:
            return np.arange(n_own), np.arange(n_donor)
        alignment, theirs = self.pairs.alignment, value.columns(self.pairs[pair], target.stream)
        if alignment is None or alignment.how == "position" or theirs is None:
            raise PairError(
                f"pair {pair} of '{self.pairs.name}' cannot be resampled at all positions: no other prompt is as long",
                facts=[("its prompt", f"{n_own} tokens"), ("drawn", f"pair {number} of {n_donor} tokens")],
                fix=f"name where, such as '{target.site}@-1' or a span, or align the pairs: pairs.align(\"spans\")",
            )
        mine = alignment.columns[pair, :, 0 if self.base == "clean" else 1]
        both = (mine >= 0) & (theirs >= 0)
        return mine[both], theirs[both]

    def _meet_elsewhere(self, target: Target, value: From, pair: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the base's tokens, and those that a value is read at."""
        if target.column is None:
            written = self._base_tokens(pair, target.position)
        else:
            place = self._find_column(replace(target, value=Zero()), target.column, pair)
            written = np.zeros(0, dtype=np.int64) if place is None else place.base
        if not len(written):
            return written, written
        return tokens_elsewhere(self.pairs, pair, self.base, value, target.position, target.column, written)

    def _align(self, target: Target, pair: int, base: np.ndarray, source: np.ndarray) -> Placement:
        if target.align == "mean":
            start = np.full(len(base), source[0])
            return Placement(base, start, np.full(len(base), source[-1] + 1))
        if target.align in ("first", "last"):
            n = min(len(base), len(source))
            part = slice(0, n) if target.align == "first" else slice(-n, None)
            return Placement(base[part], source[part], source[part] + 1)
        at = "" if target.position is None else f"@{target.position}"
        raise PairError(
            f"pair {pair} of '{self.pairs.name}' has {len(base)} and {len(source)} tokens at '{at or target.value}'",
            facts=[("base", f"tokens {base.tolist()}"), ("source", f"tokens {source.tolist()}")],
            fix=f"say how they meet: Patch('{target.site}{at}', align='first'), 'last' or 'mean'",
        )
