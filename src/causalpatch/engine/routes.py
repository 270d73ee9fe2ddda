"""Near ties of routers: runs in which rounding may have chosen the experts.

A router picks a token's experts by a comparison. Prompts that share a forward round otherwise than each by itself, so
where two experts are nearly level the choice may flip, and with it the number that is measured: not by rounding, but by
what another expert does. In forwards of several rows

1. each router is asked again about its own input, moved by a few units in the last place, several times;
2. a row with a real token that would have got other experts is taken out, and measured by a forward of its own; where
   it is an untouched run, all runs of its pair are;
3. the smallest margin is kept for the record: how far the last expert that was chosen lay above the first that was
   not, in the router's own logits.

Rows whose routing is replaced in every layer with experts are not watched: there nothing is chosen.

Cost: a router's product, width x experts, once more for each trial; nothing for models without experts.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from causalpatch.base.seeds import generator
from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.values import Row
from causalpatch.models import Model
from causalpatch.pairs import Batch
from causalpatch.sites import Site

N_TRIALS = 4
# Streams of the tiny families differed by up to 6 units in the last place of their size between one row in a forward
# and many (float32); in half precision a unit is as large as many a margin, and two are what a sum of two terms does.
_UNITS = {torch.float64: 16.0, torch.float32: 16.0}
_UNITS_IN_HALF = 2.0


@dataclass
class Ties:
    """Runs of a job that are too near a tie, as they become known.

    Args:
        cells: Their interventions and pairs; ``BASE`` of ``job`` for an untouched run.
        margin: The smallest margin of any router at any real token of a row; infinite where none was seen.
    """

    cells: set[tuple[int, int]] = field(default_factory=set)
    margin: float = math.inf

    def look(
        self,
        rows: Sequence[Row],
        site: Site,
        is_real: Bool[Tensor, "row position"],
        router: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        """Note what one router did in a forward of several rows; a hook on it.

        Args:
            rows: The rows.
            site: The router's site.
            is_real: Which tokens are not padding.
            router: The router.
            args: What it was given by place.
            kwargs: What it was given by name.
            output: What it gave.
        """
        logits, _, chosen = output
        given = next(iter((*args, *kwargs.values())))
        hidden = given.reshape(-1, given.shape[-1])
        is_open = (_flips(router, hidden, chosen) & is_real.reshape(-1)).reshape(is_real.shape).any(1)
        margins = _margins(logits, chosen).reshape(is_real.shape)
        watched = torch.tensor([not _is_given(row, site) for row in rows], device=is_real.device)
        seen = margins[is_real & watched[:, None]]
        if len(seen):
            self.margin = min(self.margin, float(seen.min()))
        self.cells.update((rows[n].intervention, rows[n].pair) for n in (is_open & watched).nonzero()[:, 0].tolist())


@contextmanager
def watching(ties: Ties | None, model: Model, rows: Sequence[Row], inputs: Batch) -> Iterator[None]:
    """Look at the routers of a model while rows run in one forward.

    Args:
        ties: Takes the notes; with None nothing is looked at.
        model: The model.
        rows: What runs; a row alone is what the others are held against, and is not looked at.
        inputs: Their prompts.
    """
    if ties is None or len(rows) == 1:
        yield
        return
    is_real = torch.as_tensor(inputs.mask, device=model.device)
    with ExitStack() as hooks:
        for site in (Site("router", layer) for layer in router_layers(model)):
            router = model.module.get_submodule(model.tap(site).port.path)
            hook = in_this_thread(partial(ties.look, rows, site, is_real))
            hooks.callback(router.register_forward_hook(hook, with_kwargs=True).remove)
        yield


def router_layers(model: Model) -> list[int]:
    """Return the layers of a model that have a router."""
    if model.family is None or "router" in model.shape.refused:
        return []
    return model.shape.layers_with("router")


def _is_given(row: Row, site: Site) -> bool:
    """Tell whether a row's routing in a layer is replaced at all tokens."""
    every = [target for target, _ in row.targets if target.site == site]
    return any(target.position is None for target in every)


def _flips(router: nn.Module, hidden: Float[Tensor, "token width"], chosen: Tensor) -> Bool[Tensor, " token"]:
    """Tell which tokens would get other experts if what the router sees were rounded otherwise."""
    units = _UNITS.get(hidden.dtype, _UNITS_IN_HALF)
    size = hidden.double().square().mean(1, keepdim=True).sqrt() * units * torch.finfo(hidden.dtype).eps
    draw = generator(0, "router")
    wanted = chosen.sort(1).values
    flips = torch.zeros(len(hidden), dtype=torch.bool, device=hidden.device)
    for _ in range(N_TRIALS):
        signs = torch.as_tensor(draw.integers(0, 2, hidden.shape[1]) * 2.0 - 1.0, device=hidden.device)
        for moved in (hidden + size * signs, hidden - size * signs):
            # Not by a call, on which hooks stand.
            again = router.forward(moved.to(hidden.dtype))[2]
            flips |= (again.sort(1).values != wanted).any(1)
    return flips


def _margins(logits: Float[Tensor, "token expert"], chosen: Tensor) -> Float[Tensor, " token"]:
    """Return how far the last chosen expert lies above the first that is not; infinite where logits do not decide."""
    is_chosen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, chosen, value=True)
    least = logits.masked_fill(~is_chosen, math.inf).amin(1)
    most = logits.masked_fill(is_chosen, -math.inf).amax(1)
    margins = (least - most).double()
    # The order of what is computed from logits may be another only where these are level up to rounding.
    decides = bool((margins >= -8 * torch.finfo(logits.dtype).eps * logits.abs().amax(1)).all())
    return margins.clamp(min=0) if decides else torch.full_like(margins, math.inf)
