"""Random small models that are given pictures: for pictures alone, for pictures and texts, and language models of both.

A picture has 3 channels, 12 rows and 8 columns of pixels, which make 3 x 2 patches, so that rows and columns cannot be
mistaken for each other; where a model takes square pictures alone these have 12 x 12 and 3 x 3. Heads are 8 columns
wide.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final

import torch
import transformers
from torch import nn

from causalpatch.base.errors import SettingError
from causalpatch.testing.configs import VOCAB
from causalpatch.testing.tiny import build_tiny

N_CLASSES: Final = 5
N_LAYERS: Final = 2
PICTURE_ID: Final = VOCAB - 1  # the token in prompts whose place a picture takes
END_ID: Final = VOCAB - 2  # the token at which CLIP reads a text
_OBLONG: Final = {"image_size": (12, 8), "patch_size": 4}
_SQUARE: Final = {"image_size": 12, "patch_size": 4}
_WIDTHS: Final = {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 20, "num_hidden_layers": N_LAYERS}
_TEXT: Final = {
    **_WIDTHS,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": END_ID,
    "pad_token_id": END_ID,
}
_LLAMA: Final = {**_WIDTHS, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCAB}

Make = Callable[[], tuple[type[Any], Any]]


def _classifier(name: str, **more: Any) -> Make:
    """Return what makes a classifier of pictures and its configuration."""

    def make() -> tuple[type[Any], Any]:
        config = getattr(transformers, f"{name}Config")
        builders = {"DeiT": "DeiTForImageClassificationWithTeacher"}
        builder = builders.get(name, f"{name}ForImageClassification")
        return getattr(transformers, builder), config(**{**_WIDTHS, **_OBLONG, **more}, num_labels=N_CLASSES)

    return make


def _tower(name: str, kind: str, **more: Any) -> Make:
    """Return what makes one tower of a model that compares pictures with texts, and its configuration."""

    def make() -> tuple[type[Any], Any]:
        sizes = {**_WIDTHS, **_SQUARE} if kind == "Vision" else _TEXT
        config = getattr(transformers, f"{name}{kind}Config")(**{**sizes, **more})
        builder = f"{name}{kind}Model" + ("WithProjection" if name == "CLIP" else "")
        return getattr(transformers, builder), config

    return make


def _compared(name: str, text: Mapping[str, Any], **more: Any) -> Make:
    """Return what makes a model that compares pictures with texts, and its configuration."""

    def make() -> tuple[type[Any], Any]:
        parts = {"vision_config": {**_WIDTHS, **_SQUARE, "num_hidden_layers": N_LAYERS + 1}}
        parts["text_config"] = {**_TEXT, **text}
        return getattr(transformers, f"{name}Model"), getattr(transformers, f"{name}Config")(**parts, **more)

    return make


def _llava(**more: Any) -> Make:
    """Return what makes a LLaVA: of three layers of its vision tower the last is not read."""

    def make() -> tuple[type[Any], Any]:
        vision = transformers.CLIPVisionConfig(**{**_WIDTHS, **_SQUARE, "num_hidden_layers": N_LAYERS + 1})
        text = transformers.LlamaConfig(**_LLAMA)
        config = transformers.LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=PICTURE_ID, image_seq_length=9, **more
        )
        return transformers.LlavaForConditionalGeneration, config

    return make


def _paligemma() -> tuple[type[Any], Any]:
    """Return PaliGemma, whose tokens of the prompt see later ones, and its configuration."""
    vision = transformers.SiglipVisionConfig(**{**_WIDTHS, **_SQUARE}, vision_use_head=False)
    text = transformers.GemmaConfig(**{**_LLAMA, "num_key_value_heads": 1}, head_dim=8)
    config = transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_id=PICTURE_ID, projection_dim=_LLAMA["hidden_size"]
    )
    return transformers.PaliGemmaForConditionalGeneration, config


def _smolvlm() -> tuple[type[Any], Any]:
    """Return SmolVLM, which is given several pictures of each prompt, and its configuration."""
    vision = {**_WIDTHS, "image_size": 16, "patch_size": 4}
    config = transformers.SmolVLMConfig(
        vision_config=vision,
        text_config=transformers.LlamaConfig(**_LLAMA, pad_token_id=0),
        image_token_id=PICTURE_ID,
        scale_factor=2,
        pad_token_id=0,
    )
    return transformers.SmolVLMForConditionalGeneration, config


_MODELS: Final[Mapping[str, Make]] = MappingProxyType(
    {
        "vit": _classifier("ViT"),
        "deit": _classifier("DeiT"),
        "dinov2": _classifier("Dinov2", **_SQUARE, mlp_ratio=2),
        "dinov2_gated": _classifier("Dinov2", **_SQUARE, use_swiglu_ffn=True),
        "dinov2_registers": _classifier("Dinov2WithRegisters", **_SQUARE, num_register_tokens=2),
        "dinov2_registers_gated": _classifier(
            "Dinov2WithRegisters", **_SQUARE, num_register_tokens=2, use_swiglu_ffn=True
        ),
        "clip_vision": _tower("CLIP", "Vision", projection_dim=N_CLASSES),
        "siglip_vision": _tower("Siglip", "Vision"),
        "clip_text": _tower("CLIP", "Text", projection_dim=N_CLASSES),
        "siglip_text": _tower("Siglip", "Text", projection_size=N_CLASSES),
        "clip": _compared("CLIP", {}, projection_dim=12),
        "siglip": _compared("Siglip", {"projection_size": _WIDTHS["hidden_size"]}),
        "llava": _llava(),
        "paligemma": _paligemma,
        "smolvlm": _smolvlm,
    }
)
SEEING: Final = tuple(_MODELS)
"""Names of the models."""
TABLES: Final = tuple(n for n in _MODELS if n not in ("clip", "siglip", "llava", "paligemma", "smolvlm"))
"""Those that are named for their family's table; the others have the tables of their parts."""


def class_of(name: str) -> type[Any]:
    """Return the class of a model that is given pictures.

    Args:
        name: One of ``SEEING``.
    """
    return _MODELS[name]()[0]


def tiny_seer(name: str, *, seed: int = 0, dtype: torch.dtype = torch.float64, effect_scale: float = 2.0) -> nn.Module:
    """Build a random small model that is given pictures, or a tower of one that compares them with texts.

    Args:
        name: One of ``SEEING``: a family of ``TABLES``, or a model of several towers.
        seed: Seed of the weights; equal arguments give equal weights.
        dtype: The model's floating-point type.
        effect_scale: As for ``tiny_model``.

    Raises:
        SettingError: There is no such model.

    Examples:
        >>> model = tiny_seer("vit", dtype=torch.float32)
        >>> model(torch.zeros(1, 3, 12, 8)).logits.shape
        torch.Size([1, 5])
    """
    if name not in _MODELS:
        raise SettingError(
            f"there is no tiny model named {name!r} that sees", facts=[("known", ", ".join(SEEING))], fix='"vit"'
        )
    builder, config = _MODELS[name]()
    return build_tiny(builder._from_config, config, seed, dtype, effect_scale)
