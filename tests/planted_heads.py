"""Decoders of which it is known which heads write the answer: alone, against each other, or in place of each other."""

from collections.abc import Mapping, Sequence

import numpy as np

import causalpatch as cp
from causalpatch.circuits.ground_truth.blueprint import Blueprint, Head, Layer, Mlp
from causalpatch.circuits.ground_truth.build import build
from causalpatch.pairs import Pair, Pairs

VARIED, BIT, EITHER, ANSWER = range(4)
Place = tuple[int, int]


def _head(source: int, target: int, times: float) -> Head:
    none, read, write = np.zeros((4, 0)), np.zeros((4, 1)), np.zeros((1, 4))
    read[source], write[0, target] = times, 1.0
    return Head(none, np.zeros(0), none, read, write)


def planted_heads(
    weights: Mapping[Place, float],
    either: Sequence[Place] = (),
    *,
    n_layers: int = 4,
    n_heads: int = 4,
    n_pairs: int = 12,
    direction: str = "denoise",
    spread: float = 0.1,
) -> cp.Experiment:
    """Return an experiment whose metric is ``sum of weights * varied + min(number of heads of either, 1)``.

    A prompt is one token. Clean ones hold a number around 1 and a bit that is on; corrupted ones hold zeros.

    Args:
        weights: How much of the number each head writes into the answer.
        either: Heads that each write the bit; an MLP in the last layer answers whether any did.
        n_layers: Layers.
        n_heads: Heads in each.
        n_pairs: Pairs, each with two tokens of its own.
        direction: ``"denoise"`` or ``"noise"``.
        spread: Standard deviation of the number.
    """
    rng = np.random.default_rng(0)
    embedded = np.zeros((2 * n_pairs, 4))
    varied = rng.normal(size=n_pairs)
    embedded[::2, VARIED] = 1 + spread * (varied - varied.mean())
    embedded[::2, BIT] = 1.0
    layers = []
    for layer in range(n_layers):
        heads = [Head.idle(4) for _ in range(n_heads)]
        for (at, head), weight in weights.items():
            heads[head] = _head(VARIED, ANSWER, weight) if at == layer else heads[head]
        for at, head in either:
            heads[head] = _head(BIT, EITHER, 1.0) if at == layer else heads[head]
        layers.append(Layer(tuple(heads), Mlp.idle(4)))
    if either:
        into, out = np.zeros((4, 2)), np.zeros((2, 4))
        into[EITHER], out[:, ANSWER] = 1.0, (1.0, -1.0)
        layers[-1] = Layer(layers[-1].heads, Mlp(into, np.array([0.0, -1.0]), out, np.zeros(4)))
    unembed = np.zeros((4, len(embedded)))
    unembed[ANSWER, 0] = 1.0
    model = cp.open_model(build(Blueprint(embedded, np.zeros((1, 4)), tuple(layers), unembed)))
    made = [
        Pair(np.array([2 * n]), np.array([2 * n + 1]), ((2 * n,),), ((2 * n + 1,),), id=str(n)) for n in range(n_pairs)
    ]
    metric = cp.metric(lambda outputs, pairs: outputs.logits[:, -1, 0], name="answer")
    return cp.Experiment(model, Pairs(made, name="numbers"), metric, direction, show_progress=False)
