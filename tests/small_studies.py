"""A small study, and what it is held against."""

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
