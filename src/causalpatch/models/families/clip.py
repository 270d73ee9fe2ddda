"""CLIP and SigLIP: a tower for pictures and one for texts, whose last vectors are compared.

Both towers are alike inside: norms in front of attention and MLP. CLIP's text tower is causal and read at the end of
the text; SigLIP's sees both ways. In the vision tower CLIP has a token in front of the patches, which is read, and a
norm in front of the first layer; SigLIP has patches alone, pooled by a head that attends. CLIP's last norm is given the
one token that is read.
"""

from dataclasses import replace

from causalpatch.models.families.family import NO_GATE, Absent, At, Family, Parted, Pictures, Positional, ShareOf, SumOf

CLIP_TEXT = Family(
    name="clip_text",
    model_types=("clip_text_model",),
    base="text_model",
    layers="encoder.layers",
    head="text_projection",
    norms=("layer_norm1", "layer_norm2"),
    needs_config=True,
    is_compared=True,
    answers=("text_embeds", "pooler_output"),
    sites={
        "embed": At("embeddings.token_embedding", "output"),
        "pos_embed": At("embeddings.position_embedding", "output"),
        "resid_pre": At("", "input"),
        "resid_mid": SumOf(changed=At("self_attn", "output"), kept=At("", "input")),
        "resid_post": At("", "output"),
        "attn_out": At("self_attn", "output"),
        "mlp_out": At("mlp", "output"),
        "q": Parted("self_attn.q_proj", "output"),
        "k": Parted("self_attn.k_proj", "output"),
        "v": Parted("self_attn.v_proj", "output"),
        "z": Parted("self_attn.out_proj", "input"),
        "head_out": ShareOf("self_attn.out_proj"),
        "mlp_pre": Parted("mlp.fc1", "output"),
        "mlp_gate": NO_GATE,
        "mlp_post": Parted("mlp.fc2", "input"),
        "final_norm": At("final_layer_norm", "output"),
    },
)

CLIP_VISION = replace(
    CLIP_TEXT,
    name="clip_vision",
    model_types=("clip_vision_model",),
    base="vision_model",
    head="visual_projection",
    sees_ahead=True,
    is_compared=False,
    answers=("image_embeds", "pooler_output"),
    pictures=Pictures("embeddings.patch_embedding", ("CLS",)),
    sites={
        **CLIP_TEXT.sites,
        "embed": Positional("embeddings", "position_embedding.weight", is_without=True),
        "pos_embed": Positional("embeddings", "position_embedding.weight"),
        "final_norm": Absent("its last norm is given one token alone, the first; use resid_post"),
    },
)

SIGLIP_TEXT = replace(CLIP_TEXT, name="siglip_text", model_types=("siglip_text_model",), head="head", sees_ahead=True)

SIGLIP_VISION = replace(
    CLIP_VISION,
    name="siglip_vision",
    model_types=("siglip_vision_model",),
    head="head",
    other_heads=("classifier",),
    answers=("pooler_output",),
    pictures=Pictures("embeddings.patch_embedding", ()),
    sites={**CLIP_VISION.sites, "final_norm": At("post_layernorm", "output")},
)
