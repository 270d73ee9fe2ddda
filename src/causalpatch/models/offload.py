"""Weights that are elsewhere between runs, as ``device_map`` leaves them: in CPU memory or on disk.

Such a module holds tensors without data (on the device ``meta``) and a hook of accelerate's that fetches them when it
runs. That library is not needed here: its hooks are known by what they hold.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class Elsewhere:
    """The weights of a model that are not in the module between runs.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._maps: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        for path, part in module.named_modules():
            for hook in _hooks(part):
                weights = getattr(hook, "weights_map", None)
                if weights is not None:
                    for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                        self._maps[f"{path}.{name}" if path else name] = weights, name

    def read(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor of the model's state with its data.

        Args:
            name: Its name in the state.
            tensor: What stands there.
        """
        if not tensor.is_meta or name not in self._maps:
            return tensor
        weights, key = self._maps[name]
        return torch.as_tensor(weights[key])


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where the first part of a model runs whose weights are elsewhere, or None where no hook says so."""
    devices = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    return next((torch.device(device) for device in devices if device is not None), None)


def _hooks(part: nn.Module) -> Iterator[Any]:
    hook = getattr(part, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))
