"""Time sweeps against other ways of making the same patches, and write RESULTS.md, results.json and charts.

Usage: python -m benchmarks.run [--only NAME] [--quick] [--repeats N] [--peers NAME,NAME] [--profile NAME] …

Each part is written as soon as it is measured, and replaces what an earlier run found; the others stay.
"""

import argparse
import gc
import json
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import alone, charts, edges, growth, profiling, report, small, start, store
from benchmarks.contest import Stable, hold
from benchmarks.machine import ROOT
from benchmarks.peers import PEERS, Peer
from benchmarks.shapes import build
from benchmarks.targets import rows_of
from benchmarks.workloads import QUICK, WORKLOADS, shorter

PARTS = ("memory", "small", "growth", "start", "edges", "edge-scores")


class Bench:
    """A run of benchmarks.

    Args:
        options: What was asked for on the command line.
        command: The command line in words.
    """

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.folder: Path = options.out
        self.folder.mkdir(parents=True, exist_ok=True)
        self.results = store.load(self.folder / "results.json")
        self.peers = _chosen_peers(options.peers)
        self.missing = {peer.name: why for peer in self.peers if (why := peer.problem()) is not None}
        self._stable: tuple[str, Stable] | None = None

    def measure(self, names: Sequence[str]) -> None:
        """Measure workloads and other parts one after the other, and write each down."""
        for name, why in self.missing.items():
            print(f"skipped: {name}: {why}", flush=True)
        for name in names:
            started = time.perf_counter()
            print(f"{name} …", end=" ", flush=True)
            self._measure(name)
            self.write()
            print(f"{time.perf_counter() - started:.0f} s", flush=True)
        for row in rows_of(self.results):
            if row.is_met is not None:
                print(f"{row.verdict.strip('*'):>7}  {row.what}: {row.of} {row.target}: {row.measured}")

    def write(self) -> None:
        """Write everything that is known so far."""
        store.save(self.results, self.folder / "results.json")
        plain = json.loads((self.folder / "results.json").read_text(encoding="utf-8"))
        text = report.write(plain, self.command, self.missing, is_tiny=self.options.tiny)
        (self.folder / "RESULTS.md").write_text(text, encoding="utf-8")
        workloads = [plain["workloads"][name] for name in WORKLOADS if name in plain["workloads"]]
        charts.speed([each for each in workloads if "skipped" not in each], self.folder / "speed.svg")
        if "points" in plain.get("growth", {}):
            charts.growth(plain["growth"], self.folder / "growth.svg")

    def _measure(self, name: str) -> None:
        repeats, is_tiny = self.options.repeats, self.options.tiny
        stamp = store.stamp(self.command, repeats)
        if name == "memory":
            for each in alone.MEASURED:
                self.results["memory"][each] = alone.in_a_process(each, 0, is_tiny=is_tiny)["memory"] | stamp
        elif name == "small":
            why = small.why_not()
            found = {"skipped": why} if why else {"sites": small.measure(repeats, is_tiny=is_tiny)}
            self.results[name] = found | stamp
        elif name == "growth":
            self.results[name] = growth.measure(repeats, is_tiny=is_tiny) | stamp
        elif name == "edges":
            self.results[name] = edges.measure_exact(repeats, is_tiny=is_tiny) | stamp
        elif name == "edge-scores":
            self.results[name] = edges.measure_scores(repeats, is_tiny=is_tiny) | stamp
        elif name == "start":
            self.results[name] = {"records": start.measure(repeats)} | stamp
        else:
            self.results["workloads"][name] = self._workload(name, repeats) | stamp

    def _workload(self, name: str, repeats: int) -> dict[str, Any]:
        is_tiny, workload = self.options.tiny, WORKLOADS[name]
        why = workload.why_not()
        if why is not None:
            return {"skipped": why, "title": workload.title}
        if workload.only_ours:
            record = alone.in_a_process(name, repeats, is_tiny=is_tiny)
            memory = record.pop("memory")
            self.results["memory"][name] = memory | store.stamp(self.command, repeats)
            return record
        if self._stable is None or self._stable[0] != workload.shape:
            gc.unfreeze()
            self._stable = None  # the last shape's models go before the next one's come
            self._stable = (workload.shape, Stable(build(workload.sizes(is_tiny=is_tiny))))
        if self.options.quick:
            workload = shorter(workload)
        return hold(workload, self._stable[1], self.peers, repeats, is_tiny=is_tiny)


def _chosen_peers(text: str | None) -> list[Peer]:
    if text is None:
        return list(PEERS)
    wanted = [word.strip().lower() for word in text.split(",") if word.strip()]
    unknown = [word for word in wanted if word != "none" and not any(word in peer.name.lower() for peer in PEERS)]
    if unknown:
        raise SystemExit(f"no peer named {unknown[0]!r}; there are: {'; '.join(peer.name for peer in PEERS)}; none")
    return [peer for peer in PEERS if any(word in peer.name.lower() for word in wanted)]


def _options(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.splitlines()[0])
    known = (*WORKLOADS, *PARTS)
    parser.add_argument("--only", action="append", metavar="NAME", help=f"measure this alone: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} and start only, peers on 8 cells")
    parser.add_argument("--repeats", type=int, help="repeats of each (5; 2 with --quick)")
    parser.add_argument("--peers", help="peers whose names hold one of these words, with commas; none for none")
    parser.add_argument("--profile", metavar="NAME", help="show where the time of one workload goes, ours only")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it works; needs --out")
    parser.add_argument("--out", type=Path, help="folder to write to (benchmarks/)")
    options = parser.parse_args(words)
    for name in [*(options.only or []), *([options.profile] if options.profile else [])]:
        if name not in (WORKLOADS if name == options.profile else known):
            parser.error(f"no workload named {name!r}; there are: {', '.join(known)}")
    if options.tiny and options.out is None and not options.profile:
        parser.error("--tiny does not overwrite results: give a folder, --out FOLDER")
    options.repeats = options.repeats or (2 if options.quick else 5)
    options.out = options.out or ROOT / "benchmarks"
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Measure what is asked for."""
    words = sys.argv[1:] if words is None else words
    options = _options(words)
    if options.profile:
        profiling.show(options.profile, is_tiny=options.tiny)
        return
    names = options.only or ([*QUICK, "start"] if options.quick else [*WORKLOADS, *PARTS])
    Bench(options, shlex.join(["python", "-m", "benchmarks.run", *words])).measure(names)


if __name__ == "__main__":
    main()
