"""The one layout of effects: which variables, axes and coordinates the labelled array has, and what it refuses.

=========================  ==========================  ==========================================================
name                       axes                        holds
=========================  ==========================  ==========================================================
``metric``                 (metric_name,) *axes pair   the metric of the patched run; NaN where there was no run
``status``                 *axes pair                  how the number was obtained, codes of ``Status``
``baseline_ROLE``          (metric_name,) pair         the metric of the unpatched runs: clean, corrupt, base, ...;
                                                       with an axis ``draw`` in front where draws differ in it
``token``                  position                    the token, or ``(varies)`` where pairs differ
``component``              pair                        which independent component of the pair graph
``base_position``          pair position               the column's position in the base prompt, -1 where none
``source_position``        pair position               the same in the source prompt
=========================  ==========================  ==========================================================

The axis ``metric_name`` is there only when one sweep fed several metrics; with one it is a scalar coordinate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.axes import AXES
from causalpatch.base.errors import NotFinite, SettingError
from causalpatch.base.extras import lazy
from causalpatch.base.spec import to_plain
from causalpatch.results.status import Status, has_number

if TYPE_CHECKING:
    import xarray as xr
else:
    xr = lazy("xarray")

ROLES = ("clean", "corrupt", "base", "source", "reference")
DIRECTIONS = ("denoise", "noise")
_LABEL_NAMES = {"position": "token", "query_position": "query_token", "key_position": "key_token"}


def label_name(axis: str) -> str:
    """Return the name of the coordinate that holds an axis's labels: ``token`` for ``position``."""
    return _LABEL_NAMES.get(axis, f"{axis}_label")


@dataclass(frozen=True, eq=False)
class Parts:
    """What effects are made of, as plain arrays.

    Args:
        axes: Name of each axis of the sweep and its coordinate values, in order.
        pair_ids: Id of each pair.
        groups: Independent component of each pair.
        metrics: Names of the metrics.
        values: Metric of the patched runs, axes metric, the sweep's, pair.
        status: Codes of ``Status``, axes the sweep's, pair.
        baselines: Metric of the unpatched runs by role, axes metric, pair; or metric, draw, pair.
        labels: Labels along an axis, such as the tokens along ``position``.
        positions: Position of every aligned column in base and source, axes pair, position, 2; -1 where none.
        provenance: How the numbers came to be, as plain data.
    """

    axes: Mapping[str, Sequence[Any]]
    pair_ids: Sequence[str]
    groups: np.ndarray
    metrics: Sequence[str]
    values: np.ndarray
    status: np.ndarray
    baselines: Mapping[str, np.ndarray]
    labels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    positions: np.ndarray | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)


