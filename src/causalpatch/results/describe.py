"""What effects say of themselves when they are printed: a few lines, nothing expensive."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from causalpatch.base.errors import NoGap
from causalpatch.results.labels import cell_text
from causalpatch.results.layout import label_name
from causalpatch.results.shares import Numbers
from causalpatch.results.status import Status, counts, has_number
from causalpatch.results.words import engine_of, own_notes, reference_run, restores

if TYPE_CHECKING:
    import xarray as xr


def describe(data: xr.Dataset, provenance: Mapping[str, Any], numbers: Numbers, pairs: str) -> list[str]:
    """Return the lines.

    Args:
        data: The labelled array.
        provenance: How the numbers came to be.
        numbers: The first metric's numbers.
        pairs: How many pairs and components, in words.
    """
    axes = [str(name) for name in data["status"].dims[:-1]]
    status = data["status"].values
    value = str(provenance.get("value") or "source")
    engine = engine_of(provenance)
    facts = [
        ("axes", " x ".join(f"{axis} {data.sizes[axis]}" for axis in axes) or "none"),
        ("pairs", pairs),
        ("metric", ", ".join(map(str, np.atleast_1d(data["metric_name"].values)))),
        *([("draws", _draws(data, numbers))] if "draw" in axes else []),
        ("gap", _gap(provenance, numbers)),
        ("runs", f"{int(has_number(status).sum())} of {status.size} measured" + _others(status)),
        *([("engine", engine)] if engine else []),
        ("largest", _largest(data, axes, provenance, numbers)),
        *(("note", note) for note in own_notes(provenance)),
    ]
    unfinished = "" if provenance.get("complete", True) else ", stopped before its end"
    return [
        f"Effects of {provenance.get('site') or 'patching'} ({provenance['direction']}, {value} values{unfinished})",
        *(f"  {name:<7}  {text}" for name, text in facts),
    ]


def _draws(data: xr.Dataset, numbers: Numbers) -> str:
    axes = [str(name) for name in data["status"].dims[:-1]]
    effect = numbers.mean_effect().reshape([data.sizes[axis] for axis in axes])
    n_draws = data.sizes["draw"]
    if n_draws < 2:
        return f"{n_draws}, whose spread is not known"
    spread = effect.std(axes.index("draw"), ddof=1)
    known = spread[np.isfinite(spread)]
    if not known.size:
        return str(n_draws)
    told = f"median {np.median(known):.3g}, largest {known.max():.3g}"
    return f"{n_draws}; standard deviation of an effect over them: {told}"


def _gap(provenance: Mapping[str, Any], numbers: Numbers) -> str:
    if numbers.no_share:
        return f"none: {numbers.no_share}"
    ends = f"clean run {numbers.clean.mean():.4g}, {reference_run(provenance)} {numbers.reference.mean():.4g}"
    return f"{numbers.gap.mean():.4g} ({ends})"


def _others(status: np.ndarray) -> str:
    numbers = counts(status)
    ways = {Status.DERIVED: "derived", Status.SCREENED: "in reduced precision"}
    told = "".join(f", {numbers[code]} of them {how}" for code, how in ways.items() if code in numbers)
    others = [f"{number} {code.text}" for code, number in numbers.items() if not has_number(np.array(code))]
    return told + (f" ({', '.join(others)})" if others else "")


def _largest(data: xr.Dataset, axes: list[str], provenance: Mapping[str, Any], numbers: Numbers) -> str:
    try:
        numbers.require_gap()
    except NoGap:
        return "no gap, so no share of it; effects.effect() gives changes of the metric"
    share = numbers.recovered()
    if not np.isfinite(share).any():
        return "nothing measured"
    cell = int(np.nanargmax(np.abs(share)))
    place = np.unravel_index(cell, tuple(data.sizes[axis] for axis in axes)) if axes else ()
    values = {axis: data[axis].values[index] for axis, index in zip(axes, place, strict=True)}
    labels = {
        axis: data[label_name(axis)].values[index]
        for axis, index in zip(axes, place, strict=True)
        if label_name(axis) in data.coords
    }
    where = cell_text(values, labels)
    said = f"{restores(provenance)} {share[cell]:.3f} of the gap"
    return f"{where}: {said} (exploratory)" if where else said
