"""Scaling: one against two workers on this machine, and a thousand that are simulated.

    python -m benchmarks.scaling [--repeats N] [--pairs N] [--kind ray|processes] [--tiny] [--again]

Writes ``SCALING.md`` and what was measured, ``scaling.json``; ``--again`` simulates anew from that file.

*Measured*: every head of a model in the shape of GPT-2 small (random weights) at all positions of prompts of 16 random
tokens, one pair a shard, by one worker with one thread, two of one thread each, and one of two. All workers have opened
the model, and have checked their engine on other pairs, before the clock starts; how long that took is told apart.
Repeats are interleaved, each on pairs of its own, so that none is remembered.

*Simulated*: the library's own scheduling with the times that were measured (``simulated.py``). First the measured runs
themselves, which must come out within ten percent; then ``LARGE``, whose numbers were fixed before anything was run.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import causalpatch as cp
from benchmarks import machine
from benchmarks.shapes import SHAPES, Shape, build, tiny
from benchmarks.simulated import Measured, Outcome, World, simulate
from causalpatch.patches import Intervention
from causalpatch.sites import expand, parse
from causalpatch.studies.clusters import Cluster
from causalpatch.studies.executors import Done, Post
from causalpatch.studies.journal import Journal
from causalpatch.studies.processes import Processes
from causalpatch.studies.scheduling import Crew, Crewed, News, Ready, Stored
from causalpatch.studies.shards import Request
from causalpatch.studies.store import Run, Store
from causalpatch.studies.stored_runs import StoredRuns
from causalpatch.studies.study import ExecutorPart, ModelPart, ShardsPart

OUT = Path(__file__).with_name("SCALING.md")
N_TOKENS = 16
RATIO_TARGET, NEAR, EFFICIENCY_TARGET = 1.5, 0.10, 0.90
N_SEEDS = 21  # simulations of each measured run
SETUPS = {"1 worker x 1 thread": (1, 1), "2 workers x 1 thread": (2, 1), "1 worker x 2 threads": (1, 2)}
ONE, TWO, WIDE = SETUPS
WORKERS = {
    "ray": "Ray's, on this machine (`executor: {kind: ray}`)",
    "processes": "processes (`executor: {kind: processes}`)",
}

# Shards as long as 48 measured ones, which took about 2.8 s each: about 135 s a shard, and 120 shards for each worker,
# so four and a half hours. A model takes two to three minutes to open, as 16 GB from a shared store at 100 MB/s do.
# Each worker dies once a day, and its successor comes after a minute. One shard in 200 takes five times as long, and
# one in 10,000 never ends where it was begun.
LARGE = World(
    n_workers=1000,
    n_shards=120_000,
    size=48.0,
    load_s=120.0,
    deaths_per_hour=1 / 24,
    replaced_s=60.0,
    slow=0.005,
    slower=5.0,
    hanging=0.0001,
)


@dataclass
class Seconds:
    """What was measured of one setup.

    Args:
        loads: From the start of each worker until it had opened the model.
        first: The whole first call, on other pairs: opening, checking the engine, and measuring.
        whole: Of each repeat, the whole call.
        measuring: Of each repeat, from asking for the first shard until the last was settled.
        shards: From handing each shard over until it was said to be stored.
        runs: Of these, what workers say that making the runs took.
        takes: Taking a shard, in the study's own process.
        settles: Settling a shard, likewise.
    """

    loads: list[float] = field(default_factory=list)
    first: float = 0.0
    whole: list[float] = field(default_factory=list)
    measuring: list[float] = field(default_factory=list)
    shards: list[float] = field(default_factory=list)
    runs: list[float] = field(default_factory=list)
    takes: list[float] = field(default_factory=list)
    settles: list[float] = field(default_factory=list)

    def measured(self) -> Measured:
        """Return what a simulation takes; workers are there before the clock starts."""
        return Measured((0.0,), tuple(self.shards), tuple(self.takes), tuple(self.settles))


class Clocked:
    """A crew and an executor in one, with a watch on both sides.

    Args:
        crew: The workers.
    """

    def __init__(self, crew: Crew) -> None:
        self.crew, self.n_workers = crew, crew.n_workers
        self.seconds = Seconds()
        self._since: dict[int, float] = {}
        self._crewed = Crewed(self)

    def start(self, worker: int) -> None:
        self._since[worker] = time.perf_counter()
        self.crew.start(worker)

    def hand(self, worker: int, request: Request) -> None:
        self._since[worker] = time.perf_counter()
        self.crew.hand(worker, request)

    def news(self, timeout_s: float | None) -> list[News]:
        found = list(self.crew.news(timeout_s))
        for news in found:
            taken = time.perf_counter() - self._since[news.worker]
            if isinstance(news, Ready):
                self.seconds.loads.append(taken)
            elif isinstance(news, Stored):
                self.seconds.shards.append(taken)
                self.seconds.runs.append(news.entry["about"]["record"]["cost"]["seconds"])
        return found

    def end(self, worker: int) -> None:
        self.crew.end(worker)

    def close(self) -> None:
        self.crew.close()

    def measure(self, requests: Iterable[Request]) -> Iterator[Done]:
        begun = time.perf_counter()
        for done in self._crewed.measure(self._taken(requests)):
            stored = time.perf_counter()
            yield done
            self.seconds.settles.append(time.perf_counter() - stored)
        self.seconds.measuring.append(time.perf_counter() - begun)

    def _taken(self, requests: Iterable[Request]) -> Iterator[Request]:
        coming = iter(requests)
        while True:
            begun = time.perf_counter()
            request = next(coming, None)
            if request is None:
                return
            self.seconds.takes.append(time.perf_counter() - begun)
            yield request


@dataclass
class Bed:
    """Where runs are measured: a model in a folder, a store, and a crew for each setup."""

    model: cp.Model
    run: Run
    crews: dict[str, Clocked]

    def measure(self, setup: str, pairs: cp.Pairs) -> None:
        """Measure every head on pairs into an empty store."""
        shutil.rmtree(Path(self.run.store.address) / "runs", ignore_errors=True)
        experiment = cp.Experiment(self.model, pairs, show_progress=False)
        asked = [Intervention.of(str(site)) for site in expand(parse("z"), self.model.shape)]
        clocked = self.crews[setup]
        runs = StoredRuns(self.run, clocked, self.run.leases(), Journal(self.run), ShardsPart(pairs=1))
        begun = time.perf_counter()
        runs.measure(experiment, asked)
        clocked.seconds.whole.append(time.perf_counter() - begun)
        runs.leases.close()


def pairs_of(n_pairs: int, vocab: int, seed: int) -> cp.Pairs:
    """Return pairs of random tokens."""
    random = np.random.default_rng(seed)
    clean, corrupt = random.integers(0, vocab, (2, n_pairs, N_TOKENS))
    rows = [cp.Pair(a, b, ((int(a[3]),),), ((int(b[3]),),)) for a, b in zip(clean, corrupt, strict=True)]
    return cp.Pairs(rows, name="random")


def measure(shape: Shape, n_pairs: int, repeats: int, kind: str) -> dict[str, Seconds]:
    """Measure all setups, interleaved."""
    with tempfile.TemporaryDirectory() as folder:
        build(shape).save_pretrained(f"{folder}/model")
        store = Store(f"{folder}/store")
        store.create()
        run = store.run_of_hash("0" * 16)
        bed = Bed(cp.open_model(f"{folder}/model", device="cpu"), run, {})
        try:
            for setup, (workers, threads) in SETUPS.items():
                post = Post(store.address, run.hash, ModelPart(name=f"{folder}/model"), folder, "cpu", threads)
                bed.crews[setup] = Clocked(_crew(kind, workers, threads, post))
                bed.measure(setup, pairs_of(2 * workers, shape.vocab, 10_000))
                warm = bed.crews[setup].seconds
                bed.crews[setup].seconds = Seconds(loads=warm.loads, first=warm.whole[0])
            for repeat in range(repeats):
                pairs, order = pairs_of(n_pairs, shape.vocab, repeat), list(SETUPS)
                for setup in order[repeat % 3 :] + order[: repeat % 3]:
                    bed.measure(setup, pairs)
                    print(f"{repeat + 1}: {setup}: {bed.crews[setup].seconds.whole[-1]:.2f} s", flush=True)
        finally:
            for clocked in reversed(bed.crews.values()):  # the first has begun Ray, and ends it
                clocked.close()
        return {setup: clocked.seconds for setup, clocked in bed.crews.items()}


def _crew(kind: str, workers: int, threads: int, post: Post) -> Crew:
    if kind == "processes":
        return Processes([post] * workers)
    # Ray is told of more CPUs than there are: all crews wait side by side, and one works at a time.
    return Cluster(ExecutorPart(kind="ray", workers=workers, threads=threads, cpus_per_worker=0.01), post)


def reproduced(seconds: Seconds, n_workers: int, n_pairs: int) -> tuple[float, float]:
    """Return the median of the measured runs, and that of their simulations."""
    seen = [simulate(seconds.measured(), World(n_workers, n_pairs, seed=seed)).seconds for seed in range(N_SEEDS)]
    return statistics.median(seconds.measuring), statistics.median(seen)


def report(found: dict[str, Seconds], n_pairs: int, kind: str, command: str, outcome: Outcome) -> str:
    """Return the page."""
    one, two, wide = (statistics.median(found[setup].whole) for setup in SETUPS)
    ratio = one / two
    lines = [
        "# Scaling: one worker, two, and a thousand",
        "",
        f"Made by `{command}` on {_machine()}.",
        "",
        "## Measured",
        "",
        f"Every head of a model in the shape of GPT-2 small at all positions, on {n_pairs} pairs of {N_TOKENS} tokens, "
        f"one pair a shard; median of {len(found[ONE].whole)} interleaved runs. Workers are "
        f"{WORKERS[kind]}, and have opened the model before.",
        "",
        "| workers | seconds | all runs | a shard | of it not making runs | opening the model |",
        "|---|---|---|---|---|---|",
    ]
    for setup, seconds in found.items():
        beside = statistics.median(a - b for a, b in zip(seconds.shards, seconds.runs, strict=True))
        whole = ", ".join(f"{each:.2f}" for each in seconds.whole)
        lines.append(
            f"| {setup} | {statistics.median(seconds.whole):.2f} | {whole} | {statistics.median(seconds.shards):.3f} s "
            f"| {1e3 * beside:.0f} ms | {statistics.mean(seconds.loads):.1f} s |"
        )
    lines += [
        "",
        f"Two workers are {ratio:.2f} times as fast as one; target {RATIO_TARGET}: "
        f"{'kept' if ratio >= RATIO_TARGET else 'missed'}. One worker with two threads is {one / wide:.2f} times as "
        "fast as with one.",
        "",
        f"In the study's own process a shard takes {_ms(found[TWO].takes)} to be taken (its lease, a look into the "
        f"store) and {_ms(found[TWO].settles)} to be settled (read back, checksum, lease given back).",
        "",
        "## Simulated",
        "",
        "The library's own scheduling with these times (`benchmarks/simulated.py`), each shard drawn from those that "
        "were measured. First the measured runs themselves, without opening the model:",
        "",
        "| workers | measured | simulated | apart |",
        "|---|---|---|---|",
    ]
    for setup in (ONE, TWO):
        seen, simulated = reproduced(found[setup], SETUPS[setup][0], n_pairs)
        lines.append(f"| {setup} | {seen:.2f} s | {simulated:.2f} s | {simulated / seen - 1:+.1%} |")
    typical = statistics.mean(found[ONE].shards)
    lines += [
        "",
        f"Then {LARGE.n_workers:,} workers like the one, and {LARGE.n_shards:,} shards of {LARGE.size * typical:.0f} s "
        f"({LARGE.size:g} measured ones each). Fixed beforehand: the model takes {LARGE.load_s:g} to "
        f"{1.5 * (LARGE.load_s or 0):g} s to open; a worker dies {LARGE.deaths_per_hour * 24:g} time a day, and its "
        f"successor comes after {LARGE.replaced_s:g} s; {LARGE.slow:.1%} of the shards take {LARGE.slower:g} times as "
        f"long, and {LARGE.hanging:.2%} never end where they were begun.",
        "",
        f"{outcome.seconds:,.0f} s, where {outcome.ideal_s:,.0f} s would be all workers measuring all the time: an "
        f"efficiency of {outcome.efficiency:.1%}; target {EFFICIENCY_TARGET:.0%}: "
        f"{'kept' if outcome.efficiency >= EFFICIENCY_TARGET else 'missed'}. {outcome.n_deaths} workers died, "
        f"{outcome.n_second} shards were given to a second worker, no shard was lost. The study's own process was busy "
        f"{outcome.own_s / outcome.seconds:.0%} of the time: that bounds how many workers one study feeds, and larger "
        "shards let it feed more.",
        "",
    ]
    return "\n".join(lines)


def large(found: dict[str, Seconds]) -> Outcome:
    """Simulate the large cluster: shards as one worker alone measures them, the study's own work as beside two."""
    own = found[TWO]
    return simulate(replace(found[ONE].measured(), takes=tuple(own.takes), settles=tuple(own.settles)), LARGE)


