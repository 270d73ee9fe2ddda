"""Means of sites over prompts, for mean ablation: summed in float64 batch by batch, pads excluded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import PatchError
from causalpatch.engine.capture import Captured
from causalpatch.engine.resolve import Placement
from causalpatch.models import KeyRow
from causalpatch.patches import Mean
from causalpatch.sites import Site


@dataclass(frozen=True)
class Means:
    """Fitted means.

    Args:
        of: The mean of each site: ``[position, *value_axes]`` with NaN where no prompt has the position, or
            ``[*value_axes]`` for means over positions and sites without them.
    """

    of: Mapping[tuple[Site, Mean], Float[Tensor, "..."]] = field(default_factory=dict)

    def at(
        self, site: Site, mean: Mean, placement: Placement | None, n_elements: int
    ) -> Float[Tensor, "element *axes"]:
        """Return the mean for each element of a write.

        Raises:
            PatchError: No prompt of the mean's side is long enough for a position.
        """
        value = self.of[site, mean]
        if placement is None or mean.over == "positions":
            return value.expand(n_elements, *value.shape)
        longest = int(placement.base.max())
        if longest >= len(value):
            raise PatchError(
                f"there is no mean of '{site}' at token {longest}",
                facts=[("longest prompt", f"{len(value)} tokens on the {mean.side} side")],
                fix='take one mean over all positions: Mean(over="positions")',
            )
        return value[torch.as_tensor(placement.base, device=value.device)]


def fit_means(runs: Iterator[Captured], sites: Sequence[tuple[Site, bool]], mean: Mean, n_positions: int) -> Means:
    """Fit the means of sites over runs.

    Args:
        runs: Captured runs of the mean's side, in batches.
        sites: The sites, and whether each has positions.
        mean: Which mean.
        n_positions: Tokens of the longest prompt.

    Returns:
        The means in float64.
    """
    totals: dict[Site, Tensor] = {}
    counts: dict[Site, Tensor] = {}
    for run in runs:
        for site, has_position in sites:
            value = run.value(site).double()
            view = run.model.tap(site).view
            if isinstance(view, KeyRow):
                value = view.fit(value, n_positions)  # batches have keys for their longest prompt
            if not has_position:
                _add(totals, counts, site, value.sum(0), torch.tensor(float(len(value)), device=value.device))
                continue
            n_columns = value.shape[1]
            real = torch.as_tensor(np.arange(n_columns)[None] - run.batch.start[:, None], device=value.device)
            mask = torch.as_tensor(run.batch.mask, device=value.device)
            slot = real[mask] if mean.over == "pairs" else torch.zeros_like(real[mask])
            n_slots = n_positions if mean.over == "pairs" else 1
            total = torch.zeros(n_slots, *value.shape[2:], dtype=torch.float64, device=value.device)
            total.index_add_(0, slot, value[mask])
            _add(totals, counts, site, total, torch.bincount(slot, minlength=n_slots).double())
    fitted = {}
    for site, has_position in sites:
        count = counts[site]
        value = totals[site] / count.reshape(count.shape + (1,) * (totals[site].ndim - count.ndim))
        fitted[site, mean] = value[0] if has_position and mean.over == "positions" else value
    return Means(fitted)


def _add(totals: dict[Site, Tensor], counts: dict[Site, Tensor], site: Site, total: Tensor, count: Tensor) -> None:
    totals[site] = totals[site] + total if site in totals else total
    counts[site] = counts[site] + count if site in counts else count
