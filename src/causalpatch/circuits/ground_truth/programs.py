"""Ten programs whose circuits are known, each with all its prompts and its answers in plain Python.

Every prompt begins with the token ``^``. An answer that is a number is the logit of the token ``more``; that of all
other tokens is 0.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise, permutations, product
from typing import Final

from causalpatch.circuits.ground_truth.language import (
    Aggregate,
    Interpolate,
    Is,
    Lookup,
    Positions,
    Program,
    Select,
    Tokens,
    Variable,
)

BEGIN: Final = 0
DIGIT: Final = 3
"""The token of the digit 0, where answers are digits."""
KINDS: Final = ((1, 2), (3, 4))
"""What opens and what closes, of either kind of brackets."""


def all_programs() -> tuple[Program, ...]:
    """Return the ten programs."""
    makers = (fraction, reverse, sort, induction, count, bigram_count, same_count, balance, first_position, addition)
    return tuple(make() for make in makers)


def everywhere(query: int, key: int) -> float | None:
    """Select every position."""
    return 0.0


def equal(query: int, key: int) -> float | None:
    """Select keys that equal the query."""
    return 0.0 if query == key else None


def but_begin(query: int, key: int) -> float | None:
    """Select every token but the first."""
    return None if key == BEGIN else 0.0


def previous() -> tuple[Positions, Select]:
    """Return positions of up to seven symbols, and the selection of the position before each."""
    positions = Positions(8)
    return positions, Select(lambda query, key: 0.0 if key == max(query - 1, 0) else None, positions, positions)


def words(symbols: Sequence[int], tail: Sequence[int] = ()) -> "Prompts":
    """Return a maker of all prompts of any of some symbols, and then a tail."""
    return Prompts(tuple(symbols), tuple(tail))


class Prompts:
    """All words of a length over some symbols, behind the first token and before a tail."""

    def __init__(self, symbols: tuple[int, ...], tail: tuple[int, ...]) -> None:
        self.symbols, self.tail = symbols, tail

    def __call__(self, n: int) -> Iterator[list[int]]:
        """Yield all prompts of n symbols."""
        for word in product(self.symbols, repeat=n):
            yield [BEGIN, *word, *self.tail]


def fraction() -> Program:
    """Which share of the symbols so far is x."""
    tokens = Tokens(4)
    is_x = Lookup([tokens], lambda token: 1.0 if token == 1 else 0.0)
    share = Aggregate(Select(but_begin, keys=tokens), [is_x])

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        return {p: sum(each == 1 for each in ids[1 : p + 1]) / p for p in range(1, len(ids))}

    names = ("^", "x", "a", "more")
    return Program("fraction", "which share of the symbols so far is x", names, 4, words([1, 2]), answers, [share], [3])


def reverse() -> Program:
    """The symbols before ``=``, from the last to the first."""
    tokens, positions = Tokens(6), Positions(8)
    equals = Aggregate(Select(lambda _, key: 0.0 if key == 4 else None, keys=tokens, begin="if none"), [positions])
    # As far before "=" as the slot is behind it.
    target = Lookup([equals, positions], lambda at, here: 2 * at - here if 0 < at < here < 2 * at else None, 8)
    read = Aggregate(Select(equal, keys=positions, queries=target), [tokens])

    def prompts(n: int) -> Iterator[list[int]]:
        return Prompts((1, 2, 3), (4, *[5] * n))(n)

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        n = ids.index(4) - 1
        return {n + 1 + k: ids[n + 1 - k] for k in range(1, n + 1)}

    names = ("^", "a", "b", "c", "=", "_")
    return Program("reverse", "the symbols in reverse", names, 3, prompts, answers, [read], range(6), reads="all")


def sort() -> Program:
    """The next larger symbol, behind ``=`` the smallest: sorts unique symbols as it writes them."""
    tokens = Tokens(7)

    def match(query: int, key: int) -> float | None:
        at_least = 0 if query == 6 else query
        return -float(key) if at_least < key < 6 else None

    read = Aggregate(Select(match, tokens, tokens, begin="if none"), [tokens])

    def prompts(n: int) -> Iterator[list[int]]:
        for word in permutations(range(1, 6), n):
            yield [BEGIN, *word, 6, *sorted(word)[:-1]]

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        at = ids.index(6)
        return dict(enumerate(sorted(ids[1:at]), start=at))

    names = ("^", "1", "2", "3", "4", "5", "=")
    about = "unique symbols sorted, one by one"
    return Program("sort", about, names, 3, prompts, answers, [read], range(7), reads="all")


def induction() -> Program:
    """What followed the latest earlier symbol that is equal to this one; ``^`` where there is none."""
    tokens = Tokens(4)
    _, is_previous = previous()
    before = Aggregate(is_previous, [tokens])
    match = Select(
        lambda query, key: 0.0 if query == key != BEGIN else None, before, tokens, prefer="latest", begin="if none"
    )
    read = Aggregate(match, [tokens])

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        def followed(p: int) -> int:
            return next((ids[k] for k in range(p, 1, -1) if ids[k - 1] == ids[p]), BEGIN)

        return {p: followed(p) for p in range(1, len(ids))}

    names = ("^", "a", "b", "c")
    about = "what followed the latest equal symbol"
    return Program("induction", about, names, 4, words([1, 2, 3]), answers, [read], range(4))


def count() -> Program:
    """How often the symbol has occurred so far."""
    tokens = Tokens(8)
    total = _how_many(tokens, tokens, 4)

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        return {p: DIGIT + ids[: p + 1].count(ids[p]) for p in range(1, len(ids))}

    about = "how often this symbol has occurred so far"
    return Program("count", about, _digits("^", "a", "b"), 4, words([1, 2]), answers, [total], _digit_tokens(5))


def bigram_count() -> Program:
    """How often the last two symbols have followed each other so far."""
    tokens = Tokens(8)
    _, is_previous = previous()
    before = Aggregate(is_previous, [tokens])

    def pair_of(first: int, second: int) -> int | None:
        return 2 * first + second - 1 if first in (0, 1, 2) and second in (1, 2) else None

    total = _how_many(Lookup([before, tokens], pair_of, 6), tokens, 4)

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        both = list(pairwise(ids))
        return {p: DIGIT + both[:p].count(both[p - 1]) for p in range(1, len(ids))}

    about = "how often the last two symbols have followed each other so far"
    return Program("bigram-count", about, _digits("^", "a", "b"), 4, words([1, 2]), answers, [total], _digit_tokens(5))


def same_count() -> Program:
    """At how many positions so far the symbol had occurred as often as this one has now."""
    tokens = Tokens(8)
    total = _how_many(_how_many(tokens, tokens, 4), tokens, 4)

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        often = [ids[: p + 1].count(ids[p]) for p in range(len(ids))]
        return {p: DIGIT + often[1 : p + 1].count(often[p]) for p in range(1, len(ids))}

    about = "at how many positions so far the symbol had occurred as often as this one now"
    return Program("same-count", about, _digits("^", "a", "b"), 4, words([1, 2]), answers, [total], _digit_tokens(5))


def balance() -> Program:
    """Whether both kinds of brackets are balanced: no prefix closes more than it opens, and none is left open."""
    tokens, n = Tokens(6), 4
    faults: list[Interpolate] = []
    left: list[Interpolate] = []
    for opens, closes in KINDS:
        step = Lookup([tokens], lambda token, o=opens, c=closes: float(token == o) - float(token == c))
        level = Aggregate(Select(everywhere), [step])
        faults.append(Interpolate([level], {-1.0: 1.0, 0.0: 0.0}))
        left.append(Interpolate([level], {-1.0: 1.0, 0.0: 0.0, 1.0: 1.0}))
    faulty = Aggregate(Select(everywhere), faults)
    # One bracket too many counts 1/(p + 1) at its prefix, and that 1/(n + 1) in the mean: (n + 1)^-2 is the least.
    good = Interpolate([faulty, *left], {0.0: 1.0, (n + 1.0) ** -2: 0.0})

    def is_good(ids: Sequence[int]) -> bool:
        levels = [[sum({o: 1, c: -1}.get(each, 0) for each in ids[:p]) for p in range(len(ids) + 1)] for o, c in KINDS]
        return all(min(each) >= 0 and each[-1] == 0 for each in levels)

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        return {p: float(is_good(ids[: p + 1])) for p in range(len(ids))}

    names = ("^", "(", ")", "[", "]", "more")
    about = "whether round and square brackets, shuffled, are each balanced"
    return Program("balance", about, names, n, words([1, 2, 3, 4]), answers, [good], [5])


def first_position() -> Program:
    """The position of the first x so far, 0 where there is none."""
    tokens, positions = Tokens(8), Positions(5)
    select = Select(lambda _, key: 0.0 if key == 1 else None, keys=tokens, prefer="earliest", begin="if none")
    read = Aggregate(select, [positions])

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        return {p: DIGIT + (ids[: p + 1].index(1) if 1 in ids[: p + 1] else 0) for p in range(1, len(ids))}

    about = "the position of the first x so far"
    return Program("first-position", about, _digits("^", "x", "a"), 4, words([1, 2]), answers, [read], _digit_tokens(5))


def addition() -> Program:
    """The sum of this symbol and the one before, modulo 3."""
    tokens = Tokens(4)
    _, is_previous = previous()
    before = Aggregate(is_previous, [tokens])
    total = Lookup([before, tokens], lambda a, b: (a + b - 2) % 3 if a and b else None, 3)

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        return {p: 1 + (ids[p - 1] + ids[p] - 2) % 3 for p in range(2, len(ids))}

    about = "this symbol and the one before added modulo 3"
    return Program("addition", about, ("^", "0", "1", "2"), 3, words([1, 2, 3]), answers, [total], [1, 2, 3])


def _how_many(shown: Variable, tokens: Tokens, most: int) -> Interpolate:
    """Return how many positions so far show what this one shows: RASP's selector width; position 0 gets 1/(1 + n)."""
    share = Aggregate(Select(equal, shown, shown, begin="always"), [Is(tokens, BEGIN)])
    return Interpolate([share], {1.0 / (1.0 + n): n for n in range(most + 1)}, most + 1)


def _digits(*first: str) -> tuple[str, ...]:
    return (*first, *map(str, range(5)))


def _digit_tokens(n: int) -> range:
    return range(DIGIT, DIGIT + n)
