"""A summary of very many cells, shard by shard: means, cluster intervals and adjusted p without holding the numbers.

1. Shards lie in a grid of cells and pairs. For each range of cells their row groups are read side by side, as many rows
   at once as ``shards.ROWS``, and become a table of cells and pairs.
2. Effects are summed by independent component (``statistics.clusters``); the share is a ratio of means, with Fieller's
   cluster-t interval (``statistics.intervals``).
3. p is that of the same cluster t at 0, in place of random flips of signs, which would take minutes; adjusted over all
   cells (Benjamini-Hochberg). It screens, and claims nothing.

Cost: one reading of the numbers, and some 60 bytes a cell of memory.
"""

import hashlib
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import StoreCorrupt
from causalpatch.base.extras import lazy
from causalpatch.results.status import has_number
from causalpatch.statistics.clusters import GroupSums, group_sums
from causalpatch.statistics.families import benjamini_hochberg
from causalpatch.statistics.intervals import MIN_GROUPS, fieller
from causalpatch.studies.sealed import checksum
from causalpatch.studies.shards import ABOUT
from causalpatch.studies.store import Run

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow.parquet as parquet
    from scipy import special
else:
    pd = lazy("pandas")
    parquet = lazy("pyarrow.parquet")
    special = lazy("scipy.special")


@dataclass(frozen=True, eq=False)
class Summary:
    """A row per cell, each column ``(cell,)``.

    Args:
        effect: Mean over pairs of m(patched) - m(base), in the metric's unit; NaN where nothing was measured.
        recovered: The same as a share of the gap.
        low: Lower end of the share's interval; NaN with fewer than 10 components, or without a gap.
        high: Upper end.
        p: Of the cluster t at 0.
        p_bh: Adjusted over all cells.
        n_pairs: Pairs that were measured.
    """

    effect: np.ndarray
    recovered: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p: np.ndarray
    p_bh: np.ndarray
    n_pairs: np.ndarray

    def to_dataframe(self) -> "pd.DataFrame":
        """Return it as a table, cells in the order of the sweep."""
        return pd.DataFrame(vars(self))


def summarise(
    run: Run, call: Mapping[str, Any], group: np.ndarray, direction: str, *, metric: int = 0, level: float = 0.95
) -> Summary:
    """Summarise the cells of a call.

    Args:
        run: The run.
        call: What was asked for, with its shards.
        group: Independent component of each pair, ``(pair,)``.
        direction: Denoise or noise.
        metric: Number of the metric.
        level: Of the intervals, each by itself.

    Raises:
        StoreCorrupt: A shard is missing, torn or changed.
    """
    sign = 1 if direction == "denoise" else -1
    shards = _Shards(run, call["shards"], metric)
    base, gap = shards.baselines(len(group))
    n_cells = max(shard["cells"][1] for shard in call["shards"])
    columns = {name: np.full(n_cells, np.nan) for name in ("effect", "recovered", "low", "high", "p")}
    n_pairs = np.zeros(n_cells, dtype=np.int32)
    for cells, patched in shards.tables(len(group)):
        for name, values in _block(patched - base, gap, group, sign, level).items():
            if name == "n_pairs":
                n_pairs[cells] = values
            else:
                columns[name][cells] = values
    return Summary(**columns, p_bh=benjamini_hochberg(columns["p"]), n_pairs=n_pairs)


def _block(effect: np.ndarray, gap: np.ndarray, group: np.ndarray, sign: int, level: float) -> dict[str, np.ndarray]:
    """Return the columns of some cells, from their effects ``(cell, pair)``."""
    data = group_sums((sign * effect, gap), group)
    top, bottom = data.means()
    (moves,) = GroupSums((data.sums[0],), data.counts).moves()
    n_groups = data.n_groups
    freedom = np.maximum(n_groups - 1, 1)
    limit = np.where(n_groups < MIN_GROUPS, np.nan, special.stdtrit(freedom, (1 + level) / 2))
    low, high = fieller(data, limit)
    with np.errstate(invalid="ignore", divide="ignore"):
        size = np.abs(top) / np.sqrt(np.einsum("cg,cg->c", moves, moves))
        p = np.where(n_groups < 2, np.nan, 2 * special.stdtr(freedom, -size))
        p = np.where((top == 0) & (n_groups >= 2), 1.0, p)
        share = np.where(bottom != 0, top / bottom, np.nan)
    return {"effect": sign * top, "recovered": share, "low": low, "high": high, "p": p, "n_pairs": data.n_pairs}


