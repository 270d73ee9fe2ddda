"""Models to measure on: published shapes with random weights, spread so that attention looks at something."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Final

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig


@dataclass(frozen=True)
class Shape:
    """Sizes of a model.

    Args:
        family: ``gpt2``, ``llama``, ``gemma2`` or ``gpt_neox``.
        width: Columns of the residual stream.
        layers: Layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        hidden: Neurons of one MLP.
        vocab: Vocabulary.
        positions: Longest prompt.
    """

    family: str
    width: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int = 12
    hidden: int = 3072
    vocab: int = 50_257
    positions: int = 1_024

    @property
    def is_gated(self) -> bool:
        """Whether the MLP has a gate beside its way up."""
        return self.family in ("llama", "gemma2")

    @property
    def head_width(self) -> int:
        """Columns of one head."""
        return self.width // self.heads


SHAPES: Final[Mapping[str, Shape]] = MappingProxyType(
    {
        "gpt2": Shape("gpt2"),
        "llama": Shape("llama", kv_heads=4, hidden=2048, vocab=32_000),
        "gemma2": Shape("gemma2", kv_heads=4, hidden=2048, vocab=32_000),
        "neox": Shape("gpt_neox", vocab=50_432),
        "middle": Shape("gpt2", width=512, layers=8, heads=8, kv_heads=8, hidden=2048, vocab=8_000),
    }
)


def tiny(shape: Shape) -> Shape:
    """Return a shape that runs in no time: it shows that the benchmark works, not how fast anything is."""
    kv_heads = 2 if shape.kv_heads < shape.heads else 4
    return replace(shape, width=32, layers=3, heads=4, kv_heads=kv_heads, hidden=48, vocab=200, positions=64)


def build(shape: Shape, seed: int = 0) -> nn.Module:
    """Build a model of some shape, in eval mode and float32; equal arguments give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: nn.Module = AutoModelForCausalLM.from_config(_config(shape), dtype=torch.float32)
    _spread(module, 2.0 * (768 / shape.width) ** 0.5, seed)
    return module.eval().requires_grad_(requires_grad=False)


def _config(shape: Shape) -> PretrainedConfig:
    common: dict[str, Any] = {"vocab_size": shape.vocab, "bos_token_id": 0, "eos_token_id": 0}
    if shape.family == "gpt2":
        dropout = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
        sizes = {"n_embd": shape.width, "n_layer": shape.layers, "n_head": shape.heads, "n_inner": shape.hidden}
        return GPT2Config(**common, **dropout, **sizes, n_positions=shape.positions)
    common |= {"hidden_size": shape.width, "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads}
    common |= {"intermediate_size": shape.hidden, "max_position_embeddings": shape.positions, "pad_token_id": 0}
    if shape.family == "gpt_neox":
        return GPTNeoXConfig(**common)
    common |= {"num_key_value_heads": shape.kv_heads, "head_dim": shape.head_width}
    if shape.family == "gemma2":
        return Gemma2Config(**common, query_pre_attn_scalar=shape.head_width)
    return LlamaConfig(**common)


@torch.no_grad()
def _spread(module: nn.Module, factor: float, seed: int) -> None:
    """Make freshly drawn weights so much larger, and let norms and biases differ from one column to the next.

    Weights are drawn with a deviation of 0.02; at width 768 twice that lets a linear map keep the size of its input.
    """
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim >= 2:
            if not any(part in name for part in ("lm_head", "wte", "wpe", "embed")):
                parameter.mul_(factor)
        else:
            deviation = 0.1 if "norm" in name or "ln" in name else 0.05
            parameter.add_(deviation * torch.randn(parameter.shape, generator=draw))
