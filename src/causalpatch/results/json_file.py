"""A result as one JSON file that says what it is and carries a checksum, so that a changed one is seen."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from causalpatch.base.errors import ResultsNotFound, StoreCorrupt
from causalpatch.results.arrays import replacing

T = TypeVar("T")


@dataclass(frozen=True)
class JsonFile:
    """How one kind of result is written and read.

    Args:
        noun: What it is called, which is also the key that its content has in the file.
        format: What the file says that it is.
        schema: Version of the content.
        fix: What helps where a file cannot be read.
    """

    noun: str
    format: str
    schema: str
    fix: str

    def save(self, path: str | Path, content: Any) -> Path:
        """Write plain data; folders are made where they are missing."""
        path = Path(path)
        head = {"format": self.format, "schema": self.schema, "sha256": _digest(content), self.noun: content}
        with replacing(path) as partial:
            partial.write_text(json.dumps(head, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    def load(self, path: str | Path, make: Callable[[Any], T]) -> T:
        """Read what ``save`` wrote.

        Args:
            path: The file.
            make: Makes the result of the content.

        Raises:
            ResultsNotFound: There is no such file.
            StoreCorrupt: It is something else, or was changed since.
        """
        path = Path(path)
        if not path.is_file():
            fix = f"name the file that {self.noun}.save(path) wrote"
            raise ResultsNotFound(f"no saved {self.noun} in '{path}'", fix=fix)
        try:
            head = json.loads(path.read_text(encoding="utf-8"))
            if head["format"] != self.format or head["schema"] != self.schema:
                raise self._corrupt(path, f"it is '{head['format']}', not '{self.format}', schema {self.schema}")
            if _digest(head[self.noun]) != head["sha256"]:
                raise self._corrupt(path, "it was changed after it was written")
            return make(head[self.noun])
        except (ValueError, KeyError, TypeError) as error:
            raise self._corrupt(path, f"{type(error).__name__}: {str(error)[:80]}") from error

    def _corrupt(self, path: Path, why: str) -> StoreCorrupt:
        return StoreCorrupt(f"the {self.noun} in '{path}' cannot be read", facts=[("why", why)], fix=self.fix)


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
