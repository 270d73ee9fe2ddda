"""Attention of packed rows: each segment's own tokens, and the base run's before it.

Legend of the axes in names: K kv_head, G query heads of one kv_head, P prompt, N segment of a prompt, Q query, S own
token, B base token before the segment, W head_width.

Segments of one group share their extent, so their attention is one batched product: scores with own keys
``[K, P*N, G*Q, S]``, scores with base keys ``[K, P, N*G*Q, B]`` (all segments of a prompt share these), put side by
side under the captured mask, and the same the other way with values.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalpatch.engine.row_steps import GroupSteps, Steps
from causalpatch.engine.segments import Group
from causalpatch.models.taps import Side

LONG = 64
"""Own tokens of a segment from which the fused kernel is faster than products, a mask and a softmax."""
MANY = 64
"""Segments of one token on a prompt from which they are worth products of their own."""
MANY_NUMBERS = 2**18
"""Numbers of one factor from which a copy of it costs more than a product for each head."""

Step = Callable[[Side, Tensor], None]


@dataclass(frozen=True)
class KeysValues:
    """What attention sees in one layer of the base run.

    Args:
        keys: After rotary, ``[prompt, kv_head, position, head_width]``.
        values: ``[prompt, kv_head, position, value_width]``.
        mask: Added to the scores, ``[prompt or 1, 1, position, position]``.
        scaling: Factor of the scores.
        softcap: Bound of the scores, or None.
        sinks: Score of each head's sink, or None.
    """

    keys: Float[Tensor, "prompt kv_head position head_width"]
    values: Float[Tensor, "prompt kv_head position value_width"]
    mask: Float[Tensor, "batch one position position"]
    scaling: float
    softcap: float | None
    sinks: Float[Tensor, " head"] | None

    @property
    def is_plain(self) -> bool:
        """Whether a fused kernel computes the same: no soft-cap, no sinks, one width of keys and values."""
        return self.softcap is None and self.sinks is None and self.keys.shape[-1] == self.values.shape[-1]


@dataclass(frozen=True)
class Own:
    """Keys and values of tokens of each segment of a group.

    Args:
        tokens: The tokens.
        keys: ``[kv_head, segment, token, head_width]``.
        values: ``[kv_head, segment, token, value_width]``.
    """

    tokens: np.ndarray
    keys: Tensor
    values: Tensor


@dataclass
class RowAttention:
    """Computes attention of the rows of one call.

    Args:
        groups: Segments of the call, in the order of their rows.
        seen: What attention saw in this layer of the base run.
        visible: Which keys each token sees, ``(prompt or 1, query_position, key_position)``.
        earlier: Keys and values of further tokens of a group, by its number.
        steps: What is written on the way.
    """

    groups: Sequence[Group]
    seen: KeysValues
    visible: np.ndarray
    earlier: Mapping[int, Own] = field(default_factory=dict)
    steps: Steps = field(default_factory=Steps)

    def keys_and_values(self, key: Tensor, value: Tensor) -> list[Own]:
        """Return the keys and values of the call's own rows, by group."""
        key = self.steps.turn("key", key)
        return [Own(group.tokens, _own(key, group), _own(value, group)) for group in self.groups]

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
    ) -> Float[Tensor, "one row head value_width"]:
        """Return what each row's heads take up."""
        del module, mask, more
        query = self.steps.turn("query", query)
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
        for number, (group, own) in enumerate(zip(self.groups, self.keys_and_values(key, value), strict=True)):
            before = self.earlier.get(number)
            if before is not None:
                tokens = np.concatenate([before.tokens, own.tokens])
                own = Own(tokens, torch.cat([before.keys, own.keys], 2), torch.cat([before.values, own.values], 2))
            rows = slice(group.first, group.first + group.n_rows)
            steps = self.steps.in_group(number, group, own.tokens, self.visible)
            if steps is None and _is_single(own, group, self.seen, self.visible):
                _attend_single(query[0, :, rows], own, group, self.seen, out[0, rows])
            else:
                _attend_group(query[0, :, rows], own, group, (self.seen, self.visible), steps, out[0, rows])
        return out


