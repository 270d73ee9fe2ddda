"""Floating-point operations that a sweep cannot do without: the cone of each cell, as the engine itself counts it.

Only what a benchmark knows beforehand is taken for granted: prompts are equal up to their first difference, so that
every patch of an earlier token changes nothing, and they differ everywhere behind it.
"""

from dataclasses import dataclass

import numpy as np

from benchmarks.shapes import Shape
from benchmarks.tasks import Task, first_difference
from causalpatch.engine.cone import ModelNumbers, Point, Runs, cone

POINTS = {"resid_pre": Point.STREAM, "mlp_out": Point.ADDED, "z": Point.ATTENDED, "neuron": Point.ACTIVATED}
ANSWERS = {"logit_difference": 2, "log_probability": 0}  # columns that are read; 0 for all


@dataclass(frozen=True)
class Work:
    """The arithmetic of a sweep.

    Args:
        flops: Floating-point operations, two per multiplication and addition. A head's or neuron's difference goes
            alone through the projection behind it: no way of computing it needs less.
        n_runs: Cells that have to be run, counted by pair; the effect of the others is known to be 0.
    """

    flops: float
    n_runs: int


def work_of(task: Task) -> Work:
    """Count a task's arithmetic."""
    shape = task.shape
    listed = [run for first in first_difference(task.pairs) for run in _runs(task, first)]
    longest = max(len(written) for _, written, _ in listed)
    counts = np.array([count for _, _, count in listed])
    runs = Runs(
        layer=np.array([layer for layer, _, _ in listed]),
        point=np.full(len(listed), int(POINTS[task.kind])),
        written=np.array([written + [-1] * (longest - len(written)) for _, written, _ in listed]),
        reads=np.full((len(listed), 1), task.n_tokens - 1),
        columns=np.full(len(listed), {"z": shape.head_width, "neuron": 1}.get(task.kind, 0)),
    )
    found = cone(numbers_of(shape), runs, ANSWERS[task.metric] or shape.vocab, low_rank=True)
    is_run = ~found.is_derived
    return Work(float((found.flops * counts * is_run).sum()), int((counts * is_run).sum()))


def numbers_of(shape: Shape) -> ModelNumbers:
    """Return a shape's numbers in the engine's words."""
    return ModelNumbers(
        n_layers=shape.layers,
        width=shape.width,
        n_heads=shape.heads,
        n_kv_heads=shape.kv_heads,
        head_width=shape.head_width,
        n_neurons=shape.hidden,
        up=shape.width * shape.hidden * (2 if shape.is_gated else 1),
        vocab=shape.vocab,
        is_parallel=shape.family == "gpt_neox",
    )


def _runs(task: Task, first: int) -> list[tuple[int, list[int], int]]:
    """Return layer, written tokens and number of cells of each different cone of a pair that is not 0 by itself."""
    last = task.n_tokens - 1
    if task.kind in ("z", "neuron"):
        written = list(range(first, last + 1)) if task.kind == "z" else [last]
        return [(layer, written, task.n_along) for layer in task.layers]
    return [(layer, [position], 1) for layer in task.layers for position in range(first, last + 1)]
