"""Which pairs are meant: by number or id, and by the values of their columns."""

from collections.abc import Mapping, Sequence

from causalpatch.base.errors import PairError
from causalpatch.pairs.pair import Pair


def index_of(pairs: Sequence[Pair], which: int | str, name: str) -> int:
    """Return the number of a pair.

    Args:
        pairs: The pairs.
        which: Its number, negative ones from the end, or its id.
        name: How errors call the pairs.

    Raises:
        PairError: There is no such pair.
    """
    ids = [pair.id for pair in pairs]
    index = ids.index(which) if isinstance(which, str) and which in ids else which
    if isinstance(index, str) or not -len(pairs) <= index < len(pairs):
        raise PairError(
            f"'{name}' has no pair {which!r}",
            facts=[("pairs", f"0 to {len(pairs) - 1}, or an id")],
            fix="see the ids: pairs.ids",
        )
    return index % len(pairs)


def where(pairs: Sequence[Pair], columns: Mapping[str, object], name: str) -> list[int]:
    """Return the numbers of the pairs whose columns have the given values.

    Args:
        pairs: The pairs.
        columns: Value by name of a column.
        name: How errors call the pairs.

    Raises:
        PairError: A column does not exist.
    """
    known = {"id", "group", "split"}.union(*(pair.extra for pair in pairs))
    for column in columns:
        if column not in known:
            raise PairError(
                f"'{name}' has no column '{column}'",
                facts=[("columns", ", ".join(sorted(known)))],
                fix="select by one of these",
            )
    return [
        number
        for number, pair in enumerate(pairs)
        if all(pair.extra.get(key, getattr(pair, key, None)) == value for key, value in columns.items())
    ]
