"""The two trained models with known circuits: what they are like, and their weights, which ``train`` made.

The weights come with the library (71 KiB each), so that the cases are the same on every machine; the script that made
them is ``python -m causalpatch.circuits.ground_truth.train``.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import nn

from causalpatch.circuits.ground_truth.idle import POSITIONS
from causalpatch.circuits.ground_truth.language import Program
from causalpatch.circuits.ground_truth.programs import addition, induction
from causalpatch.models.bare import bare_gpt2

WEIGHTS: Final = Path(__file__).parent / "weights"
EPSILON: Final = 1e-5  # of the layer norms, as GPT-2 has it
TRAINED: Final = {"addition": addition, "induction": induction}


@dataclass(frozen=True)
class Recipe:
    """What decides the weights.

    Args:
        seed: Seed of the initial weights and of all prompts.
        steps: Number of updates.
        rows: Prompts per update.
        learning_rate: Highest learning rate; it rises over ``warm_up`` steps and falls to a hundredth along a cosine.
        warm_up: Number of steps.
        width: Width of the residual stream.
        layers: Number of layers.
        heads: Heads per layer.
        neurons: Neurons per layer.
    """

    seed: int = 0
    steps: int = 1000
    rows: int = 64
    learning_rate: float = 3e-3
    warm_up: int = 100
    width: int = 32
    layers: int = 2
    heads: int = 4
    neurons: int = 64


def load(program: Program, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return the model that was trained on a program, in eval mode.

    Args:
        program: One of ``TRAINED``.
        dtype: The model's floating-point type; it was trained in float32.
    """
    module = start(program, Recipe())
    module.load_state_dict(load_file(WEIGHTS / f"{program.name}.safetensors"))
    return module.to(dtype)


def start(program: Program, recipe: Recipe) -> nn.Module:
    """Return the model with its initial weights."""
    module = bare_gpt2(
        vocab_size=len(program.vocabulary),
        n_positions=POSITIONS,
        n_embd=recipe.width,
        n_layer=recipe.layers,
        n_head=recipe.heads,
        n_inner=recipe.neurons,
        activation_function="gelu_new",
        layer_norm_epsilon=EPSILON,
        dtype=torch.float32,
    )
    draw = torch.Generator().manual_seed(recipe.seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".ln_" in name and name.endswith("weight"):
                parameter.fill_(1.0)
            elif parameter.ndim == 2:
                fan_in = recipe.width if name.endswith(("wte.weight", "wpe.weight", "head.weight")) else len(parameter)
                parameter.copy_(torch.randn(parameter.shape, generator=draw) / math.sqrt(fan_in))
    return module
