"""BLOOM: q, k and v fused head by head, ALiBi, a norm behind the embedding, and sublayers that add the stream inside.

What ``self_attention`` and ``mlp`` return is the whole stream: the first is ``resid_mid`` itself, and ``attn_out`` and
``mlp_out`` are what their last projections add to it.
"""

from causalpatch.models.families.family import NO_GATE, NOT_TURNED, SLOPES, At, Family, Parted, ShareOf

BLOOM = Family(
    name="bloom",
    model_types=("bloom",),
    base="transformer",
    layers="h",
    head="lm_head",
    norms=("input_layernorm", "post_attention_layernorm"),
    # Otherwise the norm's output is what is added to; and a projection in slices runs without its module.
    when={"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
    needs_config=True,
    sites={
        "embed": At("word_embeddings", "output"),
        "pos_embed": SLOPES,
        "resid_pre": At("", "input"),
        "resid_mid": At("self_attention", "output"),
        "resid_post": At("", "output"),
        "attn_out": At("self_attention.dense", "output"),
        "mlp_out": At("mlp.dense_4h_to_h", "output"),
        "q": Parted("self_attention.query_key_value", "output", part=0, parts=3, by_unit=True),
        "k": Parted("self_attention.query_key_value", "output", part=1, parts=3, by_unit=True),
        "v": Parted("self_attention.query_key_value", "output", part=2, parts=3, by_unit=True),
        "q_rot": NOT_TURNED,
        "k_rot": NOT_TURNED,
        "z": Parted("self_attention.dense", "input"),
        "head_out": ShareOf("self_attention.dense"),
        "mlp_pre": Parted("mlp.dense_h_to_4h", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.dense_4h_to_h", "input"),
        "final_norm": At("ln_f", "output"),
    },
)
