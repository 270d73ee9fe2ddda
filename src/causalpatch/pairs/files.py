"""Files of pairs as plain rows: JSON lines, CSV and parquet, with the line that each row came from."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from causalpatch.base.errors import PairFileError
from causalpatch.base.extras import lazy

if TYPE_CHECKING:
    import pyarrow.parquet as parquet
else:
    parquet = lazy("pyarrow.parquet")

ENDINGS = (".jsonl", ".csv", ".parquet")
# Columns whose CSV cells are JSON where they are anything but text.
_NEVER_TEXT = ("answer_id", "wrong_answer_id")


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Args:
        where: How errors call it: ``line 3 of 'ioi.jsonl'``.
        values: Values by column; None where a cell is empty.
        untyped: True where the format knows text alone, so that numbers arrive as text.
    """

    where: str
    values: Mapping[str, Any]
    untyped: bool = False


def read_rows(path: Path) -> list[Row]:
    """Read a file of pairs.

    Args:
        path: A file that ends in ``.jsonl``, ``.csv`` or ``.parquet``.

    Raises:
        PairFileError: The file is not there, is empty, ends in something else, or has a malformed line, whose number
            is given.
    """
    if path.suffix.lower() not in ENDINGS:
        raise PairFileError(
            f"'{path.name}' has an ending that is not known",
            facts=[("ending", path.suffix or "none"), ("known", " ".join(ENDINGS))],
            fix="save the pairs as JSON lines, or read them yourself and give a list of dicts",
        )
    if not path.is_file():
        near = sorted(file.name for ending in ENDINGS for file in path.parent.glob(f"*{ending}"))[:5]
        raise PairFileError(
            f"there is no file '{path}'", facts=[("pairs beside it", ", ".join(near) or "none")], fix="correct the path"
        )
    if path.suffix.lower() == ".parquet":
        rows = _parquet(path)
    else:
        reader = _json_lines if path.suffix.lower() == ".jsonl" else _csv
        rows = list(reader(_text(path), path.name))
    if not rows:
        raise PairFileError(
            f"'{path.name}' holds no pairs",
            facts=[("size", f"{path.stat().st_size} bytes")],
            fix='write one pair per line, for instance {"clean": "…", "corrupt": "…", "answer": " …"}',
        )
    return rows


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise PairFileError(
            f"'{path.name}' is not UTF-8 text", facts=[("first wrong byte", error.start)], fix="save it as UTF-8"
        ) from error


def _json_lines(text: str, name: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
        except ValueError as error:
            raise _malformed(number, name, line, str(error), "write one JSON object per line") from error
        if not isinstance(values, dict):
            problem = f"a {type(values).__name__}, not an object"
            raise _malformed(number, name, line, problem, 'write {"clean": …, "corrupt": …} on each line')
        yield Row(f"line {number} of '{name}'", values)


def _csv(text: str, name: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    first = 1
    try:
        for cells in reader:
            first, last = reader.line_num + 1, first
            if not cells:
                continue
            if not header:
                header = cells
                continue
            if len(cells) != len(header):
                problem = f"{len(cells)} cells under {len(header)} columns"
                raise _malformed(last, name, ",".join(cells), problem, 'put cells that hold a comma in "quotes"')
            values = {column: _cell(column, cell) for column, cell in zip(header, cells, strict=True)}
            yield Row(f"line {last} of '{name}'", values, untyped=True)
    except csv.Error as error:
        raise _malformed(reader.line_num, name, "", str(error), 'close every "quote"') from error


def _cell(column: str, cell: str) -> Any:
    """Read one cell: empty is missing, JSON lists and objects are what they say, ids are numbers, the rest is text."""
    if not cell:
        return None
    if cell[0] in "[{" or column in _NEVER_TEXT:
        try:
            return json.loads(cell)
        except ValueError:
            return cell
    return cell


def _parquet(path: Path) -> list[Row]:
    try:
        values = parquet.read_table(path).to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's own errors derive from these
        raise PairFileError(
            f"'{path.name}' is not a parquet file",
            facts=[("problem", str(error).splitlines()[0][:80])],
            fix="write it again, or give the pairs as .jsonl or .csv",
        ) from error
    return [Row(f"row {index} of '{path.name}'", row) for index, row in enumerate(values)]


def _malformed(number: int, name: str, line: str, problem: str, fix: str) -> PairFileError:
    shown = line if len(line) <= 60 else f"{line[:60]}…"
    facts = [("line", shown.strip())] if line else []
    return PairFileError(f"line {number} of '{name}' is malformed", facts=[*facts, ("problem", problem)], fix=fix)
