"""JSON objects that say what they are and carry a checksum of themselves, so that a changed one is seen."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, Final

from causalpatch.base.spec import to_plain

_SEAL: Final = "seal"


def seal(kind: str, content: Mapping[str, Any]) -> bytes:
    """Return the bytes of an object.

    Args:
        kind: What it is, in words.
        content: Plain data.
    """
    plain = {"format": kind, **to_plain(content)}
    return (json.dumps({**plain, _SEAL: _digest(plain)}, indent=1, ensure_ascii=False) + "\n").encode()


def unseal(kind: str, data: bytes | None) -> dict[str, Any] | None:
    """Return the content of an object; None where it is not there, not of this kind, torn or changed.

    Args:
        kind: What it must be.
        data: What ``seal`` returned.
    """
    if data is None:
        return None
    try:
        plain = json.loads(data)
        found = plain.pop(_SEAL)
        is_whole = found == _digest(plain) and plain.pop("format") == kind
    except (ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(plain) if is_whole else None


def checksum(data: bytes) -> str:
    """Return the SHA-256 of some bytes, in hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _digest(plain: Mapping[str, Any]) -> str:
    return checksum(json.dumps(plain, sort_keys=True, ensure_ascii=False).encode())
