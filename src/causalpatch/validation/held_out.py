"""Held-out pairs: enough independent ones, none that the search saw, and none that was opened before."""

from collections.abc import Hashable, Mapping
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import PairError
from causalpatch.pairs import Pairs
from causalpatch.pairs.components import vertices
from causalpatch.statistics.intervals import MIN_GROUPS
from causalpatch.statistics.permutation import smallest_p

_SHOWN: Final = 3


def components_needed(alpha: float) -> int:
    """Return how many independent components held-out pairs must have for any claim.

    Args:
        alpha: Probability of even one wrong claim.
    """
    needed = MIN_GROUPS
    while smallest_p(needed) > alpha:
        needed += 1
    return needed


def require_enough(pairs: Pairs, alpha: float) -> int:
    """Make sure that there are enough independent components for any claim, and return their number.

    Args:
        pairs: The held-out pairs.
        alpha: Probability of even one wrong claim.

    Raises:
        PairError: There are fewer than 10, or so few that flipping them gives no p as small as alpha.
    """
    n_components = len(np.unique(pairs.components))
    needed = components_needed(alpha)
    if n_components < needed:
        raise PairError(
            f"{n_components} independent components are too few for any claim",
            facts=[
                ("pairs", f"{len(pairs)} of '{pairs.name}'"),
                ("independent", "those that share no prompt, entity or group, even through others"),
                ("needed", f"{needed} or more; with {n_components} p is never below {smallest_p(n_components):.3g}"),
            ],
            fix=f"add pairs until pairs.check() counts {needed} components; 30 or more for an exact interval",
        )
    return n_components


def require_apart(pairs: Pairs, found_on: Pairs) -> None:
    """Make sure that no held-out pair hangs together with a pair of the search.

    Args:
        pairs: The held-out pairs.
        found_on: The discovery pairs.

    Raises:
        PairError: They share a prompt, an entity or a group.
    """
    seen: set[Hashable] = {vertex for pair in found_on for vertex in vertices(pair)}
    shared = [pair.id for pair in pairs if seen & set(vertices(pair))]
    if not shared:
        return
    more = ", …" if len(shared) > _SHOWN else ""
    raise PairError(
        f"{len(shared)} of {len(pairs)} pairs are not held out: the search saw their prompts, entities or groups",
        facts=[
            ("discovery", f"{len(found_on)} pairs of '{found_on.name}'"),
            ("confirmation", f"{len(pairs)} pairs of '{pairs.name}'"),
            ("shared by", ", ".join(f"'{name}'" for name in shared[:_SHOWN]) + more),
        ],
        fix="discovery, held_out = pairs.split(), and search on the first alone",
    )


def require_other(pairs: Pairs, origin: Mapping[str, Any]) -> None:
    """Make sure that components were not found on the pairs that shall confirm them.

    Args:
        pairs: The held-out pairs.
        origin: The record of the pairs that they were found on.

    Raises:
        PairError: These are the same pairs.
    """
    if origin["hash"] == pairs.content_hash:
        raise PairError(
            "these components were chosen on the pairs that shall confirm them",
            facts=[("pairs", f"{len(pairs)} of '{pairs.name}'"), ("why not", "the largest of many is too large there")],
            fix="discovery, held_out = pairs.split(): search on the first, confirm on the second",
        )
