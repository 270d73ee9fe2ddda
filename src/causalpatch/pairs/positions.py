"""Positions of a site in one pair: which tokens of the base and of the source are meant.

Each prompt counts its own real tokens, special ones included: ``@-1`` is the last token of the base in the base and of
the source in the source. A range follows Python's slices; a position or range that reaches no token is an error.
"""

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError
from causalpatch.base.suggest import closest
from causalpatch.pairs.pair import Pair
from causalpatch.pairs.role import ROLE_WORDS, ROLES, Role
from causalpatch.sites.site import Range, Span


def resolve(pair: Pair, position: int | Range | Span, role: Role, where: str) -> NDArray[np.int64]:
    """Return the positions in one prompt of a pair.

    Args:
        pair: A pair of token ids.
        position: A position, a range of them, or a span by name.
        role: Which of the two prompts.
        where: How errors call the pair.

    Returns:
        Positions in real tokens from 0, in order.

    Raises:
        PairError: The prompt has no such token, or the pair no such span.
    """
    length = len(pair.input(role))
    word, what = ROLE_WORDS[role], pair.is_called
    if isinstance(position, Span):
        if position.name not in pair.spans:
            near = closest(position.name, pair.spans)
            raise PairError(
                f"{where} has no span '{position.name}'",
                facts=[("its spans", ", ".join([*near, *(s for s in pair.spans if s not in near)]) or "none")],
                fix="name it in the column spans, for instance {" + f'"{position.name}": " Mary"' + "}",
            )
        return np.arange(*pair.spans[position.name][ROLES.index(role)], dtype=np.int64)
    if isinstance(position, Range):
        found = np.arange(length, dtype=np.int64)[position.start : position.stop]
        if not len(found):
            raise PairError(
                f"@{position} is empty in the {word} {what} of {where}",
                facts=[(word, f"{length} tokens: @0 to @{length - 1}, or @-{length} to @-1")],
                fix=f"name a range that every {what} has, or a span",
            )
        return found
    if not -length <= position < length:
        raise PairError(
            f"@{position} lies outside the {word} {what} of {where}",
            facts=[(word, f"{length} tokens: @0 to @{length - 1}, or @-{length} to @-1")],
            fix=f"name a position that every {what} has, such as @-1, or a span",
        )
    return np.array([position % length], dtype=np.int64)
