"""TransformerLens hook names, translated into sites by one table.

A translated name may carry what any site may: ``blocks.9.attn.hook_z.6@-1`` is ``z.9.6@-1``, and
``blocks.*.hook_resid_pre`` is ``resid_pre.*``. Names whose site does not exist here are translated too, so that the
error speaks of the site that was meant.

References:
    Nanda and Bloom (2022), TransformerLens, ``HookedTransformer``; ``hook_in`` and ``hook_out`` stand in
    its ``TransformerBridge``.
"""

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

ALIASES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "hook_embed": "embed",
        "embed.hook_out": "embed",
        "hook_pos_embed": "pos_embed",
        "pos_embed.hook_out": "pos_embed",
        "blocks.LAYER.hook_resid_pre": "resid_pre.LAYER",
        "blocks.LAYER.hook_in": "resid_pre.LAYER",
        "blocks.LAYER.hook_resid_mid": "resid_mid.LAYER",
        "blocks.LAYER.hook_resid_post": "resid_post.LAYER",
        "blocks.LAYER.hook_out": "resid_post.LAYER",
        "blocks.LAYER.hook_attn_out": "attn_out.LAYER",
        "blocks.LAYER.hook_mlp_out": "mlp_out.LAYER",
        "blocks.LAYER.attn.hook_q": "q.LAYER",
        "blocks.LAYER.attn.hook_k": "k.LAYER",
        "blocks.LAYER.attn.hook_v": "v.LAYER",
        "blocks.LAYER.attn.hook_rot_q": "q_rot.LAYER",
        "blocks.LAYER.attn.hook_rot_k": "k_rot.LAYER",
        "blocks.LAYER.attn.hook_z": "z.LAYER",
        "blocks.LAYER.attn.hook_result": "head_out.LAYER",
        "blocks.LAYER.attn.hook_attn_scores": "scores.LAYER",
        "blocks.LAYER.attn.hook_pattern": "pattern.LAYER",
        "blocks.LAYER.mlp.hook_pre": "mlp_pre.LAYER",  # in gated MLPs the gate: see `depends_on_model`
        "blocks.LAYER.mlp.hook_pre_linear": "mlp_pre.LAYER",
        "blocks.LAYER.mlp.hook_post": "mlp_post.LAYER",
        "ln_final.hook_normalized": "final_norm",
        "ln_final.hook_out": "final_norm",
        "unembed.hook_out": "logits",
        "hook_logits": "logits",
    }
)

_HOOK = re.compile(r"(?P<hook>(?:blocks\.(?P<layer>[^.@]+)\.)?(?:\w+\.)?hook_\w+)(?P<rest>(?:\.[^.@]+)?(?:@.*)?)")


def depends_on_model(text: str) -> bool:
    """Tell whether a hook name means one site in some models and another in others.

    ``mlp.hook_pre`` goes into the activation function: in gated MLPs that is ``mlp_gate``, in others ``mlp_pre``.

    Args:
        text: A hook name, with or without a unit and a position after it.
    """
    found = _HOOK.fullmatch(text)
    return found is not None and found["hook"].endswith(".mlp.hook_pre")


def translate(text: str) -> str:
    """Return the site's text for a TransformerLens hook name, and any other text unchanged.

    Args:
        text: A hook name, with or without a unit and a position after it.
    """
    found = _HOOK.fullmatch(text)
    if found is None:
        return text
    layer = found["layer"]
    hook = found["hook"] if layer is None else found["hook"].replace(f"blocks.{layer}.", "blocks.LAYER.", 1)
    if hook not in ALIASES:
        return text
    return ALIASES[hook].replace("LAYER", layer or "") + found["rest"]
