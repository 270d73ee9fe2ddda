"""Falcon: q, k and v fused group by group, the queries of all heads that share a key and a value before these.

Falcon 7B has one group, and attention and MLP in parallel behind one norm. The later architecture (40B, 180B) has
several groups and a norm for each of the two sublayers, or one for both (Falcon 2). The first small models (RW) are
sequential, with keys and values for every head and ALiBi. The plain kernel of transformers 5 adds these slopes twice,
the fused one once, so that scores and pattern are proved under the plain one alone.
"""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, NOT_MET, PARALLEL, Absent, At, Family, Parted, ShareOf, SumOf

FALCON = Family(
    name="falcon",
    model_types=("falcon",),
    base="transformer",
    layers="h",
    head="lm_head",
    norms=("input_layernorm",),
    when={"new_decoder_architecture": False, "multi_query": True, "parallel_attn": True},
    kv_heads=1,
    needs_config=True,
    sites={
        "embed": At("word_embeddings", "output"),
        "pos_embed": Absent(
            "positions enter inside attention, by rotary embeddings or as slopes of the scores (ALiBi); use scores"
        ),
        "resid_pre": At("", "input"),
        "resid_mid": PARALLEL,
        "resid_post": At("", "output"),
        "attn_out": At("self_attention", "output"),
        "mlp_out": At("mlp", "output"),
        "q": Parted("self_attention.query_key_value", "output", part=0, parts=3, by_unit=True),
        "k": Parted("self_attention.query_key_value", "output", part=1, parts=3, by_unit=True),
        "v": Parted("self_attention.query_key_value", "output", part=2, parts=3, by_unit=True),
        "q_rot": NOT_MET,
        "k_rot": NOT_MET,
        "z": Parted("self_attention.dense", "input"),
        "head_out": ShareOf("self_attention.dense"),
        "mlp_pre": Parted("mlp.dense_h_to_4h", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.dense_4h_to_h", "input"),
        "final_norm": At("ln_f", "output"),
    },
)

FALCON_GROUPED = replace(
    FALCON,
    name="falcon_grouped",
    norms=("ln_attn", "ln_mlp"),
    when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2},
    kv_heads="num_kv_heads",
)

FALCON_GROUPED_ONE_NORM = replace(
    FALCON_GROUPED,
    name="falcon_grouped_one_norm",
    norms=("input_layernorm",),
    when={"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "parallel_attn": True},
)

FALCON_SEQUENTIAL = replace(
    FALCON,
    name="falcon_sequential",
    norms=("input_layernorm", "post_attention_layernorm"),
    when={"new_decoder_architecture": False, "multi_query": False, "parallel_attn": False},
    kv_heads="num_attention_heads",
    sites={**FALCON.sites, "resid_mid": SumOf(changed=At("self_attention", "output"), kept=At("", "input"))},
)
