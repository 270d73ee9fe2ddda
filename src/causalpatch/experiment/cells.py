"""The cells of a grid of sites: which axes it has, and which sites each cell holds.

A set of sites is walked along axes: layers, units, positions, for modules the modules themselves. What is not an axis
is taken together in a cell.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from causalpatch.base.errors import SettingError
from causalpatch.base.suggest import closest
from causalpatch.experiment.experiment import Experiment
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import Role
from causalpatch.patches import Intervention, Patch, Value
from causalpatch.patches.patch import Alignment
from causalpatch.sites import Every, Site, SiteSet, expand
from causalpatch.sites.select import part_of


@dataclass(frozen=True)
class Grid:
    """The cells of a sweep.

    Args:
        axes: Coordinates by axis.
        labels: Labels by axis.
        sites: From a cell's coordinates to the sites patched there.
        frozen: What keeps the values of the base run in all cells.
        values: From a cell's coordinates and the sweep's value to the value that is put in there.
    """

    axes: dict[str, Sequence[Any]]
    labels: dict[str, Sequence[str]]
    sites: Callable[[dict[str, Any]], list[Site]]
    frozen: tuple[Patch, ...] = ()
    values: Callable[[dict[str, Any], Value | None], Value | None] = lambda cell, value: value

    def interventions(self, value: Value | None, align: Alignment | None) -> list[Intervention]:
        """Return one intervention per cell, in row-major order."""
        return [
            self.intervention(dict(zip(self.axes, coordinates, strict=True)), value, align)
            for coordinates in itertools.product(*self.axes.values())
        ]

    def intervention(
        self, cell: dict[str, Any], value: Value | None = None, align: Alignment | None = None
    ) -> Intervention:
        """Return the intervention of one cell.

        Args:
            cell: Its coordinate on each axis.
            value: What is put in; None for the source run's.
            align: How spans of unequal lengths meet.

        Raises:
            SettingError: There is no site in the cell.
        """
        put, column = self.values(cell, value), cell.get("position")
        patches = tuple(Patch(site, put, align, column) for site in self.sites(cell))
        name = ", ".join(f"{axis} {coordinate}" for axis, coordinate in cell.items())
        if not patches:
            raise SettingError(
                f"there is no site at {name}",
                facts=[(axis, f"{len(values)} of them") for axis, values in self.axes.items()],
                fix="sweep modules of one size together, or name the units that all of them have, such as #0:8",
            )
        return Intervention((*self.frozen, *patches), name)


def grid_of(experiment: Experiment, wanted: Site | SiteSet, over: str | Sequence[str] | None) -> Grid:
    """Return the cells of a sweep.

    Args:
        experiment: Model and pairs.
        wanted: What is patched.
        over: Axes, in order; by default those of the table above.

    Raises:
        SettingError: The site has no such axis.
        PairError: Positions are walked along, but pairs of unequal lengths have no alignment.
    """
    members = _members(experiment, wanted, over)
    possible: dict[str, list[Any]] = {}
    if wanted.info.has_layer:
        possible["layer"] = sorted({site.layer for site in members if site.layer is not None})
    if wanted.module is not None:
        paths = list(dict.fromkeys(str(site.module) for site in members))
        possible["intervention"] = paths
    units = members[0].unit_axis
    if members[0].unit is not None and units is not None:
        possible[units] = sorted({site.unit for site in members if site.unit is not None})
    # Named sites of one kind are tapped alike; modules each in their own way.
    can_walk = all(experiment.model.tap(site).has_position for site in (members if wanted.module else members[:1]))
    streams = {experiment.model.stream_of(site) for site in members}
    pairs = experiment.pairs.of(next(iter(streams)))
    if wanted.position is None or isinstance(wanted.position, Every):
        wanted = wanted.at(None)
        members = [site.at(None) for site in members]
        if can_walk and pairs.in_tokens.kind == "tokens" and len(streams) == 1:
            possible["position"] = []
    axes = _chosen(wanted, over, list(possible))
    if "position" in axes:
        possible["position"] = list(range(pairs.aligned().n_columns))
    if not axes:
        return Grid({"intervention": [str(wanted)]}, {}, lambda cell: list(members))

    fixed = [axis for axis in axes if axis != "position"]
    at: dict[tuple[Any, ...], list[Site]] = {}
    for site in members:
        at.setdefault(tuple(_coordinate(site, axis) for axis in fixed), []).append(site)
    chosen = {axis: possible[axis] for axis in axes}
    units_of = part_of(members[0], experiment.model.shape).units
    labels = _labels(pairs, experiment.base, units_of, chosen)
    return Grid(dict(chosen), labels, lambda cell: at.get(tuple(cell[axis] for axis in fixed), []))


def _members(experiment: Experiment, wanted: Site | SiteSet, over: str | Sequence[str] | None) -> list[Site]:
    """Expand the set; a module's units are counted in a run of the first pair where they are walked along."""
    walked = axes_of(over) or ()
    named = [each for each in walked if wanted.module and each in wanted.module.axes and each != "position"]
    axis = named[0] if named and wanted.unit is None else wanted.unit_axis
    if wanted.module is None or axis is None or not (isinstance(wanted.unit, Every) or axis in walked):
        return list(expand(wanted, experiment.model.shape))
    if wanted.unit is not None and not isinstance(wanted.unit, Every):
        return list(expand(wanted, experiment.model.shape))
    whole = SiteSet if "*" in wanted.module.path else Site
    modules = expand(whole("module", module=wanted.module, position=wanted.position), experiment.model.shape)
    return [
        Site("module", unit=unit, module=replace(site.module, counts=axis), position=site.position)
        for site in modules
        if site.module is not None
        for unit in range(experiment.count_units(site, axis))
    ]


