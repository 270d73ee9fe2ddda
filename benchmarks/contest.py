"""One workload: every contender in turn, again and again, in one process.

1. Our sweep runs once; each peer patches a random part of the cells, always the same one. A peer whose numbers differ
   from ours by more than the tolerance is not timed.
2. Then come the repeats; before each, and behind the last, the machine's matrix rate is measured. Our whole sweep is
   run, and each peer patches its part; who begins changes from repeat to repeat. A peer's time is that of its run over
   the clean prompts, plus the time per cell times all cells.
"""

import copy
import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from torch import nn

from benchmarks import spent
from benchmarks.cone import work_of
from benchmarks.machine import forget_peak, gemm_rate, peak_mib, resident_mib
from benchmarks.ours import NAME, Sweep
from benchmarks.peers import Contender, Peer
from benchmarks.tasks import Cell, Task
from benchmarks.workloads import Workload

# Largest difference between two contenders' numbers, times the larger of 1 and the largest metric. The effects measured
# here are a hundred to ten thousand times as large; kernels and batch shapes that differ by rounding stay far below.
TOLERANCE: Final = 1e-5


@dataclass
class Times:
    """Seconds of one contender.

    Args:
        cells: How many cells were patched in each repeat.
        seconds: What all cells take, by repeat.
        first: Seconds of the first run, which also meets what is done only once.
        capture: Seconds of running the clean prompts, by repeat; ours are in ``seconds`` only.
        difference: Largest difference of a cell's metric from ours.
        grown_mib: By how much the process grew during a run at most.
        skipped: Why it was not measured.
    """

    cells: int = 0
    seconds: list[float] = field(default_factory=list)
    first: float | None = None
    capture: list[float] = field(default_factory=list)
    difference: float | None = None
    grown_mib: float = 0.0
    skipped: str = ""


class Stable:
    """Contenders on one shape of model, each on a copy of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._opened: dict[str, Contender] = {}

    def contender(self, peer: Peer) -> Contender:
        """Return the contender, opened when it is first asked for."""
        if peer.name not in self._opened:
            self._opened[peer.name] = peer.open(copy.deepcopy(self.module))
        return self._opened[peer.name]


@dataclass
class _Entry:
    """A peer in one contest."""

    peer: Peer
    contender: Contender
    cells: Sequence[Cell]
    times: Times

    def run(self, task: Task, n_all: int) -> np.ndarray:
        """Capture and patch once, and note the time that all cells would have taken."""
        gc.collect()
        before = _forget()
        started = time.perf_counter()
        self.contender.capture(task)
        captured = time.perf_counter()
        values = self.contender.patch(task, self.cells)
        ended = time.perf_counter()
        self.times.capture.append(captured - started)
        self.times.seconds.append(captured - started + (ended - captured) / len(self.cells) * n_all)
        self.times.grown_mib = max(self.times.grown_mib, peak_mib() - before)
        return values


def hold(workload: Workload, stable: Stable, peers: Sequence[Peer], repeats: int, *, is_tiny: bool) -> dict[str, Any]:
    """Measure a workload and return its record, plain data.

    Args:
        workload: What to measure.
        stable: The model, and peers on it.
        peers: Who takes part.
        repeats: How often.
        is_tiny: Whether sizes are those that only show that it works.
    """
    task = workload.task(is_tiny=is_tiny)
    work, cells = work_of(task), task.cells
    sweep = Sweep(workload, task, stable.module)
    times = {NAME: Times(cells=len(cells))}
    values, times[NAME].first = _timed(sweep, times[NAME])
    times[NAME].seconds.clear()
    exact = _exactly(sweep, values)
    entries = []
    for peer in peers:
        times[peer.name] = Times()
        entry = _enter(peer, workload, task, stable, times[peer.name], sweep.mean_over_pairs(exact))
        entries += [entry] if entry is not None else []

    # What was loaded until now is not looked through again by every collection.
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    rates = []
    for number in range(min(repeats, workload.most_repeats)):
        rates.append(gemm_rate())
        for entry in _in_turn(entries, number):
            if entry is None:
                _timed(sweep, times[NAME])
            else:
                entry.run(task, len(cells))
    rates.append(gemm_rate())
    found = {
        "name": workload.name,
        "title": workload.title,
        "site": task.site,
        "cells": len(cells),
        "pairs": len(task.pairs),
        "runs_needed": work.n_runs,
        "derived": sweep.n_derived,
        "gflop": work.flops / 1e9,
        "engine": sweep.engine,
        "largest_effect": sweep.largest_effect(values),
        "tolerance": TOLERANCE,
        "errors": _errors(sweep, values, exact),
        "gemm": [round(rate, 1) for rate in rates],
        "contenders": {name: vars(each) for name, each in times.items()},
    }
    return found | {"spent": spent.measure(sweep)} if workload.is_profiled else found


def _enter(peer: Peer, workload: Workload, task: Task, stable: Stable, times: Times, ours: np.ndarray) -> _Entry | None:
    """Let a peer patch once and compare; a peer that cannot, or differs, is left out."""
    why = peer.why_not(task)
    if why is not None:
        times.skipped = why
        return None
    chosen = task.some_cells(min(workload.n_cells, len(task.cells)))
    index = {cell: number for number, cell in enumerate(task.cells)}
    expected = ours[[index[cell] for cell in chosen]]
    try:
        entry = _Entry(peer, stable.contender(peer), chosen, times)
        found = entry.run(task, len(task.cells))
    except Exception as error:  # noqa: BLE001 - whatever a peer breaks on, the others are measured
        times.skipped = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"
        return None
    times.cells, times.difference = len(chosen), float(np.abs(found - expected).max())
    times.first = times.seconds.pop()
    times.capture.clear()
    allowed = TOLERANCE * max(1.0, float(np.abs(expected).max()))
    if not times.difference <= allowed:
        times.skipped = f"numbers differ by {times.difference:.1e}, more than {allowed:.1e}: not timed"
        return None
    return entry


def _exactly(sweep: Sweep, values: np.ndarray) -> np.ndarray:
    """Return the values at full precision: those of a sweep of their own where less was asked for."""
    if "precision" not in sweep.workload.settings:
        return values
    return Sweep(replace(sweep.workload, settings={}), sweep.task, sweep.module).run()


def _errors(sweep: Sweep, values: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    """Return errors of effects relative to each cell's own, where less than full precision was asked for."""
    if values is exact:
        return {}
    effects = np.abs(exact - sweep.experiment.baseline.corrupt[0])
    relative = (np.abs(values - exact)[effects > 0] / effects[effects > 0]).tolist()
    return {"median": float(np.median(relative)), "ninth decile": float(np.quantile(relative, 0.9))}


def _timed(sweep: Sweep, times: Times) -> tuple[np.ndarray, float]:
    gc.collect()
    before = _forget()
    started = time.perf_counter()
    values = sweep.run()
    seconds = time.perf_counter() - started
    times.seconds.append(seconds)
    times.grown_mib = max(times.grown_mib, peak_mib() - before)
    return values, seconds


def _in_turn(entries: Sequence[_Entry], number: int) -> Iterator[_Entry | None]:
    """Yield ours (None) and the peers, another one first in each repeat."""
    everyone: list[_Entry | None] = [None, *entries]
    start = number % len(everyone)
    yield from everyone[start:] + everyone[:start]


def _forget() -> float:
    forget_peak()
    return resident_mib()
