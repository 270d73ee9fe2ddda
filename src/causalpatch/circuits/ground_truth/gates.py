"""Small circuits that tell methods apart: gates, heads that cancel each other, and a linear model with hand numbers."""

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Literal

import numpy as np

from causalpatch.circuits.ground_truth.blueprint import Blueprint, Head, Layer, Mlp
from causalpatch.circuits.ground_truth.language import Aggregate, Is, Lookup, Positions, Program, Select, Tokens
from causalpatch.circuits.ground_truth.programs import words

ON = 2
"""The token that stands for 1; 1 is the token that stands for 0."""


def all_gates() -> tuple[Program, ...]:
    """Return the two gates and the cancelling pair."""
    return gate("and"), gate("or"), cancelling()


def gate(name: Literal["and", "or"]) -> Program:
    """Two bits, each fetched by a head of its own, and what an MLP makes of them.

    Clean prompts have both bits on, corrupted ones both off. So an OR loses nothing when one of them is corrupted, and
    an AND gains nothing when one of them is restored: single patches in that direction find no circuit.

    Args:
        name: ``"and"`` or ``"or"``.
    """
    tokens = Tokens(3)
    first, second = (Aggregate(_at(place), [tokens]) for place in (1, 2))
    together = all if name == "and" else any
    result = Lookup([first, second], lambda a, b: 1 + together((a == ON, b == ON)) if a and b else None, 3)

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        return {len(ids) - 1: 1 + together(each == ON for each in ids[1:3])}

    about = f"the {name.upper()} of two bits that two heads fetch; the third symbol does not matter"
    return Program(
        name, about, ("^", "0", "1"), 3, _bits, answers, [result], range(3), redundant=name, chosen=_both_on_or_off()
    )


def cancelling() -> Program:
    """One head writes the first bit, a second one the second bit, and a third one takes the latter away again.

    The output is the first bit. Each head of the pair has an effect as large as that of the one that counts, with
    opposite signs; all heads together, or the pair, have none of it.
    """
    tokens = Tokens(4)
    first, second, third = (Aggregate(_at(place), [Is(tokens, ON)]) for place in (1, 2, 2))

    def answers(ids: Sequence[int]) -> Mapping[int, float]:
        return {len(ids) - 1: float(ids[1] == ON)}

    about = "the first bit, and a pair of heads that write the second bit and take it away"
    return Program(
        "cancelling",
        about,
        ("^", "0", "1", "more"),
        3,
        _bits,
        answers,
        [first, second, third],
        [3],
        signs=(1.0, 1.0, -1.0),
        redundant="cancelling",
        chosen=_both_on_or_off(),
    )


def linear() -> Blueprint:
    """A linear model with hand numbers: two layers, two heads each, no activation function, attention to itself alone.

    The stream has the columns x, y, z, and one for the position, which nothing reads. Prompts are single tokens, which
    every head sees alone. Tokens 1 and 2 are embedded as x = 1 and y = 2, and what is sent, of a stream (x, y, z), is::

        a0.h0: (0, 0, x)     a0.h1: (0, 0, 3 y)     m0: (z, 0, 0)
        a1.h0: (0, 0, 2 x)   a1.h1: (0, 3 y, 0)     m1: (0, 0, x - y)

    The logit of token 3 is z behind the last layer; those of the other tokens are 0.
    """
    x, y, z, place = range(4)

    def column(*entries: tuple[int, float]) -> np.ndarray:
        made = np.zeros((4, 1))
        for row, value in entries:
            made[row] = value
        return made

    def head(source: int, target: int, times: float) -> Head:
        none = np.zeros((4, 0))
        return Head(none, np.zeros(0), none, column((source, times)), column((target, 1.0)).T)

    def mlp(target: int, *entries: tuple[int, float]) -> Mlp:
        return Mlp(column(*entries), np.zeros(1), column((target, 1.0)).T, np.zeros(4))

    layers = (
        Layer((head(x, z, 1.0), head(y, z, 3.0)), mlp(x, (z, 1.0))),
        Layer((head(x, z, 2.0), head(y, y, 3.0)), mlp(z, (x, 1.0), (y, -1.0))),
    )
    embedded, positions, unembed = np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 4))
    embedded[1, x], embedded[2, y], unembed[z, 3] = 1.0, 2.0, 1.0
    positions[:, place] = np.arange(4)
    return Blueprint(embedded, positions, layers, unembed, activation="linear")


LINEAR_EDGES = frozenset(
    {
        *("embed -> a0.h0<v>", "embed -> a0.h1<v>", "a0.h0 -> m0", "a0.h1 -> m0"),
        *("embed -> a1.h0<v>", "m0 -> a1.h0<v>", "embed -> a1.h1<v>"),
        *("embed -> m1", "m0 -> m1", "a1.h1 -> m1"),
        *("a0.h0 -> logits", "a0.h1 -> logits", "a1.h0 -> logits", "m1 -> logits"),
    }
)
"""The true edges of the linear model, read off its numbers."""


def _at(place: int) -> Select:
    return Select(lambda _, key: 0.0 if key == place else None, keys=Positions(4), begin="if none")


_bits = words([1, ON])


def _both_on_or_off() -> list[tuple[list[int], list[int]]]:
    return [([0, ON, ON, a], [0, 1, 1, b]) for a, b in product((1, ON), repeat=2)]
