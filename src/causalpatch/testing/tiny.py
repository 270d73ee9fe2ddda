"""Random small models of each family, on which a patch has a real effect.

A freshly initialised model of transformers hardly reacts to a patch: its weights are so small that every sublayer adds
almost nothing, and every norm and bias is trivial. Here linear maps keep the size of what they are given, norms and
biases are perturbed, and attention looks at something.

In float64 two places of transformers still compute in float32, RMS norms and the softmax of eager attention, which
would drown laws that hold to 1e-10. Both are replaced by the same formula in float64. In any other dtype the modules
are those of transformers, unmodified.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from causalpatch.base.errors import SettingError

VOCAB: Final = 40
MAX_POSITIONS: Final = 64
HEAD_WIDTH: Final = 8
WINDOW: Final = 4  # positions that a sliding window sees

_ATTENTION = "causalpatch_float64"
_CONFIGS: Final[Mapping[str, type[PretrainedConfig]]] = MappingProxyType(
    {
        "gpt2": GPT2Config,
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "gemma2": Gemma2Config,
        "gpt_neox": GPTNeoXConfig,
        "gpt_neox_sequential": GPTNeoXConfig,
    }
)
FAMILY_NAMES: Final = tuple(_CONFIGS)
# Families in which heads may share keys and values.
GROUPED: Final = ("llama", "mistral", "qwen2", "qwen3", "gemma2")


def tiny_model(
    family: str,
    *,
    seed: int = 0,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int | None = None,
    dtype: torch.dtype = torch.float64,
    effect_scale: float = 2.0,
) -> nn.Module:
    """Build a random small model of a family, in eval mode.

    Args:
        family: One of ``FAMILY_NAMES``.
        seed: Seed of the weights; equal arguments give equal weights.
        layers: Number of layers.
        heads: Number of query heads, each of 8 columns. In Qwen3 and Gemma-2 the stream has 6 columns for each head,
            so that a head's width is not the stream's width over the number of heads.
        kv_heads: Number of key and value heads, a divisor of ``heads``; by default half of them where the family
            lets heads share and their number is even.
        dtype: The model's floating-point type.
        effect_scale: Standard deviation of a linear map's output for an input of standard deviation 1. Below about 1
            patches fade from layer to layer.

    Returns:
        A causal language model over 40 ids and up to 64 positions. Mistral and every other layer of Gemma-2 see
        windows of 4 positions.

    Raises:
        SettingError: There is no such family, or the heads do not divide.

    Examples:
        >>> model = tiny_model("llama", layers=1)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 40])
    """
    config = _config(family, layers, heads, kv_heads)
    with torch.random.fork_rng(devices=[]):
        module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=dtype)
    _randomize(module, seed, effect_scale)
    if dtype == torch.float64:
        _compute_in_float64(module, config)
    return module.eval()


def _config(family: str, layers: int, heads: int, kv_heads: int | None) -> PretrainedConfig:
    if family not in _CONFIGS:
        raise SettingError(
            f"no tiny model of family {family!r}", facts=[("families", " ".join(FAMILY_NAMES))], fix="use one of these"
        )
    shared = family in GROUPED
    kv_heads = kv_heads or (heads // 2 if shared and heads % 2 == 0 else heads)
    if heads % kv_heads or (not shared and kv_heads != heads):
        facts = [("heads", heads), ("allowed", "divisors of heads" if shared else f"{heads} only, in {family}")]
        raise SettingError(f"{kv_heads} kv_heads do not fit", facts=facts, fix=f"kv_heads={heads}")
    width = heads * (6 if family in ("qwen3", "gemma2") else HEAD_WIDTH)
    numbers: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    if family == "gpt2":
        return GPT2Config(**numbers, n_embd=width, n_layer=layers, n_head=heads, n_positions=MAX_POSITIONS)
    numbers |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    numbers |= {"num_attention_heads": heads, "max_position_embeddings": MAX_POSITIONS, "pad_token_id": 0}
    if family.startswith("gpt_neox"):
        return GPTNeoXConfig(**numbers, use_parallel_residual=family == "gpt_neox")
    numbers |= {"num_key_value_heads": kv_heads}
    if family in ("qwen3", "gemma2"):
        numbers |= {"head_dim": HEAD_WIDTH}
    if family in ("mistral", "gemma2"):
        numbers |= {"sliding_window": WINDOW}
    if family == "gemma2":
        numbers |= {"query_pre_attn_scalar": HEAD_WIDTH}
    return _CONFIGS[family](**numbers)


@torch.no_grad()
def _randomize(module: nn.Module, seed: int, effect_scale: float) -> None:
    """Draw every parameter anew, such that linear maps keep sizes and nothing is trivial."""
    draw = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()  # a tied head keeps what was drawn for the embedding

    def normal(parameter: Tensor, mean: float, deviation: float) -> None:
        if id(parameter) in drawn:
            return
        drawn.add(id(parameter))
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.copy_(mean + deviation * noise)

    for part in module.modules():
        weight = getattr(part, "weight", None)
        if weight is None:
            continue
        if isinstance(part, nn.Embedding):
            normal(weight, 0.0, 1.0 / float(getattr(part, "embed_scale", 1.0)))
        elif weight.ndim == 2:
            fan_in = weight.shape[0] if isinstance(part, Conv1D) else weight.shape[1]
            normal(weight, 0.0, effect_scale / fan_in**0.5)
        else:
            # Gemma's norms multiply by 1 + weight.
            normal(weight, 0.0 if type(part).__name__.startswith("Gemma") else 1.0, 0.2)
        bias = getattr(part, "bias", None)
        if bias is not None:
            normal(bias, 0.0, 0.2)


def _compute_in_float64(module: nn.Module, config: PretrainedConfig) -> None:
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, _RMSNorm(child))
    if config._attn_implementation == "eager":
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        config._attn_implementation = _ATTENTION


class _RMSNorm(nn.Module):
    """The formula of transformers' RMS norms in the dtype of the input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.get_parameter("weight")
        self.epsilon = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]  # module attributes are typed as tensors
        self.offset = 1.0 if type(norm).__name__.startswith("Gemma") else 0.0

    def forward(self, x: Float[Tensor, " *axes width"]) -> Float[Tensor, " *axes width"]:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.epsilon) * (self.offset + self.weight)


def _attend(
    module: nn.Module,
    query: Float[Tensor, " row head query_position head_width"],
    key: Float[Tensor, " row kv_head key_position head_width"],
    value: Float[Tensor, " row kv_head key_position head_width"],
    attention_mask: Float[Tensor, " row one query_position key_position"] | None,
    scaling: float,
    softcap: float | None = None,
    **_: object,
) -> tuple[
    Float[Tensor, " row query_position head head_width"], Float[Tensor, " row head query_position key_position"]
]:
    """Eager attention with soft-capped scores and a softmax in the dtype of the input."""
    groups = int(module.num_key_value_groups)  # type: ignore[arg-type]  # module attributes are typed as tensors
    scores = scaling * query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    pattern = torch.softmax(scores, dim=-1)
    return (pattern @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), pattern
