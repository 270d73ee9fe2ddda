"""Provenance: the plain record of how numbers came to be, kept with them.

With every number stand the six facts of Miller et al. 2024 ("Transformer Circuit Faithfulness Metrics are not Robust",
2407.08734): granularity; node, edge or path; value patched in; positions; direction; circuit or complement.
"""

import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

PACKAGES = ("causalpatch", "torch", "transformers", "numpy")


def record(facts: Mapping[str, str], **parts: Any) -> dict[str, Any]:
    """Return a provenance record.

    Args:
        facts: The six facts.
        parts: Everything else, as plain data: model, pairs, direction, engine, cost.

    Returns:
        The parts with the facts, the versions of the packages that computed, and the time in UTC.
    """
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {
        **parts,
        "facts": dict(facts),
        "versions": versions,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
