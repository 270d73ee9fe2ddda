"""Sweeps: one intervention per cell of a grid of layers, units and positions.

A sweep names a set of sites and the axes to walk along. Each cell patches its part of the set in a run of its own;
what is not an axis is patched together: heads ``over=("layer",)`` patches all heads of a layer at once.

=======================================  =========================================================
site                                     axes by default
=======================================  =========================================================
``resid_*``, ``attn_out``, ``mlp_out``   layer, position
``embed``, ``final_norm``, ``logits``    position (likewise ``pos_embed``)
``q``, ``z``, ``head_out``               layer, head (all positions at once)
``q_rot``, ``scores``, ``pattern``       layer, head (all queries at once; the position is the query's)
``k``, ``v``, ``k_rot``                  layer, kv_head
``mlp_pre``, ``mlp_gate``, ``mlp_post``  layer, neuron; needs a position or a budget
``router``                               layer, position, of the layers that have experts
``expert_out``                           layer, expert (all positions at once)
``feature(NAME)``                        layer, feature; needs a position or a budget
``module(PATH).output``                  intervention: one per module
=======================================  =========================================================

With a position in the site (``z@-1``) there is no position axis. The axis ``source_layer`` walks along the layers that
a value ``From`` is read at: back-patching, patchscopes.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from causalpatch.base.errors import SettingError
from causalpatch.base.suggest import closest
from causalpatch.engine import Plan
from causalpatch.experiment import Experiment
from causalpatch.pairs import Pairs
from causalpatch.pairs.role import Role
from causalpatch.patches import Identity, Intervention, Noise, Patch, Resample, Value
from causalpatch.patches.patch import Alignment
from causalpatch.patches.value import as_value
from causalpatch.results.effects import Effects
from causalpatch.sites import Every, Site, SiteSet, expand, parse
from causalpatch.sites.select import part_of
from causalpatch.sweeps.source_layers import SOURCE_LAYER, source_layers


def sweep(  # noqa: PLR0913 - what, over which axes, with what; each has a default
    experiment: Experiment,
    site: str | Site | SiteSet,
    over: str | Sequence[str] | None = None,
    *,
    value: Value | str | float | None = None,
    align: Alignment | None = None,
    budget: int | None = None,
    draws: int | None = None,
    window: int | None = None,
    frozen: str | Sequence[str] = (),
) -> Effects:
    """Patch every cell of a grid, each in a run of its own, on every pair.

    Args:
        experiment: Model, pairs, metrics and direction.
        site: What to patch: ``"resid_pre"``, ``"z"``, ``"z.8:12@-1"``, ``"k.3"``, ``"module(conv*).output"``.
        over: Axes of the grid, in order, as a list or one text with commas: of ``layer``, the site's unit (``head``,
            ``kv_head``, ``neuron``, a module's named axis), ``position``, for modules ``intervention``, and for a value
            ``From`` ``source_layer``; by default as in the table above.
        value: The new value, the source run's by default; see ``Patch``.
        align: How spans of unequal lengths meet; see ``Patch``.
        budget: Most runs of the model, counted in rows (one intervention on one pair); a larger grid is refused.
        draws: Number of draws of a value that is drawn (``Noise``, ``Resample``), each the same in all cells.
        window: Layers that are patched together: a window slides over the layers, cut off at the first and the last,
            and ``layer`` is its middle.
        frozen: Sites that keep the values of the base run in all runs, such as ``"router"``: tokens then keep their
            experts, and patches act through what experts are given, not through which are chosen.

    Returns:
        Effects with the axes asked for, ``draw`` where several draws were asked for, then ``pair``. Position
        coordinates are aligned columns, labelled by tokens.

    Raises:
        SiteNotFound: A layer, unit or module is not in the model.
        SiteUnsupported: The model does not have the site.
        SettingError: The site has no such axis, the grid is larger than the budget, or the value is not drawn.
        PairError: Positions are walked along, but pairs of unequal lengths have no alignment.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
        >>> cp.sweep(experiment, "z.0@-1").dims
        ('layer', 'head', 'pair')

    Cost:
        One run per cell and pair, and three or four per pair for the untouched runs and the controls. On the wavefront
        a run is the tokens and layers that the patch can change; ``plan_sweep`` says how much that is.
    """
    wanted = parse(site)
    wanted_value = as_value(value) if value is not None else None
    grid = freezing(_grid(experiment, wanted, over, wanted_value, window), frozen)
    interventions = grid.interventions(wanted_value, align)
    rows = len(interventions) * len(experiment.pairs) * (draws or 1)
    if budget is not None and rows > budget:
        _refuse_cost(wanted, len(interventions), rows, f"the budget is {budget:,} rows")
    many = {"neuron", "feature"} & {wanted.info.unit_axis} & set(grid.axes)
    if budget is None and many and wanted.position is None:
        _refuse_cost(wanted, len(interventions), rows, "at all positions at once")
    title = str(wanted) if window is None else f"{wanted} in windows of {window}"
    return run_grid(experiment, grid, title, wanted_value, align=align, draws=draws)


def run_grid(
    experiment: Experiment,
    grid: "Grid",
    title: str,
    value: Value | None,
    *,
    align: Alignment | None = None,
    draws: int | None = None,
) -> Effects:
    """Patch every cell of a grid, for each draw where there are several.

    Args:
        experiment: Model, pairs, metrics and direction.
        grid: The cells.
        title: What results call the patched sites.
        value: The new value, or None for the source run's.
        align: How spans of unequal lengths meet.
        draws: Number of draws of a value that is drawn.

    Raises:
        SettingError: Several draws are asked for of a value that is not drawn.
    """
    if draws is None:
        return experiment.run(grid.interventions(value, align), axes=grid.axes, labels=grid.labels, title=title)
    made: list[Effects] = []
    numbers = draw_numbers(value, draws)
    for drawn in numbers:
        interventions = grid.interventions(drawn, align)
        made.append(experiment.run(interventions, axes=grid.axes, labels=grid.labels, title=title))
        if not made[-1].is_complete:
            break
    return stack_draws(made, [drawn.draw for drawn in numbers])


def windows_of(grid: "Grid", size: int | None, wanted: Site | SiteSet) -> "Grid":
    """Return a grid whose cells hold the sites of all layers of a window; None leaves it as it is.

    Raises:
        SettingError: The grid has no layers, or the window no size.
    """
    if size is None:
        return grid
    if "layer" not in grid.axes:
        raise SettingError(
            f"windows of '{wanted}' need the axis 'layer'",
            facts=[("axes", ", ".join(grid.axes))],
            fix='name a site of every layer, such as "mlp_out", and over="layer"',
        )
    layers_around(0, size)
    known = set(grid.axes["layer"])

    def sites(cell: dict[str, Any]) -> list[Site]:
        around = (layer for layer in layers_around(cell["layer"], size) if layer in known)
        return [site for layer in around for site in grid.sites({**cell, "layer": layer})]

    return replace(grid, sites=sites)


def freezing(grid: "Grid", frozen: str | Sequence[str]) -> "Grid":
    """Return a grid in all of whose runs some sites keep the values of the base run.

    Args:
        grid: The grid.
        frozen: The sites.
    """
    names = [frozen] if isinstance(frozen, str) else frozen
    return replace(grid, frozen=tuple(Patch(name, Identity()) for name in names))


def layers_around(layer: int, size: int) -> range:
    """Return the layers of a window, not cut off.

    Args:
        layer: The middle.
        size: Number of layers.

    Raises:
        SettingError: There are to be none.

    References:
        Meng et al. 2022, 2202.05262: ``range(layer - window // 2, layer - (-window // 2))`` in their code.
    """
    if size < 1:
        raise SettingError(f"a window of {size} layers holds nothing", fix="give 1 or more, such as 10")
    return range(layer - size // 2, layer - (-size // 2))


def draw_numbers(value: Value | None, draws: int) -> list[Noise | Resample]:
    """Return a value that is drawn, once for each of several draws.

    Raises:
        SettingError: It is not drawn, or there is to be no draw.
    """
    if draws < 1 or not isinstance(value, Noise | Resample):
        raise SettingError(
            f"{draws} draws of the value {value or 'source'} cannot be made",
            facts=[("drawn", "Noise(…), Resample(…)"), ("needed", "one draw or more")],
            fix='sweep(…, value="noise", draws=5), or leave draws= out',
        )
    return [replace(value, draw=value.draw + number) for number in range(draws)]


def stack_draws(made: Sequence[Effects], numbers: Sequence[int]) -> Effects:
    """Return effects of several draws with the axis ``draw``; a draw that was stopped counts only where it is alone."""
    whole = [one for one in made if one.is_complete] or list(made[:1])
    return Effects.of_draws(whole, numbers[: len(whole)])


def plan_sweep(
    experiment: Experiment,
    site: str | Site | SiteSet,
    over: str | Sequence[str] | None = None,
    *,
    value: Value | str | float | None = None,
    window: int | None = None,
    frozen: str | Sequence[str] = (),
) -> Plan:
    """Say what a sweep would cost; nothing is patched.

    Args:
        experiment: Model, pairs, metrics and direction.
        site: What to patch.
        over: Axes of the grid.
        value: The new value.
        window: Layers that are patched together.
        frozen: Sites that keep the values of the base run.

    Returns:
        Rows, forwards, FLOPs and memory; it prints as a table.
    """
    wanted = parse(site)
    wanted_value = as_value(value) if value is not None else None
    grid = freezing(_grid(experiment, wanted, over, wanted_value, window), frozen)
    return experiment.plan(grid.interventions(wanted_value, None))


def _grid(
    experiment: Experiment,
    wanted: Site | SiteSet,
    over: str | Sequence[str] | None,
    value: Value | None,
    window: int | None,
) -> "Grid":
    """Return the cells of a sweep with its windows, and the layers that a value is read at."""
    axes = list(_axes_of(over) or ())
    if SOURCE_LAYER not in axes:
        return windows_of(grid_of(experiment, wanted, over), window, wanted)
    rest = [axis for axis in axes if axis != SOURCE_LAYER]
    grid = windows_of(grid_of(experiment, wanted, rest), window, wanted)
    layers, at = source_layers(experiment.model.shape, value)
    every = {**grid.axes, SOURCE_LAYER: layers}
    return replace(grid, axes={axis: every[axis] for axis in axes}, values=lambda cell, given: at(cell[SOURCE_LAYER]))


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
        made = []
        for coordinates in itertools.product(*self.axes.values()):
            cell = dict(zip(self.axes, coordinates, strict=True))
            column = cell.get("position")
            put = self.values(cell, value)
            patches = tuple(Patch(site, put, align, column) for site in self.sites(cell))
            name = ", ".join(f"{axis} {coordinate}" for axis, coordinate in cell.items())
            if not patches:
                raise SettingError(
                    f"there is no site at {name}",
                    facts=[(axis, f"{len(values)} of them") for axis, values in self.axes.items()],
                    fix="sweep modules of one size together, or name the units that all of them have, such as #0:8",
                )
            made.append(Intervention((*self.frozen, *patches), name))
        return made


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
    walked = _axes_of(over) or ()
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
    axes = _axes_of(over) or ()
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


def _axes_of(over: str | Sequence[str] | None) -> tuple[str, ...] | None:
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


def _refuse_cost(wanted: Site | SiteSet, n_cells: int, rows: int, why: str) -> None:
    name = wanted.name if wanted.dictionary is None else f"{wanted.name}({wanted.dictionary})"
    name = name if wanted.stream is None else f"{wanted.stream}/{name}"
    raise SettingError(
        f"sweeping '{wanted}' takes {n_cells:,} interventions, {rows:,} runs of the model: {why}",
        facts=[("cells", f"{n_cells:,}")],
        fix=f"narrow it, such as '{name}.0:2@-1', or say what it may cost: sweep(…, budget={rows})",
    )
