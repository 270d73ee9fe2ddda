"""Random small models of each family, on which a patch has a real effect.

A freshly initialised model of transformers hardly reacts to a patch: its weights are so small that every sublayer adds
almost nothing, and every norm and bias is trivial. Here linear maps keep the size of what they are given, norms and
biases are perturbed, and attention looks at something.

In float64 some places of transformers still compute in float32: RMS norms, the softmax of eager attention, routers,
recurrences. That would drown laws that hold to 1e-10, so the same formulas are computed in float64 there. In any other
dtype the modules are those of transformers, unmodified.
"""

import functools
from collections.abc import Callable
from typing import Any, Final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
)
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from causalpatch.testing.configs import (
    ENCODERS,
    FAMILY_NAMES,
    GROUPED,
    HEAD_WIDTH,
    MAX_POSITIONS,
    VOCAB,
    WINDOW,
    tiny_config,
)
from causalpatch.testing.encoder_decoders import ENCODER_DECODERS, encoder_decoder_config

__all__ = [
    "ENCODERS",
    "ENCODER_DECODERS",
    "FAMILY_NAMES",
    "GROUPED",
    "HEAD_WIDTH",
    "MAX_POSITIONS",
    "VOCAB",
    "WINDOW",
    "build_tiny",
    "tiny_classifier",
    "tiny_model",
]

_ATTENTION = "causalpatch_float64"
# Modules that compute something in float32 whatever they are given.
_IN_FLOAT32: Final = (
    *("BloomAttention", "MptAttention", "GPTJAttention", "GPTNeoSelfAttention", "FalconAttention"),
    *(
        "CohereAttention",
        "Cohere2Attention",
        "CohereLayerNorm",
        "Cohere2LayerNorm",
        "StableLmLayerNormPerHead",
        "Gemma3nRMSNorm",
        "Gemma3nTextAltUp",
    ),
    *("MixtralTopKRouter", "Qwen2MoeTopKRouter", "Qwen3MoeTopKRouter", "DeepseekV3TopkRouter"),
    *("MambaMixer", "Mamba2Mixer", "JambaMambaMixer", "JambaSparseMoeBlock", "MambaForCausalLM", "Mamba2ForCausalLM"),
    *("ModernBertAttention", "UMT5Attention", "T5LayerNorm", "UMT5LayerNorm"),
)


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
        family: One of ``FAMILY_NAMES`` or ``ENCODER_DECODERS``.
        seed: Seed of the weights; equal arguments give equal weights.
        layers: Number of layers.
        heads: Number of query heads, each of 8 columns. Where a family allows it, the stream has 6 columns for each
            head, so that a head's width is not the stream's width over the number of heads. Latent attention has
            queries of 10 columns and values of 5.
        kv_heads: Number of key and value heads, a divisor of ``heads``; by default half of them where the family
            lets heads share and their number is even.
        dtype: The model's floating-point type.
        effect_scale: Standard deviation of a linear map's output for an input of standard deviation 1. Below about 1
            patches fade from layer to layer.

    Returns:
        A causal language model, of ``ENCODERS`` a masked one, over 40 ids and up to 64 positions. Where a family has
        windows, they are of 4 positions, in all layers or in every other. Of ``ENCODER_DECODERS`` a model whose decoder
        has one layer more than its encoder.

    Raises:
        SettingError: There is no such family, or the heads do not divide.

    Examples:
        >>> model = tiny_model("llama", layers=1)
        >>> model(torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 40])
    """
    if family in ENCODER_DECODERS:
        config = encoder_decoder_config(family, layers, heads)
        builder = AutoModelForSpeechSeq2Seq if family == "whisper" else AutoModelForSeq2SeqLM
        return build_tiny(builder.from_config, config, seed, dtype, effect_scale)
    config = tiny_config(family, layers, heads, kv_heads)
    builder = AutoModelForMaskedLM if family in ENCODERS else AutoModelForCausalLM
    return build_tiny(builder.from_config, config, seed, dtype, effect_scale)


def tiny_classifier(family: str, n_classes: int = 3, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Build a random small model of a family that tells classes of prompts apart, in eval mode.

    Args:
        family: One of ``ENCODERS``.
        n_classes: Number of classes.
        seed: Seed of the weights.
        dtype: The model's floating-point type.

    Returns:
        A classifier of two layers with four heads each, otherwise as ``tiny_model``.
    """
    config = tiny_config(family, 2, 4, None)
    config.num_labels = n_classes
    return build_tiny(AutoModelForSequenceClassification.from_config, config, seed, dtype, 2.0)


def build_tiny(
    make: Callable[..., nn.Module], config: PretrainedConfig, seed: int, dtype: torch.dtype, effect_scale: float
) -> nn.Module:
    """Build a random model of a configuration, in eval mode.

    Args:
        make: Makes the module from its configuration and dtype.
        config: The configuration.
        seed: Seed of the weights.
        dtype: The model's floating-point type.
        effect_scale: As for ``tiny_model``.
    """
    with torch.random.fork_rng(devices=[]):
        module = make(config, dtype=dtype)
    if dtype == torch.float64:
        for parameter in module.parameters():
            parameter.data = parameter.data.double()  # routers may have weights in float32 whatever is asked for
    _randomize(module, seed, effect_scale)
    if dtype == torch.float64:
        _compute_in_float64(module, config)
    return module.eval()


