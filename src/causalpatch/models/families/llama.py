"""Llama and the models laid out like it: pre-norm blocks, separate projections, a gated MLP.

``q`` and ``k`` are before the rotary embedding, and in Qwen3 before the norm of each head. SmolLM 1 and 2 call
themselves Llama; SmolLM 3 leaves the rotary embedding out of every fourth layer.
"""

from dataclasses import replace

from causalpatch.models.families.family import ROTARY, At, Family, Parted, ShareOf, SumOf

LLAMA = Family(
    name="llama",
    model_types=("llama",),
    base="model",
    layers="layers",
    head="lm_head",
    norms=("input_layernorm", "post_attention_layernorm"),
    kv_heads="num_key_value_heads",
    sites={
        "embed": At("embed_tokens", "output"),
        "pos_embed": ROTARY,
        "resid_pre": At("", "input"),
        "resid_mid": SumOf(changed=At("self_attn", "output"), kept=At("", "input")),
        "resid_post": At("", "output"),
        "attn_out": At("self_attn", "output"),
        "mlp_out": At("mlp", "output"),
        "q": Parted("self_attn.q_proj", "output"),
        "k": Parted("self_attn.k_proj", "output"),
        "v": Parted("self_attn.v_proj", "output"),
        "z": Parted("self_attn.o_proj", "input"),
        "head_out": ShareOf("self_attn.o_proj"),
        "mlp_pre": Parted("mlp.up_proj", "output"),
        "mlp_gate": Parted("mlp.gate_proj", "output"),
        "mlp_post": Parted("mlp.down_proj", "input"),
        "final_norm": At("norm", "output"),
    },
)

MISTRAL = replace(LLAMA, name="mistral", model_types=("mistral",))
QWEN2 = replace(LLAMA, name="qwen2", model_types=("qwen2",))
QWEN3 = replace(LLAMA, name="qwen3", model_types=("qwen3",))
SMOLLM3 = replace(LLAMA, name="smollm3", model_types=("smollm3",))
