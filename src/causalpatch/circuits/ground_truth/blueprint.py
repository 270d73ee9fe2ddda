"""Weights of a decoder over named columns of the stream, before they are laid into an architecture."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """One attention head, whose score is ``(x @ q + q_bias) @ (x @ k)``, not scaled.

    Args:
        q: From the stream to queries, axes (column, width).
        q_bias: Added to queries.
        k: From the stream to keys.
        v: From the stream to values, axes (column, value width).
        out: From values to the stream.
    """

    q: Array
    q_bias: Array
    k: Array
    v: Array
    out: Array

    @property
    def width(self) -> int:
        """Columns that it needs for queries, keys and values."""
        return max(int(self.q.shape[1]), int(self.v.shape[1]))

    @classmethod
    def idle(cls, n_columns: int) -> "Head":
        """Return a head that does nothing."""
        none = np.zeros((n_columns, 0))
        return cls(none, np.zeros(0), none, none, none.T)


@dataclass(frozen=True)
class Mlp:
    """One MLP, ``act(x @ into + bias) @ out + out_bias``.

    Args:
        into: From the stream to neurons, axes (column, neuron).
        bias: Added to neurons.
        out: From neurons to the stream.
        out_bias: Added to what is written.
    """

    into: Array
    bias: Array
    out: Array
    out_bias: Array

    @classmethod
    def idle(cls, n_columns: int) -> "Mlp":
        """Return an MLP that does nothing."""
        return cls(np.zeros((n_columns, 0)), np.zeros(0), np.zeros((0, n_columns)), np.zeros(n_columns))


@dataclass(frozen=True)
class Layer:
    """The heads and the MLP of a layer."""

    heads: tuple[Head, ...]
    mlp: Mlp


@dataclass(frozen=True)
class Blueprint:
    """A decoder over columns of the stream.

    Args:
        token_embed: Axes (token, column).
        pos_embed: Axes (position, column).
        layers: The layers.
        unembed: From the stream behind the last layer to logits, axes (column, token).
        activation: The neurons' function, ``"relu"`` or ``"linear"``.
    """

    token_embed: Array
    pos_embed: Array
    layers: tuple[Layer, ...]
    unembed: Array
    activation: str = "relu"

    @property
    def n_columns(self) -> int:
        """Columns of the stream."""
        return int(self.token_embed.shape[1])

    @property
    def n_heads(self) -> int:
        """Heads per layer: the most of any layer, and two at least."""
        return max(2, *(len(layer.heads) for layer in self.layers))
