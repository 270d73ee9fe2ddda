"""From a blueprint to a ``GPT2LMHeadModel`` of transformers, plain or hidden.

The layer norm is made harmless. It gives ``(x - mean(x)) * weight / sqrt(variance(x) + epsilon)``. All that is ever
written to the stream sums to 0, so the mean is 0; with ``epsilon = 2^60`` and ``weight = 2^30`` the rest is
``x / sqrt(1 + variance(x) / 2^60)``, which differs from x by less than ``variance(x) * 2^-61`` of it: for variances up
to 10^6 by 5e-13. Both powers of two are exact, so nothing is lost by rounding them either.

*Plain*: column i of the blueprint is the pair of columns (2i, 2i + 1) of the stream, written as (x, -x).
*Hidden*: the columns are turned by a random rotation within the vectors that sum to 0.
"""

from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from causalpatch.base.seeds import generator
from causalpatch.circuits.ground_truth.blueprint import Blueprint, Layer
from causalpatch.circuits.ground_truth.idle import with_idle_parts
from causalpatch.models.bare import bare_gpt2

Array = NDArray[np.float64]

EPSILON: Final = 2.0**60
GAIN: Final = 2.0**30


def build(blueprint: Blueprint, *, seed: int | None = None, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Lay a blueprint into a ``GPT2LMHeadModel`` of transformers.

    Args:
        blueprint: The weights.
        seed: Seed of the rotation and of the idle weights that hide it; None leaves it plain.
        dtype: The model's floating-point type.
    """
    blueprint = with_idle_parts(blueprint, seed)
    n_heads = blueprint.n_heads
    head_width = max(max(head.width for layer in blueprint.layers for head in layer.heads), 1)
    least = 2 * blueprint.n_columns if seed is None else blueprint.n_columns + 1
    head_width = max(head_width, -(-least // n_heads))
    width = n_heads * head_width
    write, read = _pairs(blueprint.n_columns, width) if seed is None else _rotation(blueprint.n_columns, width, seed)
    module = bare_gpt2(
        vocab_size=len(blueprint.token_embed),
        n_positions=len(blueprint.pos_embed),
        n_embd=width,
        n_layer=len(blueprint.layers),
        n_head=n_heads,
        n_inner=max(1, *(len(layer.mlp.bias) for layer in blueprint.layers)),
        activation_function=blueprint.activation,
        layer_norm_epsilon=EPSILON,
        dtype=dtype,
    )
    weights = {
        "transformer.wte.weight": blueprint.token_embed @ write,
        "transformer.wpe.weight": blueprint.pos_embed @ write,
        "transformer.ln_f.weight": np.full(width, GAIN),
        "lm_head.weight": (read @ blueprint.unembed).T,
    }
    for number, layer in enumerate(blueprint.layers):
        here = f"transformer.h.{number}"
        weights |= {f"{here}.{norm}.weight": np.full(width, GAIN) for norm in ("ln_1", "ln_2")}
        weights |= {f"{here}.attn.{name}": each for name, each in _attention(layer, write, read, head_width).items()}
        weights |= {
            f"{here}.mlp.c_fc.weight": read @ layer.mlp.into,
            f"{here}.mlp.c_fc.bias": layer.mlp.bias,
            f"{here}.mlp.c_proj.weight": layer.mlp.out @ write,
            f"{here}.mlp.c_proj.bias": layer.mlp.out_bias @ write,
        }
    with torch.no_grad():
        for name, value in weights.items():
            parameter = module.get_parameter(name)
            parameter[tuple(slice(size) for size in value.shape)] = torch.as_tensor(value, dtype=dtype)
    return module


def _attention(layer: Layer, write: Array, read: Array, head_width: int) -> dict[str, Array]:
    """Return the weights of a layer's attention; GPT-2 divides scores by the root of the head's width."""
    width = write.shape[1]
    fused, bias, out = np.zeros((width, 3, width)), np.zeros((3, width)), np.zeros((width, width))
    scale = np.sqrt(head_width)
    for number, head in enumerate(layer.heads):
        first = number * head_width
        shown = slice(first, first + head.q.shape[1])
        carried = slice(first, first + head.v.shape[1])
        fused[:, 0, shown], bias[0, shown] = scale * read @ head.q, scale * head.q_bias
        fused[:, 1, shown] = read @ head.k
        fused[:, 2, carried] = read @ head.v
        out[carried] = head.out @ write
    return {
        "c_attn.weight": fused.reshape(width, 3 * width),
        "c_attn.bias": bias.reshape(3 * width),
        "c_proj.weight": out,
    }


def _pairs(n_columns: int, width: int) -> tuple[Array, Array]:
    """Return how columns are written to the stream, axes (column, width), and read from it, (width, column)."""
    write = np.zeros((n_columns, width))
    at = np.arange(n_columns)
    write[at, 2 * at], write[at, 2 * at + 1] = 1.0, -1.0
    return write, write.T / 2


def _rotation(n_columns: int, width: int, seed: int) -> tuple[Array, Array]:
    """Return the same for a random orthonormal basis of vectors that sum to 0."""
    drawn = generator(seed, "rotation").normal(size=(width, n_columns))
    basis = np.linalg.qr(drawn - drawn.mean(0))[0]
    return basis.T, basis
