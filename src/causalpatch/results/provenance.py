"""Provenance: which program computed the numbers, and when, as plain data that is kept with them."""

import platform
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any

PACKAGES = ("causalpatch", "torch", "transformers", "numpy")


def describe_program() -> dict[str, Any]:
    """Return the versions of the packages that compute, and the time in UTC."""
    versions = {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {"versions": versions, "created": datetime.now(UTC).isoformat(timespec="seconds")}


@cache
def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
