"""Time against the number of cells, layers, tokens and pairs, beside the arithmetic that each needs.

One number is varied at a time on a model of middle size, all others kept. If time is proportional to the cone's
operations, seconds per operation are the same along a series; the largest deviation from the series' median is given.
What a sweep takes whatever its size, about 0.15 s for the untouched runs, the layout and the record, must not be most
of it for that: few layers and tokens are measured on more pairs.
"""

import gc
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

import causalpatch as cp
from benchmarks.cone import work_of
from benchmarks.machine import gemm_rate
from benchmarks.shapes import SHAPES, build, tiny
from benchmarks.tasks import Task, random_pairs

PAIRS = {"cells": 4, "layers": 16, "tokens": 8}
MOST = 0.20  # deviation from proportionality that is allowed
SERIES = {
    "cells": (512, 1024, 2048),
    "layers": (6, 12, 18),
    "tokens": (16, 32, 64),
    "pairs": (4, 8, 16),
}
TINY = {"cells": (8, 16), "layers": (2, 3), "tokens": (4, 8), "pairs": (1, 2)}


@dataclass(frozen=True)
class _Point:
    series: str
    size: int
    task: Task
    experiment: cp.Experiment
    seconds: list[float]

    @property
    def site(self) -> str:
        return f"mlp_post.*.0:{self.task.n_along}@-1" if self.task.kind == "neuron" else self.task.site


def measure(repeats: int, *, is_tiny: bool) -> dict[str, Any]:
    """Measure all series, interleaved, and return their points and deviations."""
    points = [
        _point(series, size, is_tiny=is_tiny)
        for series, sizes in (TINY if is_tiny else SERIES).items()
        for size in sizes
    ]
    rates = []
    for number in range(repeats + 1):
        rates.append(gemm_rate())
        for point in points:
            gc.collect()
            started = time.perf_counter()
            cp.sweep(point.experiment, point.site)
            if number:  # the first run proves the model and checks the engine
                point.seconds.append(time.perf_counter() - started)
    found = [_plain(point) for point in points]
    return {"gemm": rates, "points": found, "deviation": {name: _deviation(found, name) for name in SERIES}}


def _point(series: str, size: int, *, is_tiny: bool) -> _Point:
    shape = tiny(SHAPES["middle"]) if is_tiny else SHAPES["middle"]
    if series == "layers":
        shape = replace(shape, layers=size)
    n_tokens = size if series == "tokens" else 16
    n_pairs = size if series == "pairs" else 4 if is_tiny else PAIRS[series]
    module: nn.Module = build(shape)
    pairs = random_pairs(n_pairs, n_tokens, shape.vocab)
    # The cells of a series are so many neurons in every layer: only their number changes, not what each one costs.
    swept = replace(shape, hidden=size) if series == "cells" else shape
    kind = "neuron" if series == "cells" else "resid_pre"
    task = Task(swept, pairs, kind, "logit_difference", range(shape.layers))
    return _Point(series, size, task, cp.Experiment(cp.open_model(module), pairs, show_progress=False), [])


def _plain(point: _Point) -> dict[str, Any]:
    if point.series == "cells":
        # Counted with the true width of the MLP: the task's is the number of neurons that are swept.
        whole = Task(
            replace(point.task.shape, hidden=SHAPES["middle"].hidden),
            point.task.pairs,
            "neuron",
            "logit_difference",
            point.task.layers,
        )
        share = point.task.n_along / whole.n_along
        gflop = work_of(whole).flops / 1e9 * share
    else:
        gflop = work_of(point.task).flops / 1e9
    return {
        "series": point.series,
        "size": point.size,
        "cells": len(point.task.cells),
        "gflop": gflop,
        "seconds": point.seconds,
    }


def _deviation(points: Sequence[dict[str, Any]], series: str) -> float:
    """Return by how much seconds per operation differ from the series' median at most, as a share of it."""
    each = [min(point["seconds"]) / point["gflop"] for point in points if point["series"] == series]
    middle = statistics.median(each)
    return max(abs(value / middle - 1) for value in each)
