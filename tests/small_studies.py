"""A small study, and what it is held against."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

import causalpatch as cp
from causalpatch.studies.reading import parse_study
from causalpatch.studies.store import Store

TEXT = """
schema: 1
name: small
model: zoo:stories
pairs: {name: ioi, first: 6}
split: null
shards: {pairs: 2}
executor: {threads: 1, device: cpu}
store: store
steps:
  - {kind: sweep, name: heads, site: z.2:4@-1}
"""

PLAIN = """\
schema: 1
model: zoo:stories
pairs: ioi
steps:
  - kind: sweep
    name: heads
    site: z@-1
"""
"""The smallest study, on all pairs, in lines of its own."""


def study_of(*changes, text=TEXT):
    """Return the small study with changes."""
    return parse_study(text, "small.yaml", changes)


def run_in(folder, *changes, text=TEXT, **how):
    """Run the small study and return what it found and what was told."""
    told = []
    found = cp.run_study(study_of(*changes, text=text), folder, listeners=(told.append,), **how)
    return found, told


def measured(told):
    """Return the keys of the shards that a session measured."""
    return [line["key"] for line in told if line["event"] == "shard" and line["by"] == "this run"]


def store_of(folder):
    return Store(str(Path(folder) / "store"))


def the_run(folder):
    """Return the one run in a folder's store."""
    store = store_of(folder)
    (name,) = store.hashes()
    return store.run(name)


def same(one, other):
    """Say whether effects hold the same numbers bit for bit."""
    first, second = one.to_xarray(), other.to_xarray()
    return all(np.array_equal(first[name], second[name], equal_nan=True) for name in first.data_vars)


def kill_after_a_shard(folder, *changes):
    """Run the small study in a process of its own, kill that (SIGKILL) when a shard is stored, and see it all end.

    Returns the names of the shards that were stored, when nothing that it had started ran any more.
    """
    began = begin(folder, *changes)
    until = time.monotonic() + 300
    while not list(folder.rglob("*.parquet")):
        assert began.poll() is None, (folder / "said").read_text(encoding="utf-8")
        assert time.monotonic() < until
        time.sleep(0.005)
    assert kill(began) > 1
    return {each.stem for each in folder.rglob("*.parquet")}


def begin(folder, *changes):
    """Begin to run the small study in a process of its own."""
    (folder / "small.yaml").write_text(TEXT, encoding="utf-8")
    words = [sys.executable, "-m", "causalpatch", "run", "small.yaml", *(w for c in changes for w in ("--set", c))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with (folder / "said").open("w") as said:
        return subprocess.Popen(words, cwd=folder, env=env, stdout=said, stderr=said, start_new_session=True)


def kill(began):
    """Kill a process (SIGKILL), and wait until all that it had started is gone; return how many these were."""
    family = _descendants(began.pid)
    began.send_signal(signal.SIGKILL)
    began.wait()
    until = time.monotonic() + 120
    while any(Path(f"/proc/{pid}").exists() for pid in family):
        assert time.monotonic() < until, family
        time.sleep(0.05)
    return len(family)


def _descendants(pid):
    """Return the numbers of all processes below one."""
    parents = {}
    for each in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(each.name)] = int((each / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has just ended
    found, new = set(), {pid}
    while new:
        found |= new
        new = {child for child, parent in parents.items() if parent in new} - found
    return found - {pid}
