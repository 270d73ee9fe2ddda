"""The results on disk: one JSON file, in which each part is replaced when it is measured anew."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import describe, versions

Results = dict[str, dict[str, Any]]


def load(file: Path) -> Results:
    """Return what was measured so far."""
    found: Results = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {"workloads": {}, "memory": {}} | found


def save(results: Mapping[str, Any], file: Path) -> None:
    """Write all results."""
    file.write_text(json.dumps(_rounded(results), indent=1, sort_keys=True) + "\n", encoding="utf-8")


def stamp(command: str, repeats: int) -> dict[str, Any]:
    """Return when, where and how something is measured."""
    when = f"{datetime.now(UTC):%Y-%m-%d}"
    return {"date": when, "command": command, "repeats": repeats, "machine": describe(), "versions": versions()}


def _rounded(value: Any) -> Any:
    """Keep six digits of every number."""
    if isinstance(value, Mapping):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
