"""What is written on the way through attention of packed rows: queries, keys, scores and patterns.

Queries and keys of rows lie in one tensor and are written there. A row's scores lie with those of its group, over the
base run's keys and then its segment's own, in whatever order these came. So the written rows are spread over the tokens
of the prompt, written by the same view as whole prompts are, and put back.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalpatch.engine.hooks import Write
from causalpatch.engine.segments import Group
from causalpatch.models.taps import Side
from causalpatch.models.views import Companions, take

WritesOf = Callable[[int], Sequence[Write]]
"""From the number of a group to its writes of scores and patterns, at index ``(0, row of the group)``."""


@dataclass(frozen=True)
class Steps:
    """What is written inside attention in one call.

    Args:
        turned: Writes of queries and keys, at index ``(0, row)``.
        writes_of: Finds the writes of scores and patterns; None where there are none.
    """

    turned: Sequence[Write] = ()
    writes_of: WritesOf | None = None

    def turn(self, side: Side, tensor: Float[Tensor, "one head row head_width"]) -> Tensor:
        """Return queries or keys with what is written there."""
        writes = [write for write in self.turned if write.tap.port.side == side]
        if not writes:
            return tensor
        rows = tensor.transpose(1, 2).clone()
        for write in writes:
            _put(write, write.index, rows, ())
        return rows.transpose(1, 2)

    def in_group(self, number: int, group: Group, tokens: np.ndarray, visible: np.ndarray) -> "GroupSteps | None":
        """Return what is written of a group's scores and patterns, or None.

        Args:
            number: The group's number.
            group: The group.
            tokens: Its segments' own keys, in the order in which they stand.
            visible: Which keys each token sees, ``(prompt or 1, query_position, key_position)``.
        """
        writes = self.writes_of(number) if self.writes_of is not None else ()
        if not writes:
            return None
        return GroupSteps(writes, group, np.concatenate([np.arange(group.start), tokens]), visible)


@dataclass(frozen=True)
class GroupSteps:
    """What is written of the scores and patterns of one group.

    Args:
        writes: The writes, at index ``(0, row of the group)``.
        group: The group.
        keys: The token of each key, in the order in which keys stand.
        visible: Which keys each token sees, ``(prompt or 1, query_position, key_position)``.
    """

    writes: Sequence[Write]
    group: Group
    keys: Int[np.ndarray, " key"]
    visible: Bool[np.ndarray, "batch query_position key_position"]

    def put(self, side: Side, tensor: Float[Tensor, "segment head query key"]) -> None:
        """Write scores or patterns in place."""
        writes = [write for write in self.writes if write.tap.port.side == side]
        if not writes:
            return
        device = tensor.device
        rows = torch.unique(torch.cat([write.index[1] for write in writes]))
        segment, query = rows // tensor.shape[2], rows % tensor.shape[2]
        keys = torch.as_tensor(self.keys, device=device)
        sees = torch.as_tensor(self._sees(segment.cpu().numpy(), query.cpu().numpy()), device=device)
        spread = tensor.new_zeros(1, len(rows), tensor.shape[1], sees.shape[-1])
        spread[0][:, :, keys] = tensor[segment, :, query]
        for write in writes:
            index = (write.index[0], torch.searchsorted(rows, write.index[1]))
            _put(write, index, spread, (sees[None, :, None],))
        tensor[segment, :, query] = spread[0][:, :, keys]

    def _sees(self, segment: np.ndarray, query: np.ndarray) -> Bool[np.ndarray, "row key_position"]:
        """Return which tokens of its prompt each row sees."""
        slots = np.repeat(self.group.slots, self.group.count)[segment]
        found: np.ndarray = self.visible[np.minimum(slots, len(self.visible) - 1), self.group.tokens[query]]
        return found


def _put(write: Write, index: tuple[Tensor, ...], tensor: Tensor, companions: Companions) -> None:
    view, value = write.tap.view, write.value
    new = value if isinstance(value, Tensor) else value(take(view, tensor, companions, index))
    view.write(tensor, companions, index, new.to(tensor))
