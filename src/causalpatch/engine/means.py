"""Means of sites over prompts, for mean ablation: summed in float64 batch by batch, pads excluded."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.base.errors import PairError, PatchError
from causalpatch.engine.capture import Captured
from causalpatch.engine.resolve import Placement
from causalpatch.models import KeyRow
from causalpatch.patches import Mean
from causalpatch.sites import Site


@dataclass(frozen=True)
class Table:
    """Values to be put in, looked up by the group of the pair and the token.

    Args:
        values: Axes (group where there are groups, position where ``by_position``, value axes); NaN where none is.
        what: What they are, for errors.
        by_position: Whether each real-token position has its own.
        groups: The groups that have their own.
    """

    values: Float[Tensor, "..."]
    what: str
    by_position: bool = False
    groups: tuple[str, ...] = ()

    def at(self, placement: Placement | None, groups: Sequence[str | None]) -> Float[Tensor, "element *axes"]:
        """Return the value of each element.

        Args:
            placement: The base token of each element; None for sites without positions.
            groups: The group of each element's pair.

        Raises:
            PatchError: There is none at a token.
            PairError: There is none for a group.
        """
        index: list[np.ndarray] = []
        if self.groups:
            index.append(self._numbers(groups))
        if self.by_position and placement is not None:
            longest, n_tokens = int(placement.base.max()), self.values.shape[len(index)]
            if longest >= n_tokens:
                self._refuse(longest, n_tokens)
            index.append(placement.base)
        if not index:
            return self.values.expand(len(groups), *self.values.shape)
        found = self.values[tuple(torch.as_tensor(each, device=self.values.device) for each in index)]
        missing = found.isnan().reshape(len(found), -1).any(1)
        if placement is not None and bool(missing.any()):
            self._refuse(int(placement.base[missing.cpu().numpy()][0]), None)
        return found

    def _numbers(self, groups: Sequence[str | None]) -> Int[np.ndarray, " element"]:
        known: dict[str | None, int] = {name: number for number, name in enumerate(self.groups)}
        for group in groups:
            if group not in known:
                raise PairError(
                    f"there is no {self.what} for group {group!r}",
                    facts=[("groups", ", ".join(self.groups)[:88])],
                    fix="fit it on pairs of the same groups, or leave out per_group",
                )
        return np.array([known[group] for group in groups], dtype=np.int64)

    def _refuse(self, token: int, n_tokens: int | None) -> None:
        where = "no prompt of the group has it" if n_tokens is None else f"{n_tokens} tokens where it was fitted"
        raise PatchError(
            f"there is no {self.what} at token {token}",
            facts=[("longest prompt", where)],
            fix='take one mean over all positions: Mean(over="positions")',
        )


@dataclass(frozen=True)
class Means:
    """Fitted means.

    Args:
        of: The mean of each site: ``[position, *value_axes]`` with NaN where no prompt has the position, or
            ``[*value_axes]`` for means over positions and sites without them; a mean per group has an axis of groups
            in front.
        groups: The groups of means per group.
    """

    of: Mapping[tuple[Site, Mean], Float[Tensor, "..."]] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

    def at(
        self, site: Site, mean: Mean, placement: Placement | None, groups: Sequence[str | None]
    ) -> Float[Tensor, "element *axes"]:
        """Return the mean for each element of a write.

        Args:
            site: The site.
            mean: Which mean.
            placement: The base token of each element; None for sites without positions.
            groups: The group of each element's pair.

        Raises:
            PatchError: No prompt of the mean's side, or of the group, has a token.
        """
        by_position = placement is not None and mean.over == "pairs"
        names = self.groups if mean.per_group else ()
        table = Table(self.of[site, mean], f"mean of '{site}'", by_position=by_position, groups=names)
        return table.at(placement, groups)


def fit_means(
    runs: Iterator[tuple[np.ndarray, Captured]],
    sites: Sequence[tuple[Site, bool]],
    mean: Mean,
    n_positions: int,
    n_keys: int,
    groups: Int[np.ndarray, " pair"] | None = None,
) -> dict[tuple[Site, Mean], Tensor]:
    """Fit the means of sites over runs.

    Args:
        runs: The pairs of each batch, and their captured runs of the mean's side.
        sites: The sites, and whether each has positions.
        mean: Which mean.
        n_positions: Tokens of the longest prompt.
        n_keys: Keys that values over keys have.
        groups: The number of each pair's group, for means per group.

    Returns:
        The means in float64.
    """
    totals: dict[Site, Tensor] = {}
    counts: dict[Site, Tensor] = {}
    n_groups = 1 if groups is None else int(groups.max()) + 1
    for indices, run in runs:
        of_row = np.zeros(len(indices), dtype=np.int64) if groups is None else groups[indices]
        for site, has_position in sites:
            value = run.value(site).double()
            view = run.model.tap(site).view
            if isinstance(view, KeyRow):
                value = view.fit(value, n_keys)  # batches have keys for their longest prompt
            n_slots = n_positions if has_position and mean.over == "pairs" else 1
            slots = (of_row * n_slots)[:, None]
            if has_position:
                batch = run.batch_of(site)
                if mean.over == "pairs":
                    slots = slots + np.arange(value.shape[1]) - batch.start[:, None]
                slots = np.broadcast_to(slots, value.shape[:2])[batch.mask]
                value = value[torch.as_tensor(batch.mask, device=value.device)]
            slot = torch.as_tensor(slots.reshape(-1), device=value.device)
            total = torch.zeros(n_groups * n_slots, *value.shape[1:], dtype=torch.float64, device=value.device)
            total.index_add_(0, slot, value)
            _add(totals, counts, site, total, torch.bincount(slot, minlength=len(total)).double())
    fitted = {}
    for site, has_position in sites:
        count = counts[site]
        value = totals[site] / count.reshape((-1, *[1] * (totals[site].ndim - 1)))
        keeps_positions = has_position and mean.over == "pairs"
        lead = ([] if groups is None else [n_groups]) + ([n_positions] if keeps_positions else [])
        fitted[site, mean] = value.reshape((*lead, *value.shape[1:]))
    return fitted


def _add(totals: dict[Site, Tensor], counts: dict[Site, Tensor], site: Site, total: Tensor, count: Tensor) -> None:
    totals[site] = totals[site] + total if site in totals else total
    counts[site] = counts[site] + count if site in counts else count
