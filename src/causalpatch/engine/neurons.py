"""Neurons written behind the activation, straight into the stream: a column of the down projection for each.

Where a layer adds what its MLP's down projection gives to the stream, and does nothing else to it, a neuron's new value
changes the stream by its difference times its column of the projection. That is a row of numbers for each run, instead
of a product with the whole matrix. Whether a layer is so is tried on it first, with differences larger than the stream.
"""

from collections.abc import Callable, Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.engine.hooks import Write
from causalpatch.engine.stack import Place, Stack, StackRun
from causalpatch.models import EachColumns, plain_rows

# Largest difference of the two ways, as a share of the largest number in the stream. In fewer bits than these the two
# round so differently that patched and untouched runs would no longer be alike.
_TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5}

Full = Callable[[Sequence[Write]], Float[Tensor, "row width"]]


class Neurons:
    """Knows of which layers the neurons may be written straight into the stream.

    Args:
        stack: The layers.
        run: The captured run.
    """

    def __init__(self, stack: Stack, run: StackRun) -> None:
        self.stack, self.run = stack, run
        self._is_sum: dict[int, bool] = {}
        self._columns: tuple[int, Tensor | None] | None = None  # of one layer at a time

    def takes(self, layer: int, writes: Sequence[Write]) -> bool:
        """Say whether writes are of neurons alone, whose places in the stream's sum are known."""
        if len(writes) != 1 or writes[0].tap.port != self.stack.blocks[layer].mlp_post:
            return False
        view = writes[0].tap.view
        return isinstance(view, EachColumns) and view.squeeze and self._columns_of(layer) is not None

    def is_known(self, layer: int) -> bool:
        """Say whether the layer was tried already."""
        return layer in self._is_sum

    def is_sum(self, layer: int) -> bool:
        """Say whether the layer adds to the stream what its neurons give, and no more."""
        return self._is_sum[layer]

    def try_out(self, layer: int, write: Write, place: Place, full: Full) -> None:
        """Change neurons by more than the stream, both ways, and remember whether that comes to the same.

        Args:
            layer: The layer.
            write: Neurons of a few rows.
            place: Where each row belongs.
            full: The plain way: calls the layer on these rows with writes.
        """
        columns, stream = cast(Tensor, self._columns_of(layer)), place.rows_of(self.run.inputs[layer + 1])
        size = stream.abs().amax() / columns.abs().amax().clamp_min(torch.finfo(columns.dtype).tiny)

        def shake(current: Tensor) -> Tensor:
            steps = torch.arange(1, len(current) + 1, device=current.device, dtype=current.dtype)
            return current + size * (2 + torch.sin(steps))

        shaken = Write(write.tap, write.index, shake)
        wanted, got = full([shaken]), self.stream(layer, shaken, place)
        tolerance = _TOLERANCES[columns.dtype] * wanted.abs().amax()
        self._is_sum[layer] = bool(((got - wanted).abs() <= tolerance).all())

    def stream(self, layer: int, write: Write, place: Place) -> Float[Tensor, "row width"]:
        """Return the stream out of a layer.

        Args:
            layer: The layer.
            write: The neurons, at index ``(0, row)``.
            place: Where each row belongs.
        """
        rows, view, kept = write.index[1], write.tap.view, self.run.kept[self.stack.blocks[layer].mlp_post]
        neurons = torch.as_tensor(cast(EachColumns, view).starts, device=rows.device)
        columns = cast(Tensor, self._columns_of(layer))[neurons]
        old = kept[place.slot[rows], place.position[rows], neurons]
        new = write.value if isinstance(write.value, Tensor) else write.value(old)
        change = (new.to(old) - old)[:, None]
        stream = place.rows_of(self.run.inputs[layer + 1])
        if len(rows) == len(stream) and bool((rows[1:] > rows[:-1]).all()):
            return stream.addcmul_(change, columns)
        return stream.index_add_(0, rows, columns.mul_(change))

    def forget(self) -> None:
        """Let go of the weights that were looked at last; what was found out about layers stays."""
        self._columns = None

    def _columns_of(self, layer: int) -> Float[Tensor, "neuron width"] | None:
        """Return what each neuron adds to the stream, where that is a plain matrix product."""
        if self._columns is None or self._columns[0] != layer:
            down = plain_rows(self.stack.model.module.get_submodule(self.stack.blocks[layer].mlp_post.path))
            self._columns = (layer, None if down is None or down.dtype not in _TOLERANCES else down.contiguous())
        return self._columns[1]
