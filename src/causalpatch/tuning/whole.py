"""Full fine-tuning: every weight is trained, in a set of its own; the model's weights stand aside and come back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from causalpatch.models import Model
from causalpatch.tuning.parts import Parts
from causalpatch.tuning.ways import Way

NOTHING = Parts((), {}, {})


class Full(Way):
    """All floating-point parameters of a model; those that are tied stay tied.

    Args:
        model: The model; a second set of its weights is made.
    """

    name = "full"

    def __init__(self, model: Model) -> None:
        super().__init__(model, NOTHING)
        named = {name: each for name, each in model.module.named_parameters() if each.is_floating_point()}
        # In float32 at least, as what other ways train: steps are too small for fewer bits.
        wide = {each: torch.promote_types(each.dtype, torch.float32) for each in named.values()}
        self._held = {name: nn.Parameter(each.detach().to(wide[each], copy=True)) for name, each in named.items()}
        self._old = dict(named)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return the weights, by name; of tied ones the first."""
        return self._held

    def sizes(self) -> dict[str, float]:
        """Return the usual size of the elements of each weight; of a bias that is 0, of its weight's."""
        found = {name: float(each.detach().double().square().mean().sqrt()) for name, each in self._old.items()}
        return {name: size or found.get(_beside(name), 0.0) or 1.0 for name, size in found.items()}

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """Run the model with these weights in place of its own."""
        root = self.model.module
        new = {id(self._old[name]): each.to(self._old[name].dtype) for name, each in self._held.items()}
        swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        try:
            for module in root.modules():
                held: dict[str, Any] = module._parameters  # of fewer bits they are rounded: tensors, no parameters
                for name, own in held.items():
                    if own is not None and id(own) in new:
                        swapped.append((module, name, own))
                        held[name] = new[id(own)]
            yield root
        finally:
            for module, name, own in swapped:
                module._parameters[name] = own

    def write_into(self, module: nn.Module) -> None:
        """Copy the weights into a copy of the model."""
        with torch.no_grad():
            for name, each in self._held.items():
                module.get_parameter(name).copy_(each)


def _beside(name: str) -> str:
    """Return the name of the weight that stands beside a bias."""
    return f"{name.removesuffix('.bias')}.weight" if name.endswith(".bias") else name
