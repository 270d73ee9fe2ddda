"""Studies: what the store costs beside the same sweep in memory, and a summary of ten million cells.

    python -m benchmarks.studies [--only store|summary] [--cells N] [--repeats N]

Writes ``STUDIES.md``, in about six minutes. The store's part is measured in the shape of GPT-2 small with random
weights, in one thread: each repetition makes the same sweep in memory at once, in memory pair by pair, as shards cut
it, and into an empty store, in a turning order. What else runs on the machine weighs on all. What the store costs is
the third beside the second; what it costs to cut, the second beside the first. How much of the time in the store is
not making its runs is clocked as well.

The summary's numbers are drawn (a fixed seed), written by the library's own code into shards in a temporary folder, and
summarised in a process of its own, whose peak memory is asked of the kernel; the page cache is as the writing left it.
Ten million cells of 16 pairs take 1.6 GB of disk while that goes on.
"""

import argparse
import io
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as parquet
import torch

import causalpatch as cp
from benchmarks import machine
from benchmarks.shapes import SHAPES, Shape, build
from causalpatch.experiment.measured import Measured
from causalpatch.experiment.subset import with_pairs
from causalpatch.results.status import Status
from causalpatch.statistics.intervals import ratio_intervals
from causalpatch.studies.executors import Done
from causalpatch.studies.journal import Journal
from causalpatch.studies.shards import Request, encode
from causalpatch.studies.store import Run, Store
from causalpatch.studies.stored_runs import StoredRuns
from causalpatch.studies.study import ShardsPart
from causalpatch.studies.summary import summarise

OUT = Path(__file__).with_name("STUDIES.md")
STORE_TARGET, SECONDS_TARGET, GB_TARGET = 0.03, 60.0, 4.0
N_PAIRS = 16
SITE, STORE_PAIRS, SHARDS = "z", 6, ShardsPart(pairs=1)  # the study of scaling.py, shorter
CELLS = 10_000_000
CELLS_PER_SHARD, PAIRS_PER_SHARD = 2_500_000, 8


@dataclass(frozen=True)
class Overhead:
    """What the store costs.

    Args:
        memory: Seconds of the sweep in memory, of each repetition.
        pieces: Seconds of the same sweep in memory, pair by pair.
        whole: Seconds of the same sweep in a store.
        measuring: Seconds of these in which runs were made.
        n_runs: Patched runs of each.
        n_shards: Shards of each.
    """

    memory: tuple[float, ...]
    pieces: tuple[float, ...]
    whole: tuple[float, ...]
    measuring: tuple[float, ...]
    n_runs: int
    n_shards: int

    @property
    def shares(self) -> list[float]:
        """Of each repetition, how much longer the pieces took in a store, as a share of their time in memory."""
        return [whole / pieces - 1 for whole, pieces in zip(self.whole, self.pieces, strict=True)]

    @property
    def share(self) -> float:
        """Their median."""
        return statistics.median(self.shares)

    @property
    def cutting(self) -> float:
        """Median of how much longer the pieces took than the sweep at once, both in memory."""
        return statistics.median(cut / memory - 1 for cut, memory in zip(self.pieces, self.memory, strict=True))

    @property
    def idle(self) -> float:
        """Median share of the time in the store in which no run was made."""
        return statistics.median(1 - own / whole for own, whole in zip(self.measuring, self.whole, strict=True))


@dataclass(frozen=True)
class Summarised:
    """What a summary took, in a process of its own."""

    n_cells: int
    n_shards: int
    gigabytes: float
    seconds: float
    peak_gb: float
    largest_difference: float


def experiment_of(shape: Shape, n_pairs: int) -> cp.Experiment:
    """Return an experiment on a model of some shape with random weights, on prompts of 16 random tokens."""
    model = cp.open_model(build(shape), device="cpu")
    random = np.random.default_rng(0)
    clean, corrupt = random.integers(0, shape.vocab, (2, n_pairs, 16))
    rows = [cp.Pair(a, b, ((int(a[3]),),), ((int(b[3]),),)) for a, b in zip(clean, corrupt, strict=True)]
    return cp.Experiment(model, cp.Pairs(rows, name="random"), show_progress=False)


@dataclass
class Clocked:
    """Measures in this process as ``Local`` does, and notes how long making the runs takes.

    Args:
        run: Where shards are stored.
        model: The model.
    """

    run: Run
    model: cp.Model
    seconds: float = 0.0

    n_workers = 1

    def measure(self, requests: Iterable[Request]) -> Iterator[Done]:
        """Measure shards, and yield each when it is stored."""
        for request in requests:
            started = time.perf_counter()
            found = request.measure(self.model, None)
            self.seconds += time.perf_counter() - started
            data = encode(request.key, found, request.setting.metrics)
            yield Done(request, self.run.write(request.key, data, {"record": found.record, "runs": request.n_runs}))

    def close(self) -> None:
        """Nothing has to be let go."""


