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

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from causalpatch.base.errors import SettingError
from causalpatch.engine import Plan
from causalpatch.experiment import Experiment
from causalpatch.experiment.cells import Grid, axes_of, grid_of
from causalpatch.patches import Identity, Noise, Patch, Resample, Value
from causalpatch.patches.patch import Alignment
from causalpatch.patches.value import as_value
from causalpatch.results.effects import Effects
from causalpatch.sites import Site, SiteSet, parse
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
    grid: Grid,
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


def windows_of(grid: Grid, size: int | None, wanted: Site | SiteSet) -> Grid:
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


def freezing(grid: Grid, frozen: str | Sequence[str]) -> Grid:
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
) -> Grid:
    """Return the cells of a sweep with its windows, and the layers that a value is read at."""
    axes = list(axes_of(over) or ())
    if SOURCE_LAYER not in axes:
        return windows_of(grid_of(experiment, wanted, over), window, wanted)
    rest = [axis for axis in axes if axis != SOURCE_LAYER]
    grid = windows_of(grid_of(experiment, wanted, rest), window, wanted)
    layers, at = source_layers(experiment.model.shape, value)
    every = {**grid.axes, SOURCE_LAYER: layers}
    return replace(grid, axes={axis: every[axis] for axis in axes}, values=lambda cell, given: at(cell[SOURCE_LAYER]))


def _refuse_cost(wanted: Site | SiteSet, n_cells: int, rows: int, why: str) -> None:
    name = wanted.name if wanted.dictionary is None else f"{wanted.name}({wanted.dictionary})"
    name = name if wanted.stream is None else f"{wanted.stream}/{name}"
    raise SettingError(
        f"sweeping '{wanted}' takes {n_cells:,} interventions, {rows:,} runs of the model: {why}",
        facts=[("cells", f"{n_cells:,}")],
        fix=f"narrow it, such as '{name}.0:2@-1', or say what it may cost: sweep(…, budget={rows})",
    )
