"""Models in which every head restores a known share of the gap, with the pairs that they were made for.

Prompts are one token long. Head h reads column h of its token and writes it to the output, whose logit difference is
the metric. A clean token of pair i holds ``share_h * gap_i + noise`` in column h and the rest of ``gap_i`` in the
output itself; a corrupted one holds nothing. So the gap of pair i is ``gap_i``, and a head's effect is what its column
holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import causalpatch as cp
from causalpatch.circuits.ground_truth import build
from causalpatch.circuits.ground_truth.blueprint import Blueprint, Head, Layer, Mlp
from causalpatch.models import Model
from causalpatch.pairs import Pair, Pairs

RIGHT, WRONG = 1, 2
_FIRST = 3  # token that a pair may use
N_HEADS = 4


@dataclass(frozen=True)
class World:
    """A model and its pairs.

    Args:
        model: The model.
        pairs: All pairs, each of them independent unless they share a group.
        effects: What each head's column holds, (head, pair): its true effects.
        gap: The gap of each pair.
        sites: The heads' sites, by number.
    """

    model: Model
    pairs: Pairs
    effects: np.ndarray
    gap: np.ndarray
    sites: list[str]

    def experiment(self, part: slice | Sequence[int] | None = None, **settings: Any) -> cp.Experiment:
        """Return an experiment on some of the pairs, or on all.

        Args:
            part: Which pairs.
            settings: Of the experiment.
        """
        pairs = self.pairs.take(
            range(len(self.pairs))[part] if isinstance(part, slice) else part or range(len(self.pairs))
        )
        return cp.Experiment(self.model, pairs, show_progress=False, **settings)


def world(  # noqa: PLR0913 - everything that is planted
    shares: Sequence[float],
    n_pairs: int,
    *,
    spread: float = 0.05,
    gap_spread: float = 0.1,
    n_each: int = 1,
    seed: int = 0,
    noise: np.ndarray | None = None,
    name: str = "made",
) -> World:
    """Build a model and pairs.

    Args:
        shares: Of the gap, for each head; the rest goes past all of them.
        n_pairs: Number of pairs.
        spread: Standard deviation of a head's effect beside its share, of the mean gap.
        gap_spread: Standard deviation of the gap.
        n_each: Pairs that share a group, one after the other.
        seed: Of all that is drawn.
        noise: What is added to effects instead, (head, pair).
        name: Of the pairs.
    """
    random = np.random.default_rng(seed)
    gap = 1 + gap_spread * random.standard_normal(n_pairs)
    n_heads = len(shares)
    added = spread * random.standard_normal((n_heads, n_pairs)) if noise is None else noise
    effects = np.asarray(shares)[:, None] * gap + added
    n_columns = n_heads + 1
    embed = np.zeros((_FIRST + 2 * n_pairs, n_columns))
    embed[_FIRST : _FIRST + n_pairs, :n_heads] = effects.T
    embed[_FIRST : _FIRST + n_pairs, n_heads] = gap - effects.sum(0)
    layers = []
    for start in range(0, n_heads, N_HEADS):
        heads = [_copy(column, n_heads, n_columns) for column in range(start, min(start + N_HEADS, n_heads))]
        heads += [Head.idle(n_columns)] * (N_HEADS - len(heads))
        layers.append(Layer(tuple(heads), Mlp.idle(n_columns)))
    unembed = np.zeros((n_columns, len(embed)))
    unembed[n_heads, RIGHT] = 1.0
    module = build(Blueprint(embed, np.zeros((2, n_columns)), tuple(layers), unembed, activation="linear"))
    rows = [
        Pair(
            np.array([_FIRST + number]),
            np.array([_FIRST + n_pairs + number]),
            ((RIGHT,),),
            ((WRONG,),),
            id=f"{name} {number}",
            group=f"{name} {number // n_each}" if n_each > 1 else None,
        )
        for number in range(n_pairs)
    ]
    sites = [f"z.{number // N_HEADS}.{number % N_HEADS}@-1" for number in range(n_heads)]
    return World(cp.open_model(module), Pairs(rows, name=name), effects, gap, sites)


def _copy(column: int, target: int, n_columns: int) -> Head:
    none = np.zeros((n_columns, 0))
    read, write = np.zeros((n_columns, 1)), np.zeros((1, n_columns))
    read[column, 0], write[0, target] = 1.0, 1.0
    return Head(none, np.zeros(0), none, read, write)
