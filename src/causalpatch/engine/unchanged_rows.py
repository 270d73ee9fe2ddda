"""Queries, keys and values of rows that enter a layer unchanged: gathered from the base run, not multiplied again.

A run that is patched at some tokens has the base run's stream at all others, up to and into the first layer that it
passes whole; only behind that layer's attention may every later token differ. So there the projections to queries, keys
and values run on the written tokens alone, and so does the MLP of a parallel block, which reads the same stream.

1. Before the base run, ``kept_ports`` says which of these modules' outputs will be wanted.
2. ``UnchangedRows`` knows the tokens of each segment whose stream is written.
3. For a call of a layer each module's forward is replaced by one that runs on the changed rows and puts the base run's
   outputs beside them. Hooks on the module see the whole, so patched queries, keys and values come on top.

Assumes what the wavefront assumes of layers: but for attention each row is treated by itself. Projections are replaced
where they are plain linear modules, an MLP where nothing is patched within it; all else runs on all rows as it is.

Cost: products with the changed rows instead of all, for two copies of each row's outputs; and the memory of these
outputs in the base run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from causalpatch.engine.bypass import bypassed
from causalpatch.engine.hooks import Write
from causalpatch.engine.job import Job
from causalpatch.engine.resolve import Target
from causalpatch.engine.segments import Entry, Layout, Segments, entry_of
from causalpatch.engine.stack import Place, Stack, StackRun, layer_of
from causalpatch.models import Model, Port, plain_widths
from causalpatch.sites import Site
from causalpatch.sites.names import ATTENTION_SITES

SHARE = 0.25
"""Share of a call's rows that must be unchanged. By count: of width w, an unchanged row saves 3 w w multiply-adds for
6 w numbers that are copied, and each changed one beside it has 4 w more copied. Calls of their own for segments that
enter a layer lose more by the small products than they gain."""

_PROJECTED = ("q", "k", "v")
# Written behind the stream into the layer, which stays as it is.
_BEHIND_STREAM = ATTENTION_SITES | {*_PROJECTED, "q_bias", "k_bias", "v_bias"}


def kept_ports(job: Job) -> list[Port]:
    """Return the modules' outputs in which rows of a job's runs are as in the base run, and which are then kept.

    Args:
        job: What is measured; what is screened in few bits keeps other things.
    """
    if job.few_bits is not None:
        return []
    layers = {_entered_in_part(job.model, targets) for targets in job.interventions} - {None}
    return [port for layer in range(job.model.shape.n_layers) if layer in layers for port in _ports(job.model, layer)]


def numbers_per_token(job: Job) -> int:
    """Return how many numbers ``kept_ports`` holds for each token of the untouched runs."""
    found = (plain_widths(job.model.module.get_submodule(port.path)) for port in kept_ports(job))
    return sum(job.model.width if widths is None else widths[1] for widths in found)


def _entered_in_part(model: Model, targets: Sequence[Target]) -> int | None:
    """Return the layer that a run passes whole first if rows of it can be as in the base run there, else None."""
    one = targets[0]
    writes_all = one.column is None and (one.position is None or one.position == -1)
    if len(targets) == 1 and writes_all and one.site.name not in _BEHIND_STREAM:
        return None
    sites = [target.site for target in targets]
    layers = [layer_of(model, site.module.path) if site.module is not None else site.layer for site in sites]
    n_layers = model.shape.n_layers
    return min(entry_of(target, layer, n_layers).depth for target, layer in zip(targets, layers, strict=True))


def _ports(model: Model, layer: int) -> tuple[Port, ...]:
    """Return what a layer computes of each row by itself: q, k and v where they are plain linear, a parallel MLP."""
    named = (Site(name, layer, 0) for name in _PROJECTED if name not in model.shape.refused)
    ports = [port for port in dict.fromkeys(model.tap(site).port for site in named) if _is_plain(model, port)]
    is_parallel = "resid_mid" in model.shape.refused
    return (*ports, Port(_mlp(model, layer), "output")) if is_parallel else tuple(ports)


def _is_plain(model: Model, port: Port) -> bool:
    """Say whether a port is all that a plain linear module gives."""
    is_output = port.side == "output" and not port.items
    return is_output and plain_widths(model.module.get_submodule(port.path)) is not None


def _mlp(model: Model, layer: int) -> str:
    """Return the path of a layer's MLP."""
    return model.tap(Site("mlp_post", layer, 0)).port.path.rpartition(".")[0]


