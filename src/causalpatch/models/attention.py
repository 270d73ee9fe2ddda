"""Attention kernels of transformers: one of ours registered by name, and models switched to a kernel and back.

Models that use the attention interface of transformers look their kernel up by the name in their configuration, part by
part. Ours hands queries, keys, values and mask to whoever stands in the context, so that an engine sees attention as it
happens; outside such a context it refuses to run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from causalpatch.base.errors import ModelUnsupported

OURS = "causalpatch"
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], Tensor]
_ATTEND: ContextVar[Attend | None] = ContextVar("attend", default=None)


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    attend = _ATTEND.get()
    if attend is None:
        raise ModelUnsupported(
            f"the attention kernel {OURS!r} ran outside of an engine",
            fix='switch the model back: model.set_attn_implementation("sdpa")',
        )
    return attend(module, query, key, value, attention_mask, kwargs), None


@contextmanager
def attending(module: nn.Module, attend: Attend) -> Iterator[bool]:
    """Let a function compute all attention of a model, and put the model's own kernel back afterwards.

    Args:
        module: The model.
        attend: Takes the attention module, queries ``[row, head, position, head_width]``, keys and values
            ``[row, kv_head, position, head_width]``, an additive mask and the kernel's other arguments, and returns
            ``[row, position, head, head_width]``.

    Yields:
        Whether the model has a kernel that can be switched; if not, the function is not called.
    """
    configs: dict[int, Any] = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    before = {key: getattr(config, "_attn_implementation", None) for key, config in configs.items()}
    switched = [key for key, name in before.items() if name]
    token = _ATTEND.set(attend)
    try:
        for key in switched:
            configs[key]._attn_implementation = OURS
        yield bool(switched)
    finally:
        _ATTEND.reset(token)
        for key in switched:
            configs[key]._attn_implementation = before[key]


AttentionInterface.register(OURS, _dispatch)
AttentionMaskInterface.register(OURS, eager_mask)
