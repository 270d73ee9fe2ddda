"""Attention kernels of transformers: one of ours registered by name, and models switched to a kernel and back.

Models that use the attention interface of transformers look their kernel up by the name in their configuration, part by
part. Ours hands queries, keys, values and mask to whoever stands in the context, so that an engine sees attention as it
happens. A configuration may be shared by models and by threads: the first to enter notes the kernel, the last to leave
puts it back, and whoever calls the model from outside of a context gets the kernel that was noted.

Ours is registered when the first model is switched: transformers takes seconds to load what it needs for models, and a
module of another kind needs none of that.
"""

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import transformers
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported

OURS = "causalpatch"
Attend = Callable[[nn.Module, Tensor, Tensor, Tensor, Tensor | None, dict[str, Any]], Tensor]
_ATTEND: ContextVar[Attend | None] = ContextVar("attend", default=None)


@dataclass
class _Switched:
    """A configuration that names our kernel, or did so.

    Args:
        config: The configuration; afterwards what tells when it is gone.
        before: The kernel that it named.
        n_inside: Contexts that are open.
    """

    config: Any
    before: str
    n_inside: int = 0


# By id; kept after the last context is left: another thread may have read our name just before.
_SWITCHED: dict[int, _Switched] = {}
_GUARD = threading.RLock()  # what forgets a configuration may be called at any time


def kernels_of(name: str) -> tuple[object, object]:
    """Return the functions that are registered for a kernel and for its mask; None where there is none."""
    return _kernels().get(name), _masks().get(name)


def _kernels() -> Any:
    """Return the attention kernels of transformers by name."""
    return transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS


def _masks() -> Any:
    """Return what makes masks for attention kernels, by their name."""
    return transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS


def _dispatch(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    attend = _ATTEND.get()
    if attend is not None:
        return attend(module, query, key, value, attention_mask, kwargs), None
    found: tuple[Tensor, Tensor | None] = _kernel_before(module)(module, query, key, value, attention_mask, **kwargs)
    return found


def _mask(*given: Any, config: Any = None, **named: Any) -> Any:
    before = _before(config)
    make = transformers.masking_utils.eager_mask
    if _ATTEND.get() is None and before is not None:
        make = _masks().get(before)
    return None if make is None else make(*given, config=config, **named)


def _before(config: Any) -> str | None:
    """Return the kernel that a configuration named before it was switched to ours."""
    switched = _SWITCHED.get(id(config))
    # Where a reader set our name by hand there is none.
    return None if switched is None or switched.before == OURS else switched.before


def _kernel_before(module: nn.Module) -> Callable[..., Any]:
    """Return the kernel that a module used before an engine, in another thread, switched it to ours."""
    before = _before(getattr(module, "config", None))
    if before is not None:
        # The plain kernel is not registered: each family of transformers has its own beside its attention.
        files = [sys.modules.get(kind.__module__) for kind in type(module).__mro__]
        plain = [getattr(file, "eager_attention_forward", None) for file in files]
        kernels: list[Callable[..., Any] | None] = [_kernels().get(before), *plain]
        for kernel in kernels:
            if kernel is not None:
                return kernel
    raise ModelUnsupported(
        f"the attention kernel {OURS!r} ran outside of an engine",
        fix='switch the model back: model.set_attn_implementation("sdpa")',
    )


@contextmanager
def attending(module: nn.Module, attend: Attend) -> Iterator[bool]:
    """Let a function compute all attention of a model in this thread, and put the model's own kernel back afterwards.

    Args:
        module: The model.
        attend: Takes the attention module, queries ``[row, head, position, head_width]``, keys and values
            ``[row, kv_head, position, head_width]``, an additive mask and the kernel's other arguments, and returns
            ``[row, position, head, head_width]``.

    Yields:
        Whether the model has a kernel that can be switched; if not, the function is not called.
    """
    entered = [config for config in _configs_of(module) if _enter(config)]
    token = _ATTEND.set(attend)
    try:
        yield bool(entered)
    finally:
        _ATTEND.reset(token)
        for config in entered:
            _leave(config)


def _configs_of(module: nn.Module) -> Iterator[Any]:
    """Yield every configuration of a model's parts once, and those within them."""
    waiting: list[Any] = [part.config for part in module.modules() if hasattr(part, "config")]
    seen: set[int] = set()
    while waiting:
        config = waiting.pop()
        if id(config) not in seen and config is not None:
            seen.add(id(config))
            waiting += [getattr(config, name, None) for name in getattr(config, "sub_configs", ())]
            yield config


def _enter(config: Any) -> bool:
    """Let a configuration name our kernel; say whether it names any."""
    with _GUARD:
        name = getattr(config, "_attn_implementation", None)
        if not name:
            return False
        _register()
        switched = _SWITCHED.get(id(config))
        if switched is None or not (switched.n_inside or name == OURS):
            switched = _SWITCHED[id(config)] = _Switched(config, name)
        switched.config = config
        switched.n_inside += 1
        _name(config, OURS)
        return True


def _leave(config: Any) -> None:
    with _GUARD:
        switched = _SWITCHED[id(config)]
        switched.n_inside -= 1
        if not switched.n_inside:
            _name(config, switched.before)
            try:
                switched.config = weakref.ref(config, partial(_forget, id(config)))
            except TypeError:  # it cannot be followed
                del _SWITCHED[id(config)]


def _name(config: Any, kernel: str) -> None:
    # The setter of transformers' configurations (5.23) goes on into those within them, which other threads may use.
    if "_attn_implementation_internal" in vars(config):
        vars(config)["_attn_implementation_internal"] = kernel
    else:
        config._attn_implementation = kernel


def _forget(place: int, reference: "weakref.ref[Any]") -> None:
    with _GUARD:
        if place in _SWITCHED and _SWITCHED[place].config is reference:
            del _SWITCHED[place]


@cache
def _register() -> None:
    transformers.AttentionInterface.register(OURS, _dispatch)
    transformers.AttentionMaskInterface.register(OURS, _mask)


def kernel_of(module: nn.Module) -> str:
    """Return the name of a model's attention kernel, such as ``sdpa``; ``"unknown"`` where it does not say."""
    for part in module.modules():
        kernel = getattr(getattr(part, "config", None), "_attn_implementation", None)
        if isinstance(kernel, str):
            return kernel
    return "unknown"
