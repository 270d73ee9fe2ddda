"""Hooks by which transformers notes what its modules return, for ``output_hidden_states`` and its like.

They are put on modules when someone first asks for them, and stay there. Some models read what was noted: LLaVA takes
a layer of its vision tower so. What is noted has to be what is handed on, so that writes of ours come before.
"""

from collections.abc import Callable
from typing import Any

from torch import nn

_HOME = "transformers.utils.output_capturing"  # of transformers 5.24


def own_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """Return the forward hooks of a module but those of transformers that only take notes."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return [hook for hook in hooks if not _is_recorder(hook)]


def note_last(module: nn.Module) -> None:
    """Let hooks that note what a module returns run after all others on it."""
    for key in [key for key, hook in module._forward_hooks.items() if _is_recorder(hook)]:
        module._forward_hooks[key] = module._forward_hooks.pop(key)


def _is_recorder(hook: Callable[..., Any]) -> bool:
    return getattr(hook, "__module__", None) == _HOME
