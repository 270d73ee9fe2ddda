"""One wave: segments move on together, layer by layer, and each layer's own module runs on the rows that changed.

Where a segment enters behind attention, or behind the MLP's activation, only its written tokens are rows of that layer,
and the modules in front are replaced for the call by what they gave in the base run. In the first layer that it passes
whole, a segment's unwritten tokens take their queries, keys and values from the base run (``unchanged_rows``). In the
last layer tokens that nothing reads go as far as their keys and values.

Symbols: R rows (a token of a segment each), L layers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from causalpatch.base.errors import EnoughError
from causalpatch.engine.bypass import bypassed
from causalpatch.engine.fetched import holding_layer
from causalpatch.engine.hooks import Write, hooked
from causalpatch.engine.job import Cost
from causalpatch.engine.resolve import Target
from causalpatch.engine.row_steps import Steps
from causalpatch.engine.rows import Own, RowAttention
from causalpatch.engine.scene import Placed, Scene
from causalpatch.engine.segments import DOWN, INPUT, PROJECTION, STAGES, UP, Group, Layout, cut
from causalpatch.engine.stack import Place, call_layer
from causalpatch.engine.unchanged_rows import UnchangedRows
from causalpatch.engine.unread_queries import without_queries
from causalpatch.engine.values import writes_at
from causalpatch.engine.written import TargetsByLayer
from causalpatch.models import Port


class Wave:
    """Segments on their way through the layers.

    Args:
        scene: The untouched runs.
        placed: The segments.
        chunk_rows: Rows in one call of a layer.
        cost: Counts what is spent.
    """

    def __init__(self, scene: Scene, placed: Placed, chunk_rows: int, cost: Cost) -> None:
        self.scene, self.stack, self.run = scene, scene.stack, scene.run
        self.placed, self.segments = placed, placed.segments
        self.chunk_rows = chunk_rows
        self.cost = cost
        self.device = self.stack.model.device
        self.targets = TargetsByLayer(placed, self.stack.n_layers)
        self.unchanged = UnchangedRows(self.stack, self.run, self.segments, placed.entries)
        self.all = Layout.of(self.segments, np.arange(len(self.segments)))
        self.offset = np.cumsum(self.segments.lengths) - self.segments.lengths
        self.reads = self.all.where(self._is_read(self.all))
        self._attend: Callable[..., Tensor] = _unreachable
        self._next = 0  # layer
        inputs = self.run.inputs
        self._stream = inputs[0].new_empty(len(self.all), inputs[0].shape[-1])

    def stream(self) -> Float[Tensor, "row width"]:
        """Return the stream behind the last layer, for the rows of ``reads``, running what has not run yet."""
        with self.stack.running(self._dispatch):
            while self._next < self.stack.n_layers:
                with holding_layer(self.stack, self._next):
                    self._step()
        return self._stream

    def step(self, layer: int) -> None:
        """Go through a layer, and through those before it that have not run yet."""
        with self.stack.running(self._dispatch):
            while self._next <= layer:
                self._step()

    @property
    def entry(self) -> int:
        """The first layer that a segment enters, or the last one."""
        return int(min(self.segments.entry.min(initial=self.stack.n_layers), self.stack.n_layers - 1))

    def _step(self) -> None:
        segments, layer = self.segments, self._next
        self._next += 1
        if layer == self.stack.n_layers - 1:
            self._stream = self._last_layer(self._stream, layer)
            return
        here = segments.entry == layer
        self._enter(self._stream, layer, np.flatnonzero(here & (segments.stage == INPUT)))
        for moving in self._moving(layer):
            rows = self._rows(moving)
            self._stream[rows] = self._whole_layer(layer, Layout.of(segments, moving), self._stream[rows])
        for stage in STAGES[1:]:
            chosen = np.flatnonzero(here & (segments.stage == stage))
            self._enter(self._stream, layer + 1, chosen)
            self._behind(self._stream, layer, stage, chosen, self.all)

    def _moving(self, layer: int) -> Iterator[Int[np.ndarray, " segment"]]:
        """Yield the segments that go through the whole of a layer, those of one call together."""
        moving = np.flatnonzero(self.segments.first_whole <= layer)
        for part in cut(self.segments.lengths[moving], self.chunk_rows):
            yield moving[part]

    def logits(
        self,
        stream: Float[Tensor, "row width"],
        some: Int[np.ndarray, " segment"],
        local: Int[np.ndarray, " segment"],
        base: Float[Tensor, "pair read column"],
    ) -> Float[Tensor, "segment read column"]:
        """Return the logits of segments where they are read: the base run's before a segment, else computed.

        Args:
            stream: The stream behind the last layer, for the rows of ``reads``.
            some: Neighbouring segments.
            local: Their pairs in the batch.
            base: Logits of the base runs.
        """
        scene, device = self.scene, self.device
        rows = np.flatnonzero((self.reads.owner >= some[0]) & (self.reads.owner <= some[-1]))
        layout = Layout(self.segments, some, self.reads.owner[rows] - some[0], self.reads.token[rows])
        batch, slot = scene.prompts.batch, layout.slot
        tokens = batch.ids[slot, layout.token], batch.position_ids[slot, layout.token]
        with self.stack.running():
            writes = self._one_token_writes(self.stack.n_layers, layout)
            computed = scene.head.logits(
                stream[rows[0] : rows[-1] + 1], tokens, writes, scene.vocab, in_passing=scene.gauge.keeps_nothing
            )
        wanted = scene.tokens[scene.job.base][local]
        found = layout.find(np.repeat(np.arange(len(some)), wanted.shape[1]), wanted.reshape(-1))
        if np.array_equal(found, np.arange(len(layout))):
            return computed.reshape(*wanted.shape, -1)  # all of it, in order: copies of a vocabulary are dear
        logits = base[torch.as_tensor(local, device=device)]
        flat = logits.view(-1, logits.shape[-1])
        is_here = torch.as_tensor(found >= 0, device=device)
        flat[is_here] = computed[torch.as_tensor(found[found >= 0], device=device)]
        return logits

    def _one_token_writes(self, layer: int, layout: Layout) -> list[Write]:
        """Return what is patched in front of or behind the layers, for rows as prompts of one token."""

        def locate(owner: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
            found = layout.find(owner, tokens)
            return found, np.minimum(found, 0)

        return self._writes(layer, layout, locate)

    def _last_layer(self, stream: Tensor, layer: int) -> Float[Tensor, "row width"]:
        segments = self.segments
        here = segments.entry == layer
        self._enter(stream, layer, np.flatnonzero(here & (segments.stage == INPUT)))
        out = self._place(self.reads).rows_of(self.run.inputs[layer + 1])
        for moving in self._moving(layer):
            found, values = self._read_rows(layer, Layout.of(segments, moving), stream[self._rows(moving)])
            out[self._rows_in_reads(found)] = values
        for stage in STAGES[1:]:
            self._behind(out, layer, stage, np.flatnonzero(here & (segments.stage == stage)), self.reads)
        return out

    def _read_rows(self, layer: int, layout: Layout, hidden: Tensor) -> tuple[Layout, Tensor]:
        """Run the last layer: keys and values of all tokens, everything of those that are read."""
        is_read = self._is_read(layout)
        if is_read.all():
            return layout, self._whole_layer(layer, layout, hidden)
        unread, read = layout.where(~is_read), layout.where(is_read)
        # Segments of one group have the same tokens, so that groups of both layouts have the same segments.
        earlier = self._keys_and_values(layer, unread, hidden[torch.as_tensor(~is_read, device=self.device)])
        chosen = hidden[torch.as_tensor(is_read, device=self.device)]
        return read, self._whole_layer(layer, read, chosen, earlier)

    def _keys_and_values(self, layer: int, layout: Layout, hidden: Tensor) -> dict[int, Own]:
        found: list[Own] = []
        groups = [group for group in layout.groups() if len(group.tokens)]
        writes, turned = _apart(self._layer_writes(layer, layout, (INPUT,)))
        attention = RowAttention(groups, self.run.seen(layer), self.run.visible[layer], steps=Steps(turned))

        def stop(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, more: dict[str, Any]
        ) -> Tensor:
            found.extend(attention.keys_and_values(key, value))
            raise EnoughError

        with suppress(EnoughError), without_queries(self.stack.model, self.run, layer, writes):
            self._call(layer, layout, hidden, stop, writes)
        numbers = [number for number, group in enumerate(layout.groups()) if len(group.tokens)]
        return dict(zip(numbers, found, strict=True))

    def _whole_layer(
        self, layer: int, layout: Layout, hidden: Tensor, earlier: dict[int, Own] | None = None
    ) -> Float[Tensor, "row width"]:
        groups, seen, visible = layout.groups(), self.run.seen(layer), self.run.visible[layer]
        writes, inside = _apart(self._layer_writes(layer, layout))
        steps = Steps(inside, partial(self._writes_in, layer, layout, groups) if _are_over_keys(inside) else None)
        attention = RowAttention(groups, seen, visible, earlier or {}, steps)
        return self._call(layer, layout, hidden, attention.attend, writes)

    def _writes_in(self, layer: int, layout: Layout, groups: Sequence[Group], number: int) -> list[Write]:
        """Return what is written inside attention in one group of a layout, by rows of the group."""
        group, first = groups[number], sum(group.n_segments for group in groups[:number])
        rows = slice(group.first, group.first + group.n_rows)
        chosen = layout.chosen[first : first + group.n_segments]
        own = Layout(layout.segments, chosen, layout.owner[rows] - first, layout.token[rows])
        return _apart(self._layer_writes(layer, own, (INPUT,)))[1]

    def _call(
        self, layer: int, layout: Layout, hidden: Tensor, attend: Callable[..., Tensor], writes: Sequence[Write]
    ) -> Float[Tensor, "row width"]:
        self._attend = attend
        is_partial = attend is _unreachable  # attention was passed by
        self.cost.token_layers += len(layout)
        place = self._place(layout)
        with ExitStack() as around:
            if not is_partial:
                around.enter_context(self.unchanged.gathered(layer, layout, place, writes))
            if writes:
                around.enter_context(hooked(self.stack.model, writes))
            return call_layer(self.stack, self.run, layer, hidden, place, is_partial=is_partial)

    def _behind(self, stream: Tensor, layer: int, stage: int, chosen: np.ndarray, within: Layout) -> None:
        """Run the written tokens of segments that enter a layer behind attention or the activation.

        Args:
            stream: The stream out of the layer, for the rows of ``within``; changed in place.
            layer: The layer.
            stage: Where the segments enter.
            chosen: The segments.
            within: The rows that are wanted.
        """
        written = self._written(layer, chosen, within)
        for part in cut(np.ones(len(written), dtype=np.int64), self.chunk_rows):
            rows = written[part]
            layout = _rows_of(within, rows)
            writes = self._layer_writes(layer, layout)
            neurons = self.scene.neurons
            if stage == DOWN and neurons.takes(layer, writes) and self._add_up(layer, _rows_of(within, rows[:4])):
                out = neurons.stream(layer, writes[0], self._place(layout))
            else:
                out = self._call_behind(layer, stage, layout, writes)
            stream[torch.as_tensor(rows, device=self.device)] = out

    def _add_up(self, layer: int, few: Layout) -> bool:
        """Say whether a layer's neurons may be written straight into the stream; try it on a few rows if need be."""
        neurons = self.scene.neurons
        if not neurons.is_known(layer):
            writes = self._layer_writes(layer, few)
            neurons.try_out(layer, writes[0], self._place(few), partial(self._call_behind, layer, DOWN, few))
        return neurons.is_sum(layer)

    def _call_behind(
        self, layer: int, stage: int, layout: Layout, writes: Sequence[Write]
    ) -> Float[Tensor, "row width"]:
        """Call a layer on rows of the base run, with the modules in front of a stage passed by."""
        place = self._place(layout)
        attends: Tensor | None = None
        if stage == PROJECTION and self.scene.heads.takes(layer, writes):
            attends, writes = self.scene.heads.given(layer, writes, place), ()
        with ExitStack() as modules:
            self._pass_by(modules, stage, place, layout, layer, attends)
            return self._call(layer, layout, place.rows_of(self.run.inputs[layer]), _unreachable, writes)

    def _pass_by(
        self, modules: ExitStack, stage: int, place: Place, layout: Layout, layer: int, attends: Tensor | None
    ) -> None:
        """Replace the modules in front of a stage by what they gave in the base run, attention by what it gives now."""
        block, model = self.stack.blocks[layer], self.stack.model.module
        kept, returns_tuple = self.run.kept, self.run.returns_tuple

        def giving(path: str, make: Callable[[], Tensor]) -> None:
            def forward(*args: Any, **kwargs: Any) -> Any:
                return (make(), None) if returns_tuple.get(path, False) else make()

            modules.enter_context(bypassed(model.get_submodule(path), forward))

        def known(port: Port) -> Tensor:
            return place.rows_of(kept[port])[None]

        def projected(port: Port) -> Callable[[], Tensor]:
            return lambda: model.get_submodule(port.path)(known(port))

        if stage == PROJECTION:
            giving(block.attention, projected(block.z) if attends is None else partial(torch.unsqueeze, attends, 0))
            # In parallel blocks the MLP does not see what attention adds.
            is_apart = self.stack.is_parallel and block.mlp != block.path
            if is_apart and not self.targets.any_at(layer, layout.chosen, (UP, DOWN)):
                giving(block.mlp, lambda: known(Port(block.mlp, "output")))
            return
        giving(block.attention, lambda: known(Port(block.attention, "output")))
        if stage == UP:
            for port in block.up:
                giving(port.path, partial(known, port))
        elif block.mlp != block.path:  # else there is no module to pass by, and all of the MLP runs
            giving(block.mlp, projected(block.mlp_post))

    def _enter(self, stream: Tensor, layer: int, chosen: np.ndarray) -> None:
        """Fill in the base run's stream for segments that begin to differ here."""
        if not len(chosen):
            return
        layout = Layout.of(self.segments, chosen)
        stream[self._rows(chosen)] = self._place(layout).rows_of(self.run.inputs[layer])
        embedded = chosen[np.isin(chosen, self.targets.embedded)] if layer == 0 else chosen[:0]
        if len(embedded):
            self._embed(stream, Layout.of(self.segments, embedded))

    def _embed(self, stream: Tensor, layout: Layout) -> None:
        batch, slot = self.scene.prompts.batch, layout.slot
        tokens = batch.ids[slot, layout.token], batch.position_ids[slot, layout.token]

        stream[self._rows(layout.chosen)] = self.scene.head.embed(tokens, self._one_token_writes(-1, layout))

    def _layer_writes(self, layer: int, layout: Layout, stages: tuple[int, ...] = STAGES) -> list[Write]:
        def locate(owner: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, ...]:
            found = layout.find(owner, tokens)
            return np.zeros_like(found), found

        return self._writes(layer, layout, locate, stages)

    def _writes(
        self,
        layer: int,
        layout: Layout,
        locate: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, ...]],
        stages: tuple[int, ...] = STAGES,
    ) -> list[Write]:
        owners, rows = self.targets.rows_at(layer, layout.chosen, stages)
        if not rows:
            return []

        def place(_: Target, numbers: np.ndarray, tokens: np.ndarray | None) -> tuple[np.ndarray, ...]:
            return locate(owners[numbers], np.zeros(0, dtype=np.int64) if tokens is None else tokens)

        return writes_at(self.scene.taps, self.scene.known, rows, place)

    def _written(self, layer: int, chosen: np.ndarray, within: Layout) -> Int[np.ndarray, " row"]:
        """Return the rows of a layout that segments write in a layer."""
        owners, rows = self.targets.rows_at(layer, chosen, STAGES)
        if not rows:
            return np.zeros(0, dtype=np.int64)
        places = [[place.base for _, place in row.targets if place is not None] for row in rows]
        tokens = np.concatenate([base for some in places for base in some])
        counts = [sum(len(base) for base in some) for some in places]
        found = within.find(np.repeat(chosen[owners], counts), tokens)
        return np.unique(found[found >= 0])

    def _is_read(self, layout: Layout) -> Bool[np.ndarray, " row"]:
        reads, width = self.scene.reads, int(self.segments.stop.max())
        table = np.zeros((len(reads.of_kind), width), dtype=bool)
        for number, tokens in enumerate(reads.of_kind):
            table[number, tokens[tokens < width]] = True
        found: np.ndarray = table[self.segments.kind[layout.chosen][layout.owner], layout.token]
        return found

    def _rows(self, chosen: np.ndarray) -> slice | Tensor:
        """Return the rows of segments in the stream."""
        if len(chosen) and chosen[-1] - chosen[0] == len(chosen) - 1:
            return slice(int(self.offset[chosen[0]]), int(self.offset[chosen[-1]] + self.segments.lengths[chosen[-1]]))
        layout = Layout.of(self.segments, chosen)
        rows = self.offset[chosen][layout.owner] + layout.token - self.segments.start[chosen][layout.owner]
        return torch.as_tensor(rows, device=self.device)

    def _rows_in_reads(self, layout: Layout) -> Tensor:
        return torch.as_tensor(self.reads.find(layout.chosen[layout.owner], layout.token), device=self.device)

    def _place(self, layout: Layout) -> Place:
        return Place.of(layout.slot, layout.token, self.device)

    def _dispatch(self, *args: Any) -> Tensor:
        return self._attend(*args)


def _rows_of(within: Layout, rows: Int[np.ndarray, " row"]) -> Layout:
    """Return some rows as a layout of the segments that they belong to."""
    owners, owner = np.unique(within.owner[rows], return_inverse=True)
    return Layout(within.segments, within.chosen[owners], owner, within.token[rows])


def _apart(writes: Sequence[Write]) -> tuple[list[Write], list[Write]]:
    """Return the writes at modules' doors, and those inside attention."""
    return [w for w in writes if not w.tap.port.is_inside], [w for w in writes if w.tap.port.is_inside]


def _are_over_keys(writes: Sequence[Write]) -> bool:
    return any(write.tap.port.side in ("scores", "pattern") for write in writes)


def _unreachable(*_: Any) -> Tensor:
    raise AssertionError("attention ran although its module was passed by")
