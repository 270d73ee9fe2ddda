"""Contenders: other ways to make the same patches, each in its own words; a missing one is skipped.

Each file holds one package in the form that its own documentation shows, with nothing turned off that a user would
leave on. All work on one module of transformers with the same weights.
"""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Final, Protocol

import numpy as np
from torch import nn

from benchmarks.tasks import Cell, Kind, Task


class Contender(Protocol):
    """A way to patch."""

    def capture(self, task: Task) -> None:
        """Run the clean prompts and keep what is patched in."""

    def patch(self, task: Task, cells: Sequence[Cell]) -> np.ndarray:
        """Patch each cell alone and return the metric, averaged over pairs, ``(cell,)``."""


@dataclass(frozen=True)
class Peer:
    """A contender and where it comes from.

    Args:
        name: How tables call it.
        file: The file of this folder that it is in.
        factory: The class in that file, made from a module that it may change.
        package: What it is called on PyPI, or nothing where it needs none.
        families: The families that it is measured on.
        kinds: What it can patch.
    """

    name: str
    file: str
    factory: str
    package: str = ""
    families: tuple[str, ...] = ("gpt2",)
    kinds: tuple[Kind, ...] = ("resid_pre", "mlp_out", "z", "neuron")

    @property
    def version(self) -> str:
        """The installed version, empty where there is none."""
        try:
            return metadata.version(self.package) if self.package else ""
        except metadata.PackageNotFoundError:
            return ""

    def why_not(self, task: Task) -> str | None:
        """Say why this peer is not measured on a task, if it is not."""
        if task.shape.family not in self.families:
            return f"measured on {', '.join(self.families)} only"
        if task.kind not in self.kinds:
            return "patches no single neuron" if task.kind == "neuron" else f"patches no {task.kind}"
        return self.problem()

    def problem(self) -> str | None:
        """Say why this peer cannot be used here, if it cannot."""
        try:
            importlib.import_module(f"benchmarks.peers.{self.file}")
        except ImportError as error:
            return f"not installed ({error})" if not self.version else f"cannot be imported ({error})"
        except Exception as error:  # noqa: BLE001 - a broken peer is left out, whatever breaks it
            return f"cannot be imported ({type(error).__name__}: {error})"
        return None

    def open(self, module: nn.Module) -> Contender:
        """Make the contender on a module of its own."""
        found: Contender = getattr(importlib.import_module(f"benchmarks.peers.{self.file}"), self.factory)(module)
        return found


HOOKS: Final = "hooks by hand, batched"
LENS: Final = "TransformerLens"
NNSIGHT: Final = "nnsight"
NNSIGHT_BATCHED: Final = "nnsight, 8 per trace"
PYVENE: Final = "pyvene"
PEERS: Final = (
    Peer(HOOKS, "hooks", "Hooks", families=("gpt2", "llama", "gemma2", "gpt_neox")),
    Peer(LENS, "lens", "Lens", "transformer-lens"),
    Peer(NNSIGHT, "traces", "Traces", "nnsight"),
    Peer(NNSIGHT_BATCHED, "traces", "BatchedTraces", "nnsight"),
    Peer(PYVENE, "intervenable", "Intervenable", "pyvene", kinds=("resid_pre", "mlp_out", "z")),
)
