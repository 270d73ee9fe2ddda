"""One workload in a process of its own: how much memory it takes in all, and what does not fit beside others.

Usage: python -m benchmarks.alone NAME FILE [--repeats N] [--tiny]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contest import Stable, hold
from benchmarks.machine import ROOT, peak_mib, resident_mib
from benchmarks.ours import Sweep
from benchmarks.peers import HOOKS, PEERS
from benchmarks.shapes import build
from benchmarks.workloads import WORKLOADS

# Workloads whose memory is measured: one with a target, and one of each other kind. The longest is measured anyway.
MEASURED = ("resid_pre", "mlp_out", "z", "resid_pre-128", "neurons-128")


def in_a_process(name: str, repeats: int, *, is_tiny: bool) -> dict[str, Any]:
    """Measure a workload in a new process.

    Args:
        name: Name of the workload.
        repeats: How often it is timed beside hooks by hand on a few cells; 0 measures memory only.
        is_tiny: Whether sizes are those that only show that it works.

    Returns:
        ``memory``, and with repeats the record of the workload.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "record.json"
        words = [sys.executable, "-m", "benchmarks.alone", name, str(file), "--repeats", str(repeats)]
        subprocess.run([*words, *(["--tiny"] if is_tiny else [])], cwd=ROOT, check=True)
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def measure(name: str, repeats: int, *, is_tiny: bool) -> dict[str, Any]:
    """Measure a workload in this process, which should have done nothing else before."""
    workload = WORKLOADS[name]
    loaded = resident_mib()
    stable = Stable(build(workload.sizes(is_tiny=is_tiny)))
    sweep = Sweep(workload, workload.task(is_tiny=is_tiny), stable.module)
    before, peak_before = resident_mib(), peak_mib()
    started = time.perf_counter()
    sweep.run()
    memory = {
        "loaded_mib": round(loaded),
        "before_mib": round(before),
        "peak_before_mib": round(peak_before),
        "peak_mib": round(peak_mib()),
        "seconds": round(time.perf_counter() - started, 3),
    }
    record: dict[str, Any] = {"memory": memory}
    if repeats:
        peers = [peer for peer in PEERS if peer.name == HOOKS]
        record |= hold(workload, stable, peers, repeats, is_tiny=is_tiny)
    return record


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=WORKLOADS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--repeats", type=int, default=0)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    record = measure(options.name, options.repeats, is_tiny=options.tiny)
    options.file.write_text(json.dumps(record), encoding="utf-8")


if __name__ == "__main__":
    main()