class _Shards:
    """The shards of a call, read in groups of rows; each one's checksum is computed before a number is used.

    Args:
        run: The run.
        shards: The shards.
        metric: Number of the metric.
    """

    def __init__(self, run: Run, shards: Sequence[Mapping[str, Any]], metric: int) -> None:
        self._run, self._shards, self._metric = run, shards, metric
        self._sources: dict[str, Any] = {}

    def baselines(self, n_pairs: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the metric of the base run and the gap of each pair, ``(pair,)``."""
        runs = {role: np.full(n_pairs, np.nan) for role in ("base", "clean", "reference")}
        for shard in {tuple(shard["pairs"]): shard for shard in self._shards}.values():
            held = self._about(shard["key"])["baselines"]
            for role, table in runs.items():
                table[slice(*shard["pairs"])] = held.get(role, held["corrupt"])[self._metric]
        return runs["base"], runs["clean"] - runs["reference"]

    def tables(self, n_pairs: int) -> Iterator[tuple[slice, np.ndarray]]:
        """Yield ranges of cells with the metrics of their patched runs, ``(cell, pair)``; NaN where there is none."""
        by_cells: dict[tuple[int, int], list[Mapping[str, Any]]] = {}
        for shard in self._shards:
            by_cells.setdefault(tuple(shard["cells"]), []).append(shard)
        for (first, stop), beside in sorted(by_cells.items()):
            readers = [(slice(*shard["pairs"]), self._rows(shard)) for shard in beside]
            # Shards of other numbers of pairs have other groups of rows: what was read too far is kept for the next.
            left = [np.zeros((0, pairs.stop - pairs.start)) for pairs, _ in readers]
            while first < stop:
                left = [kept if len(kept) else next(rows) for kept, (_, rows) in zip(left, readers, strict=True)]
                n_rows = min(map(len, left))
                table = np.full((n_rows, n_pairs), np.nan)
                for kept, (pairs, _) in zip(left, readers, strict=True):
                    table[:, pairs] = kept[:n_rows]
                left = [kept[n_rows:] for kept in left]
                yield slice(first, first + n_rows), table
                first += n_rows

    def _rows(self, shard: Mapping[str, Any]) -> Iterator[np.ndarray]:
        """Yield the numbers of a shard in groups of rows, ``(cell, pair)``."""
        file = parquet.ParquetFile(self._source(shard["key"]))
        names = json.loads(file.schema_arrow.metadata[ABOUT])["metrics"]
        wanted, width = [f"metric:{names[self._metric]}", "status"], shard["pairs"][1] - shard["pairs"][0]
        for group in range(file.num_row_groups):
            table = file.read_row_group(group, columns=wanted)
            values, status = (table[name].to_numpy() for name in wanted)
            there = has_number(status)
            yield (values if there.all() else np.where(there, values, np.nan)).reshape(-1, width)

    def _about(self, key: str) -> dict[str, Any]:
        return dict(json.loads(parquet.ParquetFile(self._source(key)).schema_arrow.metadata[ABOUT]))

    def _source(self, key: str) -> Any:
        """Return where a shard is read from: its file, or its bytes.

        Raises:
            StoreCorrupt: It is missing, torn or changed.
        """
        if key not in self._sources:
            self._sources[key] = self._checked(key)
        held = self._sources[key]
        return io.BytesIO(held) if isinstance(held, bytes) else held

    def _checked(self, key: str) -> str | bytes:
        entry = self._run.entry(key)
        if entry is not None:
            name = self._run.name("shards", entry["file"])
            path = self._run.objects.path(name)
            if path is not None and path.is_file():
                with path.open("rb") as file:
                    if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]:
                        return str(path)
            data = self._run.objects.get(name) if path is None else None
            if data is not None and checksum(data) == entry["sha256"]:
                return data
        raise StoreCorrupt(
            f"shard {key} is missing, torn or changed",
            facts=[("run", self._run.hash)],
            fix="causalpatch run measures it again",
        )
