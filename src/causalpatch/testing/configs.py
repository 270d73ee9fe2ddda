"""Small configurations of each family, whose numbers differ where a mistake would hide if they were equal.

Heads are 8 columns wide, and where a family lets its stream have another width than its heads together, it has 6
columns for each head. Layers of several kinds alternate, multipliers are not 1, and latent attention has queries, keys
and values of different widths.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final

from transformers import (
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTBigCodeConfig,
    GPTJConfig,
    GPTNeoConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    JambaConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    ModernBertConfig,
    MptConfig,
    Olmo2Config,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    SmolLM3Config,
    StableLmConfig,
    Starcoder2Config,
)

from causalpatch.base.errors import SettingError

VOCAB: Final = 40
MAX_POSITIONS: Final = 64
HEAD_WIDTH: Final = 8
WINDOW: Final = 4  # positions that a sliding window sees

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
        "gemma": GemmaConfig,
        "gemma3": Gemma3TextConfig,
        "olmo2": Olmo2Config,
        "phi3": Phi3Config,
        "smollm3": SmolLM3Config,
        "falcon": FalconConfig,
        "falcon_grouped": FalconConfig,
        "falcon_grouped_one_norm": FalconConfig,
        "falcon_sequential": FalconConfig,
        "bloom": BloomConfig,
        "mpt": MptConfig,
        "gptj": GPTJConfig,
        "gpt_neo": GPTNeoConfig,
        "opt": OPTConfig,
        "opt_post_norm": OPTConfig,
        "phi": PhiConfig,
        "stablelm": StableLmConfig,
        "stablelm_parallel": StableLmConfig,
        "cohere": CohereConfig,
        "cohere2": Cohere2Config,
        "gpt_bigcode": GPTBigCodeConfig,
        "starcoder2": Starcoder2Config,
        "granite": GraniteConfig,
        "mixtral": MixtralConfig,
        "qwen2_moe": Qwen2MoeConfig,
        "qwen3_moe": Qwen3MoeConfig,
        "deepseek_v3": DeepseekV3Config,
        "deepseek_v3_full_queries": DeepseekV3Config,
        "gpt_oss": GptOssConfig,
        "gemma3n": Gemma3nTextConfig,
        "mamba": MambaConfig,
        "mamba2": Mamba2Config,
        "jamba": JambaConfig,
        "bert": BertConfig,
        "roberta": RobertaConfig,
        "modernbert": ModernBertConfig,
    }
)
FAMILY_NAMES: Final = tuple(_CONFIGS)
# Families whose tokens see each other both ways; they fill in masked tokens.
ENCODERS: Final = ("bert", "roberta", "modernbert")
# Families in which heads may share keys and values.
GROUPED: Final = (
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma", "gemma3", "olmo2", "phi3", "smollm3"),
    *("falcon_grouped", "falcon_grouped_one_norm", "phi", "stablelm", "stablelm_parallel", "cohere", "cohere2"),
    *("starcoder2", "granite", "mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "gemma3n"),
)
# Families whose heads need not be as wide as the stream over their number.
_OWN_HEAD_WIDTH: Final = (
    *("qwen3", "gemma2", "gemma", "gemma3", "cohere2", "mixtral", "qwen3_moe", "gpt_oss", "gemma3n"),
    *("deepseek_v3", "deepseek_v3_full_queries"),
)
_WINDOWED: Final = ("mistral", "gemma2", "gemma3", "cohere2", "phi3", "gpt_oss", "gemma3n")
_ROTARY_IN_PART: Final = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def tiny_config(family: str, layers: int, heads: int, kv_heads: int | None) -> PretrainedConfig:
    """Return the configuration of a small model.

    Args:
        family: One of ``FAMILY_NAMES``.
        layers: Number of layers.
        heads: Number of query heads.
        kv_heads: Number of key and value heads; see ``tiny_model``.

    Raises:
        SettingError: There is no such family, or the heads do not divide.
    """
    if family not in _CONFIGS:
        raise SettingError(
            f"no tiny model of family {family!r}", facts=[("families", " ".join(FAMILY_NAMES))], fix="use one of these"
        )
    shared = family in GROUPED
    kv_heads = kv_heads or (heads // 2 if shared and heads % 2 == 0 else heads)
    if heads % kv_heads or (not shared and kv_heads != heads):
        facts = [("heads", heads), ("allowed", "divisors of heads" if shared else f"{heads} only, in {family}")]
        raise SettingError(f"{kv_heads} kv_heads do not fit", facts=facts, fix=f"kv_heads={heads}")
    width = heads * (6 if family in _OWN_HEAD_WIDTH else HEAD_WIDTH)
    numbers: dict[str, Any] = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    numbers |= {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers}
    numbers |= {"num_attention_heads": heads, "max_position_embeddings": MAX_POSITIONS}
    if shared:
        numbers |= {"num_key_value_heads": kv_heads}
    if family in _OWN_HEAD_WIDTH:
        numbers |= {"head_dim": HEAD_WIDTH}
    if family in _WINDOWED:
        numbers |= {"sliding_window": WINDOW}
    return _CONFIGS[family](**(numbers | _special(family, layers, heads, kv_heads)))


def _special(family: str, layers: int, heads: int, kv_heads: int) -> dict[str, Any]:
    """Return what only this family's configuration says."""
    by_turns = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    width = heads * HEAD_WIDTH
    falcon: dict[str, Any] = {
        "num_kv_heads": kv_heads,
        "ffn_hidden_size": 3 * width,
        "new_decoder_architecture": "grouped" in family,
    }
    falcon |= {"bias": True, "attn_implementation": "eager"}
    opt = {"ffn_dim": 3 * width, "word_embed_proj_dim": width, "dropout": 0.0}
    experts: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 12, "experts_implementation": "eager"}
    latent: dict[str, Any] = {
        "kv_lora_rank": 10,
        "qk_nope_head_dim": 6,
        "qk_rope_head_dim": 4,
        "v_head_dim": 5,
        "head_dim": 4,
    }
    latent |= {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    latent |= {"num_key_value_heads": heads, "q_lora_rank": None if "full" in family else 12}
    special: dict[str, dict[str, Any]] = {
        "gpt2": {"n_inner": None},
        "gpt_bigcode": {"n_inner": 3 * width},
        "gpt_neox": {"use_parallel_residual": True},
        "gpt_neox_sequential": {"use_parallel_residual": False},
        "gemma2": {"query_pre_attn_scalar": HEAD_WIDTH},
        "gemma3": {"query_pre_attn_scalar": HEAD_WIDTH, "layer_types": by_turns},
        "smollm3": {"no_rope_layers": [layer % 2 for layer in range(layers)]},
        "falcon": {**falcon, "multi_query": True},
        "falcon_grouped": {**falcon, "num_ln_in_parallel_attn": 2},
        "falcon_grouped_one_norm": {**falcon, "num_ln_in_parallel_attn": 1},
        "falcon_sequential": {**falcon, "multi_query": False, "parallel_attn": False, "alibi": True},
        "mpt": {"max_seq_len": MAX_POSITIONS},
        "gptj": {"n_inner": 3 * width, "rotary_dim": 4},
        "gpt_neo": {
            "attention_types": [[[("local", "global")[n % 2]], 1] for n in range(layers)],
            "window_size": WINDOW,
        },
        "opt": opt,
        "opt_post_norm": {**opt, "word_embed_proj_dim": 2 * heads, "do_layer_norm_before": False},
        "phi": {"rope_parameters": _ROTARY_IN_PART, "qk_layernorm": True},
        "stablelm": {"rope_parameters": _ROTARY_IN_PART, "qk_layernorm": True, "use_parallel_residual": False},
        "stablelm_parallel": {"rope_parameters": _ROTARY_IN_PART, "use_parallel_residual": True},
        "cohere": {"logit_scale": 0.5, "use_qk_norm": True},
        "cohere2": {"logit_scale": 0.5, "layer_types": by_turns},
        "granite": {
            "residual_multiplier": 0.6,
            "embedding_multiplier": 1.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        },
        "mixtral": {"num_local_experts": 4, **experts, "intermediate_size": 12},
        "qwen2_moe": {
            "num_experts": 4,
            **experts,
            "shared_expert_intermediate_size": 10,
            "mlp_only_layers": [1],
        },
        "qwen3_moe": {"num_local_experts": 4, **experts, "norm_topk_prob": True, "mlp_only_layers": [1]},
        "deepseek_v3": {**experts, **latent},
        "deepseek_v3_full_queries": {**experts, **latent, "rope_interleave": False},
        "gpt_oss": {"num_local_experts": 4, **experts, "intermediate_size": 12, "layer_types": by_turns},
        "gemma3n": {
            "vocab_size_per_layer_input": VOCAB,
            "hidden_size_per_layer_input": 5,
            "altup_num_inputs": 3,
            "laurel_rank": 4,
            "layer_types": ["full_attention"] * layers,
            "num_kv_shared_layers": 1 if layers > 1 else 0,
            "activation_sparsity_pattern": [0.6, *[0.0] * (layers - 1)],
            "intermediate_size": [18 * heads] * layers,
        },
        "mamba": {"state_size": 4, "time_step_rank": 3, "residual_in_fp32": False},
        "mamba2": {"num_heads": heads, "head_dim": 16, "state_size": 4, "n_groups": 1, "chunk_size": 4},
        "jamba": {
            "num_key_value_heads": max(1, heads // 2) if heads % 2 == 0 else heads,
            "mamba_d_state": 4,
            "mamba_dt_rank": 3,
            "attn_layer_period": 2,
            "attn_layer_offset": min(1, layers - 1),
            "num_experts": 4,
            "use_mamba_kernels": False,
            **experts,
        },
        # A padding id that is not 0 where positions are counted from behind it.
        "roberta": {"pad_token_id": 2, "eos_token_id": 0},
        "modernbert": {"local_attention": WINDOW, "layer_types": by_turns, "attention_bias": True, "mlp_bias": True},
    }
    return special.get(family, {})
