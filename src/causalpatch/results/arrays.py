"""Arrays and a record in one file without pickles, with a checksum: numpy's ``.npz`` with a JSON text in it."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from causalpatch.base.errors import ResultsNotFound, SettingError, StoreCorrupt

_SCHEMA = "1"
_ENTRY = "about"


class Saved(ABC):
    """Results that are arrays and a record, written into one file and read again."""

    format: ClassVar[str]
    """What the file is, in words; the last one is what messages call it."""

    def save(self, path: str | Path) -> Path:
        """Write everything into one file.

        Args:
            path: Ends in ``.npz``; folders are made where they are missing.

        Raises:
            SettingError: It has another ending.
        """
        return write(Path(path), self.format, *self._parts())

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote.

        Raises:
            ResultsNotFound: There is no such file.
            StoreCorrupt: It is no such file, or was changed since.
        """
        return cls._of_parts(*read(Path(path), cls.format))

    @abstractmethod
    def _parts(self) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Return the arrays by name, and all else as plain data."""

    @classmethod
    @abstractmethod
    def _of_parts(cls, held: dict[str, np.ndarray], about: dict[str, Any]) -> Self:
        """Return what some parts are of."""


def write(path: Path, kind: str, held: Mapping[str, np.ndarray], about: Mapping[str, Any]) -> Path:
    """Write arrays and what is to be known of them.

    Args:
        path: Ends in ``.npz``; folders are made where they are missing.
        kind: What it is, in words; ``read`` asks for it.
        held: The arrays by name.
        about: What is to be known of them, as plain data.

    Raises:
        SettingError: The path has another ending.
    """
    if path.suffix != ".npz":
        noun = _noun(kind)
        verb = f"{noun} are" if noun.endswith("s") else f"a {noun} is"
        raise SettingError(f"{verb} saved as .npz, not as '{path.name}'", fix=f'{noun}.save("{path.stem}.npz")')
    content = json.dumps(about, sort_keys=True)
    head = {"format": kind, "schema": _SCHEMA, "content": content, "sha256": _digest(content, held)}
    with replacing(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **{_ENTRY: np.array(json.dumps(head, sort_keys=True)), **held})  # type: ignore[arg-type]
    return path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of another one when all is written.

    Args:
        path: Where the file shall be; folders are made where they are missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read(path: Path, kind: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Read arrays and what is known of them.

    Args:
        path: What ``write`` wrote.
        kind: What it must be.

    Raises:
        ResultsNotFound: There is no such file.
        StoreCorrupt: It is something else, or was changed since.
    """
    if not path.is_file():
        noun = _noun(kind)
        raise ResultsNotFound(f"no saved {noun} in '{path}'", fix=f"name the file that {noun}.save(path) wrote")
    try:
        with np.load(path, allow_pickle=False) as file:
            head = json.loads(str(file[_ENTRY]))
            held = {name: file[name] for name in file.files if name != _ENTRY}
    except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
        raise _corrupt(path, kind, f"{type(error).__name__}: {str(error)[:80]}") from error
    if head.get("format") != kind or head.get("schema") != _SCHEMA:
        raise _corrupt(path, kind, f"it is '{head.get('format')}', not '{kind}', schema {_SCHEMA}")
    if _digest(head["content"], held) != head["sha256"]:
        raise _corrupt(path, kind, "it was changed after it was written")
    return held, json.loads(head["content"])


def _digest(content: str, held: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(content.encode())
    for name in sorted(held):
        digest.update(f"{name} {held[name].dtype.str} {held[name].shape}".encode() + held[name].tobytes())
    return digest.hexdigest()


def _noun(kind: str) -> str:
    return kind.rpartition(" ")[2]


def _corrupt(path: Path, kind: str, why: str) -> StoreCorrupt:
    noun = _noun(kind)
    again = "them" if noun.endswith("s") else "it"
    return StoreCorrupt(
        f"the {noun} in '{path}' cannot be read", facts=[("why", why)], fix=f"write {again} again: {noun}.save(path)"
    )
