"""Stability of a localisation: what is selected again on resampled pairs, from effects that are stored.

1. Independent components of pairs are drawn with replacement; shares are ratios of the drawn sums. No run is made.
2. Cells are selected again by the same rule: the k largest, or all beyond delta.
3. A search that opens parts measures only what it opens. A resample may have opened another part: of ``localize`` it is
   known which parts each resample opens (``localize/again``), of effects with those of the coarser level, and so how
   many of them wanted a cell that was never measured. ``rerun=True`` measures these cells, after which nothing is
   conditional any more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from causalpatch.attribution.confirm import COARSE, FINE
from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import SettingError
from causalpatch.base.seeds import generator
from causalpatch.experiment import Experiment
from causalpatch.experiment.cells import grid_of
from causalpatch.results.effects import Effects
from causalpatch.results.labels import cell_text
from causalpatch.results.localization import Localization
from causalpatch.results.selection import FEWEST, THRESHOLD, SelectionStability
from causalpatch.results.shares import component_sums
from causalpatch.sites import parse
from causalpatch.sweeps.localize.again import Drawn, measured_too


def selection_stability(  # noqa: PLR0913 - the effects, the rule, and what to do about cells that were not measured
    found: Effects | Localization,
    *,
    k: int | None = None,
    delta: float | None = None,
    parents: Effects | None = None,
    experiment: Experiment | None = None,
    rerun: bool = False,
    n_draws: int = 1000,
    threshold: float = THRESHOLD,
    seed: int = 0,
) -> SelectionStability:
    """Select cells again on bootstrap resamples of the pairs' independent components.

    Args:
        found: What ``localize`` found, whose own rules select again; or stored effects, in which cells that were never
            measured have no number.
        k: Of effects: select the k largest |share|; without it all beyond ``delta``.
        delta: Of effects: share beyond which a cell is selected, and beyond which a parent is opened; .1 by default, of
            neurons and features .02.
        parents: Of effects: those of the coarser level on the same pairs, whose axes are some of these axes: the parent
            of a cell is where it stands on them.
        experiment: The experiment that these are of, for ``rerun``.
        rerun: Measure the cells that were not: of effects all, of a search those that a resample wanted.
        n_draws: Resamples.
        threshold: Frequency from which a cell is called stable.
        seed: Of the draws.

    Raises:
        SettingError: There are fewer than four independent components; parents are of other pairs or axes; a rule is
            given for a search, which has its own; ``rerun`` has no experiment, or another one; or the threshold is
            beyond 0 and 1.
        NoGap: Clean and reference runs do not differ enough, so a share means nothing.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> heads = cp.sweep(cp.Experiment(model, cp.load_pairs("ioi", model)), "z@-1")
        >>> found = cp.selection_stability(heads, k=2)
        >>> found.to_dataframe()["frequency"].tolist()
        [1.0, 1.0]

    Cost:
        Draws times cells times components of pairs; with ``rerun`` one run per cell that was not measured, and pair.

    References:
        See ``causalpatch.results.selection``.
    """
    if not 0 < threshold <= 1:
        raise SettingError(
            f"no cell is selected in {threshold:g} of the resamples",
            facts=[("allowed", "above 0, up to 1")],
            fix=f"threshold={THRESHOLD}",
        )
    if isinstance(found, Localization):
        if k is not None or delta is not None or parents is not None:
            raise SettingError(
                "a search selects again by its own rules",
                facts=[("given", "k, delta or parents, which are for effects")],
                fix="selection_stability(found)",
            )
        return _of_search(found, experiment, n_draws, threshold, seed, rerun=rerun)
    whole = found.over_draws()
    one = whole.metric(whole.metrics[0])
    one.recovered()  # refuses shares of no gap
    _require_enough(one.n_components)
    numbers = _numbers(one)
    if rerun:
        numbers = _complete(numbers, one, experiment)
    fine = bool({"neuron", "feature"} & set(one.axes))
    delta = delta if delta is not None else FINE if fine else COARSE
    measured = np.isfinite(numbers).any(-1)
    gap, group = _gap(one)
    n_groups, times = _draws(group, n_draws, seed)
    shares = _resampled(numbers, gap, group, np.concatenate([np.ones((1, n_groups)), times]))
    selected = _select(shares, k, delta)
    both, either = (selected[1:] & selected[0]).sum(-1), (selected[1:] | selected[0]).sum(-1)
    wanted = 0.0
    if not measured.all():
        wanted = np.nan if parents is None else _wanted(one, parents, times, measured, delta)
    names = _names(one)
    cells = [
        {
            "cell": names[place],
            "share": float(shares[0, place]),
            "is_selected": bool(selected[0, place]),
            "frequency": float(selected[1:, place].mean()),
        }
        for place in np.flatnonzero(measured)
    ]
    rule = f"cells with |share| above {delta:g}" if k is None else f"the {k} largest cells"
    overlap = np.divide(both, either, out=np.ones(n_draws), where=either > 0)
    return SelectionStability(tuple(cells), overlap, float(wanted), int((~measured).sum()), n_groups, rule, threshold)


def _of_search(
    found: Localization, experiment: Experiment | None, n_draws: int, threshold: float, seed: int, *, rerun: bool
) -> SelectionStability:
    """Return how often a search's own rules select its parts again."""
    n_groups, times = _draws(found.measured.group, n_draws, seed)
    _require_enough(n_groups)
    if rerun:
        with undisturbed():
            found, _ = measured_too(found, times, _required(experiment))
    drawn = Drawn(found, times)
    before = np.array([cell.is_component for cell in found.cells], dtype=bool)
    both, either = (drawn.selected & before).sum(-1), (drawn.selected | before).sum(-1)
    wanted = np.zeros(n_draws, dtype=bool)
    for wants in drawn.wanted.values():
        wanted |= wants
    cells = [
        {
            "cell": cell.name,
            "share": cell.effect,
            "is_selected": cell.is_component,
            "frequency": float(drawn.selected[:, number].mean()),
        }
        for number, cell in enumerate(found.cells)
    ]
    return SelectionStability(
        cells=tuple(cells),
        overlap=np.divide(both, either, out=np.ones(n_draws), where=either > 0),
        wanted=float(wanted.mean()),
        n_unmeasured=sum(drawn.lacking.values()),
        n_groups=n_groups,
        rule="parts by the rules of the search",
        threshold=threshold,
    )


