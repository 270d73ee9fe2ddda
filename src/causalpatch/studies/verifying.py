"""Verification: is everything as it was written, and are the numbers those that the model gives?

1. Every shard, entry, call and result is read and its checksum computed anew, and so are the manifest, the pairs and
   the records of sessions. Files that no entry names are listed.
2. Cells are drawn at random from all that was asked for and measured again on some of their pairs, in runs of their
   own. Other batches round differently, so that numbers agree within a tolerance, not bit for bit:
   ``TOLERANCE[dtype] x (mean |clean - corrupted| + |number|)``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import StoreCorrupt
from causalpatch.base.seeds import generator
from causalpatch.experiment.edges import EdgeRuns
from causalpatch.experiment.measured import Work
from causalpatch.results.status import has_number
from causalpatch.studies.opened import Opened
from causalpatch.studies.results import Results
from causalpatch.studies.shards import Setting, decode
from causalpatch.studies.store import Run
from causalpatch.studies.works import Patched

TOLERANCE: Final = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
_ENDS: Final = (("clean", "source"), ("corrupt", "base"))  # runs whose difference is the gap, of scores those behind
_PAIRS: Final = 8  # of a cell, at most, that are measured again


@dataclass(frozen=True)
class Verified:
    """What a verification found.

    Args:
        n_shards: Shards that were read.
        damaged: What is wrong, by the shard's key, the result's name, or the file's.
        unclaimed: Files of shards that no entry names; they are part of nothing.
        n_cells: Cells that were measured again.
        n_runs: Runs that this took.
        largest: The largest difference, as a share of what is tolerated.
        off: Cells whose numbers the model does not give, in words.
        n_unknown: Calls on pairs that the store cannot keep, which were not measured again.
    """

    n_shards: int
    damaged: Mapping[str, str]
    unclaimed: Sequence[str]
    n_cells: int
    n_runs: int
    largest: float
    off: Sequence[str]
    n_unknown: int

    @property
    def is_sound(self) -> bool:
        """Whether everything is as it should be; files that are part of nothing do not count."""
        return not self.damaged and not self.off


def verify(run: Run, opened: Opened | None, n_cells: int = 32, seed: int = 0) -> Verified:
    """Verify a run.

    Args:
        run: The run.
        opened: Its study, opened; None computes checksums alone.
        n_cells: How many cells are measured again.
        seed: Seed of the draw.

    Cost:
        Every byte of the run is read, and ``n_cells`` cells are run on up to eight pairs each.
    """
    results = Results(run)
    damaged = dict(run.damaged())
    for name in results.names():
        if not results.is_whole(name):
            damaged[name] = "a part of this result is missing, torn or changed"
    damaged.update(results.calls.damaged())
    damaged.update(run.damaged_records())
    checked = _Checked(run, results, opened, damaged)
    if opened is not None:
        checked.measure_again(n_cells, seed)
    return Verified(
        len(run.keys()),
        damaged,
        run.unclaimed(),
        checked.n_cells,
        checked.n_runs,
        checked.largest,
        checked.off,
        checked.n_unknown,
    )


@dataclass
class _Checked:
    """Cells that are measured again."""

    run: Run
    results: Results
    opened: Opened | None
    damaged: Mapping[str, str]

    def __post_init__(self) -> None:
        self.n_cells = self.n_runs = self.n_unknown = 0
        self.largest = 0.0
        self.off: list[str] = []

    def measure_again(self, n_cells: int, seed: int) -> None:
        """Draw cells and measure them."""
        calls = {}
        for name in self.results.calls.names():
            if self.results.calls.problems(name):
                continue
            call = self.results.call(name)
            if call["pairs"] is None:
                self.n_unknown += 1
            elif not any(shard["key"] in self.damaged for shard in call["shards"]):
                calls[name] = call
        works = {name: self.results.work(name, call) for name, call in calls.items()}
        sizes = [work.n_cells for work in works.values()]
        if not sum(sizes):
            return
        random = generator(seed, "verify", self.run.hash)
        drawn = np.sort(random.choice(sum(sizes), size=min(n_cells, sum(sizes)), replace=False))
        firsts = np.concatenate([[0], np.cumsum(sizes)])
        for number, (name, call) in enumerate(calls.items()):
            here = drawn[(drawn >= firsts[number]) & (drawn < firsts[number + 1])] - firsts[number]
            if here.size:
                self._call(name, call, works[name], here, random)

    def _call(
        self, name: str, call: Mapping[str, Any], work: Work, cells: np.ndarray, random: np.random.Generator
    ) -> None:
        """Measure some cells of a call again: of each pair by itself on some, else on all pairs of one shard."""
        if self.opened is None:
            return
        model, source_model = self.opened.models
        pairs = self.results.calls.pairs(call["pairs"], self.opened.model.tokenizer)
        if pairs is None:
            return  # that is told among what is damaged
        setting = Setting(**{**call["setting"], "metrics": tuple(call["setting"]["metrics"])})
        piece = call["shards"][int(random.integers(len(call["shards"])))]
        stored = self.results.numbers(name)
        chosen = np.arange(len(pairs))
        if stored.record.get("pooled"):
            chosen = np.arange(*piece["pairs"])
            stored = decode(piece["key"], *self._held(piece["key"]))
        elif work.cuts(setting.experiment(model, pairs, source_model)).pairs:
            chosen = np.sort(random.choice(len(pairs), size=min(_PAIRS, len(pairs)), replace=False))
        some = work.take(cells)
        again = some.measured(setting.experiment(model, pairs.take(chosen), source_model)).values
        again = again if again.shape[1] == len(cells) else again[:, cells]
        kept = chosen if not stored.record.get("pooled") else np.array([0])
        before, status = stored.values[:, cells][:, :, kept], stored.status[cells][:, kept]
        ends = [stored.baselines.get(role, stored.baselines[other]) for role, other in _ENDS]
        gap = np.abs(ends[0] - ends[1]).mean(axis=1) * (len(chosen) if stored.record.get("pooled") else 1)
        dtype = str(model.dtype).removeprefix("torch.")
        allowed = TOLERANCE.get(dtype, TOLERANCE["float32"]) * (gap[:, None, None] + np.abs(before))
        with np.errstate(invalid="ignore", divide="ignore"):
            share = np.where(has_number(status), np.abs(again - before) / allowed, 0.0)
        share = np.where(np.isnan(share), np.inf, share)
        self.n_cells += len(cells)
        self.n_runs += len(chosen) * some.runs_per_pair
        self.largest = max(self.largest, float(share.max(initial=0.0)))
        labels = _labels(work, cells)
        off = np.flatnonzero((share > 1).any((0, 2)))
        self.off += [self._words(labels[n], before[:, n], again[:, n]) for n in off]

    def _held(self, key: str) -> tuple[bytes, dict[str, Any]]:
        held = self.run.read(key)
        if held is None:
            raise StoreCorrupt(f"shard {key} is missing, torn or changed", fix="causalpatch run measures it again")
        return held

    @staticmethod
    def _words(label: str, before: np.ndarray, again: np.ndarray) -> str:
        worst = np.unravel_index(np.nanargmax(np.abs(before - again)), before.shape)
        return f"{label}: stored {before[worst]:.6g}, measured again {again[worst]:.6g}"


def _labels(work: Work, cells: np.ndarray) -> list[str]:
    """Return what messages call some cells."""
    if isinstance(work, Patched):
        return [work.interventions[int(cell)].label for cell in cells]
    if isinstance(work, EdgeRuns):
        return [str(work.asked.labels[int(cell)]) for cell in cells]
    return [f"score {int(cell)}" for cell in cells]
