"""BART and its kin: separate encoder and decoder, biases everywhere, positions numbered by column.

BART and Marian have their norms behind the sums (``resid_mid`` and ``resid_post`` are the outputs of norms, and in the
decoder a third norm stands behind cross-attention); mBART and Pegasus in front, with one more behind the last layer.
Whisper is of the second kind; its encoder reads sound, in frames that two convolutions leave.
"""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, NOT_TURNED, Absent, At, Fact, Family, Parted, ShareOf, SumOf

# The decoder's table of positions is looked up once for all prompts, sinusoids are so in the encoder too.
_ONE_FOR_ALL = Absent("one row of positions serves all prompts, so that none can be changed alone; use resid_pre.0")
_NO_FINAL_NORM = Absent("every layer ends with its own norm, and none comes behind them; use resid_post")

_ENCODER = Family(
    name="bart",
    model_types=("bart",),
    base="model.encoder",
    layers="layers",
    head="",
    norms=("self_attn_layer_norm", "final_layer_norm"),
    post_norms=("self_attn_layer_norm", "final_layer_norm"),
    stream="encoder",
    sees_ahead=True,
    counts_columns=True,
    needs_config=True,
    heads="encoder_attention_heads",
    kv_heads="encoder_attention_heads",
    width="d_model",
    sites={
        "embed": At("embed_tokens", "output"),
        "pos_embed": At("embed_positions", "output"),
        "resid_pre": At("", "input"),
        "resid_mid": At("self_attn_layer_norm", "output"),
        "resid_post": At("", "output"),
        "attn_out": At("self_attn.out_proj", "output"),
        "mlp_out": At("fc2", "output"),
        "q": Parted("self_attn.q_proj", "output"),
        "k": Parted("self_attn.k_proj", "output"),
        "v": Parted("self_attn.v_proj", "output"),
        "q_rot": NOT_TURNED,
        "k_rot": NOT_TURNED,
        "z": Parted("self_attn.out_proj", "input"),
        "head_out": ShareOf("self_attn.out_proj"),
        "mlp_pre": Parted("fc1", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("fc2", "input"),
        "final_norm": _NO_FINAL_NORM,
    },
)

BART = replace(
    _ENCODER,
    base="model.decoder",
    head="lm_head",
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    post_norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    stream="decoder",
    sees_ahead=False,
    heads="decoder_attention_heads",
    kv_heads="decoder_attention_heads",
    cross="encoder_attn",
    encoder=_ENCODER,
    sites={
        **_ENCODER.sites,
        "pos_embed": _ONE_FOR_ALL,
        "resid_mid": At("encoder_attn_layer_norm", "output"),
        "cross_q": Parted("encoder_attn.q_proj", "output"),
        "cross_k": Parted("encoder_attn.k_proj", "output"),
        "cross_v": Parted("encoder_attn.v_proj", "output"),
        "cross_z": Parted("encoder_attn.out_proj", "input"),
        "cross_head_out": ShareOf("encoder_attn.out_proj"),
        "cross_attn_out": At("encoder_attn.out_proj", "output"),
    },
)

_SINUSOIDS = {"pos_embed": _ONE_FOR_ALL}
_NORMS_IN_FRONT: dict[str, Fact] = {
    "resid_mid": SumOf(changed=At("self_attn.out_proj", "output"), kept=At("", "input")),
    "final_norm": At("layer_norm", "output"),
}
_NORMS_IN_FRONT_OF_CROSS: dict[str, Fact] = {
    **_NORMS_IN_FRONT,
    "resid_mid": SumOf(changed=At("encoder_attn.out_proj", "output"), kept=At("encoder_attn_layer_norm", "input")),
}

MARIAN = replace(
    BART, name="marian", model_types=("marian",), encoder=replace(_ENCODER, sites={**_ENCODER.sites, **_SINUSOIDS})
)

MBART = replace(
    BART,
    name="mbart",
    model_types=("mbart",),
    post_norms=(),
    encoder=replace(_ENCODER, post_norms=(), sites={**_ENCODER.sites, **_NORMS_IN_FRONT}),
    sites={**BART.sites, **_NORMS_IN_FRONT_OF_CROSS},
)

PEGASUS = replace(
    MBART,
    name="pegasus",
    model_types=("pegasus",),
    encoder=replace(_ENCODER, post_norms=(), sites={**_ENCODER.sites, **_NORMS_IN_FRONT, **_SINUSOIDS}),
)

_OF_SOUND = {
    "embed": Absent("sound is embedded by convolutions; use resid_pre.0"),
    "pos_embed": _ONE_FOR_ALL,
}
WHISPER = replace(
    MBART,
    name="whisper",
    model_types=("whisper",),
    head="proj_out",
    counts_columns=False,
    encoder=replace(
        _ENCODER,
        counts_columns=False,
        post_norms=(),
        sites={**_ENCODER.sites, **_NORMS_IN_FRONT, **_OF_SOUND},
        convolutions=("conv1", "conv2"),
    ),
    sites={**BART.sites, **_NORMS_IN_FRONT_OF_CROSS, "pos_embed": At("embed_positions", "output")},
)
