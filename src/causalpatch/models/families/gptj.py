"""GPT-J: separate projections, attention and MLP in parallel behind one norm, rotary on part of each head."""

from causalpatch.models.families.family import NO_GATE, PARALLEL, ROTARY, At, Family, Parted, ShareOf

GPTJ = Family(
    name="gptj",
    model_types=("gptj",),
    base="transformer",
    layers="h",
    head="lm_head",
    norms=("ln_1",),
    sites={
        "embed": At("wte", "output"),
        "pos_embed": ROTARY,
        "resid_pre": At("", "input"),
        "resid_mid": PARALLEL,
        "resid_post": At("", "output"),
        "attn_out": At("attn", "output"),
        "mlp_out": At("mlp", "output"),
        "q": Parted("attn.q_proj", "output"),
        "k": Parted("attn.k_proj", "output"),
        "v": Parted("attn.v_proj", "output"),
        "z": Parted("attn.out_proj", "input"),
        "head_out": ShareOf("attn.out_proj"),
        "mlp_pre": Parted("mlp.fc_in", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.fc_out", "input"),
        "final_norm": At("ln_f", "output"),
    },
)
