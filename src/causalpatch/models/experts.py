"""Experts of a mixture: which layers have them, and what one of them adds to their sum.

The weights of a layer's experts are fused, so that no module holds what one expert makes of a token. But the module of
all experts is told which experts each token has, with which weights, and says what these add up to. So it is asked
again, by its own forward, for one expert with its own weight at the tokens that have chosen it: that is the expert's
term of the sum. It is written by its difference. Cost: one expert's arithmetic for each reading.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.models.families import RoutedBy, TermOf
from causalpatch.models.views import Index

EXPERT_SITES: Final = frozenset({"router", "expert_out"})
NO_EXPERTS: Final = "its layers have no experts"


@dataclass(frozen=True, eq=False)
class ExpertTerm:
    """What one expert adds: its weight times what it makes of a token, and 0 where a token has not chosen it.

    The tensor is the sum over the experts; the companions are what goes into the experts, and the weights of them all.

    Args:
        experts: The module of all experts.
        number: Which of them.
    """

    experts: nn.Module
    number: int

    def read(
        self, x: Float[Tensor, "row position width"], companions: tuple[Float[Tensor, "row position _"], ...]
    ) -> Float[Tensor, "row position width"]:
        """Return the expert's term of the sum."""
        tokens, weights = companions
        own = weights[..., self.number]
        has_chosen = own != 0
        term = torch.zeros_like(x)
        n_tokens = int(has_chosen.sum())
        if n_tokens:
            numbers = torch.full((n_tokens, 1), self.number, device=x.device)
            # Not by a call of the module, on which hooks stand that wait for the sum.
            term[has_chosen] = self.experts.forward(tokens[has_chosen], numbers, own[has_chosen][:, None]).to(x)
        return term

    def write(
        self,
        x: Float[Tensor, "row position width"],
        companions: tuple[Float[Tensor, "row position _"], ...],
        index: Index,
        value: Float[Tensor, "n *value"],
    ) -> None:
        """Replace the expert's term in the sum at the index."""
        # Read at all tokens, as when its value was kept: fewer tokens may round differently.
        x[index] = x[index] + (value - self.read(x, companions)[index])


def layers_without(
    fact: RoutedBy | TermOf, layers: Mapping[int, str], modules: Mapping[str, nn.Module]
) -> dict[int, str]:
    """Return the layers that have no experts, each with the reason.

    Args:
        fact: Where the router, or the experts, stand in a layer.
        layers: The path of each layer.
        modules: All modules by their paths.
    """
    wanted = (fact.module,) if isinstance(fact, RoutedBy) else (fact.router, fact.module)
    found: dict[int, str] = {}
    for layer, path in layers.items():
        lacking = next((name for name in wanted if f"{path}.{name}" not in modules), None)
        if lacking is not None:
            found[layer] = f"layer {layer} has one MLP and no experts: there is no module {path}.{lacking}"
    return found


def count_experts(fact: TermOf, layers: Mapping[int, str], modules: Mapping[str, nn.Module]) -> int:
    """Return how many experts each layer has that has any; 0 where layers differ, or do not say.

    Args:
        fact: Where the experts stand in a layer.
        layers: The path of each layer.
        modules: All modules by their paths.
    """
    experts = [modules.get(f"{path}.{fact.module}") for path in layers.values()]
    counts = {getattr(each, "num_experts", None) for each in experts if each is not None}
    count = counts.pop() if len(counts) == 1 else 0
    return count if isinstance(count, int) else 0
