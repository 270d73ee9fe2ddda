"""Heads written behind attention, straight into what attention adds: their rows of the output projection alone.

A head that hands on something else changes what attention gives by its difference times its own rows of the output
projection. That is a product as wide as a head, instead of one with the whole matrix for every row. It holds where the
projection is a plain linear map; what its output goes through on the way to the stream, such as a post-norm, is the
layer's own affair and sees the whole.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.engine.hooks import Write
from causalpatch.engine.stack import Place, Stack, StackRun
from causalpatch.models import Columns, EachColumns, Port, plain_rows
from causalpatch.models.views import take


class HeadShares:
    """Knows what attention gives when some heads hand on something else.

    Args:
        stack: The layers.
        run: The captured run.
    """

    def __init__(self, stack: Stack, run: StackRun) -> None:
        self.stack, self.run = stack, run

    def takes(self, layer: int, writes: Sequence[Write]) -> bool:
        """Say whether writes are of heads alone, whose places in the projection are known."""
        block = self.stack.blocks[layer]
        is_kept = not self.run.deltas and Port(block.attention, "output") in self.run.kept
        return (
            is_kept
            and bool(writes)
            and all(write.tap.port == block.z and isinstance(write.tap.view, Columns | EachColumns) for write in writes)
            and self._weight_of(layer) is not None
        )

    def given(self, layer: int, writes: Sequence[Write], place: Place) -> Float[Tensor, "row width"]:
        """Return what attention gives.

        Args:
            layer: The layer.
            writes: The heads, at index ``(0, row)``.
            place: Where each row belongs.
        """
        block, weight = self.stack.blocks[layer], self._weight_of(layer)
        if weight is None:
            raise LookupError(block.z)
        z = place.rows_of(self.run.kept[block.z])[None]
        mixed = z.clone()
        for write in writes:
            view, value = write.tap.view, write.value
            new = value if isinstance(value, Tensor) else value(take(view, mixed, (), write.index))
            view.write(mixed, (), write.index, new.to(mixed))
        change = mixed.sub_(z)[0]
        given = place.rows_of(self.run.kept[Port(block.attention, "output")])
        for columns, rows in _rows_by_head(writes):
            given.index_add_(0, rows, change[rows, columns] @ weight[columns])
        return given

    def _weight_of(self, layer: int) -> Float[Tensor, "column width"] | None:
        weight = plain_rows(self.stack.model.module.get_submodule(self.stack.blocks[layer].z.path))
        return None if weight is None else weight.detach()


def _rows_by_head(writes: Sequence[Write]) -> Iterator[tuple[slice, Int[Tensor, " row"]]]:
    """Yield the columns of each head that is written, and its rows, each once."""
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    for write in writes:
        view, rows = write.tap.view, write.index[1].cpu().numpy()
        if isinstance(view, Columns):
            found.setdefault((view.start, view.width), []).append(rows)
        elif isinstance(view, EachColumns):
            for start in np.unique(view.starts).tolist():
                found.setdefault((start, view.width), []).append(rows[view.starts == start])
    for (start, width), parts in found.items():
        rows = np.unique(np.concatenate(parts))
        yield slice(start, start + width), torch.as_tensor(rows, device=writes[0].index[1].device)
