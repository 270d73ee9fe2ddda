"""Checkpoints of tiny models, opened whole and with their weights fetched layer by layer."""

from pathlib import Path
from typing import Any

import torch

import causalpatch as cp
from causalpatch.models import Model
from causalpatch.testing.tiny import tiny_model

FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "mistral", "qwen3")


def write(folder: Path, family: str = "llama", **sizes: Any) -> Path:
    """Write the checkpoint of a tiny model in float32, and return its folder."""
    place = folder / family
    if not place.exists():
        tiny_model(family, dtype=torch.float32, **({"layers": 3} | sizes)).save_pretrained(place)
    return place


def opened(place: Path, *, is_streamed: bool, dtype: str = "float32", **settings: Any) -> Model:
    """Open a checkpoint on the CPU, from disk unless a place is given."""
    how = {"weights": "disk", **settings} if is_streamed else settings
    return cp.open_model(place, device="cpu", dtype=dtype, **how)


def count_layers(model: Model) -> list[int]:
    """Return how often each layer was fetched."""
    return [model.weights.loads[path] for path in model.weights.layers]
