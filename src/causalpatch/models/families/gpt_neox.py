"""GPT-NeoX (Pythia): q, k and v fused head by head; attention and MLP in parallel unless the configuration says not."""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, PARALLEL, ROTARY, At, Family, Parted, ShareOf, SumOf

GPT_NEOX = Family(
    name="gpt_neox",
    model_types=("gpt_neox",),
    base="gpt_neox",
    layers="layers",
    head="lm_head",
    norms=("input_layernorm", "post_attention_layernorm"),
    extras=("post_attention_dropout", "post_mlp_dropout"),
    when={"use_parallel_residual": True},
    sites={
        "embed": At("embed_in", "output"),
        "pos_embed": ROTARY,
        "resid_pre": At("", "input"),
        "resid_mid": PARALLEL,
        "resid_post": At("", "output"),
        "attn_out": At("attention", "output"),
        "mlp_out": At("mlp", "output"),
        "q": Parted("attention.query_key_value", "output", part=0, parts=3, by_unit=True),
        "k": Parted("attention.query_key_value", "output", part=1, parts=3, by_unit=True),
        "v": Parted("attention.query_key_value", "output", part=2, parts=3, by_unit=True),
        "z": Parted("attention.dense", "input"),
        "head_out": ShareOf("attention.dense"),
        "mlp_pre": Parted("mlp.dense_h_to_4h", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.dense_4h_to_h", "input"),
        "final_norm": At("final_layer_norm", "output"),
    },
)

GPT_NEOX_SEQUENTIAL = replace(
    GPT_NEOX,
    name="gpt_neox_sequential",
    when={"use_parallel_residual": False},
    sites={**GPT_NEOX.sites, "resid_mid": SumOf(changed=At("attention", "output"), kept=At("", "input"))},
)
