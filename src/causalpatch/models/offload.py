"""A model's weights where they lie: in the module, as codes and scales, or elsewhere between runs.

``device_map`` leaves weights in CPU memory or on disk. Such a module holds tensors without data (on the device
``meta``) and a hook of accelerate's that fetches them when it runs. That library is not needed here: its hooks are
known by what they hold. Weights that ``streamed`` fetches are read from their store, in blocks, so that no more than
one block is in memory.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from causalpatch.models.stores import blocks_of
from causalpatch.models.streamed import weights_of


class _Elsewhere:
    """The weights of a model that are not in the module between runs.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self._streamed = weights_of(module)
        self._maps: dict[str, tuple[Mapping[str, Tensor], str]] = {}
        for path, part in module.named_modules():
            for hook in _hooks(part):
                weights = getattr(hook, "weights_map", None)
                if weights is not None:
                    for name, _ in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
                        self._maps[f"{path}.{name}" if path else name] = weights, name

    def blocks(self, name: str, tensor: Tensor) -> Iterator[Tensor]:
        """Yield a tensor of the model's state with its data, whole or in blocks of rows.

        Args:
            name: Its name in the state.
            tensor: What stands there.
        """
        if tensor.is_meta and self._streamed is not None and name in self._streamed.store:
            yield from blocks_of(self._streamed.store, name, tensor)
        elif tensor.is_meta and name in self._maps:
            weights, key = self._maps[name]
            yield torch.as_tensor(weights[key])
        else:
            yield tensor


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where the first part of a model runs whose weights are elsewhere, or None where nothing says so."""
    streamed = weights_of(module)
    if streamed is not None:
        return streamed.device
    devices = (getattr(hook, "execution_device", None) for part in module.modules() for hook in _hooks(part))
    return next((torch.device(device) for device in devices if device is not None), None)


def _hooks(part: nn.Module) -> Iterator[Any]:
    hook = getattr(part, "_hf_hook", None)
    yield from getattr(hook, "hooks", (hook,))


class Content:
    """The weights of a model, known by their hash.

    Args:
        module: The model.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._known: tuple[object, str] | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of the names, types, shapes and bytes of the state, again after a tensor of it was changed."""
        state = self.module.state_dict()
        stamp = tuple((name, x.data_ptr(), -1 if x.is_inference() else x._version) for name, x in state.items())
        if self._known is None or self._known[0] != stamp:
            self._known = stamp, _hash_state(self.module, state)
        return self._known[1]


def _hash_state(module: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, types, shapes and bytes of a model's state, wherever its weights are.

    Args:
        module: The model.
        state: What its ``state_dict`` gives.
    """
    digest, elsewhere = hashlib.sha256(), _Elsewhere(module)
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        for block in elsewhere.blocks(name, tensor):
            for part in _plain_parts(block.detach()):
                data = part.cpu().contiguous().reshape(-1)
                digest.update(data.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_parts(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors of which a tensor is made: itself, or codes and scales of one in 8 or 4 bits."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(getattr(tensor, name))
