"""Tokens that go as far as their keys and values: their queries are not worked out.

In the last layer most tokens are there for others to attend to. Where queries stand in front of keys and values in one
plain projection, or have one of their own, the projection is made without them; nothing looks at what stands there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from causalpatch.engine.bypass import bypassed
from causalpatch.engine.hooks import Write
from causalpatch.engine.stack import StackRun
from causalpatch.models import Columns, Model, plain_rows
from causalpatch.sites import Site


@contextmanager
def without_queries(model: Model, run: StackRun, layer: int, writes: Sequence[Write]) -> Iterator[None]:
    """Within the context, a layer's projection gives zeros for queries.

    Args:
        model: The model, without gradients.
        run: The captured run; where linear maps are replayed in few bits nothing is left out.
        layer: The layer.
        writes: What is written in the call.
    """
    found = None if run.deltas else _projection(model, layer)
    if found is None or any(write.tap.port.path == found[0] for write in writes):
        yield
        return
    path, n_queries = found
    module = model.module.get_submodule(path)
    with bypassed(module, _rest(module, n_queries)):
        yield


def _projection(model: Model, layer: int) -> tuple[str, int] | None:
    """Return the path of the projection to queries, and how many of its first columns are theirs."""
    if "q" in model.shape.refused:
        return None
    taps = [model.tap(Site("q", layer, head)) for head in range(model.n_heads)]
    port, views = taps[0].port, [tap.view for tap in taps if isinstance(tap.view, Columns)]
    weight = plain_rows(model.module.get_submodule(port.path))
    if weight is None or len(views) < len(taps) or port.side != "output" or port.items:
        return None
    if [view.start for view in views] != [number * views[0].width for number in range(len(views))]:
        return None
    return port.path, len(views) * views[0].width


def _rest(module: nn.Module, n_zeros: int) -> Callable[[Tensor], Tensor]:
    """Return a plain projection's forward, in which some first columns are zeros."""
    weight, bias, own = cast(Tensor, plain_rows(module)), cast("Tensor | None", module.bias), module.forward

    def forward(x: Tensor) -> Tensor:
        if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
            return cast(Tensor, own(x))
        out = x.new_zeros(*x.shape[:-1], weight.shape[1])
        rows, made = x.reshape(-1, x.shape[-1]), out.view(-1, weight.shape[1])[:, n_zeros:]
        if bias is None:
            torch.mm(rows, weight[:, n_zeros:], out=made)
        else:
            torch.addmm(bias[n_zeros:], rows, weight[:, n_zeros:], out=made)
        return out

    return forward
