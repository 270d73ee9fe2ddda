"""Effects on disk: immutable parquet shards and a JSON manifest that names them with their checksums.

1. Every file is written under a temporary name and then moved into place, so that half a file never has a real name.
2. The manifest is moved last. It names every other file, so what it does not name is not part of the effects, and a
   save over older effects takes names that are still free: whatever moment it is cut short, one whole set is there.
3. Reading checks the manifest's own checksum and that of every file before a number is used.

``data-NNNNN.parquet`` is a long table: the sweep's axes, pair, metric_name, metric, status. ``pairs.parquet`` has a row
per pair: its component, the metrics of the unpatched runs, the positions of the aligned columns. Anything that reads
parquet and JSON can read them; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import ResultsNotFound, StoreCorrupt, UnsupportedError
from causalpatch.base.extras import lazy
from causalpatch.results.layout import Parts

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as parquet
else:
    pa = lazy("pyarrow")
    parquet = lazy("pyarrow.parquet")

MANIFEST = "manifest.json"
FORMAT = "causalpatch effects"
SCHEMA = 1
ROWS_PER_SHARD = 1_000_000


def write(parts: Parts, folder: Path) -> Path:
    """Write effects into a folder.

    Args:
        parts: What the effects are made of.
        folder: Made where it is missing; files that are not part of older effects are left alone.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.iterdir()}
    older = _names_of_older(folder)
    shards = [_write_table(folder, _free("data-{:05d}.parquet", before), table) for table in _long_tables(parts)]
    pairs = _write_table(folder, _free_pairs(before), _pairs_table(parts))
    manifest = {
        "format": FORMAT,
        "schema": SCHEMA,
        "axes": {axis: list(values) for axis, values in parts.axes.items()},
        "labels": {axis: list(texts) for axis, texts in parts.labels.items()},
        "metrics": list(parts.metrics),
        "baselines": list(parts.baselines),
        "has_positions": parts.positions is not None,
        "n_pairs": len(parts.pair_ids),
        "provenance": dict(parts.provenance),
        "shards": shards,
        "pairs": pairs,
    }
    manifest["sha256"] = _digest(manifest)
    text = json.dumps(manifest, indent=1) + "\n"
    _put(folder / MANIFEST, lambda path: path.write_text(text, encoding="ascii"))
    for name in older - {shard["file"] for shard in [*shards, pairs]}:
        (folder / name).unlink(missing_ok=True)
    return folder


def read(folder: Path) -> Parts:
    """Read effects back, bit for bit.

    Args:
        folder: Where they were written.

    Raises:
        ResultsNotFound: There is no manifest.
        StoreCorrupt: A file is missing or was changed since it was written.
        UnsupportedError: A later version of the library wrote them.
    """
    manifest = _read_manifest(folder)
    axes, metrics, n_pairs = manifest["axes"], manifest["metrics"], manifest["n_pairs"]
    cells = tuple(len(values) for values in axes.values())
    values, status = [], []
    for shard in manifest["shards"]:
        table = _read_table(folder, shard, columns=["metric", "status"])
        values.append(table["metric"].to_numpy())
        status.append(table["status"].to_numpy())
    whole = (len(metrics), *cells, n_pairs)
    rows = _read_table(folder, manifest["pairs"])
    positions = None
    if manifest["has_positions"]:
        columns = [rows[name].to_pylist() for name in ("base_position", "source_position")]
        shape = (n_pairs, len(axes.get("position", ())))
        positions = np.stack([np.array(column, dtype=np.int64).reshape(shape) for column in columns], axis=-1)
    return Parts(
        axes=axes,
        pair_ids=rows["pair"].to_pylist(),
        groups=rows["component"].to_numpy(),
        metrics=metrics,
        values=np.concatenate(values).reshape(whole),
        status=np.concatenate(status).reshape(whole)[0],
        baselines={
            role: np.stack([_baseline(rows[f"{role}:{name}"]) for name in metrics]) for role in manifest["baselines"]
        },
        labels=manifest["labels"],
        positions=positions,
        provenance=manifest["provenance"],
    )


