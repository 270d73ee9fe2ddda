"""Arrays as inputs: pairs of them, and what stands beside inputs as further arguments of the model's forward.

An argument belongs to each side of a pair (``Pair.beside``), such as the picture that a prompt speaks of, or is the
same in every run (``Pairs.common``), such as the texts that pictures are compared with.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from causalpatch.base.errors import PairError
from causalpatch.pairs.pair import Array, Pair, as_numbers


def pair_up(
    clean: Sequence[Any],
    corrupt: Sequence[Any],
    answer: Sequence[int] | None,
    wrong_answer: Sequence[int] | None,
    group: Sequence[str] | None,
    *,
    name: str,
) -> list[Pair]:
    """Pair stacked arrays; see ``Pairs.from_arrays``.

    Raises:
        PairError: The lists are not equally long.
    """
    n_pairs = len(clean)
    given = {"corrupt": corrupt, "answer": answer, "wrong_answer": wrong_answer, "group": group}
    for word, values in given.items():
        if values is not None and len(values) != n_pairs:
            raise PairError(
                f"'{name}' has {n_pairs} clean inputs and {len(values)} of {word}", fix="give one of each per pair"
            )
    return [
        Pair(
            as_numbers(clean[i]),
            as_numbers(corrupt[i]),
            answer=() if answer is None else ((operator.index(answer[i]),),),
            wrong_answer=() if wrong_answer is None else ((operator.index(wrong_answer[i]),),),
            id=str(i),
            group=None if group is None else str(group[i]),
        )
        for i in range(n_pairs)
    ]


def transform(pairs: Sequence[Pair], function: Callable[[Array], Any]) -> list[Pair]:
    """Return pairs with a function applied to every input."""
    return [
        dataclasses.replace(pair, clean=as_numbers(function(pair.clean)), corrupt=as_numbers(function(pair.corrupt)))
        for pair in pairs
    ]


def put_beside(pairs: Sequence[Pair], arguments: Mapping[str, Any], name: str) -> list[Pair]:
    """Return pairs with further arguments; see ``Pairs.with_beside``.

    Raises:
        PairError: There is not one for each pair, or they hold no numbers.
    """
    made = list(pairs)
    for argument, given in arguments.items():
        both = given if isinstance(given, tuple) else (given,)
        if len(both) > 2 or any(len(side) != len(pairs) for side in both):
            raise PairError(
                f"'{argument}' does not stand beside the {len(pairs)} pairs of '{name}'",
                facts=[("given", " and ".join(str(len(side)) for side in both)), ("needed", "one for each pair")],
                fix=f"with_beside({argument}=(clean, corrupted)), each with axes (pair, …), or one for both",
            )
        for number, pair in enumerate(made):
            sides = [as_numbers(side[number]) for side in both]
            made[number] = dataclasses.replace(pair, beside={**pair.beside, argument: (sides[0], sides[-1])})
    return made


def as_common(arguments: Mapping[str, Any]) -> dict[str, Array]:
    """Return what is the same in every run as arrays that nobody can change."""
    made = {name: as_numbers(arguments[name]) for name in sorted(arguments)}
    kept = {name: array.copy() if array.flags.writeable else array for name, array in made.items()}
    for array in kept.values():
        array.setflags(write=False)
    return kept


def check_names(pairs: Sequence[Pair], common: Mapping[str, Array], name: str) -> None:
    """Make sure that all pairs have the same further arguments, and none of those that all runs share.

    Raises:
        PairError: They have not.
    """
    first = set(pairs[0].beside)
    for number, pair in enumerate(pairs):
        if set(pair.beside) != first:
            odd = sorted(first ^ set(pair.beside))
            raise PairError(
                f"not all pairs of '{name}' have '{odd[0]}' beside them",
                facts=[("pair 0", ", ".join(sorted(first)) or "nothing"), (f"pair {number}", ", ".join(pair.beside))],
                fix="give it for every pair",
            )
    twice = sorted(first & set(common))
    if twice:
        raise PairError(
            f"'{twice[0]}' of '{name}' is given for each pair and for all of them", fix="give it in one way"
        )