def main() -> None:
    parser = argparse.ArgumentParser(description="How studies scale.")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--kind", choices=tuple(WORKERS), default="ray")
    parser.add_argument("--tiny", action="store_true", help="a model that runs in no time: that it works, not how fast")
    parser.add_argument("--again", action="store_true", help="simulate anew from what was measured")
    parser.add_argument("--out", type=Path, default=OUT)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    kept = asked.out.with_name(asked.out.stem.lower() + ".json")
    if asked.again:
        held: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
        n_pairs, kind, command = held["pairs"], held["kind"], held["command"]
        found = {setup: Seconds(**seconds) for setup, seconds in held["seconds"].items()}
    else:
        n_pairs, kind, command = asked.pairs, asked.kind, " ".join(["python -m benchmarks.scaling", *sys.argv[1:]])
        shape = tiny(SHAPES["gpt2"]) if asked.tiny else SHAPES["gpt2"]
        found = measure(shape, n_pairs, asked.repeats, kind)
        plain = {setup: asdict(seconds) for setup, seconds in found.items()}
        about = {"command": command, "kind": kind, "pairs": n_pairs, "seconds": plain}
        kept.write_text(json.dumps(about) + "\n", encoding="utf-8")
    outcome = large(found)
    asked.out.write_text(report(found, n_pairs, kind, command, outcome), encoding="utf-8")
    far = []
    for setup in (ONE, TWO):
        seen, simulated = reproduced(found[setup], SETUPS[setup][0], n_pairs)
        print(f"{setup}: measured {seen:.2f} s, simulated {simulated:.2f} s, {simulated / seen - 1:+.1%}")
        far += [setup] if abs(simulated / seen - 1) > NEAR else []
    print(f"{LARGE.n_workers:,} workers: efficiency {outcome.efficiency:.1%}")
    if far:
        raise SystemExit(f"the simulation is more than {NEAR:.0%} from what was measured: {', '.join(far)}")


def _machine() -> str:
    return f"{', '.join(machine.describe().values())}; {', '.join(f'{k} {v}' for k, v in machine.versions().items())}"


def _ms(seconds: list[float]) -> str:
    return f"{1e3 * statistics.median(seconds):.1f} ms"


if __name__ == "__main__":
    main()
