"""Results as files of other tools: a table as parquet or CSV, labelled arrays as NetCDF."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.circuits.circuit import Circuit
from causalpatch.results.effects import Effects
from causalpatch.studies.results import Result

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr
else:
    pd = lazy("pandas")
    xr = lazy("xarray")

ENDINGS: Final = (".parquet", ".csv", ".nc")


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
        raise SettingError(
            f"results are not exported as '{path.name}'",
            facts=[("endings", ", ".join(ENDINGS))],
            fix=f"--out {path.stem or 'heads'}.parquet",
        )
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
    frame = table_of(found)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path, index=False)
    return path


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
