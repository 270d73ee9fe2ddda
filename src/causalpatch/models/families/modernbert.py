"""ModernBERT: an encoder with norms in front, rotary positions, a gated MLP, and windows in two of three layers.

Windows reach as far back as ahead. The first layer has no norm in front of attention, since one stands behind the
embedding. Queries, keys and values are thirds of one output; gate and up projection are its MLP's halves.
"""

from causalpatch.models.families.family import ROTARY, At, Family, Parted, ShareOf, SumOf

MODERNBERT = Family(
    name="modernbert",
    model_types=("modernbert",),
    base="model",
    layers="layers",
    head="decoder",
    other_heads=("classifier",),
    norms=("attn_norm", "mlp_norm"),
    sees_ahead=True,
    needs_config=True,
    sites={
        "embed": At("embeddings.tok_embeddings", "output"),
        "pos_embed": ROTARY,
        "resid_pre": At("", "input"),
        "resid_mid": SumOf(changed=At("attn", "output"), kept=At("", "input")),
        "resid_post": At("", "output"),
        "attn_out": At("attn", "output"),
        "mlp_out": At("mlp", "output"),
        "q": Parted("attn.Wqkv", "output", part=0, parts=3),
        "k": Parted("attn.Wqkv", "output", part=1, parts=3),
        "v": Parted("attn.Wqkv", "output", part=2, parts=3),
        "z": Parted("attn.Wo", "input"),
        "head_out": ShareOf("attn.Wo"),
        "mlp_pre": Parted("mlp.Wi", "output", part=1, parts=2),
        "mlp_gate": Parted("mlp.Wi", "output", part=0, parts=2),
        "mlp_post": Parted("mlp.Wo", "input"),
        "final_norm": At("final_norm", "output"),
    },
)