class UnchangedRows:
    """Knows which rows of segments are as in the base run up to the attention of a layer.

    Args:
        stack: The layers.
        run: The captured run.
        segments: The segments.
        entries: Where each target of each segment comes in.
    """

    def __init__(self, stack: Stack, run: StackRun, segments: Segments, entries: Sequence[Sequence[Entry]]) -> None:
        self.stack, self.run, self.segments = stack, run, segments
        self.first = segments.first_whole
        kept = frozenset() if run.deltas else frozenset(run.kept)
        layers = [layer for layer in np.unique(self.first).tolist() if layer < stack.n_layers and kept]
        by_layer = {layer: [port for port in _ports(stack.model, layer) if port in kept] for layer in layers}
        self._known = {layer: ports for layer, ports in by_layer.items() if ports}
        self._owner, self._token = self._written(entries)

    @contextmanager
    def gathered(self, layer: int, layout: Layout, place: Place, writes: Sequence[Write]) -> Iterator[None]:
        """Within the context, a layer computes what it can of the changed rows of a call alone.

        Args:
            layer: The layer.
            layout: The rows of the call.
            place: Where each row belongs.
            writes: What is written in the call.
        """
        # Rows are counted by all who write within a module.
        ports = [port for port in self._known.get(layer, ()) if not any(_is_within(write, port) for write in writes)]
        changed = self._changed(layer, layout) if ports else np.ones(1, dtype=bool)
        if changed.mean() > 1 - SHARE:
            yield
            return
        rows, rest = (torch.as_tensor(np.flatnonzero(x), device=place.slot.device) for x in (changed, ~changed))
        base = Place(place.slot[rest], place.position[rest])
        with ExitStack() as modules:
            for port in ports:
                module, kept = self.stack.model.module.get_submodule(port.path), self.run.kept[port]
                if kept.shape[:-1] == self.run.batch.ids.shape:
                    modules.enter_context(bypassed(module, _beside(module.forward, rows, rest, base, kept)))
            yield

    def _written(
        self, entries: Sequence[Sequence[Entry]]
    ) -> tuple[Int[np.ndarray, " element"], Int[np.ndarray, " element"]]:
        """Return the tokens whose stream is written, for the first layer that their segment passes whole."""
        owners, tokens = [], []
        for number, (row, some, first) in enumerate(zip(self.segments.rows, entries, self.first.tolist(), strict=True)):
            for (target, place), entry in zip(row.targets if first in self._known else (), some, strict=False):
                if entry.depth == first and place is not None and target.site.name not in _BEHIND_STREAM:
                    owners.append(number)
                    tokens.append(place.base)
        if not owners:
            return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        return np.repeat(owners, [len(some) for some in tokens]), np.concatenate(tokens)

    def _changed(self, layer: int, layout: Layout) -> Bool[np.ndarray, " row"]:
        """Return which rows may differ from the base run before the layer's attention."""
        chosen = layout.chosen
        changed: np.ndarray = (self.first[chosen] < layer)[layout.owner]
        some = slice(*np.searchsorted(self._owner, [chosen[0], chosen[-1] + 1]))
        owner = np.searchsorted(chosen, self._owner[some])
        is_here = chosen[owner] == self._owner[some]
        found = layout.find(owner[is_here], self._token[some][is_here])
        changed[found[found >= 0]] = True
        return changed


def _is_within(write: Write, port: Port) -> bool:
    """Say whether something is written within the module of a port, not at its door."""
    ports = (write.tap.port, *write.tap.companions)
    return any(each.path.startswith(f"{port.path}.") for each in ports)


def _beside(
    own: Callable[..., Tensor], rows: Int[Tensor, " changed"], rest: Int[Tensor, " same"], base: Place, kept: Tensor
) -> Callable[..., Tensor]:
    """Return a module's forward that runs on the changed rows and takes the others from the base run.

    Args:
        own: The module's forward.
        rows: The changed rows.
        rest: All others.
        base: Where the others belong.
        kept: What the module gave in the base run.
    """
    n_rows = len(rows) + len(rest)

    def forward(*given: Any, **named: Any) -> Tensor:
        if named or len(given) != 1 or given[0].shape[:-1] != (1, n_rows):
            return own(*given, **named)  # something else than the rows of the call
        known = base.rows_of(kept)
        if not len(rows):
            return known[None]
        fresh = own(given[0][:, rows])
        out = fresh.new_empty(1, n_rows, fresh.shape[-1])
        out[0].index_copy_(0, rows, fresh[0])
        out[0].index_copy_(0, rest, known.to(out))
        return out

    return forward