def overhead(experiment: cp.Experiment, site: str, repeats: int, shards: ShardsPart | None = None) -> Overhead:
    """Make a sweep in memory and in a store, in turn, and clock both."""
    kept = experiment.measuring(experiment.metrics)
    times: dict[str, list[float]] = {"memory": [], "pieces": [], "whole": [], "measuring": []}
    n_runs = n_shards = 0

    def in_memory() -> None:
        nonlocal n_runs
        started = time.perf_counter()
        found = cp.sweep(experiment, site)
        times["memory"].append(time.perf_counter() - started)
        n_runs = found.to_xarray()["status"].size

    def in_pieces() -> None:
        started = time.perf_counter()
        size = (shards or ShardsPart()).pairs or len(experiment.pairs)
        for first in range(0, len(experiment.pairs), size):
            cp.sweep(with_pairs(experiment, experiment.pairs[first : first + size]), site)
        times["pieces"].append(time.perf_counter() - started)

    def in_a_store() -> None:
        nonlocal n_shards
        with tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            store = Store(f"{folder}/store")
            store.create()
            run = store.run_of_hash("0" * 16)
            clocked = Clocked(run, experiment.model)
            runs = StoredRuns(run, clocked, run.leases(), Journal(run), shards or ShardsPart())
            kept.runner = runs
            cp.sweep(kept, site)
            runs.leases.close()
            times["whole"].append(time.perf_counter() - started)
            times["measuring"].append(clocked.seconds)
            n_shards = len(run.keys())

    cp.sweep(with_pairs(experiment, experiment.pairs[:2]), site)  # what is found out once of a model
    ways = [in_memory, in_pieces, in_a_store]
    for repetition in range(repeats):
        for way in np.roll(np.array(ways), repetition):
            way()
    memory, pieces, whole, measuring = (tuple(times[name]) for name in ("memory", "pieces", "whole", "measuring"))
    return Overhead(memory, pieces, whole, measuring, n_runs, n_shards)


def write_cells(run: Run, n_cells: int, cells_per_shard: int = CELLS_PER_SHARD) -> dict[str, Any]:
    """Write drawn numbers of many cells on 16 pairs as shards; return the call that they belong to."""
    random = np.random.default_rng(0)
    gap = 4.0 + random.normal(size=N_PAIRS)
    shards = []
    for first in range(0, n_cells, cells_per_shard):
        stop = min(first + cells_per_shard, n_cells)
        share = random.normal(size=(stop - first, 1)) * 0.1
        values = share * gap + 0.2 * random.normal(size=(stop - first, N_PAIRS))
        for start in range(0, N_PAIRS, PAIRS_PER_SHARD):
            pairs = slice(start, start + PAIRS_PER_SHARD)
            runs = {"base": np.zeros((1, PAIRS_PER_SHARD)), "corrupt": np.zeros((1, PAIRS_PER_SHARD))}
            runs["clean"] = gap[None, pairs]
            status = np.full((stop - first, PAIRS_PER_SHARD), Status.MEASURED, dtype=np.uint8)
            found = Measured(values[None, :, pairs], status, runs, np.arange(PAIRS_PER_SHARD), {})
            key = f"{first:010d}-{start:02d}"
            run.write(key, encode(key, found, ["drawn"]), {"record": {}})
            shards.append({"key": key, "cells": [first, stop], "pairs": [start, start + PAIRS_PER_SHARD]})
    return {"shards": shards}


def summarised(n_cells: int, cells_per_shard: int = CELLS_PER_SHARD) -> Summarised:
    """Write cells, summarise them in a process of its own, and hold some rows against the library's intervals."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/store")
        store.create()
        run = store.run_of_hash("0" * 16)
        call = write_cells(run, n_cells, cells_per_shard)
        Path(f"{folder}/call.json").write_text(json.dumps(call), encoding="utf-8")
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.parquet")) / 1e9
        words = [sys.executable, "-m", "benchmarks.studies", "--summarise", folder]
        root = Path(__file__).resolve().parents[1]
        done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=root)
        told = json.loads(done.stdout)
        return Summarised(
            n_cells, len(call["shards"]), size, told["seconds"], told["peak_gb"], told["largest_difference"]
        )


def summarise_here(folder: Path) -> dict[str, float]:
    """Summarise what is in a folder; return seconds, peak memory, and how far some rows are from the library's own."""
    call: Mapping[str, Any] = json.loads((folder / "call.json").read_text(encoding="utf-8"))
    run = Store(str(folder / "store")).run_of_hash("0" * 16)
    started = time.perf_counter()
    found = summarise(run, call, np.arange(N_PAIRS), "denoise")
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"seconds": seconds, "peak_gb": peak, "largest_difference": difference(run, call, found)}


