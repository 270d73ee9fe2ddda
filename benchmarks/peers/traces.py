"""nnsight: one trace per cell as its tutorials do, or eight cells stacked into one trace.

A trace's block is read from this file's source and run while the model runs, so modules stand in the order in which
they run.
"""

from collections.abc import Sequence

import nnsight
import numpy as np
import torch
from nnsight import NNsight
from torch import Tensor, nn

from benchmarks.tasks import Cell, Task


class Traces:
    """Patches by nnsight, one cell per trace."""

    per_trace = 1

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.model = NNsight(module)
        self.kept: list[Tensor] = []

    @torch.no_grad()
    def capture(self, task: Task) -> None:
        model, kind, layers = self.model, task.kind, len(self.module.transformer.h)
        with model.trace(task.clean):
            kept = []
            for layer in range(layers):
                block = model.transformer.h[layer]
                if kind == "resid_pre":
                    kept.append(block.input.save())
                elif kind == "mlp_out":
                    kept.append(block.mlp.output.save())
                elif kind == "z":
                    kept.append(block.attn.c_proj.input.save())
                else:
                    kept.append(block.mlp.c_proj.input.save())
            kept = nnsight.save(kept)
        self.kept = kept

    @torch.no_grad()
    def patch(self, task: Task, cells: Sequence[Cell]) -> np.ndarray:
        found = np.empty(len(cells))
        for start in range(0, len(cells), self.per_trace):
            # In the order of layers, which is that in which modules run.
            chosen = sorted(range(start, min(start + self.per_trace, len(cells))), key=lambda index: cells[index])
            found[chosen] = self._trace(task, [cells[index] for index in chosen]).numpy()
        return found

    def _trace(self, task: Task, cells: Sequence[Cell]) -> Tensor:
        model, kept, kind, n_pairs, width = self.model, self.kept, task.kind, len(task.pairs), task.shape.head_width
        with model.trace(task.corrupt.repeat(len(cells), 1)):
            for number, (layer, cell) in enumerate(cells):
                rows = slice(number * n_pairs, (number + 1) * n_pairs)
                block = model.transformer.h[layer]
                if kind == "resid_pre":
                    block.input[rows, cell] = kept[layer][:, cell]
                elif kind == "mlp_out":
                    block.mlp.output[rows, cell] = kept[layer][:, cell]
                elif kind == "z":
                    columns = slice(cell * width, (cell + 1) * width)
                    block.attn.c_proj.input[rows, :, columns] = kept[layer][..., columns]
                else:
                    block.mlp.c_proj.input[rows, -1, cell] = kept[layer][:, -1, cell]
            values = task.read(model.lm_head.output[:, -1]).reshape(len(cells), n_pairs).mean(1).save()
        # Returned behind the trace: its block is run elsewhere.
        return values  # noqa: RET504


class BatchedTraces(Traces):
    """Patches by nnsight, eight cells per trace."""

    per_trace = 8
