"""Small configurations of families with an encoder and a decoder, which differ in depth, in heads and in their MLPs."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from transformers import (
    BartConfig,
    MarianConfig,
    MBartConfig,
    PegasusConfig,
    PretrainedConfig,
    T5Config,
    UMT5Config,
    WhisperConfig,
)

from causalpatch.base.errors import SettingError
from causalpatch.testing.configs import HEAD_WIDTH, MAX_POSITIONS, VOCAB

_CONFIGS: Final[Mapping[str, type[PretrainedConfig]]] = MappingProxyType(
    {
        "t5": T5Config,
        "t5_gated": T5Config,
        "umt5": UMT5Config,
        "bart": BartConfig,
        "marian": MarianConfig,
        "mbart": MBartConfig,
        "pegasus": PegasusConfig,
        "whisper": WhisperConfig,
    }
)
FRAMES: Final = 6
MELS: Final = 5
ENCODER_DECODERS: Final = tuple(_CONFIGS)
"""Names of the tiny models; UMT5 has the table of T5 with a gate, and attention of its own."""


def encoder_decoder_config(family: str, layers: int, heads: int) -> PretrainedConfig:
    """Return the configuration of a small model with an encoder and a decoder.

    Args:
        family: One of ``ENCODER_DECODERS``.
        layers: Number of layers of the encoder; the decoder has one more.
        heads: Number of heads of the encoder, each of 8 columns. Where a family lets them differ the decoder has half
            as many, twice as wide.

    Raises:
        SettingError: The heads cannot be halved.
    """
    if heads % 2:
        raise SettingError(f"{heads} heads cannot be halved", facts=[("family", family)], fix=f"heads={heads + 1}")
    numbers: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    numbers |= {"decoder_start_token_id": 0}
    if "t5" in family:
        width = 6 * heads
        numbers |= {"d_model": width, "d_kv": HEAD_WIDTH, "d_ff": 3 * width, "num_heads": heads}
        numbers |= {"num_layers": layers, "num_decoder_layers": layers + 1, "relative_attention_num_buckets": 8}
        numbers |= {"relative_attention_max_distance": 12}
        numbers |= {"feed_forward_proj": "relu" if family == "t5" else "gated-gelu"}
        return _CONFIGS[family](**numbers)
    width = HEAD_WIDTH * heads
    numbers |= {"d_model": width, "encoder_layers": layers, "decoder_layers": layers + 1}
    numbers |= {"encoder_attention_heads": heads, "decoder_attention_heads": heads // 2}
    numbers |= {"encoder_ffn_dim": 3 * width, "decoder_ffn_dim": 2 * width, "max_position_embeddings": MAX_POSITIONS}
    if family == "whisper":
        numbers |= {"max_source_positions": FRAMES, "max_target_positions": MAX_POSITIONS, "num_mel_bins": MELS}
    return _CONFIGS[family](**numbers, scale_embedding=family != "whisper")
