"""Results as files of other tools: a table as parquet or CSV, labelled arrays as NetCDF."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.circuits.circuit import Circuit
from causalpatch.results.effects import Effects
from causalpatch.results.layout import label_name
from causalpatch.studies.results import Result, Results
from causalpatch.studies.summary import summarise

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd = lazy("pandas")
    xr = lazy("xarray")

TABLES: Final = (".parquet", ".csv")
ENDINGS: Final = (*TABLES, ".nc")


def export(found: Result, path: str | Path) -> Path:
    """Write what a step found.

    Args:
        found: What it found. ``found.to_xarray()`` of effects gives the labelled array itself.
        path: Ends in ``.parquet`` or ``.csv`` for a table (of effects a row per metric, cell and pair), or in ``.nc``
            for NetCDF 3, effects only; folders are made where they are missing.

    Returns:
        The path.

    Raises:
        SettingError: It ends otherwise, or what was found is no labelled array.
    """
    path = Path(path)
    if path.suffix not in ENDINGS:
        raise _no_such_file(path, ENDINGS)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".nc":
        if not isinstance(found, Effects):
            raise SettingError(
                f"{type(found).__name__} is no labelled array",
                facts=[("arrays", "what sweeps found")],
                fix=f"--out {path.stem}.csv",
            )
        plain_dataset(found).to_netcdf(path, engine="scipy", format="NETCDF3_64BIT")
        return path
    _write(table_of(found), path)
    return path


def _write(frame: "pd.DataFrame", path: Path) -> None:
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)


def _no_such_file(path: Path, endings: Sequence[str]) -> SettingError:
    return SettingError(
        f"results are not exported as '{path.name}'",
        facts=[("endings", ", ".join(endings))],
        fix=f"--out {path.stem or 'heads'}.parquet",
    )


def export_cells(results: Results, name: str, path: str | Path) -> Path:
    """Write a row per cell of a sweep of any size: mean, share, interval, p; read shard by shard, and never whole.

    Args:
        results: The results of a run.
        name: The sweep's.
        path: Ends in ``.parquet`` or ``.csv``.

    Returns:
        The path.

    Raises:
        ResultsNotFound: The step is not finished.
        SettingError: It is no sweep that was measured in one piece, or the path ends otherwise.
        StoreCorrupt: A shard is missing, torn or changed.
    """
    path = Path(path)
    if path.suffix not in TABLES:
        raise _no_such_file(path, TABLES)
    frame = cells_of(results, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(frame, path)
    return path


def cells_of(results: Results, name: str) -> "pd.DataFrame":
    """Return a row per cell of a sweep, as ``export_cells`` writes it, and notes in ``attrs["notes"]``.

    Args:
        results: The results of a run.
        name: The sweep's.
    """
    call, layout = results.sharded(name)
    group, direction = np.array(layout["groups"]), str(layout["provenance"]["direction"])
    summary = summarise(results.run, call, group, direction).to_dataframe()
    shape = tuple(len(values) for values in layout["axes"].values())
    columns = {}
    for axis, place in zip(layout["axes"], np.unravel_index(np.arange(len(summary)), shape), strict=True):
        columns[axis] = np.asarray(layout["axes"][axis])[place]
        if axis in layout["labels"]:
            columns[label_name(axis)] = np.asarray(layout["labels"][axis])[place]
    frame: pd.DataFrame = pd.DataFrame({**columns, **{name: summary[name] for name in summary.columns}})
    frame.attrs = dict(summary.attrs)
    return frame


def plain_dataset(effects: Effects) -> "xr.Dataset":
    """Return the labelled array of effects as NetCDF 3 can hold it: signed bytes, and texts without objects."""
    data = effects.to_xarray()
    data["status"] = data["status"].astype(np.int8)
    for name, array in data.coords.items():
        if array.dtype == object:
            data = data.assign_coords({name: (array.dims, array.values.astype(str))})
    return data


def table_of(found: Result) -> "pd.DataFrame":
    """Return what a step found as a table: of circuits their edges."""
    made: pd.DataFrame = pd.DataFrame({"edge": found.edges()}) if isinstance(found, Circuit) else found.to_dataframe()
    for column in made.columns:
        if made[column].map(lambda one: isinstance(one, list | tuple | dict)).any():
            made[column] = made[column].map(json.dumps)
    return made
