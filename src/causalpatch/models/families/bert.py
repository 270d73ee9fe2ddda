"""BERT and RoBERTa: encoders whose tokens see each other both ways, with norms behind the sums.

The stream goes through a norm after attention and after the MLP: ``resid_mid`` and ``resid_post`` are the outputs of
these norms, and the stream is not the sum of what the sublayers add. Embeddings of words, types and positions are added
and go through a norm before the first layer. Attention stands in a module beside its output projection. RoBERTa counts
positions from behind the id of its padding.
"""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, Absent, At, Family, Parted, ShareOf

BERT = Family(
    name="bert",
    model_types=("bert",),
    base="bert",
    layers="encoder.layer",
    head="cls",
    other_heads=("classifier",),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    post_norms=("attention.output.LayerNorm", "output.LayerNorm"),
    attention="attention.self",
    # As a decoder it sees no later tokens, and with cross-attention a third term joins the stream.
    when={"is_decoder": False, "add_cross_attention": False},
    sees_ahead=True,
    needs_config=True,
    sites={
        "embed": At("embeddings.word_embeddings", "output"),
        "pos_embed": At("embeddings.position_embeddings", "output"),
        "resid_pre": At("", "input"),
        "resid_mid": At("attention.output.LayerNorm", "output"),
        "resid_post": At("", "output"),
        "attn_out": At("attention.output.dense", "output"),
        "mlp_out": At("output.dense", "output"),
        "q": Parted("attention.self.query", "output"),
        "k": Parted("attention.self.key", "output"),
        "v": Parted("attention.self.value", "output"),
        "z": Parted("attention.output.dense", "input"),
        "head_out": ShareOf("attention.output.dense"),
        "mlp_pre": Parted("intermediate.dense", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("output.dense", "input"),
        "final_norm": Absent("every layer ends with its own norm, and none comes behind them; use resid_post"),
    },
)

ROBERTA = replace(
    BERT,
    name="roberta",
    model_types=("roberta", "camembert", "xlm-roberta"),
    base="roberta",
    head="lm_head",
    positions_behind="pad_token_id",
)
