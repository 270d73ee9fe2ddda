"""T5 and what was made of it: a relative bias of the scores, RMS norms in front, no biases anywhere.

Each layer is a list of sublayers, which add to the stream by themselves: self-attention, in the decoder attention to
the encoder, and the MLP. The bias of the scores by distance is a table of the first layer (in UMT5 of each). Encoder
and decoder have tables of embeddings with the same weights. Newer checkpoints (T5 1.1, Flan, mT5) gate their MLP.
"""

from dataclasses import replace

from causalpatch.models.families.family import BIASED, NO_GATE, NOT_TURNED, At, Fact, Family, Parted, ShareOf

_ENCODER = Family(
    name="t5",
    model_types=("t5", "mt5", "umt5"),
    base="encoder",
    layers="block",
    head="",
    norms=("layer.0.layer_norm", "layer.1.layer_norm"),
    attention="layer.0.SelfAttention",
    stream="encoder",
    sees_ahead=True,
    needs_config=True,
    heads="num_heads",
    kv_heads="num_heads",
    width="d_model",
    sites={
        "embed": At("embed_tokens", "output"),
        "pos_embed": BIASED,
        "resid_pre": At("", "input"),
        "resid_mid": At("layer.1", "input"),
        "resid_post": At("", "output"),
        "attn_out": At("layer.0.SelfAttention.o", "output"),
        "mlp_out": At("layer.1.DenseReluDense", "output"),
        "q": Parted("layer.0.SelfAttention.q", "output"),
        "k": Parted("layer.0.SelfAttention.k", "output"),
        "v": Parted("layer.0.SelfAttention.v", "output"),
        "q_rot": NOT_TURNED,
        "k_rot": NOT_TURNED,
        "z": Parted("layer.0.SelfAttention.o", "input"),
        "head_out": ShareOf("layer.0.SelfAttention.o"),
        "mlp_pre": Parted("layer.1.DenseReluDense.wi", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("layer.1.DenseReluDense.wo", "input"),
        "final_norm": At("final_layer_norm", "output"),
    },
)

_DECODER_SITES: dict[str, Fact] = {
    **_ENCODER.sites,
    "resid_mid": At("layer.2", "input"),
    "cross_q": Parted("layer.1.EncDecAttention.q", "output"),
    "cross_k": Parted("layer.1.EncDecAttention.k", "output"),
    "cross_v": Parted("layer.1.EncDecAttention.v", "output"),
    "cross_z": Parted("layer.1.EncDecAttention.o", "input"),
    "cross_head_out": ShareOf("layer.1.EncDecAttention.o"),
    "cross_attn_out": At("layer.1.EncDecAttention.o", "output"),
    "mlp_out": At("layer.2.DenseReluDense", "output"),
    "mlp_pre": Parted("layer.2.DenseReluDense.wi", "output"),
    "mlp_post": Parted("layer.2.DenseReluDense.wo", "input"),
}

T5 = replace(
    _ENCODER,
    base="decoder",
    head="lm_head",
    norms=("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
    stream="decoder",
    sees_ahead=False,
    when={"is_gated_act": False},
    cross="layer.1.EncDecAttention",
    encoder=_ENCODER,
    sites=_DECODER_SITES,
)


def _gated(mlp: str) -> dict[str, Parted]:
    return {"mlp_gate": Parted(f"{mlp}.wi_0", "output"), "mlp_pre": Parted(f"{mlp}.wi_1", "output")}


T5_GATED = replace(
    T5,
    name="t5_gated",
    when={"is_gated_act": True},
    encoder=replace(_ENCODER, name="t5_gated", sites={**_ENCODER.sites, **_gated("layer.1.DenseReluDense")}),
    sites={**_DECODER_SITES, **_gated("layer.2.DenseReluDense")},
)
