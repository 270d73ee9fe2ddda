"""Where the tensors of a captured run are kept: on the model's device, in the host's memory, or in a file.

A run of long prompts may need more memory for what it keeps than there is. One layer at a time is looked at, so all
else may lie elsewhere: beside a GPU in the host's memory, and where that is too small, or on a CPU, in files that are
mapped into memory, whose pages the system drops and reads again as it needs.

Cost: each layer's tensors are moved to the device once per pass over the layers.
"""

import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Generic, Literal, TypeVar

import torch
from torch import Tensor

from causalpatch.base.errors import MemoryExhausted

Where = Literal["device", "host", "disk"]
Key = TypeVar("Key")

NEAR = 8
"""Tensors that stay on the device after they were handed out: those of one layer, about."""
_HOST_SHARE = 0.5


class Shelf:
    """Keeps tensors, and hands them out on the device.

    Args:
        device: The model's device.
        where: Where tensors are kept.
    """

    def __init__(self, device: torch.device, where: Where = "device") -> None:
        self.device, self.where = device, where
        self._near: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def keep(self, tensor: Tensor, *, is_private: bool = False) -> Tensor:
        """Return a private copy of a tensor where tensors are kept.

        Args:
            tensor: The tensor.
            is_private: Nothing will change the tensor, so that it need not be copied to stay on the device.

        Raises:
            MemoryExhausted: The disk is full.
        """
        tensor = tensor.detach()
        if self.where == "device":
            return tensor if is_private else tensor.clone()
        if self.where == "host":
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.device.type == "cuda")
            return kept.copy_(tensor)
        return _mapped(tensor)

    def on_device(self, kept: Tensor) -> Tensor:
        """Return a kept tensor on the device; those that were asked for last stay there."""
        if kept.device == self.device:
            return kept
        if id(kept) not in self._near:
            # The kept tensor is held beside its copy, so that no other can take its number.
            self._near[id(kept)] = (kept, kept.to(self.device, non_blocking=kept.is_pinned()))
            if len(self._near) > NEAR:
                self._near.popitem(last=False)
        self._near.move_to_end(id(kept))
        return self._near[id(kept)][1]


class OnShelf(Mapping[Key, Tensor], Generic[Key]):
    """Kept tensors by their keys, each handed out on the device.

    Args:
        shelf: The shelf.
        tensors: What is kept on it.
    """

    def __init__(self, shelf: Shelf, tensors: Mapping[Key, Tensor]) -> None:
        self._shelf, self._tensors = shelf, tensors

    def __getitem__(self, key: Key) -> Tensor:
        return self._shelf.on_device(self._tensors[key])

    def __iter__(self) -> Iterator[Key]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def place_for(n_bytes: int, budget: int, device: torch.device) -> Where:
    """Say where to keep so many bytes.

    Args:
        n_bytes: Bytes that are to be kept.
        budget: Bytes that may be kept on the device.
        device: The model's device.
    """
    if n_bytes <= budget:
        return "device"
    if device.type == "cpu":
        return "disk"
    free = _free_host_bytes()
    return "host" if free is None or n_bytes <= _HOST_SHARE * free else "disk"


def _free_host_bytes() -> int | None:
    """Return the host's free memory, or None where the system does not tell."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _mapped(tensor: Tensor) -> Tensor:
    """Write a tensor to a file without a name, and return it mapped into memory."""
    raw = tensor.contiguous().cpu().reshape(-1).view(torch.uint8)
    if not len(raw):
        return tensor.cpu().clone()
    descriptor, name = tempfile.mkstemp(prefix="causalpatch-")
    try:
        # Written, not filled through the mapping: there a full disk would end the process without a word.
        with os.fdopen(descriptor, "wb") as file:
            raw.numpy().tofile(file)
        kept = torch.from_file(name, shared=False, size=len(raw), dtype=torch.uint8)
    except OSError as error:
        raise MemoryExhausted(
            "activations fit neither into memory nor on the disk",
            facts=[("wanted", f"{len(raw) / 2**20:,.0f} MiB"), ("folder", Path(name).parent), ("error", error)],
            fix="set TMPDIR to a folder with more room, or raise budget_gib",
        ) from error
    finally:
        Path(name).unlink(missing_ok=True)  # the mapping lives on, and the room is given back with it
    return kept.view(tensor.dtype).reshape(tensor.shape)
