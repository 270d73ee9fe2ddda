"""Rows over keys between prompts: they can be exchanged only where the keys are tokens in the same places."""

from typing import TYPE_CHECKING, Literal

import numpy as np

from causalpatch.base.errors import PairError
from causalpatch.engine.drawn import Donated
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import ROLE_WORDS

if TYPE_CHECKING:
    from causalpatch.engine.resolve import Placement, Target

Role = Literal["clean", "corrupt"]


def require_keys(pairs: Pairs, base: Role, target: "Target", pair: int, place: "Placement") -> None:
    """Make sure that each query takes the row of the same token of the source prompt, keys of the same tokens.

    A row is over all keys up to its query. Key for key it can be put in place of another row only where both
    prompts have equally many tokens up to there, and none of these is aligned with a token elsewhere.

    Args:
        pairs: The pairs of the prompts whose tokens are keys.
        base: Which side is the base run's.
        target: What is written.
        pair: The number of the pair.
        place: Where it lies.

    Raises:
        PairError: They are not.
    """
    crossing = np.flatnonzero((place.start != place.base) | (place.stop != place.base + 1))
    if target.key_stream != target.stream:
        crossing = crossing[:0]  # any query sees all of the encoder's tokens
    reach = "from first to last" if target.sees_ahead else "up to the query"
    of = "another pair's prompt" if isinstance(target.value, Donated) else "the source prompt"
    if len(crossing):
        query, source = place.base[crossing[0]], place.start[crossing[0]]
        tokens = f"token {source}" if place.stop[crossing[0]] == source + 1 else "the mean of several tokens"
        why = f"query {query} takes the row of {tokens} of {of}"
    elif target.sees_ahead and len(set(_sizes(pairs, base, target, pair))) > 1:
        why = "a row over {} keys cannot take one over {}".format(*_sizes(pairs, base, target, pair))
    else:
        alignment, last = pairs.alignment, int(place.base.max(initial=-1))
        last = max(_sizes(pairs, base, target, pair)) if target.sees_ahead else last
        has_columns = alignment is not None and target.needs_source
        matches = alignment.columns[pair] if alignment and has_columns else np.zeros((0, 2), dtype=np.int64)
        inside = (matches >= 0).all(1) & (matches <= last).any(1)
        moved = matches[inside & (matches[:, 0] != matches[:, 1])]
        if not len(moved):
            return
        key, source = moved[0] if base == "clean" else moved[0][::-1]
        why = f"key {key} is aligned with token {source} of {of}"
    raise PairError(
        f"the keys of '{target.site}' in pair {pair} of '{pairs.name}' are not those of its source",
        facts=[
            ("why", why),
            ("rule", f"key by key: both prompts must have the same tokens in the same places {reach}"),
            *[(word, f"{len(pairs[pair].input(side))} tokens") for side, word in ROLE_WORDS.items()],
        ],
        fix=f"drop it (pairs.drop({pair})), patch earlier queries, or patch z.{target.site.layer}: it has no keys",
    )


def _sizes(pairs: Pairs, base: Role, target: "Target", pair: int) -> tuple[int, int]:
    """Return how many tokens the base prompt has, and the prompt that a value is taken from."""
    own = len(pairs[pair].input(base))
    if isinstance(target.value, Donated):
        pool = target.value.pool.of(target.key_stream).in_tokens
        return own, len(pool[target.value.donor(pairs[pair])].input(target.value.value.side))
    return own, len(pairs[pair].input("clean" if base == "corrupt" else "corrupt"))