def difference(run: Run, call: Mapping[str, Any], found: Any, n_rows: int = 500) -> float:
    """Return how far the first rows are from the intervals of ``Effects.summary``."""
    beside = [shard for shard in call["shards"] if shard["cells"][0] == 0]
    parts, gaps = [], []
    for shard in beside:
        held = run.read(shard["key"])
        if held is None:
            raise SystemExit("a shard is damaged")
        file = parquet.ParquetFile(io.BytesIO(held[0]))
        gaps += json.loads(file.schema_arrow.metadata[b"causalpatch"])["baselines"]["clean"][0]
        rows = file.read_row_group(0, columns=["metric:drawn"])["metric:drawn"].to_numpy()
        parts.append(rows.reshape(-1, PAIRS_PER_SHARD))
    values = np.concatenate([part[:n_rows] for part in parts], axis=1)
    own = ratio_intervals(values, gaps, np.arange(N_PAIRS))
    rows = np.array([[each.estimate, each.low, each.high] for each in own])
    mine = np.stack([found.recovered[: len(rows)], found.low[: len(rows)], found.high[: len(rows)]], axis=1)
    return float(np.abs(rows - mine).max())


def report(costs: Overhead | None, many: Summarised | None, command: str) -> str:
    """Return the page."""
    lines = ["# Studies: the store beside the runs, and many cells", "", f"Made by `{command}` on {_machine()}.", ""]
    if costs is not None:
        kept = "kept" if costs.share <= STORE_TARGET else "missed"
        lines += [
            "## What the store costs",
            "",
            f"GPT-2 small's shape, random weights, {STORE_PAIRS} pairs of 16 tokens, `{SITE}`: {costs.n_runs:,} "
            f"patched runs in {costs.n_shards} shards, one thread, {len(costs.whole)} repetitions, in "
            "memory and in an empty store in turn.",
            "",
            "| | s of each repetition |",
            "|---|---|",
            f"| the sweep in memory | {_all(costs.memory)} |",
            f"| the same in memory, cut as shards are | {_all(costs.pieces)} |",
            f"| in a store: cut, named, leased, written, forced to disk, read back, noted | {_all(costs.whole)} |",
            f"| of these in which runs were made | {_all(costs.measuring)} |",
            "",
            f"The store adds {costs.share:.1%} to the time of the same pieces in memory (median of "
            f"{', '.join(f'{each:.1%}' for each in costs.shares)}); target at most {STORE_TARGET:.0%}: {kept}. "
            f"{costs.idle:.1%} of the time in the store no run was made. To cut into pieces of one pair costs "
            f"{costs.cutting:.1%}: each has untouched runs and a set-up of its own. By default a shard takes ten "
            "trillion operations, some 50 seconds here.",
            "",
        ]
    if many is not None:
        is_kept = many.seconds < SECONDS_TARGET and many.peak_gb < GB_TARGET
        verdict = (
            ("kept" if is_kept else "missed") if many.n_cells >= CELLS else f"of {CELLS:,} cells, not measured here"
        )
        lines += [
            "## A summary of many cells",
            "",
            f"{many.n_cells:,} cells x {N_PAIRS} pairs in {many.n_shards} shards, {many.gigabytes:.2f} GB on disk: "
            "mean, share, cluster interval, p and its adjustment over all cells, checksums included.",
            "",
            f"{many.seconds:.1f} s and {many.peak_gb:.2f} GB at the peak; targets {SECONDS_TARGET:.0f} s and "
            f"{GB_TARGET:.0f} GB: {verdict}. The first 500 rows differ from the intervals of "
            f"`Effects.summary` by at most {many.largest_difference:.1e}.",
            "",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What studies cost.")
    parser.add_argument("--only", choices=("store", "summary"))
    parser.add_argument("--cells", type=int, default=CELLS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--summarise", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.summarise:
        print(json.dumps(summarise_here(asked.summarise)))
        return
    torch.set_num_threads(1)
    costs = many = None
    if asked.only != "summary":
        costs = overhead(experiment_of(SHAPES["gpt2"], STORE_PAIRS), SITE, asked.repeats, SHARDS)
        print(f"store: {costs.share:.2%}, {costs.idle:.2%} without runs", flush=True)
    if asked.only != "store":
        many = summarised(asked.cells)
        print(f"summary: {many.seconds:.1f} s, {many.peak_gb:.2f} GB", flush=True)
    asked.out.write_text(
        report(costs, many, " ".join(["python -m benchmarks.studies", *sys.argv[1:]])), encoding="utf-8"
    )


def _machine() -> str:
    return f"{', '.join(machine.describe().values())}; {', '.join(f'{k} {v}' for k, v in machine.versions().items())}"


def _all(seconds: tuple[float, ...]) -> str:
    return ", ".join(f"{each:.2f}" for each in seconds)


if __name__ == "__main__":
    main()