def attend_whole(
    query: Float[Tensor, "prompt head position head_width"],
    seen: KeysValues,
    *,
    is_causal: bool,
    step: Step | None = None,
) -> Float[Tensor, "prompt position head value_width"]:
    """Compute attention of whole prompts, by the same arithmetic as for rows.

    Args:
        query: The queries.
        seen: Keys, values and the rest.
        is_causal: Whether each real token sees all tokens up to itself and no more.
        step: Sees scores and patterns, ``[prompt, head, query_position, key_position]``, by their side of a port.
    """
    n_prompts, n_heads, n_tokens, _ = query.shape
    n_kv = seen.keys.shape[1]
    if step is None and is_causal and n_tokens >= LONG and seen.is_plain:
        own = [part.repeat_interleave(n_heads // n_kv, 1) for part in (seen.keys, seen.values)]
        return _flash(query, own[0], own[1], seen.scaling, is_causal=True)[0].transpose(1, 2)
    grouped = query.reshape(n_prompts, n_kv, -1, query.shape[-1])
    scores = (grouped @ seen.keys.transpose(-1, -2)).reshape(n_prompts, n_heads, n_tokens, -1)
    pattern = _pattern(scores, seen.mask, seen, step)
    mixed = pattern.reshape(n_prompts, n_kv, -1, pattern.shape[-1]) @ seen.values
    return mixed.reshape(n_prompts, n_heads, n_tokens, -1).transpose(1, 2)


def _pattern(
    scores: Float[Tensor, "*axes q k"], mask: Tensor | None, seen: KeysValues, step: Step | None = None
) -> Tensor:
    """Turn products of queries and keys, which are not needed any more, into patterns.

    A step sees, and may change in place, the scores and then the pattern, of all heads side by side.
    """
    dtype, wide = scores.dtype, torch.promote_types(scores.dtype, torch.float32)
    scores = scores.to(wide).mul_(seen.scaling)
    if seen.softcap is not None:
        scores = scores.div_(seen.softcap).tanh_().mul_(seen.softcap)
    if mask is not None:
        scores = scores.add_(mask)
    if step is not None:
        step("scores", scores)
    if seen.sinks is None:
        pattern = scores.softmax(-1).to(dtype)
    else:
        # A sink takes its share of the attention and gives nothing: the pattern's rows do not sum to one.
        sinks = seen.sinks.to(wide).reshape(-1, 1, 1).expand(*scores.shape[:-1], 1)
        pattern = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1].to(dtype)
    if step is not None:
        step("pattern", pattern)
    return pattern


def _own(tensor: Float[Tensor, "one K row W"], group: Group) -> Float[Tensor, "K PN S W"]:
    rows = tensor[0, :, group.first : group.first + group.n_rows]
    return rows.reshape(tensor.shape[1], group.n_segments, len(group.tokens), tensor.shape[-1])


def _is_single(own: Own, group: Group, seen: KeysValues, visible: np.ndarray) -> bool:
    """Say whether each segment of a group is one token that sees all base tokens, many of them to a prompt."""
    if own.keys.shape[2] > 1 or not group.start or not seen.is_plain or group.count < MANY:
        return False
    return bool(_visible(own.tokens, group, visible).all())


def _attend_single(
    query: Float[Tensor, "head row head_width"],
    own: Own,
    group: Group,
    seen: KeysValues,
    out: Float[Tensor, "row head value_width"],
) -> None:
    """Attend from one token per segment, prompt by prompt, with as few passes over the rows as can be."""
    n_heads, n_kv, n_base = len(query), len(own.keys), group.start
    for number, slot in enumerate(group.slots.tolist()):
        rows = slice(number * group.count, (number + 1) * group.count)
        keys, values = seen.keys[slot, :, :n_base], seen.values[slot, :, :n_base]
        own_keys, own_values = own.keys[:, rows, 0], own.values[:, rows, 0]
        if n_kv < n_heads:
            keys, values, own_keys, own_values = (
                part.repeat_interleave(n_heads // n_kv, 0) for part in (keys, values, own_keys, own_values)
            )
        some = query[:, rows]
        scores = some.new_empty(n_heads, group.count, n_base + 1)
        scores[..., :n_base] = some @ keys.transpose(-1, -2)
        scores[..., n_base] = (some * own_keys).sum(-1)
        pattern = _pattern(scores, None, seen)
        mixed = torch.baddbmm(pattern[..., n_base:] * own_values, pattern[..., :n_base], values)
        out[rows] = mixed.transpose(0, 1)


def _attend_group(
    query: Float[Tensor, "head row head_width"],
    own: Own,
    group: Group,
    known: tuple[KeysValues, np.ndarray],
    steps: GroupSteps | None,
    out: Float[Tensor, "row head value_width"],
) -> None:
    seen, visible = known
    part = _visible(own.tokens, group, visible)
    if steps is None and _is_long(own, group, seen, part):
        out.copy_(_attend_long(query, own, group, seen))
        return
    n_kv, n_segments, n_own, width = own.keys.shape
    n_heads, n_base, n_each = len(query), group.start, len(group.tokens)
    n_group = n_heads // n_kv
    # [K, P*N, G*Q, W]: the queries of all heads that share keys stand together.
    query = query.reshape(n_kv, n_group, n_segments, n_each, width).transpose(1, 2)
    query = query.reshape(n_kv, n_segments, n_group * n_each, width)
    scores = (query * own.keys).sum(-1, keepdim=True) if n_own == 1 else _by_head(query, own.keys.transpose(-1, -2))
    slots = torch.as_tensor(group.slots, device=query.device)
    if n_base:
        keys = seen.keys[slots, :, :n_base].transpose(0, 1)
        base = _by_head(query.reshape(n_kv, len(slots), -1, width), keys.transpose(-1, -2))
        scores = torch.cat([base.reshape(n_kv, n_segments, -1, n_base), scores], -1)
    mask = _mask(part, group, seen)
    # [K, P*N, G, Q, B+S], as a mask and the heads' sinks need it.
    scores = scores.reshape(n_kv, n_segments, n_group, n_each, -1)
    if seen.sinks is None and steps is None:
        pattern = _pattern(scores, mask, seen)
    else:
        by_head = scores.permute(1, 0, 2, 3, 4).reshape(n_segments, n_heads, n_each, -1)
        pattern = _pattern(by_head, None if mask is None else mask[0], seen, None if steps is None else steps.put)
        pattern = pattern.reshape(n_segments, n_kv, n_group, n_each, -1).transpose(0, 1)
    pattern = pattern.reshape(n_kv, n_segments, n_group * n_each, -1)
    mixed = pattern[..., n_base:] * own.values if n_own == 1 else _by_head(pattern[..., n_base:], own.values)
    if n_base:
        values = seen.values[slots, :, :n_base].transpose(0, 1)
        shared = _by_head(pattern[..., :n_base].reshape(n_kv, len(slots), -1, n_base), values)
        mixed = mixed.add_(shared.reshape(mixed.shape))
    mixed = mixed.reshape(n_kv, n_segments, n_group, n_each, -1).permute(1, 3, 0, 2, 4)
    out.view(n_segments, n_each, n_kv, n_group, -1).copy_(mixed)


def _by_head(left: Float[Tensor, "K B M W"], right: Float[Tensor, "K B W N"]) -> Float[Tensor, "K B M N"]:
    """Multiply matrices; on a CPU head by head: where heads lie side by side all of them would be copied first."""
    if left.is_cuda or left.numel() < MANY_NUMBERS:
        return left @ right
    out = left.new_empty(*left.shape[:3], right.shape[-1])
    for one, other, made in zip(left, right, out, strict=True):
        torch.bmm(one, other, out=made)
    return out


def _is_long(own: Own, group: Group, seen: KeysValues, part: np.ndarray) -> bool:
    """Say whether a group's attention is plain causal attention over enough tokens for the fused kernel to pay."""
    n_each = len(group.tokens)
    if n_each < LONG or len(own.tokens) != n_each or not seen.is_plain:
        return False
    return bool(part[..., : group.start].all() and (part[..., group.start :] == np.tri(n_each, dtype=bool)).all())


def _attend_long(
    query: Float[Tensor, "head row head_width"], own: Own, group: Group, seen: KeysValues
) -> Float[Tensor, "row head value_width"]:
    """Attend by two calls of the fused kernel, own keys and base keys, merged by their normalisers."""
    n_kv, n_segments, _, width = own.keys.shape
    n_heads, n_base, n_each = len(query), group.start, len(group.tokens)
    n_group = n_heads // n_kv
    by_segment = query.reshape(n_heads, n_segments, n_each, width).transpose(0, 1)
    keys, values = (x.transpose(0, 1).repeat_interleave(n_group, 1) for x in (own.keys, own.values))
    mixed, total = _flash(by_segment, keys, values, seen.scaling, is_causal=True)
    if n_base:
        slots = torch.as_tensor(group.slots, device=query.device)
        base = [x[slots, :, :n_base] for x in (seen.keys, seen.values)]
        # All segments and heads that share keys are so many more queries.
        shared = query.reshape(n_kv, n_group, len(slots), -1, width).permute(2, 0, 1, 3, 4)
        shared = shared.reshape(len(slots), n_kv, -1, width)
        out, weight = _flash(shared, base[0], base[1], seen.scaling, is_causal=False)
        shape = (len(slots), n_heads, group.count, n_each)
        out = out.reshape(*shape, -1).transpose(1, 2).reshape(mixed.shape)
        weight = weight.reshape(shape).transpose(1, 2).reshape(total.shape)
        both = torch.logaddexp(total, weight)
        mixed = mixed * (total - both).exp()[..., None].to(mixed) + out * (weight - both).exp()[..., None].to(mixed)
    return mixed.transpose(1, 2).reshape(n_segments * n_each, n_heads, -1)


def _flash(query: Tensor, key: Tensor, value: Tensor, scaling: float, *, is_causal: bool) -> tuple[Tensor, Tensor]:
    """Return fused attention ``[batch, head, query, width]`` and the log of its normaliser ``[batch, head, query]``."""
    if query.device.type == "cuda":
        wants_total = True
        out, total, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, wants_total, 0.0, is_causal, scale=scaling
        )
        return out, total[..., : query.shape[2]]
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scaling
    )
    return out, total


