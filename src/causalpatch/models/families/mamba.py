"""Mamba: blocks of a norm and a mixer that carries a state from token to token; no attention and no MLP."""

from dataclasses import replace

from causalpatch.models.families.family import Absent, At, Family

_NO_ATTENTION = Absent(
    "there is no attention: a recurrence (selective state space, 'mixer') carries a state from token to token; "
    "use resid_pre, resid_post or module(PATH).output of a mixer"
)
_NO_MLP = Absent("the blocks have no MLP, only a recurrence ('mixer'); use resid_pre or resid_post")

MAMBA = Family(
    name="mamba",
    model_types=("mamba", "falcon_mamba"),
    base="backbone",
    layers="layers",
    head="lm_head",
    norms=("norm",),
    heads="",
    kv_heads=0,
    needs_config=True,
    sites={
        "embed": At("embeddings", "output"),
        "pos_embed": Absent("there are no embeddings of positions: recurrences keep the order; use embed"),
        "resid_pre": At("", "input"),
        "resid_mid": Absent("the blocks have one sublayer, a recurrence ('mixer'); use resid_pre or resid_post"),
        "resid_post": At("", "output"),
        "attn_out": _NO_ATTENTION,
        "mlp_out": _NO_MLP,
        "q": _NO_ATTENTION,
        "k": _NO_ATTENTION,
        "v": _NO_ATTENTION,
        "z": _NO_ATTENTION,
        "head_out": _NO_ATTENTION,
        "mlp_pre": _NO_MLP,
        "mlp_gate": _NO_MLP,
        "mlp_post": _NO_MLP,
        "final_norm": At("norm_f", "output"),
    },
)

MAMBA2 = replace(MAMBA, name="mamba2", model_types=("mamba2",))