def _chosen(wanted: Site | SiteSet, over: str | Sequence[str] | None, possible: list[str]) -> tuple[str, ...]:
    if over is None:
        has_units = wanted.unit_axis in possible
        walks = isinstance(wanted, SiteSet) or wanted.module is None
        skipped = {"position"} if has_units or wanted.module is not None else set()
        return tuple(axis for axis in possible if axis not in skipped and (walks or axis == "intervention"))
    axes = axes_of(over) or ()
    for axis in axes:
        if axis not in possible:
            near = closest(axis, possible, 1)
            why = f"it stands at @{wanted.position}" if axis == "position" and wanted.position is not None else ""
            raise SettingError(
                f"'{wanted}' cannot be swept over {axis!r}",
                facts=[("its axes", ", ".join(possible) or "none"), *([("because", why)] if why else [])],
                fix=f'over="{near[0]}"' if near else "leave over= out for the default axes",
            )
    if len(set(axes)) < len(axes):
        raise SettingError(f"an axis is named twice: {', '.join(axes)}", fix=f"over={tuple(dict.fromkeys(axes))}")
    return axes


def axes_of(over: str | Sequence[str] | None) -> tuple[str, ...] | None:
    """Return axes that are named in a list, or in one text with commas; None where none are."""
    if over is None:
        return None
    return tuple(axis.strip() for axis in over.split(",")) if isinstance(over, str) else tuple(over)


def _coordinate(site: Site, axis: str) -> Any:
    if axis == "layer":
        return site.layer
    return str(site.module) if axis == "intervention" else site.unit


def _labels(pairs: Pairs, base: Role, units: Mapping[str, int], axes: dict[str, list[Any]]) -> dict[str, Sequence[str]]:
    labels: dict[str, Sequence[str]] = {}
    if "position" in axes:
        labels["position"] = pairs.aligned().labels(base)
    if "kv_head" in axes and units.get("kv_head", 0) < units.get("head", 0):
        group = units["head"] // units["kv_head"]
        labels["kv_head"] = [f"(heads {kv * group}-{(kv + 1) * group - 1})" for kv in axes["kv_head"]]
    return labels