def assemble(parts: Parts) -> tuple[xr.Dataset, dict[str, Any]]:
    """Put the parts into the layout, after checking that they fit together.

    Returns:
        The labelled array and the provenance, its direction and reference filled in.

    Raises:
        SettingError: Two parts do not fit together; the message names both shapes.
        NotFinite: A run that was made has NaN or infinity for a metric.
    """
    provenance = dict(to_plain(parts.provenance))
    direction = provenance.setdefault("direction", "denoise")
    if direction not in DIRECTIONS:
        raise SettingError(
            f"no direction named {direction!r}", facts=[("known", ", ".join(DIRECTIONS))], fix='direction="denoise"'
        )
    names = [str(name) for name in parts.metrics]
    if "reference" not in parts.baselines:
        provenance.setdefault("reference", "corrupted run")
    _check_names(parts, names)
    coordinates = {axis: _coordinate(axis, values) for axis, values in parts.axes.items()}
    cells = tuple(len(values) for values in coordinates.values())
    n_pairs = len(parts.pair_ids)
    status = _shaped("status", parts.status, (*cells, n_pairs), np.uint8)
    unknown = np.setdiff1d(status, list(Status))
    if unknown.size:
        raise SettingError(
            f"no status has the code {int(unknown[0])}",
            facts=[("known", "0 to 5")],
            fix="use causalpatch.results.status.Status",
        )
    values = _shaped("values", parts.values, (len(names), *cells, n_pairs), np.float64)
    baselines = {
        role: _shaped(f"baseline {role!r}", array, (len(names), *_draws(array, coordinates), n_pairs), np.float64)
        for role, array in _with_defaults(parts.baselines, direction).items()
    }
    _check_finite(values, status, baselines, names)
    values = np.where(has_number(status), values, np.nan)

    dims = tuple(coordinates)
    lead: tuple[str, ...] = ("metric_name",)
    if len(names) == 1:
        lead, values = (), values[0]
        baselines = {role: array[0] for role, array in baselines.items()}
    variables = {
        "metric": ((*lead, *dims, "pair"), values),
        "status": ((*dims, "pair"), status),
        **{
            f"baseline_{role}": ((*lead, *(("draw",) if array.ndim - len(lead) > 1 else ()), "pair"), array)
            for role, array in baselines.items()
        },
    }
    coords: dict[str, Any] = {axis: ((axis,), array) for axis, array in coordinates.items()}
    coords["pair"] = (("pair",), _texts([str(name) for name in parts.pair_ids]))
    coords["component"] = (("pair",), _shaped("groups", parts.groups, (n_pairs,), np.int64))
    coords["metric_name"] = (("metric_name",), _texts(names)) if lead else names[0]
    coords |= _labels(parts.labels, coordinates)
    if parts.positions is not None:
        shape = (n_pairs, len(coordinates.get("position", ())), 2)
        positions = _shaped("positions", parts.positions, shape, np.int64)
        coords["base_position"] = (("pair", "position"), positions[..., 0].copy())
        coords["source_position"] = (("pair", "position"), positions[..., 1].copy())
    return xr.Dataset(variables, coords=coords), provenance


def take_apart(data: xr.Dataset, provenance: Mapping[str, Any]) -> Parts:
    """Return the parts of a labelled array; ``assemble`` of them gives the same array again."""
    several = "metric_name" in data["metric"].dims
    axes = [str(name) for name in data["status"].dims[:-1]]
    prefix = "baseline_"

    def with_metric(name: str) -> np.ndarray:
        array: np.ndarray = data[name].values
        return array if several else array[None]

    positions = None
    if "base_position" in data.coords:
        positions = np.stack([data["base_position"].values, data["source_position"].values], axis=-1)
    return Parts(
        axes={axis: data[axis].values.tolist() for axis in axes},
        pair_ids=data["pair"].values.tolist(),
        groups=data["component"].values,
        metrics=np.atleast_1d(data["metric_name"].values).tolist(),
        values=with_metric("metric"),
        status=data["status"].values,
        baselines={name.removeprefix(prefix): with_metric(name) for name in data.data_vars if name.startswith(prefix)},
        labels={axis: data[label_name(axis)].values.tolist() for axis in axes if label_name(axis) in data.coords},
        positions=positions,
        provenance=provenance,
    )


def _draws(baseline: Any, coordinates: Mapping[str, np.ndarray]) -> tuple[int, ...]:
    """Return the size of the axis of draws of a baseline, where it has one."""
    return (len(coordinates["draw"]),) if np.ndim(baseline) == 3 and "draw" in coordinates else ()


def _check_names(parts: Parts, names: list[str]) -> None:
    foreign = [axis for axis in parts.axes if axis not in AXES or axis == "pair"]
    if foreign:
        raise SettingError(
            f"no axis named {foreign[0]!r}", facts=[("known", " ".join(AXES))], fix="use one of these names"
        )
    if not names or len(set(names)) != len(names):
        raise SettingError(
            "the metrics need names, each its own",
            facts=[("metrics", ", ".join(names) or "none")],
            fix="give each metric a name",
        )
    if not len(parts.pair_ids):
        raise SettingError("effects without a pair mean nothing", facts=[("pairs", 0)], fix="give at least one pair")
    strange = [role for role in parts.baselines if role not in ROLES]
    if strange:
        raise SettingError(
            f"no baseline named {strange[0]!r}", facts=[("known", ", ".join(ROLES))], fix="use one of these names"
        )


