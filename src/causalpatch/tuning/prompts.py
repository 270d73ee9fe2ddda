"""Prompts that a model is run on again and again, with one change after the other.

1. *Laid out once*: which rows a batch has, and where in them stands what is asked for. Trainings of one seed see the
   same batches, whatever they train and at which rate.
2. *Entered late*: below the first layer that a change acts in, the stream is the base model's. It is kept for each
   row, and runs with the change begin at that layer (``engine.layers``).
3. *Few logits*: where answers alone are read, logits are computed from the first column that is read on.

The last two are tried on the shortest and the longest row before they are relied on. Where the outcome is another but
for rounding, where a model is of no known family, or where someone else's hooks stand on it, runs are whole.

Cost: memory for the stream into each layer that is entered at, up to ``HELD_BYTES`` for all of them.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.capture import capture, inputs_of
from causalpatch.engine.few_logits import agree
from causalpatch.engine.hooks import quiet, users_hooks
from causalpatch.engine.layers import Layers, entering, look_at
from causalpatch.models import Model
from causalpatch.pairs import Batch, Pairs
from causalpatch.tuning.together import side_by_side
from causalpatch.tuning.ways import Way

HELD_BYTES: Final = 256 * 2**20
"""Of what is kept of one set of prompts, rather than computed again."""
MOST_LAID: Final = 4096
"""Batches whose layout is kept."""
_MOST_ROWS: Final = 256  # of a forward that only looks
_LOGIT_BYTES: Final = 64 * 2**20  # of the logits of such a forward


@dataclass(frozen=True, eq=False)
class Laid:
    """Some rows, laid out to be run.

    Args:
        rows: Their numbers.
        sizes: How many of them are run with each change.
        batch: The rows in one rectangle.
        call: Arguments of the model's forward.
        first: The first column whose logits are computed.
    """

    rows: Int[Tensor, " row"]
    sizes: tuple[int, ...]
    batch: Batch
    call: Mapping[str, Any]
    first: int


class Prompts:
    """Rows of prompts of one model: a prompt of some pairs each, perhaps with the beginning of an answer behind it.

    Args:
        model: The model, as it is.
        pairs: The pairs; their prompts are the clean ones.
        rows: For each row its pair, and the ids behind its prompt.
        is_cut: Whether only logits from the last token of a prompt on are read.
    """

    def __init__(
        self, model: Model, pairs: Pairs, rows: Sequence[tuple[int, tuple[int, ...]]], *, is_cut: bool
    ) -> None:
        self.model, self.pairs, self.rows = model, pairs, tuple(rows)
        lengths = pairs.lengths("clean")
        self._sizes = np.array([lengths[pair] + len(more) for pair, more in self.rows], dtype=np.int64)
        self._layers = Layers(model) if model.family is not None else None
        self._streams: dict[int, Float[Tensor, "row position width"] | None] = {0: None}
        self._is_cut = False  # until it was tried
        self._is_cut = is_cut and len(self.rows) > 0 and self._may_be_cut()

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self._sizes.max(initial=0))

    def in_rows(self, n: int, n_ways: int = 1) -> list[range]:
        """Return numbers from 0 in blocks, of which so many changes may be looked at in one forward."""
        per_row = self.longest * self.model.vocab_size * 4
        most = max(1, min(_MOST_ROWS, _LOGIT_BYTES // max(1, per_row)) // n_ways)
        return [range(first, min(first + most, n)) for first in range(0, n, most)]

    def lay(self, blocks: Sequence[Sequence[int]]) -> Laid:
        """Lay out some rows.

        Args:
            blocks: Numbers of the rows that are run with each change.
        """
        chosen = [self.rows[row] for block in blocks for row in block]
        batch = self.pairs.batch("clean", [pair for pair, _ in chosen], continuations=[list(ids) for _, ids in chosen])
        columns = None
        if self._is_cut:
            columns = range(int((batch.start + batch.lengths - 1).min()), batch.ids.shape[1])
        rows = torch.tensor([row for block in blocks for row in block], dtype=torch.long, device=self.model.device)
        call = inputs_of(self.model, batch, columns)
        return Laid(rows, tuple(map(len, blocks)), batch, call, 0 if columns is None else columns.start)

    def ready(self, way: Way | None) -> None:
        """Keep the stream into the layer that a change begins in, where runs may begin there.

        Args:
            way: The change; it must not be running, for what is kept is the base model's. None is no change.
        """
        entry = 0 if way is None else way.entry
        if entry in self._streams:
            return
        size = torch.finfo(self.model.dtype).bits // 8
        n_bytes = len(self.rows) * self.longest * self.model.width * size
        held = [each for each in self._streams.values() if each is not None]
        if n_bytes > HELD_BYTES - sum(each.nbytes for each in held):
            self._streams = {0: None}
        self._streams[entry] = self._into(entry) if n_bytes <= HELD_BYTES and self._may_enter(entry) else None

    def logits(self, ways: Sequence[Way], laid: Laid) -> Float[Tensor, "row position vocab"]:
        """Return the logits of some rows from ``laid.first`` on, differentiable in what the ways train.

        Args:
            ways: What is changed, each in a block of the rows; none for the model as it is.
            laid: The rows.
        """
        if not ways:
            return self.model.logits(self.model.module(**laid.call))
        entry = ways[0].entry
        stream = self._streams.get(entry)
        with side_by_side(ways, laid.sizes) as module:
            if stream is None or self._layers is None:
                return self.model.logits(module(**laid.call))
            own = stream[laid.rows, : laid.batch.ids.shape[1]]
            with entering(self._layers, entry, own):
                return self.model.logits(module(**laid.call))

    def _telling(self) -> Laid:
        """Return the shortest and the longest row."""
        return self.lay([sorted({int(self._sizes.argmin()), int(self._sizes.argmax())})])

    def _may_be_cut(self) -> bool:
        module = self.model.module
        if "logits_to_keep" not in inspect.signature(module.forward).parameters or users_hooks(self.model):
            return False
        whole = self._telling()
        columns = range(int((whole.batch.start + whole.batch.lengths - 1).min()), whole.batch.ids.shape[1])
        try:
            with quiet(self.model):
                wanted = self.model.logits(module(**whole.call))[:, columns.start :]
                found = self.model.logits(module(**inputs_of(self.model, whole.batch, columns)))
        except (ModelUnsupported, RuntimeError, TypeError):
            return False
        return agree(found, wanted, whole.batch.mask[:, columns.start :])

    def _may_enter(self, entry: int) -> bool:
        """Say whether runs that begin at a layer come out as whole ones do."""
        layers = self._layers
        if layers is None or not 0 < entry < len(layers) or users_hooks(self.model) or not self.rows:
            return False
        laid = self._telling()
        try:
            kept = look_at(layers, laid.batch, [layers.sites[entry]])
            with quiet(self.model), entering(layers, entry, kept.value(layers.sites[entry])):
                found = self.model.logits(self.model.module(**inputs_of(self.model, laid.batch)))
        except ModelUnsupported:
            return False
        return agree(found, self.model.logits(kept.output), laid.batch.mask)

    def _into(self, entry: int) -> Float[Tensor, "row position width"]:
        """Return the base model's stream into a layer, for all rows, padded to the longest."""
        layers = self._layers
        site = layers.sites[entry] if layers is not None else None
        shape = (len(self.rows), self.longest, self.model.width)
        made = torch.zeros(shape, dtype=self.model.dtype, device=self.model.device)
        for some in self.in_rows(len(self.rows)):
            batch = self.lay([some]).batch
            if site is not None:
                made[some.start : some.stop, : batch.ids.shape[1]] = capture(self.model, batch, [site]).value(site)
        return made
