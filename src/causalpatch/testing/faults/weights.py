"""The weights of each component of a Llama-like decoder, such as ``zoo:stories``: which slices of which parameters.

===================  ====================================================================
component            its weights
===================  ====================================================================
``z.L.H``            rows of q, k and v of this head, columns of the output projection
``mlp_post.L.N``     a neuron: its row of the gate and of the up projection, its column down
``mlp_out.L``        all neurons of a layer
``embed``            the embedding, which is the unembedding too where they are tied
``norms``            the scales of all norms
===================  ====================================================================

Heads and MLPs are the parts that a search can find; ``embed`` and ``norms`` are what else training may have moved.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

EVERYTHING: Final = "everything"
Slices = tuple[slice, slice]


@dataclass(frozen=True)
class Piece:
    """A part of one parameter.

    Args:
        parameter: Its name in the module.
        at: The slice of its rows, and of its columns where it has some.
    """

    parameter: str
    at: tuple[slice, ...]

    def of(self, module: nn.Module) -> Tensor:
        """Return this part of a module's parameter, as a view."""
        return module.get_parameter(self.parameter).data[self.at]


def components(module: nn.Module) -> dict[str, list[Piece]]:
    """Return the weights of all heads, all MLPs, the embedding and the norms, each weight in one component.

    Args:
        module: A ``LlamaForCausalLM`` in which every head has keys and values of its own.
    """
    config: Any = module.config
    found = {
        f"z.{layer}.{head}": head_pieces(module, layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
    }
    found |= {
        f"mlp_out.{layer}": neuron_pieces(layer, range(config.intermediate_size))
        for layer in range(config.num_hidden_layers)
    }
    whole = (slice(None),)
    names = [name for name, _ in module.named_parameters()]
    found["embed"] = [Piece(name, whole) for name in names if "embed" in name or "lm_head" in name]
    found["norms"] = [Piece(name, whole) for name in names if "norm" in name]
    return found


def head_pieces(module: nn.Module, layer: int, head: int) -> list[Piece]:
    """Return the weights of a head."""
    config: Any = module.config
    width = config.hidden_size // config.num_attention_heads
    own, every = slice(head * width, (head + 1) * width), slice(None)
    block = f"model.layers.{layer}.self_attn"
    rows = [Piece(f"{block}.{name}_proj.weight", (own, every)) for name in ("q", "k", "v")]
    return [*rows, Piece(f"{block}.o_proj.weight", (every, own))]


def neuron_pieces(layer: int, neurons: range) -> list[Piece]:
    """Return the weights of neighbouring neurons of a layer."""
    own, every = slice(neurons.start, neurons.stop), slice(None)
    block = f"model.layers.{layer}.mlp"
    rows = [Piece(f"{block}.{name}_proj.weight", (own, every)) for name in ("gate", "up")]
    return [*rows, Piece(f"{block}.down_proj.weight", (every, own))]


def masks(module: nn.Module, pieces: Iterable[Piece]) -> Mapping[str, Tensor]:
    """Return 1 for each weight of some pieces and 0 for the others, by the parameters that they are parts of."""
    made: dict[str, Tensor] = {}
    for piece in pieces:
        mask = made.setdefault(piece.parameter, torch.zeros_like(module.get_parameter(piece.parameter).data))
        mask[piece.at] = 1.0
    return made


def put(pieces: Sequence[Piece], origin: nn.Module, target: nn.Module) -> None:
    """Copy the weights of some pieces from one module into another."""
    for piece in pieces:
        piece.of(target).copy_(piece.of(origin))


def change(pieces: Sequence[Piece], before: nn.Module, after: nn.Module) -> float:
    """Return how far the weights of some pieces moved: the norm of the change over the norm of what was there."""
    moved = sum(float((piece.of(after) - piece.of(before)).square().sum()) for piece in pieces)
    held = sum(float(piece.of(before).square().sum()) for piece in pieces)
    return (moved / held) ** 0.5 if held else 0.0
