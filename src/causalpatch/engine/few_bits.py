"""Delta linears in all layers of a wavefront: recorded in the untouched runs, replayed on packed rows.

The row of prompt p and position t of an untouched run is base row ``p * positions + t`` of every layer; a patched row
is replayed by differences from the base row of its own prompt and position (``delta``).
"""

from dataclasses import dataclass, field

import torch
from torch import nn

from causalpatch.engine.delta import MIN_WEIGHTS, DeltaLinears
from causalpatch.engine.products import Casts, Product
from causalpatch.models import Model
from causalpatch.sites import Site


@dataclass(frozen=True)
class FewBits:
    """How the linear maps of layers are multiplied on patched rows.

    Args:
        product: How differences are multiplied by weights.
        min_weights: Fewest weights of a map that is not left in float32.
        casts: The weights in few bits.
    """

    product: Product
    min_weights: int = MIN_WEIGHTS
    casts: Casts = field(default_factory=Casts, compare=False)

    def deltas(self, n_layers: int) -> list[DeltaLinears]:
        """Return what keeps the linear calls of each layer."""
        return [DeltaLinears(self.casts, self.product, min_weights=self.min_weights) for _ in range(n_layers)]

    def numbers_per_token(self, model: Model) -> int:
        """Return how many numbers the records hold for each token of the untouched runs."""
        return sum(sum(weight.shape) for weight in large_weights(model, self.min_weights))


def large_weights(model: Model, min_weights: int) -> list[nn.Parameter]:
    """Return the weights of a model's layers that delta linears multiply in few bits."""
    paths = [model.tap(Site("resid_pre", layer)).port.path for layer in range(model.shape.n_layers)]
    held = [weight for path in paths for weight in model.module.get_submodule(path).parameters()]
    return [w for w in held if w.ndim == 2 and w.numel() >= min_weights and w.dtype == torch.float32]
