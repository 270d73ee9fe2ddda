"""GPT-2: learned positions, q, k and v fused as thirds of one output, transposed (Conv1D) weights."""

from causalpatch.models.families.family import NO_GATE, At, Family, Parted, ShareOf, SumOf

GPT2 = Family(
    name="gpt2",
    model_types=("gpt2",),
    base="transformer",
    layers="h",
    head="lm_head",
    norms=("ln_1", "ln_2"),
    # With cross-attention a third term joins the stream, which this table does not know.
    when={"add_cross_attention": False},
    sites={
        "embed": At("wte", "output"),
        "pos_embed": At("wpe", "output"),
        "resid_pre": At("", "input"),
        "resid_mid": SumOf(changed=At("attn", "output"), kept=At("", "input")),
        "resid_post": At("", "output"),
        "attn_out": At("attn", "output"),
        "mlp_out": At("mlp", "output"),
        "q": Parted("attn.c_attn", "output", part=0, parts=3),
        "k": Parted("attn.c_attn", "output", part=1, parts=3),
        "v": Parted("attn.c_attn", "output", part=2, parts=3),
        "z": Parted("attn.c_proj", "input"),
        "head_out": ShareOf("attn.c_proj"),
        "mlp_pre": Parted("mlp.c_fc", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.c_proj", "input"),
        "final_norm": At("ln_f", "output"),
    },
)