@torch.no_grad()
def _randomize(module: nn.Module, seed: int, effect_scale: float) -> None:
    """Draw every parameter anew, such that linear maps keep sizes and nothing is trivial."""
    draw = torch.Generator().manual_seed(seed)
    drawn: set[int] = set()  # a tied head keeps what was drawn for the embedding

    def normal(parameter: Tensor, mean: Tensor | float, deviation: float) -> None:
        if id(parameter) in drawn:
            return
        drawn.add(id(parameter))
        noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float64)
        parameter.copy_(mean + deviation * noise)

    for part in module.modules():
        weight = getattr(part, "weight", None)
        if weight is not None:
            kind = type(part).__name__
            if isinstance(part, nn.Embedding):
                normal(weight, 0.0, 1.0 / float(getattr(part, "embed_scale", 1.0)))
            elif weight.ndim == 2 and "Norm" not in kind:
                fan_in = weight.shape[0] if isinstance(part, Conv1D) else weight.shape[1]
                normal(weight, 0.0, effect_scale / fan_in**0.5)
            elif weight.ndim == 3:  # a convolution over positions
                normal(weight, 0.0, effect_scale / weight[0].numel() ** 0.5)
            else:
                normal(weight, _centre(weight), 0.2)
            bias = getattr(part, "bias", None)
            if bias is not None:
                normal(bias, 0.0, 0.2)
    for part in module.modules():
        if type(part).__name__ in ("T5Attention", "UMT5Attention"):  # which do not scale their scores
            part.get_parameter("q.weight").mul_(HEAD_WIDTH**-0.5)
        for name, parameter in part.named_parameters(recurse=False):
            if parameter.ndim == 3:  # experts side by side
                fan_in = parameter.shape[1 if type(part).__name__ == "GptOssExperts" else 2]
                normal(parameter, 0.0, effect_scale / fan_in**0.5)
            elif name == "A_log":  # how fast states fade, which has its range
                normal(parameter, parameter.double(), 0.2)
            else:
                normal(parameter, _centre(parameter), 0.2)


def _centre(fresh: Tensor) -> float:
    """Return the number that a fresh parameter is full of: 0 or 1 in norms, some of which multiply by 1 + weight."""
    first = fresh.flatten()[0]
    return float(first) if bool((fresh == first).all()) else 0.0


def _compute_in_float64(module: nn.Module, config: PretrainedConfig) -> None:
    for parent in list(module.modules()):
        if type(parent).__name__ in _IN_FLOAT32:
            parent.__class__ = _keeping_float64(type(parent))
            continue
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm") and type(child).__name__ not in _IN_FLOAT32:
                setattr(parent, name, _RMSNorm(child))
    if config._attn_implementation == "eager":
        AttentionInterface.register(_ATTENTION, _attend)
        AttentionMaskInterface.register(_ATTENTION, eager_mask)
        config._attn_implementation = _ATTENTION


class _InFloat64(TorchFunctionMode):
    """Leaves tensors in float64 where they would be turned into float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        kwargs = kwargs or {}
        if any(isinstance(x, Tensor) and x.dtype == torch.float64 for x in args):
            if function is Tensor.float:
                return args[0]
            args = tuple(torch.float64 if x is torch.float32 else x for x in args)
            kwargs = {name: torch.float64 if x is torch.float32 else x for name, x in kwargs.items()}
        return function(*args, **kwargs)


def _keeping_float64(kind: type[nn.Module]) -> type[nn.Module]:
    """Return a module's class that computes in float64 where it is given that."""

    @functools.wraps(kind.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with _InFloat64():
            return kind.forward(self, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward})


class _RMSNorm(nn.Module):
    """The formula of transformers' RMS norms in the dtype of the input."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.get_parameter("weight")
        self.epsilon = float(norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps)  # type: ignore[arg-type]  # module attributes are typed as tensors
        self.offset = 1.0 if type(norm).__name__ in ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm") else 0.0

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
    **more: Any,
) -> tuple[
    Float[Tensor, " row query_position head head_width"], Float[Tensor, " row head query_position key_position"]
]:
    """Eager attention with soft-capped scores, sinks and a softmax in the dtype of the input."""
    groups = int(module.num_key_value_groups)  # type: ignore[arg-type]  # module attributes are typed as tensors
    scores = scaling * query @ key.repeat_interleave(groups, dim=1).transpose(-1, -2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attention_mask is not None:
        scores = scores + attention_mask
    sinks = more.get("s_aux")
    if sinks is None:
        pattern = torch.softmax(scores, dim=-1)
    else:
        sinks = sinks.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        pattern = torch.softmax(torch.cat([scores, sinks], -1), dim=-1)[..., :-1]
    return (pattern @ value.repeat_interleave(groups, dim=1)).transpose(1, 2).contiguous(), pattern
