"""Independent components: which pairs hang together through shared inputs, entities or groups.

Pairs are dyadic: a pair belongs to two prompts. Two pairs that share one are not two independent observations, and a
split that puts them on different sides leaks. So clusters and splits are the connected components of the graph whose
vertices are prompts (and entities and groups where they are given) and whose edges are pairs.

Cost: one pass over the pairs with a disjoint-set forest, near linear in the number of pairs and vertices.
"""

from collections.abc import Hashable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.errors import PairError
from causalpatch.pairs.pair import Pair


def vertices(pair: Pair) -> list[Hashable]:
    """Return what ties a pair to others: its inputs and what stands beside them by content, entities, group.

    Of a model with an encoder and a decoder the encoder's inputs: many pairs have the decoder begin alike.
    """
    group = [] if pair.group is None else [("group", pair.group)]
    entities = [("entity", name) for name in pair.entities]
    hashes = {name: both for name, both in pair.hashes.items() if name or pair.encoder is None}
    inputs = [("input", name, content) for name, both in hashes.items() for content in both]
    return [*inputs, *entities, *group]


def alike(pairs: Sequence[Pair], columns: Sequence[str], name: str) -> NDArray[np.int64]:
    """Number the components of pairs that hang together through values of columns as well, axis (pair,).

    Args:
        pairs: The pairs.
        columns: Columns of which two components share no value.
        name: How errors call the pairs.

    Raises:
        PairError: A column does not exist.
    """
    held = [{"group": pair.group, "split": pair.split, **pair.extra} for pair in pairs]
    for column in columns:
        if not all(column in each for each in held):
            raise PairError(
                f"pairs of '{name}' have no column '{column}'",
                facts=[("columns", ", ".join(sorted(set.intersection(*(set(each) for each in held)))))],
                fix="split by one of these",
            )
    return connected(
        [*vertices(pair), *(("column", column, str(each[column])) for column in columns)]
        for pair, each in zip(pairs, held, strict=True)
    )


def connected(members: Iterable[Sequence[Hashable]]) -> NDArray[np.int64]:
    """Number the connected components of sets of vertices, from 0 in order of first appearance.

    Args:
        members: The vertices of each pair.

    Returns:
        One component number per pair, axis (pair,).

    Examples:
        >>> connected([("a", "b"), ("c", "d"), ("b", "e")]).tolist()
        [0, 1, 0]
    """
    parent: dict[Hashable, Hashable] = {}

    def root(vertex: Hashable) -> Hashable:
        parent.setdefault(vertex, vertex)
        while parent[vertex] != vertex:
            parent[vertex] = parent[parent[vertex]]
            vertex = parent[vertex]
        return vertex

    firsts = []
    for held in members:
        for vertex in held[1:]:
            parent[root(vertex)] = root(held[0])
        firsts.append(held[0])
    number: dict[Hashable, int] = {}
    return np.array([number.setdefault(root(first), len(number)) for first in firsts], dtype=np.int64)