def _coordinate(axis: str, values: Sequence[Any]) -> np.ndarray:
    plain = [value.item() if isinstance(value, np.generic) else value for value in values]
    if len(set(plain)) != len(plain):
        raise SettingError(
            f"the axis {axis!r} names a value twice",
            facts=[("values", str(plain)[:90])],
            fix="give every place its own value",
        )
    if all(isinstance(value, int) for value in plain):
        return np.array(plain, dtype=np.int64)
    return _texts([str(value) for value in plain])


def _texts(values: Sequence[str]) -> np.ndarray:
    # Objects, not numpy's fixed-width texts: those drop a trailing NUL, which byte-level tokens do have.
    # Half a surrogate pair, which is no character, becomes its code: neither pandas nor parquet can hold it.
    array = np.empty(len(values), dtype=object)
    array[:] = [text.encode("utf-8", "backslashreplace").decode("utf-8") for text in values]
    return array


def _shaped(name: str, array: Any, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    result = np.array(array, dtype=dtype)
    if result.shape != shape:
        facts = [("expected", shape), ("found", result.shape)]
        raise SettingError(
            f"the shape of {name} does not fit the axes", facts=facts, fix="give arrays over the axes, then pair"
        )
    return result


def _with_defaults(baselines: Mapping[str, np.ndarray], direction: str) -> dict[str, np.ndarray]:
    """Fill in base and reference: the runs of pairs, unless something else was said."""
    full = dict(baselines)
    for role, stand_in in (("base", "corrupt" if direction == "denoise" else "clean"), ("reference", "corrupt")):
        if role not in full and stand_in in full:
            full[role] = full[stand_in]
    for role in ("clean", "base", "reference"):
        if role not in full:
            raise SettingError(
                f"the baseline {role!r} is missing",
                facts=[("given", ", ".join(baselines) or "none")],
                fix="give baselines clean and corrupt",
            )
    return {role: full[role] for role in ROLES if role in full}


def _check_finite(
    values: np.ndarray, status: np.ndarray, baselines: Mapping[str, np.ndarray], names: Sequence[str]
) -> None:
    for role, array in baselines.items():
        for name, row in zip(names, array, strict=True):
            if not np.isfinite(row).all():
                facts = [("pairs", int((~np.isfinite(row)).sum())), ("run", role)]
                raise NotFinite(
                    f"the metric {name!r} is not a finite number on an unpatched run",
                    facts=facts,
                    fix="check the model for NaN weights",
                )
    made = has_number(status)
    for name, array in zip(names, values, strict=True):
        wrong = made & ~np.isfinite(array)
        if wrong.any():
            facts = [("runs", f"{int(wrong.sum())} of {int(made.sum())}")]
            raise NotFinite(
                f"the metric {name!r} is not a finite number on a patched run",
                facts=facts,
                fix="mark such runs Status.FAILED",
            )


def _labels(labels: Mapping[str, Sequence[str]], coordinates: Mapping[str, np.ndarray]) -> dict[str, Any]:
    coords = {}
    for axis, texts in labels.items():
        if axis not in coordinates:
            raise SettingError(
                f"labels for an axis that is not there: {axis!r}",
                facts=[("axes", list(coordinates))],
                fix="label one of these",
            )
        if len(texts) != len(coordinates[axis]):
            facts = [("labels", len(texts)), (axis, len(coordinates[axis]))]
            raise SettingError(
                f"the number of labels does not fit the axis {axis!r}", facts=facts, fix="give one label per place"
            )
        coords[label_name(axis)] = ((axis,), _texts([str(text) for text in texts]))
    return coords
