"""What tests of a hypothesis found: a row for each thing tested, every number behind it, and how it was obtained.

On disk findings are two parquet tables and a JSON record that names them with their checksums; nothing is pickled. Each
file is written under a temporary name and then moved into place, the record last.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from causalpatch.base.errors import AlgorithmError, ResultsNotFound, StoreCorrupt
from causalpatch.base.extras import lazy
from causalpatch.base.spec import to_plain

if TYPE_CHECKING:
    import pandas as pd
else:
    pd = lazy("pandas")

RECORD = "record.json"
FORMAT = "causalpatch findings"
SCHEMA = 1
_TABLES = ("table", "samples")
_Found = TypeVar("_Found", bound="Findings")


@dataclass(frozen=True, eq=False)
class Findings:
    """Numbers of a test, with what they stand on.

    Args:
        table: A row for each thing that was tested.
        samples: A row for each observation: inputs, what was expected, what the network answered.
        provenance: Model, hypothesis, seeds, engine and settings, as plain data.
    """

    table: "pd.DataFrame"
    samples: "pd.DataFrame"
    provenance: Mapping[str, Any]

    kind: ClassVar[str] = "findings"

    def __str__(self) -> str:
        lines = [self.title, *self.lines(), "", self.shown().to_string(index=False)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.provenance.get("notes", ()))])

    def __repr__(self) -> str:
        return str(self)

    @property
    def title(self) -> str:
        """What was tested on what."""
        return f"{self.kind} of '{self.provenance['hypothesis']['algorithm']}' in '{self.provenance['model']['name']}'"

    def lines(self) -> list[str]:
        """Return what is printed above the table."""
        return []

    def shown(self) -> "pd.DataFrame":
        """Return the table as it is printed."""
        return self.table

    def row(self, **where: Any) -> Mapping[str, Any]:
        """Return one row of the table.

        Args:
            where: Value by column, such as ``variable="total"``.

        Raises:
            AlgorithmError: No row has these values.
        """
        for record in self.table.to_dict("records"):
            if all(record.get(name) == value for name, value in where.items()):
                return {str(name): value for name, value in record.items()}
        name, value = next(iter(where.items()))
        known = ", ".join(dict.fromkeys(map(str, self.table.get(name, ()))))
        raise AlgorithmError(
            f"no row of these findings has {name}={value!r}",
            facts=[("known", known or ", ".join(map(str, self.table.columns)))],
            fix="name one of these",
        )

    def save(self, folder: str | Path) -> Path:
        """Write the findings into a folder and return it."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        digests = {}
        for name in _TABLES:
            path, frame = folder / f"{name}.parquet", getattr(self, name)
            _put(path, frame.to_parquet)
            digests[name] = _sha256(path)
        record = {
            "format": FORMAT,
            "schema": SCHEMA,
            "kind": self.kind,
            "files": digests,
            "provenance": to_plain(dict(self.provenance)),
        }
        record["sha256"] = _digest(record)
        text = json.dumps(record, indent=1) + "\n"
        _put(folder / RECORD, lambda path: path.write_text(text, encoding="ascii"))
        return folder

    @classmethod
    def load(cls: type[_Found], folder: str | Path) -> _Found:
        """Read findings of this kind back.

        Raises:
            ResultsNotFound: The folder holds none, or findings of another kind.
            StoreCorrupt: A file is missing or was changed after it was written.
        """
        folder = Path(folder)
        record = _read_record(folder)
        if record["kind"] != cls.kind:
            raise ResultsNotFound(
                f"{str(folder)!r} holds findings of another kind",
                facts=[("asked for", cls.kind), ("found", record["kind"])],
                fix="load them with the class that saved them",
            )
        frames = {}
        for name in _TABLES:
            path = folder / f"{name}.parquet"
            if not path.is_file() or _sha256(path) != record["files"][name]:
                raise _corrupt(folder, f"{path.name!r} is missing or was changed after it was written")
            frames[name] = pd.read_parquet(path)
        return cls(frames["table"], frames["samples"], record["provenance"])


def percent(share: float) -> str:
    """Return a share as a person reads it."""
    return "" if share != share else f"{share:.1%}"


def interval_text(low: float, high: float) -> str:
    """Return an interval of shares as a person reads it; nothing where there is none."""
    return "none" if low != low else f"{low:.1%} to {high:.1%}"


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    if not path.is_file():
        there = "the folder is there" if folder.is_dir() else "there is no such folder"
        raise ResultsNotFound(
            f"no saved findings in {str(folder)!r}",
            facts=[("looked for", RECORD), ("found", there)],
            fix="name the folder that findings.save(folder) wrote",
        )
    try:
        record = json.loads(path.read_bytes())
    except ValueError as error:
        raise _corrupt(folder, f"{RECORD!r} is not JSON") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT or record.get("schema") != SCHEMA:
        raise _corrupt(folder, f"{RECORD!r} does not describe findings of this version")
    if record.pop("sha256", None) != _digest(record):
        raise _corrupt(folder, f"{RECORD!r} was changed after it was written")
    return record


def _corrupt(folder: Path, what: str) -> StoreCorrupt:
    return StoreCorrupt(f"the findings in {str(folder)!r} cannot be trusted: {what}", fix="run the test again")


def _put(path: Path, write_to: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then move it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_to(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
