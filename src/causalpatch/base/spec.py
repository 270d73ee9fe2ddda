"""Specs: plain frozen data that prints, travels as JSON and has a content hash.

The hash of a spec names a run: equal content gives an equal hash on every machine and in every session.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from causalpatch.base.errors import SettingError


def to_plain(value: Any) -> Any:
    """Turn dataclasses, arrays, tuples and paths into what JSON knows.

    A dataclass becomes a mapping of its fields with its class name under ``"kind"``.

    Raises:
        SettingError: The value holds something that is not plain data, such as a function.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.repr}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, np.ndarray):
        return {"shape": list(value.shape), "dtype": str(value.dtype), "data": to_plain(value.ravel().tolist())}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, str | int | float | bool | None):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Sequence | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return [to_plain(item) for item in items]
    raise SettingError(
        f"a {type(value).__name__} cannot be written into a spec",
        facts=[("value", repr(value)[:80]), ("known", "dataclasses, arrays, mappings, lists, texts, numbers")],
        fix="give plain data, such as the function's name",
    )


def finite(value: Any) -> Any:
    """Return plain data in which numbers that JSON does not have are null.

    Args:
        value: What ``to_plain`` returned.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    return [finite(item) for item in value] if isinstance(value, list) else value


def to_json(value: Any) -> str:
    """Return canonical JSON of a spec: sorted keys, no spaces, the same text for the same content."""
    return json.dumps(to_plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def content_hash(value: Any) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 of a spec's canonical JSON."""
    return hashlib.sha256(to_json(value).encode()).hexdigest()[:16]
