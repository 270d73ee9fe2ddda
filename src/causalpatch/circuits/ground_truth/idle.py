"""Parts that are busy and of no use, beside those of a program.

A token that is never an answer reads the whole stream, so that nothing is dead: whatever is changed anywhere changes
its logit, which is how the library proves that sites are what they are called. The logits of answers read none of it.

*Plain*: what a layer has too few heads and neurons of is filled up, and every head has two more values. All of these
read the whole stream by dense weights, and write into one further column that nothing reads but such parts and the
logit of that token.

*Hidden*: there are more further columns, one more head in each layer, and more neurons. The embeddings and all heads
and MLPs of use write into the further columns too, and inside a head queries, keys and values are rotated. So what
nearly every component sends changes with the prompt, and nearly every edge carries something.
"""

from dataclasses import replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from causalpatch.base.seeds import generator
from causalpatch.circuits.ground_truth.blueprint import Blueprint, Head, Layer, Mlp

Array = NDArray[np.float64]

MORE_NEURONS: Final = 8
LEAK: Final = 0.5
POSITIONS: Final = 16
"""Positions that each model has at least: the library tries sites on prompts of a few random tokens."""


def with_idle_parts(blueprint: Blueprint, seed: int | None = None) -> Blueprint:
    """Return a blueprint with idle parts beside its own, and one token more.

    Args:
        blueprint: The weights.
        seed: Seed of what hides the circuit; None leaves it plain.
    """
    return _Filler(blueprint, seed).filled()


class _Filler:
    """Fills up one blueprint."""

    def __init__(self, blueprint: Blueprint, seed: int | None) -> None:
        self.blueprint, self.is_hidden = blueprint, seed is not None
        self.draw = generator(seed or 0, "hidden" if self.is_hidden else "plain")
        self.n_used = blueprint.n_columns
        self.n_further = max(4, self.n_used // 4) if self.is_hidden else 1
        self.n_heads = blueprint.n_heads + self.is_hidden
        n_neurons = max(len(layer.mlp.bias) for layer in blueprint.layers)
        self.n_neurons = n_neurons + MORE_NEURONS if self.is_hidden else max(n_neurons, 1)

    def filled(self) -> Blueprint:
        """Return the whole."""
        given = self.blueprint
        n_tokens = len(given.token_embed)
        positions = np.zeros((max(len(given.pos_embed), POSITIONS), self.n_used))
        positions[: len(given.pos_embed)] = given.pos_embed
        unembed = np.zeros((self.n_used + self.n_further, n_tokens + 1))
        unembed[: self.n_used, :n_tokens] = given.unembed
        unembed[:, n_tokens] = self.draw.normal(size=len(unembed))
        return replace(
            given,
            token_embed=self._writing(np.concatenate([given.token_embed, np.zeros((1, self.n_used))])),
            pos_embed=self._writing(positions),
            layers=tuple(map(self._layer, given.layers)),
            unembed=unembed,
        )

    def _layer(self, layer: Layer) -> Layer:
        idle = [self._idle_head() for _ in range(self.n_heads - len(layer.heads))]
        mlp, n_more = layer.mlp, self.n_neurons - len(layer.mlp.bias)
        order = self.draw.permutation(self.n_neurons) if self.is_hidden else np.arange(self.n_neurons)
        into = np.concatenate([self._reading(mlp.into), self._dense(n_more)], axis=1)[:, order]
        bias = np.concatenate([mlp.bias, self.draw.normal(size=n_more)])[order]
        out = np.concatenate([self._writing(mlp.out), self._aside(n_more)])[order]
        heads = (*map(self._head, layer.heads), *idle)
        return Layer(heads, Mlp(into, bias, out, self._writing(mlp.out_bias[None])[0]))

    def _head(self, head: Head) -> Head:
        """Return a head of use with idle values beside its own, and with queries and keys."""
        q, q_bias, k = self._reading(head.q), head.q_bias, self._reading(head.k)
        if not len(q_bias):
            # It looks at nothing: queries show one column and keys the other, so that all scores are 0.
            q, q_bias = np.zeros((len(q), 2)), np.array([1.0, 0.0])
            k = np.concatenate([np.zeros((len(q), 1)), self._dense(1)], axis=1)
        v = np.concatenate([self._reading(head.v), self._dense(2)], axis=1)
        out = np.concatenate([self._writing(head.out), self._aside(2)])
        if not self.is_hidden:
            return Head(q, q_bias, k, v, out)
        turn, mix = (_orthogonal(size, self.draw) for size in (len(q_bias), v.shape[1]))
        return Head(q @ turn, q_bias @ turn, k @ turn, v @ mix, mix.T @ out)

    def _idle_head(self) -> Head:
        n = 4
        return Head(self._dense(n), self.draw.normal(size=n), self._dense(n), self._dense(n), self._aside(n))

    def _writing(self, matrix: Array) -> Array:
        """Let what writes to the stream for use write to the further columns too, where it is hidden."""
        leaked = LEAK * self.draw.normal(size=(len(matrix), self.n_further)) * self.is_hidden
        return np.concatenate([matrix, leaked], axis=1)

    def _reading(self, matrix: Array) -> Array:
        """Let what reads from the stream for use read nothing of the further columns."""
        return np.concatenate([matrix, np.zeros((self.n_further, matrix.shape[1]))])

    def _dense(self, n: int) -> Array:
        """Read the whole stream."""
        n_columns = self.n_used + self.n_further
        read: Array = self.draw.normal(size=(n_columns, n)) / np.sqrt(n_columns)
        return read

    def _aside(self, n: int) -> Array:
        """Write into the further columns alone."""
        further = self.draw.normal(size=(n, self.n_further)) / np.sqrt(max(n, 1))
        return np.concatenate([np.zeros((n, self.n_used)), further], axis=1)


def _orthogonal(size: int, draw: np.random.Generator) -> Array:
    turn: Array = np.linalg.qr(draw.normal(size=(size, size)))[0]
    return turn
