"""OPT: learned positions, biases, and an MLP of two projections that stand in the layer itself.

The layer folds rows and positions into one axis for its MLP, so that ``mlp_pre``, ``mlp_post`` and ``mlp_out`` come
without them. OPT-350M has its norms behind the sums: the stream goes through a norm after attention and after the
MLP, so it is not the sum of what they add, and there is none in front of the head. Its embedding is narrower than the
stream.
"""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, Absent, At, Family, Parted, ShareOf, SumOf

OPT = Family(
    name="opt",
    model_types=("opt",),
    base="model.decoder",
    layers="layers",
    head="lm_head",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    extras=("activation_fn",),
    when={"do_layer_norm_before": True, "_remove_final_layer_norm": False},
    needs_config=True,
    sites={
        "embed": At("embed_tokens", "output"),
        "pos_embed": At("embed_positions", "output"),
        "resid_pre": At("", "input"),
        "resid_mid": SumOf(changed=At("self_attn", "output"), kept=At("", "input")),
        "resid_post": At("", "output"),
        "attn_out": At("self_attn", "output"),
        "mlp_out": At("fc2", "output", is_folded=True),
        "q": Parted("self_attn.q_proj", "output"),
        "k": Parted("self_attn.k_proj", "output"),
        "v": Parted("self_attn.v_proj", "output"),
        "z": Parted("self_attn.out_proj", "input"),
        "head_out": ShareOf("self_attn.out_proj"),
        "mlp_pre": Parted("fc1", "output", is_folded=True),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("fc2", "input", is_folded=True),
        "final_norm": At("final_layer_norm", "output"),
    },
)

OPT_POST_NORM = replace(
    OPT,
    name="opt_post_norm",
    when={"do_layer_norm_before": False},
    post_norms=("self_attn_layer_norm", "final_layer_norm"),
    sites={
        **OPT.sites,
        "resid_mid": At("self_attn_layer_norm", "output"),
        "final_norm": Absent("every layer ends with its own norm, and none comes behind them; use resid_post"),
    },
)
