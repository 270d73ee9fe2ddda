"""Weights of a dictionary in a file: their shapes at once, their numbers when they are first asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from causalpatch.base.errors import ModelNotFound


@dataclass(frozen=True)
class TensorFile:
    """A .safetensors or .npz file.

    Args:
        path: The file.

    Raises:
        ModelNotFound: The file cannot be read.
    """

    path: Path

    def __post_init__(self) -> None:
        try:
            _ = self.shapes
        except (OSError, ValueError, EOFError, SafetensorError) as error:
            raise ModelNotFound(
                f"the weights in '{self.path}' cannot be read",
                facts=[("reason", f"{type(error).__name__}: {str(error).splitlines()[0][:80]}")],
                fix="give a .safetensors file, or an .npz of arrays",
            ) from error

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes of all tensors by name."""
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as file:
                return {name: file[name].shape for name in file.files}
        with safe_open(self.path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - no mapping

    def load(self, name: str) -> Tensor:
        """Return a tensor."""
        if self.path.suffix == ".npz":
            with np.load(self.path, allow_pickle=False) as file:
                return torch.from_numpy(file[name])
        with safe_open(self.path, framework="pt") as file:
            found: Tensor = file.get_tensor(name)
            return found


@dataclass(frozen=True)
class Weights:
    """Tensors of a coder by the names that it uses.

    Args:
        shapes: Shapes by name.
        loads: What returns the tensor of each name.
    """

    shapes: Mapping[str, tuple[int, ...]]
    loads: Mapping[str, Callable[[], Tensor]] = field(repr=False)

    @classmethod
    def of(cls, file: TensorFile, names: Mapping[str, str], *, turned: tuple[str, ...] = ()) -> "Weights":
        """Take tensors of a file.

        Args:
            file: The file.
            names: For each name that a coder uses, that in the file; those that the file lacks are left out.
            turned: Which of the coder's names lie the other way round in the file.
        """
        there = {name: own for name, own in names.items() if own in file.shapes}
        shapes = {name: file.shapes[own][::-1] if name in turned else file.shapes[own] for name, own in there.items()}

        def loader(name: str, own: str) -> Callable[[], Tensor]:
            return lambda: file.load(own).T.contiguous() if name in turned else file.load(own)

        return cls(shapes, {name: loader(name, own) for name, own in there.items()})

    def load(self, name: str) -> Tensor:
        """Return a tensor."""
        return self.loads[name]()

    def with_tensor(self, name: str, tensor: Tensor) -> "Weights":
        """Return the same weights with one more."""
        return Weights({**self.shapes, name: tuple(tensor.shape)}, {**self.loads, name: lambda: tensor})
