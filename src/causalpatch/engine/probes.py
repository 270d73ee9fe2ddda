"""Probes: what stands at ports of a run, and the slope of a metric there, while the model runs as it is.

A probe is a write that puts back what it finds, perhaps moved a little, and remembers it: its value, the tensor that
goes on, and in the backward the gradient that arrives; or of these what is asked for. At the input of a module it meets
the gradient by way of this module alone, since only the call of the module is handed the tensor that goes on. Where
nothing before it has a gradient, the graph begins at the first probe that asks for one.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Shaped
from torch import Tensor

from causalpatch.engine.hooks import Write
from causalpatch.models import Port, Tap
from causalpatch.models.views import Whole
from causalpatch.sites import Site

_ANY = Site("logits")  # taps of probes are read and written whole, whatever they are of


@dataclass(eq=False)
class Probes:
    """Probes of one forward and its backward.

    Args:
        ports: Where they stand.
        moved: What is added to the tensor at some of the ports.
        scaled: What the gradient is multiplied by at some of the ports.
        read: Ports whose tensors are kept; None for all.
        linked: Ports whose tensors are kept with their graph.
        sloped: Ports whose gradients are kept; None for all.
        values: The tensors that are kept, filled by the forward.
        nodes: Those kept with their graph, as they go on.
        slopes: The gradient at each port, filled by the backward.
        dropped: Ports through which no gradient goes back.
        copies: Runs of each pair, those of all pairs in a row; what is moved has as many rows.
        steepest: The largest |gradient| that was met, as far as they were looked through.
    """

    ports: tuple[Port, ...]
    moved: Mapping[Port, Tensor] = field(default_factory=dict)
    scaled: Mapping[Port, Tensor | float] = field(default_factory=dict)
    read: Collection[Port] | None = None
    linked: Collection[Port] = ()
    sloped: Collection[Port] | None = None
    values: dict[Port, Tensor] = field(default_factory=dict)
    nodes: dict[Port, Tensor] = field(default_factory=dict)
    slopes: dict[Port, Tensor] = field(default_factory=dict)
    dropped: set[Port] = field(default_factory=set)
    copies: int = 1
    steepest: float = 0.0

    @classmethod
    def at(
        cls,
        ports: Iterable[Port],
        moved: Mapping[Port, Tensor] | None = None,
        scaled: Mapping[Port, Tensor | float] | None = None,
    ) -> "Probes":
        """Return probes at ports, each once; those that are moved or scaled too."""
        every = dict.fromkeys([*(moved or {}), *ports, *(scaled or {})])
        return cls(tuple(every), moved or {}, scaled or {})

    def writes(self, n_rows: int, device: torch.device) -> list[Write]:
        """Return what is to be written in the forward.

        Args:
            n_rows: Rows of the forward.
            device: Where they are.
        """
        index = (torch.arange(n_rows, device=device),)
        return [Write(Tap(_ANY, port, Whole()), index, _Met(self, port), is_whole=True) for port in self.ports]

    def meet(self, port: Port, found: Shaped[Tensor, " row *axes"]) -> Shaped[Tensor, " row *axes"]:
        """Remember what stands at a port, and return what goes on.

        Args:
            port: The port.
            found: What stands there, a copy of our own.
        """
        if port in self.moved:
            found = found + self.moved[port].to(found)
        if not found.is_floating_point():
            return found
        if self.read is None or port in self.read:
            # What goes on may be changed in place by the model.
            self.values[port] = found.detach().clone()
        if not torch.is_grad_enabled():
            return found
        is_sloped = self.sloped is None or port in self.sloped
        if not (found.requires_grad or is_sloped or port in self.linked):
            return found  # no graph need begin here
        # What was taken out of the model's tensor is a tensor of our own, so that it may begin a graph.
        going = found if found.requires_grad else found.detach().requires_grad_()
        if is_sloped:
            going.register_hook(_Arrived(self, port))  # type: ignore[no-untyped-call]
        if port not in self.linked and not going.is_leaf:
            return going
        if port in self.linked:
            self.nodes[port] = going
        return going.clone()


@dataclass(frozen=True, eq=False)
class _Met:
    """Hands what stands at a port to the probes."""

    probes: Probes
    port: Port

    def __call__(self, current: Tensor) -> Tensor:
        return self.probes.meet(self.port, current)


@dataclass(frozen=True, eq=False)
class _Arrived:
    """Takes the gradient that arrives at a port."""

    probes: Probes
    port: Port

    def __call__(self, gradient: Tensor) -> Tensor | None:
        factor = 0.0 if self.port in self.probes.dropped else self.probes.scaled.get(self.port)
        # What stands here is a part of what was stopped or scaled, so that its slope is too.
        self.probes.slopes[self.port] = gradient if factor is None else gradient * factor
        return None if factor is None else self.probes.slopes[self.port]