def _long_tables(parts: Parts) -> Iterator[pa.Table]:
    """Yield the long table in shards of whole rows, in the order of the axes (last one fastest)."""
    coordinates: dict[str, list[Any]] = {"metric_name": list(parts.metrics)}
    coordinates |= {axis: list(values) for axis, values in parts.axes.items()}
    coordinates["pair"] = list(parts.pair_ids)
    shape = tuple(len(values) for values in coordinates.values())
    metric = parts.values.reshape(-1)
    status = np.broadcast_to(parts.status, shape).reshape(-1)
    for first in range(0, max(metric.size, 1), ROWS_PER_SHARD):
        rows = np.arange(first, min(first + ROWS_PER_SHARD, metric.size))
        columns = {}
        for (name, values), place in zip(coordinates.items(), np.unravel_index(rows, shape), strict=True):
            if values and isinstance(values[0], str):
                columns[name] = pa.DictionaryArray.from_arrays(place.astype(np.int32), pa.array(values, pa.string()))
            else:
                columns[name] = pa.array(np.array(values, dtype=np.int64)[place])
        columns["metric"] = pa.array(metric[rows])
        columns["status"] = pa.array(status[rows])
        yield pa.table(columns)


def _pairs_table(parts: Parts) -> pa.Table:
    columns = {"pair": pa.array(list(parts.pair_ids), pa.string()), "component": pa.array(parts.groups)}
    for role, array in parts.baselines.items():
        for name, row in zip(parts.metrics, np.asarray(array), strict=True):
            # Where draws differ, a pair holds a list of them.
            columns[f"{role}:{name}"] = pa.array(row) if row.ndim == 1 else pa.array(row.T.tolist())
    if parts.positions is not None:
        for place, name in enumerate(("base_position", "source_position")):
            columns[name] = pa.array(parts.positions[..., place].tolist(), pa.list_(pa.int64()))
    return pa.table(columns)


def _baseline(column: pa.ChunkedArray) -> np.ndarray:
    """Return the metric of an unpatched run, axes pair, or draw and pair."""
    if not pa.types.is_list(column.type):
        return np.asarray(column.to_numpy())
    return np.array(column.to_pylist(), dtype=np.float64).T


def _write_table(folder: Path, name: str, table: pa.Table) -> dict[str, Any]:
    path = folder / name
    _put(path, lambda partial: parquet.write_table(table, partial))
    return {"file": name, "sha256": _sha256(path), "rows": table.num_rows}


def _read_table(folder: Path, shard: Mapping[str, Any], columns: list[str] | None = None) -> pa.Table:
    path = folder / shard["file"]
    if not path.is_file():
        raise _corrupt(folder, f"the file {shard['file']!r} is missing")
    found = _sha256(path)
    if found != shard["sha256"]:
        changed = f"the file {shard['file']!r} was changed after it was written"
        raise _corrupt(
            folder, changed, [("expected", f"sha256 {shard['sha256'][:16]}"), ("found", f"sha256 {found[:16]}")]
        )
    return parquet.read_table(path, columns=columns)


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        there = "the folder is there" if folder.is_dir() else "there is no such folder"
        raise ResultsNotFound(
            f"no saved effects in {str(folder)!r}",
            facts=[("looked for", MANIFEST), ("found", there)],
            fix="name the folder that effects.save(folder) wrote",
        )
    try:
        manifest = json.loads(path.read_bytes())
    except ValueError as error:
        raise _corrupt(folder, f"{MANIFEST!r} is not JSON", [("line", str(error)[:80])]) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise _corrupt(folder, f"{MANIFEST!r} does not describe effects")
    if manifest.get("schema") != SCHEMA:
        raise UnsupportedError(
            f"the effects in {str(folder)!r} were written in another format",
            facts=[("format", manifest.get("schema")), ("this version reads", SCHEMA)],
            fix="pip install --upgrade causalpatch",
        )
    if manifest.pop("sha256", None) != _digest(manifest):
        raise _corrupt(folder, f"{MANIFEST!r} was changed after it was written")
    return manifest


def _corrupt(folder: Path, what: str, facts: list[tuple[str, object]] | None = None) -> StoreCorrupt:
    return StoreCorrupt(
        f"the effects in {str(folder)!r} cannot be trusted: {what}", facts=facts or (), fix="run the sweep again"
    )


def _put(path: Path, write_to: Any) -> None:
    """Write a file under a temporary name, force it to disk, then move it into place."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        write_to(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _free(pattern: str, taken: set[str]) -> str:
    number = 0
    while (name := pattern.format(number)) in taken:
        number += 1
    taken.add(name)
    return name


def _free_pairs(taken: set[str]) -> str:
    return "pairs.parquet" if "pairs.parquet" not in taken else _free("pairs-{:05d}.parquet", taken)


def _names_of_older(folder: Path) -> set[str]:
    try:
        manifest = _read_manifest(folder)
    except (ResultsNotFound, StoreCorrupt, UnsupportedError):
        return set()
    return {shard["file"] for shard in [*manifest["shards"], manifest["pairs"]]}


def _digest(manifest: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
