"""Where the weights of a model lie that are not in its module: in the host's memory, or in safetensors files on disk.

Both hand out one tensor at a time by its name in the model's state, or some rows of one, in the model's dtype and in
the host's memory. Files are read with ``pread``, not mapped, so that what was read and let go is gone from memory.
"""

import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

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


Backend: TypeAlias = Literal["pread", "mmap"]


class DiskStore:
    """Tensors in safetensors files.

    Args:
        tensors: Where each stands, by name.
    """

    place: Literal["host", "disk"] = "disk"

    def __init__(self, tensors: Mapping[str, Stored]) -> None:
        self._tensors = dict(tensors)
        self._files: dict[tuple[str, str], Any] = {}
        self._guard = threading.Lock()

    def __contains__(self, name: object) -> bool:
        """Say whether there is a tensor of a name."""
        return name in self._tensors

    def read(self, name: str) -> Tensor:
        """Return a tensor."""
        stored = self._tensors[name]
        with self._guard:
            tensor: Tensor = self._file(stored.file, "pread").get_tensor(stored.key)
        return tensor.to(stored.dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return some neighbouring entries of a tensor's first axis."""
        stored = self._tensors[name]
        with self._guard:  # of a mapped file only these pages are read; pread would read the whole tensor
            tensor: Tensor = self._file(stored.file, "mmap").get_slice(stored.key)[start:stop].clone()
        return tensor.to(stored.dtype)

    def _file(self, path: str, backend: Backend) -> Any:
        if (path, backend) not in self._files:
            self._files[path, backend] = open_file(path, backend)
        return self._files[path, backend]


def open_file(path: str, backend: Backend = "pread") -> Any:
    """Return a safetensors file whose tensors are read when they are asked for."""
    return safe_open(path, framework="pt", backend=backend)
