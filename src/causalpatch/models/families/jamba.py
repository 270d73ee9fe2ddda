"""Jamba and Bamba: most layers carry a state from token to token, some attend; every layer has an MLP or experts."""

from dataclasses import replace

from causalpatch.models.families.family import Absent, At, RoutedBy, TermOf
from causalpatch.models.families.mamba import MAMBA

_MIXED = Absent(
    "only some layers attend; the others carry a state from token to token (a recurrence: selective state space, "
    "'mamba'); use resid_pre, resid_post or module(PATH).output of self_attn or mamba"
)
_EXPERTS = Absent("the MLP may be a mixture of experts; use mlp_out or module(PATH).input of a projection")

JAMBA = replace(
    MAMBA,
    name="jamba",
    model_types=("jamba", "bamba"),
    base="model",
    norms=("input_layernorm", "pre_ff_layernorm"),
    sites={
        **dict.fromkeys(("attn_out", "q", "k", "v", "z", "head_out"), _MIXED),
        "embed": At("embed_tokens", "output"),
        "pos_embed": Absent("there are no embeddings of positions: recurrences keep the order; use embed"),
        "resid_pre": At("", "input"),
        "resid_mid": Absent("what stands before it is attention or a recurrence by turns; use resid_pre or resid_post"),
        "resid_post": At("", "output"),
        "mlp_out": At("feed_forward", "output"),
        **dict.fromkeys(("mlp_pre", "mlp_gate", "mlp_post"), _EXPERTS),
        "router": RoutedBy("feed_forward.router"),
        "expert_out": TermOf("feed_forward.experts", router="feed_forward.router"),
        "final_norm": At("final_layernorm", "output"),
    },
)
