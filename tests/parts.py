"""Where the modules of transformers keep what the oracle hooks, family by family, as their authors named it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Parts:
    """Paths below the layer, but for the first five.

    ``fused`` says how q, k and v lie in ``qkv``: side by side, or group by group of heads that share a key. ``gate_up``
    returns the gate's columns and then those of the up projection. ``reader`` is the first module that is given the
    stream between attention and MLP, and ``shared_reader`` the norm of layers in which these share one; ``middle``
    returns that stream. ``folded`` modules take rows and positions as one axis.
    ``times`` is an attribute of the layer that what is added is multiplied by. Attention that is ``spelt_out`` calls
    torch's softmax by itself. ``experts`` are told which experts each token has.
    """

    body: str = "model"
    layers: str = "layers"
    embed: str = "embed_tokens"
    positions: str = ""
    final: str = "norm"
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    qkv: str = ""
    fused: Literal["", "side by side", "by group"] = ""
    attention: str = "self_attn"
    spelt_out: bool = False
    heads: str = "self_attn.o_proj"
    attn_out: str = "self_attn"
    mlp_out: str = "mlp"
    up: str = "mlp.up_proj"
    gate: str = "mlp.gate_proj"
    gate_up: str = ""
    down: str = "mlp.down_proj"
    reader: str = "post_attention_layernorm"
    shared_reader: str = "input_layernorm"
    middle: str = ""
    folded: tuple[str, ...] = ()
    times: str = ""
    experts: str = ""


LLAMA = Parts()
GEMMA2 = replace(
    LLAMA,
    attn_out="post_attention_layernorm",
    mlp_out="post_feedforward_layernorm",
    reader="pre_feedforward_layernorm",
)
NEOX = Parts(
    body="gpt_neox",
    embed="embed_in",
    final="final_layer_norm",
    qkv="attention.query_key_value",
    fused="by group",
    attention="attention",
    heads="attention.dense",
    attn_out="attention",
    up="mlp.dense_h_to_4h",
    down="mlp.dense_4h_to_h",
)
FALCON = replace(
    NEOX,
    body="transformer",
    layers="h",
    embed="word_embeddings",
    final="ln_f",
    qkv="self_attention.query_key_value",
    attention="self_attention",
    spelt_out=True,
    heads="self_attention.dense",
    attn_out="self_attention",
)
GPTJ = Parts(
    body="transformer",
    layers="h",
    embed="wte",
    final="ln_f",
    q="attn.q_proj",
    k="attn.k_proj",
    v="attn.v_proj",
    attention="attn",
    heads="attn.out_proj",
    attn_out="attn",
    shared_reader="ln_1",
    up="mlp.fc_in",
    down="mlp.fc_out",
)
GPT2 = replace(
    GPTJ,
    positions="wpe",
    qkv="attn.c_attn",
    fused="side by side",
    heads="attn.c_proj",
    up="mlp.c_fc",
    down="mlp.c_proj",
    reader="ln_2",
)
OPT = replace(
    LLAMA,
    body="model.decoder",
    positions="embed_positions",
    final="final_layer_norm",
    heads="self_attn.out_proj",
    mlp_out="fc2",
    up="fc1",
    down="fc2",
    reader="final_layer_norm",
    folded=("fc1", "fc2", "final_layer_norm"),
)
DEEPSEEK = replace(LLAMA, q="self_attn.q_b_proj", v="self_attn.kv_b_proj", experts="mlp.experts")
MAMBA = Parts(body="backbone", embed="embeddings", final="norm_f")

BERT = Parts(
    body="bert",
    layers="encoder.layer",
    embed="embeddings.word_embeddings",
    positions="embeddings.position_embeddings",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    attention="attention.self",
    heads="attention.output.dense",
    attn_out="attention.output.dense",
    mlp_out="output.dense",
    up="intermediate.dense",
    down="output.dense",
    middle="attention.output.LayerNorm",
)
MODERNBERT = Parts(
    embed="embeddings.tok_embeddings",
    final="final_norm",
    qkv="attn.Wqkv",
    fused="side by side",
    attention="attn",
    heads="attn.Wo",
    attn_out="attn",
    gate_up="mlp.Wi",
    down="mlp.Wo",
    reader="mlp_norm",
)

PARTS: Mapping[str, Parts] = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "stablelm", "stablelm_parallel"], LLAMA),
    **dict.fromkeys(["cohere", "cohere2"], LLAMA),
    **dict.fromkeys(["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"], replace(LLAMA, experts="mlp.experts")),
    **dict.fromkeys(["gemma2", "gemma3", "gemma3n"], GEMMA2),
    "olmo2": replace(GEMMA2, reader="mlp"),
    "phi3": replace(LLAMA, qkv="self_attn.qkv_proj", fused="side by side", gate_up="mlp.gate_up_proj"),
    "phi": replace(LLAMA, final="final_layernorm", heads="self_attn.dense", up="mlp.fc1", down="mlp.fc2"),
    "starcoder2": replace(LLAMA, up="mlp.c_fc", down="mlp.c_proj"),
    "granite": replace(LLAMA, times="residual_multiplier"),
    **dict.fromkeys(["gpt_neox", "gpt_neox_sequential"], NEOX),
    **dict.fromkeys(["falcon", "falcon_grouped", "falcon_grouped_one_norm", "falcon_sequential"], FALCON),
    "bloom": replace(FALCON, attn_out="self_attention.dense", mlp_out="mlp.dense_4h_to_h"),
    **dict.fromkeys(["gpt2", "gpt_bigcode"], GPT2),
    "gptj": GPTJ,
    "gpt_neo": replace(
        GPTJ,
        q="attn.attention.q_proj",
        k="attn.attention.k_proj",
        v="attn.attention.v_proj",
        positions="wpe",
        attention="attn.attention",
        spelt_out=True,
        heads="attn.attention.out_proj",
        up="mlp.c_fc",
        down="mlp.c_proj",
        reader="ln_2",
    ),
    "mpt": replace(
        GPTJ,
        layers="blocks",
        final="norm_f",
        qkv="attn.Wqkv",
        fused="side by side",
        spelt_out=True,
        mlp_out="ffn.down_proj",
        up="ffn.up_proj",
        down="ffn.down_proj",
        reader="norm_2",
    ),
    "opt": OPT,
    "opt_post_norm": replace(OPT, middle="self_attn_layer_norm"),
    "deepseek_v3": DEEPSEEK,
    "deepseek_v3_full_queries": replace(DEEPSEEK, q="self_attn.q_proj"),
    **dict.fromkeys(["mamba", "mamba2"], MAMBA),
    "bert": BERT,
    "roberta": replace(BERT, body="roberta"),
    "modernbert": MODERNBERT,
    "jamba": replace(LLAMA, final="final_layernorm", mlp_out="feed_forward", experts="feed_forward.experts"),
}

# The biases of the tiny models.
_QKV = ("q_bias", "k_bias", "v_bias")
_ALL = (*_QKV, "attn_bias", "mlp_bias")
BIASED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(PARTS, ()),
    **dict.fromkeys(["gpt2", "gpt_bigcode", "gpt_neox", "gpt_neox_sequential", "bloom", "phi", "starcoder2"], _ALL),
    **dict.fromkeys(["falcon", "falcon_grouped", "falcon_grouped_one_norm", "falcon_sequential"], _ALL),
    **dict.fromkeys(["opt", "opt_post_norm", "bert", "roberta", "modernbert"], _ALL),
    **dict.fromkeys(["qwen2", "qwen2_moe"], _QKV),
    "gpt_oss": (*_QKV, "attn_bias"),
    "gpt_neo": ("attn_bias", "mlp_bias"),
    "gptj": ("mlp_bias",),
}
