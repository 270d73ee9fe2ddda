"""Plain hooks of torch, eight cells stacked into one forward, logits of the last position only.

The best that is commonly written by hand: nothing is computed but full forwards, and the vocabulary once per prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks import Cell, Task

PER_FORWARD = 8

# Where each family keeps its layers and, within a layer, the module whose output is added to the stream by the MLP, the
# output projection of attention, and the MLP's way down.
PLACES = {
    "gpt2": ("transformer.h", "mlp", "attn.c_proj", "mlp.c_proj"),
    "llama": ("model.layers", "mlp", "self_attn.o_proj", "mlp.down_proj"),
    "gemma2": ("model.layers", "post_feedforward_layernorm", "self_attn.o_proj", "mlp.down_proj"),
    "gpt_neox": ("gpt_neox.layers", "mlp", "attention.dense", "mlp.dense_4h_to_h"),
}


class Hooks:
    """Patches by forward hooks."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kept: dict[int, Tensor] = {}

    def capture(self, task: Task) -> None:
        self.kept = {}
        handles = [
            _hook(_place(self.module, task, layer), task.kind, lambda value, layer=layer: self._keep(layer, value))
            for layer in task.layers
        ]
        self._forward(task.clean)
        for handle in handles:
            handle.remove()

    def patch(self, task: Task, cells: Sequence[Cell]) -> np.ndarray:
        n_pairs, found = len(task.pairs), []
        for start in range(0, len(cells), PER_FORWARD):
            some = cells[start : start + PER_FORWARD]
            handles = []
            for number, (layer, cell) in enumerate(some):
                rows = slice(number * n_pairs, (number + 1) * n_pairs)
                put = _putter(task, rows, cell, self.kept[layer])
                handles.append(_hook(_place(self.module, task, layer), task.kind, put))
            values = task.read(self._forward(task.corrupt.repeat(len(some), 1)))
            for handle in handles:
                handle.remove()
            found.append(values.reshape(len(some), n_pairs).mean(1))
        return torch.cat(found).numpy()

    def _keep(self, layer: int, value: Tensor) -> None:
        self.kept[layer] = value.clone()

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.module(ids, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1]


def _place(module: nn.Module, task: Task, layer: int) -> nn.Module:
    layers, mlp, projection, down = PLACES[task.shape.family]
    block = module.get_submodule(f"{layers}.{layer}")
    inner = {"resid_pre": "", "mlp_out": mlp, "z": projection, "neuron": down}[task.kind]
    return block.get_submodule(inner)


def _putter(task: Task, rows: slice, cell: int, source: Tensor) -> Callable[[Tensor], Tensor]:
    where: tuple[Any, ...]
    if task.kind == "z":
        where = (slice(None), slice(cell * task.shape.head_width, (cell + 1) * task.shape.head_width))
    else:
        where = (-1, cell) if task.kind == "neuron" else (cell,)

    def put(value: Tensor) -> Tensor:
        value = value.clone()
        value[(rows, *where)] = source[(slice(None), *where)]
        return value

    return put


def _hook(place: nn.Module, kind: str, change: Callable[[Tensor], Tensor | None]) -> Any:
    """Let a function see the module's input, or an MLP's output; what it returns takes its place."""

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return change(output)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            value = change(args[0])
            return None if value is None else ((value, *args[1:]), kwargs)
        value = change(kwargs["hidden_states"])
        return None if value is None else (args, {**kwargs, "hidden_states": value})

    if kind == "mlp_out":
        return place.register_forward_hook(after)
    return place.register_forward_pre_hook(before, with_kwargs=True)
