"""pyvene: one intervenable model per cell, as its tutorials do; it runs the clean prompts along with every cell."""

from collections.abc import Sequence

import numpy as np
import pyvene
import torch
from torch import nn

from benchmarks.tasks import Cell, Task

COMPONENTS = {"resid_pre": "block_input", "mlp_out": "mlp_output", "z": "head_attention_value_output"}


class Intervenable:
    """Patches by pyvene."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def capture(self, task: Task) -> None:
        """Nothing to keep: pyvene runs its sources with each cell."""

    @torch.no_grad()
    def patch(self, task: Task, cells: Sequence[Cell]) -> np.ndarray:
        return np.array([self._patch(task, layer, cell) for layer, cell in cells])

    def _patch(self, task: Task, layer: int, cell: int) -> float:
        unit = "h.pos" if task.kind == "z" else "pos"
        place = pyvene.RepresentationConfig(layer, COMPONENTS[task.kind], unit, 1)
        model = pyvene.IntervenableModel(pyvene.IntervenableConfig([place], pyvene.VanillaIntervention), self.module)
        model.set_device("cpu")
        where: object = cell
        if task.kind == "z":
            n_pairs = len(task.pairs)
            one_side = [[[cell]] * n_pairs, [list(range(task.n_tokens))] * n_pairs]
            where = ([one_side], [one_side])
        _, output = model({"input_ids": task.corrupt}, [{"input_ids": task.clean}], {"sources->base": where})
        return float(task.read(output.logits[:, -1]).mean())
