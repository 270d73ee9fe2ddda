"""MPT: q, k and v fused as thirds, ALiBi, no biases, and an MLP that adds the stream inside.

What ``ffn`` returns is the whole stream, so ``mlp_out`` is what its last projection adds to it. ``q``, ``k`` and ``v``
are in front of the clipping that some models have.
"""

from causalpatch.models.families.family import NO_GATE, NOT_TURNED, SLOPES, At, Family, Parted, ShareOf, SumOf

MPT = Family(
    name="mpt",
    model_types=("mpt",),
    base="transformer",
    layers="blocks",
    head="lm_head",
    norms=("norm_1", "norm_2"),
    extras=("resid_attn_dropout",),
    needs_config=True,
    sites={
        "embed": At("wte", "output"),
        "pos_embed": SLOPES,
        "resid_pre": At("", "input"),
        "resid_mid": SumOf(changed=At("attn", "output"), kept=At("", "input")),
        "resid_post": At("", "output"),
        "attn_out": At("attn", "output"),
        "mlp_out": At("ffn.down_proj", "output"),
        "q": Parted("attn.Wqkv", "output", part=0, parts=3),
        "k": Parted("attn.Wqkv", "output", part=1, parts=3),
        "v": Parted("attn.Wqkv", "output", part=2, parts=3),
        "q_rot": NOT_TURNED,
        "k_rot": NOT_TURNED,
        "z": Parted("attn.out_proj", "input"),
        "head_out": ShareOf("attn.out_proj"),
        "mlp_pre": Parted("ffn.up_proj", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("ffn.down_proj", "input"),
        "final_norm": At("norm_f", "output"),
    },
)
