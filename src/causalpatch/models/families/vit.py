"""ViT, DeiT and DINOv2: encoders of pictures, cut into patches whose tokens see each other both ways.

The picture is cut into patches, each of which is one token; special tokens stand in front of them. Positions are a
parameter that is added to all tokens: ``pos_embed`` is this term and ``embed`` what it is added to. DeiT has a second
special token, for distillation. DINOv2 scales what a sublayer gives before it joins the stream, and may have register
tokens, which have no position, behind the first.
"""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, At, Family, Parted, Pictures, Positional, ShareOf, SumOf

VIT = Family(
    name="vit",
    model_types=("vit",),
    base="vit",
    layers="layers",
    head="classifier",
    norms=("layernorm_before", "layernorm_after"),
    extras=("dropout",),
    sees_ahead=True,
    needs_config=True,
    pictures=Pictures("embeddings.patch_embeddings", ("CLS",)),
    sites={
        "embed": Positional("embeddings", "position_embeddings", is_without=True),
        "pos_embed": Positional("embeddings", "position_embeddings"),
        "resid_pre": At("", "input"),
        "resid_mid": SumOf(changed=At("attention", "output"), kept=At("", "input")),
        "resid_post": At("", "output"),
        "attn_out": At("attention", "output"),
        "mlp_out": At("mlp", "output"),
        "q": Parted("attention.q_proj", "output"),
        "k": Parted("attention.k_proj", "output"),
        "v": Parted("attention.v_proj", "output"),
        "z": Parted("attention.o_proj", "input"),
        "head_out": ShareOf("attention.o_proj"),
        "mlp_pre": Parted("mlp.fc1", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.fc2", "input"),
        "final_norm": At("layernorm", "output"),
    },
)

DEIT = replace(VIT, name="deit", model_types=("deit",), base="deit", other_heads=("cls_classifier",))
DEIT = replace(DEIT, pictures=Pictures("embeddings.patch_embeddings", ("CLS", "distillation")))

DINOV2 = replace(
    VIT,
    name="dinov2",
    model_types=("dinov2",),
    base="dinov2",
    layers="encoder.layer",
    norms=("norm1", "norm2"),
    extras=("drop_path",),
    when={"use_swiglu_ffn": False},
    sites={
        **VIT.sites,
        "resid_mid": SumOf(changed=At("layer_scale1", "output"), kept=At("", "input")),
        "attn_out": At("layer_scale1", "output"),
        "mlp_out": At("layer_scale2", "output"),
    },
)

DINOV2_GATED = replace(
    DINOV2,
    name="dinov2_gated",
    when={"use_swiglu_ffn": True},
    sites={
        **DINOV2.sites,
        "mlp_pre": Parted("mlp.up_proj", "output"),
        "mlp_gate": Parted("mlp.gate_proj", "output"),
        "mlp_post": Parted("mlp.down_proj", "input"),
    },
)

_REGISTERS = Pictures("embeddings.patch_embeddings", ("CLS",), registers="num_register_tokens")
DINOV2_REGISTERS, DINOV2_REGISTERS_GATED = (
    replace(
        family,
        name=family.name.replace("dinov2", "dinov2_registers"),
        model_types=("dinov2_with_registers",),
        base="dinov2_with_registers",
        pictures=_REGISTERS,
    )
    for family in (DINOV2, DINOV2_GATED)
)