def _draws(group: np.ndarray, n_draws: int, seed: int) -> tuple[int, np.ndarray]:
    """Return how many components there are, and how often each is drawn, (draw, component)."""
    n_groups = len(np.unique(group))
    return n_groups, generator(seed, "selection").multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_draws)


def _require_enough(n_groups: int) -> None:
    if n_groups < FEWEST:
        raise SettingError(
            f"{n_groups} independent components cannot be resampled",
            facts=[("needed", f"{FEWEST} or more")],
            fix="take more independent pairs",
        )


def _required(experiment: Experiment | None) -> Experiment:
    if experiment is None:
        raise SettingError(
            "cells that were not measured cannot be run without their experiment",
            fix="selection_stability(found, experiment=experiment, rerun=True)",
        )
    return experiment


def _numbers(effects: Effects) -> np.ndarray:
    """Return effects in the direction of the gap, (cell, pair)."""
    sign = 1 if effects.direction == "denoise" else -1
    values = effects.effect(per_pair=True).values
    found: np.ndarray = sign * values.reshape(-1, values.shape[-1])
    return found


def _gap(effects: Effects) -> tuple[np.ndarray, np.ndarray]:
    data = effects.to_xarray()
    return (data["baseline_clean"] - data["baseline_reference"]).values, data["component"].values


def _names(effects: Effects) -> list[str]:
    data = effects.to_xarray()
    shape = tuple(data.sizes[axis] for axis in effects.axes)
    places = zip(*np.unravel_index(np.arange(int(np.prod(shape))), shape), strict=True)
    return [
        cell_text({axis: data[axis].values[n] for axis, n in zip(effects.axes, at, strict=True)}, {}) for at in places
    ]


def _resampled(numbers: np.ndarray, gap: np.ndarray, group: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Return the share of every cell in every draw, (draw, cell); NaN where nothing was measured."""
    known = np.isfinite(numbers)
    top = times @ component_sums(np.where(known, numbers, 0.0), group).T
    bottom = times @ component_sums(known * gap, group).T
    shares: np.ndarray = np.divide(top, bottom, out=np.full(top.shape, np.nan), where=bottom != 0)
    return shares


def _select(shares: np.ndarray, k: int | None, delta: float) -> np.ndarray:
    """Return which cells each draw selects, (draw, cell)."""
    size = np.nan_to_num(np.abs(shares))
    if k is None:
        return np.asarray(size > delta)
    chosen = np.zeros(size.shape, dtype=bool)
    order = np.argsort(-size, axis=-1, kind="stable")[:, :k]
    np.put_along_axis(chosen, order, values=True, axis=-1)
    return np.asarray(chosen & np.isfinite(shares))


def _wanted(effects: Effects, parents: Effects, times: np.ndarray, measured: np.ndarray, delta: float) -> float:
    """Return the share of draws that open a part whose cells were not all measured."""
    coarse = parents.over_draws()
    coarse = coarse.metric(coarse.metrics[0])
    if not set(coarse.axes) <= set(effects.axes) or coarse.pair_ids != effects.pair_ids:
        raise SettingError(
            "these are not the parents of the cells",
            facts=[
                ("axes", f"{', '.join(coarse.axes)}, of cells {', '.join(effects.axes)}"),
                ("pairs", f"{len(coarse.pair_ids)}, of cells {len(effects.pair_ids)}"),
            ],
            fix="give the effects of the coarser level on the same pairs, such as layers for heads",
        )
    shape = tuple(effects.to_xarray().sizes[axis] for axis in effects.axes)
    gaps = ~measured.reshape(shape)
    others = tuple(place for place, axis in enumerate(effects.axes) if axis not in coarse.axes)
    lacks: np.ndarray = np.asarray(gaps.any(axis=others))
    kept = [axis for axis in effects.axes if axis in coarse.axes]
    lacks = np.moveaxis(lacks, [kept.index(axis) for axis in coarse.axes], range(len(kept))).reshape(-1)
    opened = np.abs(_resampled(_numbers(coarse), *_gap(coarse), times)) > delta
    return float((opened & lacks).any(-1).mean())


def _complete(numbers: np.ndarray, effects: Effects, experiment: Experiment | None) -> np.ndarray:
    """Return the numbers with those cells measured that were not."""
    made = _required(experiment)
    missing = np.flatnonzero(~np.isfinite(numbers).any(-1))
    if not len(missing):
        return numbers
    grid = grid_of(made, parse(str(effects.provenance["site"])), effects.axes)
    shape = tuple(len(held) for held in grid.axes.values())
    cells: list[dict[str, Any]] = [
        {axis: held[n] for (axis, held), n in zip(grid.axes.items(), at, strict=True)}
        for at in zip(*np.unravel_index(missing, shape), strict=True)
    ]
    labels = [f"cell {place}" for place in missing]
    again = made.measuring(effects.metrics[0]).run(list(map(grid.intervention, cells)), axes={"intervention": labels})
    if not again.is_complete:
        raise KeyboardInterrupt
    whole = numbers.copy()
    whole[missing] = _numbers(again)
    return whole
