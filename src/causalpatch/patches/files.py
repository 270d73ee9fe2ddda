"""Interventions on disk: JSON for people and programs, arrays in an .npz beside it, nothing pickled.

Arrays (a steering vector, a direction, a constant, a fitted value) are stored once each under the hash of their content
and checked against it when they are read. A function is code and cannot be saved.
"""

import dataclasses
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from causalpatch.base.errors import CausalPatchError, PatchError, ResultsNotFound, StoreCorrupt
from causalpatch.patches.direction import ProjectOut, Steer
from causalpatch.patches.elsewhere import From, OtherPrompts
from causalpatch.patches.fixed import Constant, Identity, Interpolate, Source, Zero
from causalpatch.patches.given import Given
from causalpatch.patches.patch import Intervention, Patch
from causalpatch.patches.sampled import Fitted, FittedOn, Mean, Noise, Optimal, Resample, hash_of
from causalpatch.patches.subspace import Subspace
from causalpatch.patches.value import Value
from causalpatch.sites import Site, SiteSet

FORMAT = "causalpatch interventions"
SCHEMA = 1
_KINDS: Mapping[str, type] = {
    kind.__name__: kind
    for kind in (
        *(Source, Identity, Interpolate, Zero, Constant, Mean, Resample, Noise, Optimal),
        *(Fitted, FittedOn, From, OtherPrompts, Given, Steer, ProjectOut, Subspace),
    )
}

Request = Intervention | Patch | Site | SiteSet | str | Iterable[Patch | Site | SiteSet | str]


def save_interventions(path: str | Path, interventions: Iterable[Request]) -> Path:
    """Write interventions as JSON, and their arrays into an .npz of the same name.

    Args:
        path: Ends in ``.json``; folders are made where they are missing.
        interventions: As for ``Experiment.run``.

    Returns:
        The path.

    Raises:
        PatchError: A value is a function, or the path has another ending.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise PatchError(f"interventions are saved as JSON, not as '{path.name}'", fix=f"{path.stem}.json")
    plain, arrays = plain_interventions([Intervention.of(one) for one in interventions])
    path.parent.mkdir(parents=True, exist_ok=True)
    text = {"format": FORMAT, "schema": SCHEMA, "interventions": plain}
    if arrays:
        with path.with_suffix(".npz").open("wb") as file:
            np.savez(file, **cast(dict[str, Any], arrays))
    path.write_text(json.dumps(text, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path


def plain_interventions(interventions: Iterable[Intervention]) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return interventions as plain data, and their arrays by the hash that stands for them.

    Raises:
        PatchError: A value is a function.
    """
    arrays: dict[str, np.ndarray] = {}
    plain = [
        {"label": one.label, "patches": [_plain_patch(patch, arrays) for patch in one.patches]} for one in interventions
    ]
    return plain, arrays


def interventions_of_plain(
    plain: Iterable[Mapping[str, Any]], arrays: Callable[[str], np.ndarray]
) -> list[Intervention]:
    """Return the interventions that ``plain_interventions`` wrote.

    Args:
        plain: What it returned.
        arrays: Finds an array by its hash.
    """
    return [Intervention(tuple(_read_patch(patch, arrays) for patch in one["patches"]), one["label"]) for one in plain]


def plain_value(value: Value) -> tuple[Any, dict[str, np.ndarray]]:
    """Return a value by itself as plain data, and its arrays by the hash that stands for them.

    Raises:
        PatchError: It is a function.
    """
    arrays: dict[str, np.ndarray] = {}
    return _plain(value, arrays), arrays


def value_of_plain(plain: Any, arrays: Mapping[str, np.ndarray]) -> Value:
    """Return the value that ``plain_value`` wrote."""
    found: Value = _read(plain, lambda name: arrays[name])
    return found


def load_interventions(path: str | Path) -> list[Intervention]:
    """Read interventions that ``save_interventions`` wrote.

    Raises:
        ResultsNotFound: There is no such file.
        StoreCorrupt: It is not of this format, or an array is missing or was changed since.
    """
    path = Path(path)
    if not path.is_file():
        raise ResultsNotFound(f"no saved interventions in '{path}'", fix="name the file that save_interventions wrote")
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        if text.get("format") != FORMAT or text.get("schema") != SCHEMA:
            raise _corrupt(path, f"it is no file of the format {FORMAT!r}, schema {SCHEMA}")
        return interventions_of_plain(text["interventions"], _Arrays(path).find)
    except (ValueError, KeyError, TypeError, AttributeError, CausalPatchError) as error:
        if isinstance(error, StoreCorrupt):
            raise
        raise _corrupt(path, f"{type(error).__name__}: {str(error).splitlines()[0][:80]}") from error


def _plain_patch(patch: Patch, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    value = _plain(patch.value, arrays)
    return {"site": str(patch.site), "value": value, "align": patch.align, "column": patch.column}


def _plain(value: object, arrays: dict[str, np.ndarray]) -> Any:
    """Return a value as plain data, with its arrays put aside under their hashes."""
    if isinstance(value, np.ndarray):
        name = hash_of(value)
        arrays[name] = value
        return {"sha256": name}
    if dataclasses.is_dataclass(value) and type(value).__name__ in _KINDS:
        fields = {field.name: _plain(getattr(value, field.name), arrays) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return [_plain(item, arrays) for item in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise PatchError(
        f"{value} cannot be saved",
        facts=[("why", "it is code, not data")],
        fix="save the array that it computes: Constant(array), Steer(array) or ProjectOut(array)",
    )


def _read_patch(plain: Mapping[str, Any], arrays: Callable[[str], np.ndarray]) -> Patch:
    value: Value = _read(plain["value"], arrays)
    return Patch(plain["site"], value, plain["align"], plain["column"])


def _read(plain: Any, arrays: Callable[[str], np.ndarray]) -> Any:
    if isinstance(plain, list):
        return tuple(_read(item, arrays) for item in plain)
    if not isinstance(plain, Mapping):
        return plain
    if set(plain) == {"sha256"}:
        return arrays(plain["sha256"])
    fields = {name: _read(item, arrays) for name, item in plain.items() if name != "kind"}
    return _KINDS[plain["kind"]](**fields)


class _Arrays:
    """The arrays beside a file of interventions, each checked against its name when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, np.ndarray] = {}

    def find(self, name: str) -> np.ndarray:
        beside = self._path.with_suffix(".npz")
        if not self._known:
            try:
                with np.load(beside, allow_pickle=False) as file:
                    self._known = {key: file[key] for key in file.files}
            except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                why = f"'{beside.name}' beside it cannot be read: {type(error).__name__}"
                raise _corrupt(self._path, why) from error
        found = self._known.get(name)
        if found is None or hash_of(found) != name:
            what = "is missing" if found is None else "was changed after it was written"
            raise _corrupt(self._path, f"array {name[:16]} in '{beside.name}' {what}")
        return found


def _corrupt(path: Path, why: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"the interventions in '{path}' cannot be read",
        facts=[("why", why)],
        fix="write them again: save_interventions",
    )
