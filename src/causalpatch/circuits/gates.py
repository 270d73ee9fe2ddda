"""Gates that are learnt, one for each edge: 1 keeps it, 0 ablates it, and training sees what lies between.

==================  ===============================================================================================
``HardConcrete``    a logistic draw about the logit, stretched to (-0.1, 1.1) and clipped, so that 0 and 1 are drawn
``Uniform``         1 with probability p, else 0; but for a share p (1 - p) of all draws uniform between both, where
                    alone slopes are read: their mean there is how much more is lost with the edge than without it
``TopK``            sigmoid(logit - offset), the offset such that all gates sum to k, which is drawn anew each time
==================  ===============================================================================================

Symbols: R rows, each with gates of its own, E edges.

References:
    Louizos et al. 2018, "Learning Sparse Neural Networks through L0 Regularization", 1712.01312, eq. 10 to 12; Bhaskar
    et al. 2024, "Finding Transformer Circuits with Edge Pruning", 2406.16778 (hard concrete). Li & Janson 2024,
    "Optimal ablation for interpretability", 2409.09951 (uniform gradient sampling). "Sigmoid top-k", 2609.25518.
"""

import math
from typing import Final, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

_WIDTH, _LOW, _HIGH = 2 / 3, -0.1, 1.1  # temperature and ends of the stretch, as in Louizos et al.
_BISECTIONS: Final = 60


class HardConcrete:
    """Logistic draws, stretched and clipped.

    Args:
        n_edges: Number of edges.
        device: Where they are learnt.
    """

    def __init__(self, n_edges: int, device: torch.device) -> None:
        self.logits = torch.full((n_edges,), 2.0, device=device, requires_grad=True)

    def draw(self, n_rows: int, draws: torch.Generator) -> Float[Tensor, "R E"]:
        """Return gates, with the slope that the stretch lets through."""
        drawn = _uniform(n_rows, self.logits, draws).clamp(1e-6, 1 - 1e-6)
        soft = torch.sigmoid((drawn.logit() + self.logits) / _WIDTH)
        return (soft * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def size(self) -> Float[Tensor, ""]:
        """Return the mean probability that a gate is not 0."""
        return torch.sigmoid(self.logits - _WIDTH * math.log(-_LOW / _HIGH)).mean()


class Uniform:
    """Draws of 0 and 1, some of them uniform between.

    Args:
        n_edges: Number of edges.
        device: Where they are learnt.
    """

    def __init__(self, n_edges: int, device: torch.device) -> None:
        self.logits = torch.full((n_edges,), 1.0, device=device, requires_grad=True)

    def draw(self, n_rows: int, draws: torch.Generator) -> Float[Tensor, "R E"]:
        """Return gates; the mean slope over rows is that over the rows that are uniform at an edge."""
        p = torch.sigmoid(self.logits)
        drawn, window = _uniform(n_rows, self.logits, draws), (p * (1 - p)).detach()
        gates = (0.5 + (p.detach() - drawn) / window.clamp(min=1e-12)).clamp(0, 1)
        between = (gates > 0) & (gates < 1)
        weight = between * (n_rows / between.sum(0).clamp(min=1))
        return gates + weight * (p - p.detach())

    def size(self) -> Float[Tensor, ""]:
        """Return the mean probability."""
        return torch.sigmoid(self.logits).mean()


class TopK:
    """Sigmoids that sum to a number of edges, which is drawn evenly over its logarithm.

    Args:
        n_edges: Number of edges.
        device: Where they are learnt.
    """

    def __init__(self, n_edges: int, device: torch.device) -> None:
        self.logits = torch.zeros(n_edges, device=device, requires_grad=True)

    def draw(self, n_rows: int, draws: torch.Generator) -> Float[Tensor, "R E"]:
        """Return gates, each row with a sum of its own, from 1 to all edges but one."""
        largest = math.log(max(1.0, len(self.logits) - 1))
        k = torch.exp(_uniform(n_rows, self.logits[:1], draws)[:, 0] * largest)
        return soft_top_k(self.logits, k)

    def size(self) -> None:
        """Return None: every draw has a size of its own."""


Gates: TypeAlias = HardConcrete | Uniform | TopK
"""Gates of all edges: their logits, draws of them by rows, and the share that is kept, where draws have none of their
own."""


def soft_top_k(logits: Float[Tensor, " E"], k: Float[Tensor, " R"]) -> Float[Tensor, "R E"]:
    """Return sigmoid(logits - offset), the offset such that each row sums to its k; with exact slopes.

    With m the gates, s' = m (1 - m) and g the slope at m, the slope at logit i is s'_i (g_i - sum(g s') / sum(s')).

    Args:
        logits: Logits of all edges.
        k: Sums, above 0 and below the number of edges.
    """
    with torch.no_grad():
        low = (logits.min() - math.log(len(logits)) - 10).expand(len(k)).clone()
        high = (logits.max() + math.log(len(logits)) + 10).expand(len(k)).clone()
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            is_large = torch.sigmoid(logits - middle[:, None]).sum(1) > k
            low, high = torch.where(is_large, middle, low), torch.where(is_large, high, middle)
        offset = (low + high) / 2
        gates = torch.sigmoid(logits - offset[:, None])
        slope = gates * (1 - gates)
        share = slope / slope.sum(1, keepdim=True).clamp(min=1e-12)
    # By the implicit function, the offset moves by the mean of what logits move by, each weighing by its own slope.
    moved = offset + (share * (logits - logits.detach())).sum(1)
    return torch.sigmoid(logits - moved[:, None])


def _uniform(n_rows: int, logits: Tensor, draws: torch.Generator) -> Tensor:
    return torch.rand(n_rows, len(logits), generator=draws).to(logits.device)
