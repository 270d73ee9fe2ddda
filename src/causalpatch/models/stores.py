"""Where the weights of a model lie that are not in its module: in the host's memory, or in safetensors files on disk.

Both hand out one tensor at a time by its name in the model's state, or some rows of one, in the model's dtype and in
the host's memory. Files are read with ``pread``, not mapped, so that what was read and let go is gone from memory.
"""

import json
import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

BLOCK_BYTES = 16 * 2**20
"""Bytes of a tensor that are read together where it is only looked through."""


@runtime_checkable
class Store(Protocol):
    """Hands out tensors by name."""

    place: Literal["host", "disk"]

    def __contains__(self, name: object) -> bool:
        """Say whether there is a tensor of a name."""

    def read(self, name: str) -> Tensor:
        """Return a tensor."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some neighbouring entries of a tensor's first axis."""


def blocks_of(store: Store, name: str, like: Tensor) -> Iterator[Tensor]:
    """Yield a tensor in blocks of rows, none larger than ``BLOCK_BYTES`` but for single rows.

    Args:
        store: Where it lies.
        name: Its name.
        like: A tensor of its shape and dtype.
    """
    n_rows = like.shape[0] if like.ndim else 0
    row_bytes = like.numel() * like.element_size() // max(1, n_rows)
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    if n_rows <= step:
        yield store.read(name)
        return
    for start in range(0, n_rows, step):
        yield store.rows(name, start, min(n_rows, start + step))


class HostStore:
    """Tensors in the host's memory.

    Args:
        tensors: The tensors by name.
        pinned: Whether they are kept where a GPU can fetch them by itself.
    """

    place: Literal["host", "disk"] = "host"

    def __init__(self, tensors: Mapping[str, Tensor], *, pinned: bool) -> None:
        once = {id(tensor): tensor.pin_memory() if pinned else tensor for tensor in tensors.values()}
        self._tensors = {name: once[id(tensor)] for name, tensor in tensors.items()}

    def __contains__(self, name: object) -> bool:
        """Say whether there is a tensor of a name."""
        return name in self._tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        return self._tensors[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some neighbouring entries of a tensor's first axis."""
        return self._tensors[name][start:stop]


@dataclass(frozen=True)
class Stored:
    """Where a tensor stands on disk.

    Args:
        file: The safetensors file.
        key: Its name there.
        dtype: The type in which the model has it.
    """

    file: str
    key: str
    dtype: torch.dtype


_TYPES: Final = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class DiskStore:
    """Tensors in safetensors files.

    Args:
        tensors: Where each stands, by name.
    """

    place: Literal["host", "disk"] = "disk"

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self._tensors = dict(tensors)
        self._files: dict[str, Any] = {}
        self._begins: dict[str, dict[str, int]] = {}
        self._guard = threading.Lock()

    def __contains__(self, name: object) -> bool:
        """Say whether there is a tensor of a name."""
        return name in self._tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        stored = self._tensors[name]
        with self._guard:
            tensor: Tensor = self._file(stored.file).get_tensor(stored.key)
        return tensor.to(stored.dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some neighbouring entries of a tensor's first axis."""
        stored = self._tensors[name]
        with self._guard:
            file = self._file(stored.file)
            part = file.get_slice(stored.key)
            n_rows, *inner = part.get_shape()
            dtype, stop = _TYPES.get(part.get_dtype()), min(stop, n_rows)
            if dtype is None:
                return torch.as_tensor(part[start:stop]).to(stored.dtype)
            if stored.file not in self._begins:
                self._begins[stored.file] = _offsets_in(stored.file)
        row = math.prod(inner) * dtype.itemsize
        begin = self._begins[stored.file][stored.key] + start * row
        found = np.fromfile(stored.file, np.uint8, (stop - start) * row, offset=begin)
        return torch.from_numpy(found).view(dtype).reshape(stop - start, *inner).to(stored.dtype)

    def _file(self, path: str) -> Any:
        if path not in self._files:
            self._files[path] = open_file(path)
        return self._files[path]


def _offsets_in(path: str) -> dict[str, int]:
    """Return where each tensor begins in a safetensors file.

    The library's own slices read the whole tensor first, or map the whole file, which counts as memory. A file is eight
    bytes with the length of its header, the header in JSON, and the tensors, whose places are counted from its end.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {name: 8 + length + told["data_offsets"][0] for name, told in header.items() if name != "__metadata__"}


def open_file(path: str) -> Any:
    """Return a safetensors file whose tensors are read when they are asked for."""
    return safe_open(path, framework="pt", backend="pread")
