"""Attention laid open: the eager arithmetic of transformers, step by step, with a door at every step.

Legend of the axes in names: R row, H head, K kv_head, Q query_position, S key_position, W head_width.

1. Queries and keys come as attention compares them: after QK-norm and rotary.
2. ``scores_RHQS`` = q k^T * scaling, bounded by the soft-cap, plus a bias by distance where there is one, plus the
   mask: what the softmax gets.
3. ``pattern_RHQS`` = softmax(scores), in float32 at least. A sink takes its share of each row and gives nothing, so
   that the rows of a pattern with sinks do not sum to 1; they are never renormalised.
4. ``z`` = pattern @ v. Heads that share keys and values each have rows of their own. There is no dropout.

Queries, keys, values, scores and patterns pass a door each, which may hand on another. The order of operations and the
dtypes are those of the plain kernels of transformers, so that what is read here is what such a kernel computes.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from causalpatch.base.errors import SiteUnsupported
from causalpatch.models.taps import Side

# Arguments of attention kernels that change nothing in the arithmetic above, or are in the mask already.
HARMLESS = frozenset({"dropout", "sliding_window", "is_causal", "use_cache", "position_ids", "output_attentions"})
HARMLESS |= {"output_hidden_states", "output_router_logits", "deterministic"}
KNOWN = frozenset({"scaling", "softcap", "s_aux"}) | HARMLESS
# What is added to the scores of whole prompts, query by query, as T5 does.
_OF_WHOLE_PROMPTS = frozenset({"position_bias"})

Door = Callable[[Side, Tensor], Tensor]
"""Takes a side of a port inside attention and the tensor there, with its axes; returns the tensor that goes on."""


def attend_openly(
    query: Float[Tensor, "R H Q W"],
    key: Float[Tensor, "R K S W"],
    value: Float[Tensor, "R K S V"],
    mask: Shaped[Tensor, "batch heads Q S"] | None,
    more: Mapping[str, Any],
    door: Door,
) -> Float[Tensor, "R Q H V"]:
    """Compute attention, with a door at every step.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        mask: What is added to the scores, or None.
        more: Further arguments of the kernel.
        door: Sees each tensor by its side of a port, and returns what goes on.

    Raises:
        SiteUnsupported: The kernel is given an argument whose meaning is not known, or a mask that is not added.
    """
    _require_known(mask, more)
    n_shared = query.shape[1] // key.shape[1]
    query = door("query", query.transpose(1, 2)).transpose(1, 2)
    key = door("key", key.transpose(1, 2)).transpose(1, 2)
    value = door("value", value.transpose(1, 2)).transpose(1, 2)
    door("visible", _visible(mask, query, key).transpose(1, 2))
    key = door("head_key", key.repeat_interleave(n_shared, 1).transpose(1, 2)).transpose(1, 2)
    value = door("head_value", value.repeat_interleave(n_shared, 1).transpose(1, 2)).transpose(1, 2)
    scaling = more.get("scaling")
    scores = query @ key.transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if more.get("softcap") is not None:
        scores = torch.tanh(scores / more["softcap"]) * more["softcap"]
    if more.get("position_bias") is not None:
        scores = scores + more["position_bias"]
    if mask is not None:
        scores = scores + mask
    scores = door("scores", scores.transpose(1, 2)).transpose(1, 2)
    pattern = _pattern(scores, more.get("s_aux")).to(query.dtype)
    pattern = door("pattern", pattern.transpose(1, 2)).transpose(1, 2)
    return (pattern @ value).transpose(1, 2).contiguous()


def unknown_arguments(more: Mapping[str, Any]) -> list[str]:
    """Return the names of a kernel's arguments whose meaning is not known."""
    return [name for name, held in more.items() if name not in KNOWN and held is not None]


def _pattern(scores: Float[Tensor, "R H Q S"], sinks: Float[Tensor, " H"] | None) -> Float[Tensor, "R H Q S"]:
    wide = torch.promote_types(scores.dtype, torch.float32)
    if sinks is None:
        return scores.softmax(-1, dtype=wide)
    column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], -1).softmax(-1, dtype=wide)[..., :-1]


def _visible(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """Return which keys each query sees, ``[R, 1, Q, S]``."""
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=query.device)
    # Masks add the least number there is to what is hidden, and sometimes a little more to it.
    return (mask > torch.finfo(mask.dtype).min / 2).any(1, keepdim=True).expand(shape)


def _require_known(mask: Tensor | None, more: Mapping[str, Any]) -> None:
    unknown = [name for name in unknown_arguments(more) if name not in _OF_WHOLE_PROMPTS]
    if unknown:
        raise SiteUnsupported(
            f"attention takes an argument that is not known: {', '.join(unknown)}",
            facts=[("known", ", ".join(sorted(KNOWN | _OF_WHOLE_PROMPTS)))],
            fix="use sites outside of attention, such as q, k, v and z",
        )
    if mask is not None and not mask.is_floating_point():
        raise SiteUnsupported(
            "attention has a mask that is not added to the scores",
            facts=[("mask", f"{mask.dtype}, shape {tuple(mask.shape)}")],
            fix="use sites outside of attention, such as q, k, v and z",
        )