def _visible(
    tokens: np.ndarray, group: Group, visible: np.ndarray
) -> Bool[np.ndarray, "prompt query_position key_position"]:
    """Return which of base and own keys the queries of each prompt see, once where prompts do not differ."""
    slots = group.slots if visible.shape[0] > 1 else np.zeros(1, dtype=np.int64)
    if len(tokens) == len(group.tokens) and tokens[-1] - group.start == len(tokens) - 1:
        part = visible[slots, group.start : group.start + len(tokens), : group.start + len(tokens)]
    else:
        part = visible[np.ix_(slots, group.tokens, np.concatenate([np.arange(group.start), tokens]))]
    return part[:1] if len(part) > 1 and (part == part[:1]).all() else part


def _mask(part: np.ndarray, group: Group, seen: KeysValues) -> Float[Tensor, "one segment one query key"] | None:
    """Return a mask to be added to the scores, or None where everything is seen."""
    if part.all():
        return None
    hidden = torch.as_tensor(~part, device=seen.mask.device)
    mask = torch.zeros(hidden.shape, dtype=seen.mask.dtype, device=hidden.device)
    mask.masked_fill_(hidden, torch.finfo(mask.dtype).min)
    if len(part) > 1:
        mask = mask.repeat_interleave(group.count, 0)
    return mask[None, :, None]
