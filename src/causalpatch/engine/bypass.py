"""Hooks and forwards of ours that hold in one thread, for a while: elsewhere a module does what it always does."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

from torch import nn


def in_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """Return a hook that acts in the thread it is made in, and leaves calls in other threads as they are.

    Args:
        hook: A hook of either kind; other threads may call it without keyword arguments while it is being removed.
    """
    own = get_ident()
    return lambda *given: hook(*given) if get_ident() == own else None


def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward for a module that holds in this thread; in other threads the module's own one runs.

    Args:
        module: The module, with the forward that it has now.
        forward: What it is to do here.
    """
    own, before = get_ident(), module.forward

    return lambda *given, **named: (forward if get_ident() == own else before)(*given, **named)


@contextmanager
def bypassed(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let a module run another forward in this thread for a while; hooks on it still run.

    Args:
        module: The module; its own forward, its class's or one that was set on it, is put back.
        forward: What it is to do.
    """
    own = module.__dict__.get("forward")
    module.__dict__["forward"] = standing_in(module, forward)
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = own
