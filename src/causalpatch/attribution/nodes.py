"""Scores of nodes and neurons: approximate effects of every cell of a grid of sites, from a few runs for all of them.

======================  ================================================================================
method                  slopes are taken
======================  ================================================================================
``"atp"``               at the base run (attribution patching)
``"ig"``                at points between the base's and the source's inputs
``"ig-activations"``    with each cell's own output between the base's and the source's
``"clean-corrupted"``   at the clean and at the corrupted run
``"atp*"``              at the base run; queries and keys by attention weights (QK-fix), the mean magnitude
                        without the gradient of one layer after the other (GradDrop)
``"relp"``              at the base run by other rules: norm scales fixed, activations as multiples, gates halved
======================  ================================================================================

References:
    Nanda 2023, "Attribution Patching"; Kramár et al. 2024, "AtP*", 2403.00745; Sundararajan et al. 2017, "Axiomatic
    Attribution for Deep Networks", 1703.01365; Jafari et al. 2025, "RelP", 2508.21258.
"""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args, overload

import numpy as np

from causalpatch.attribution.confirm import confirm_scores
from causalpatch.attribution.pieces import Scored, Scoring, contraction_of, count_slopes, measured_of, points_of, scored
from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import SettingError
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.node_slopes import Group, NodeSlopes, no_rules
from causalpatch.engine.relevance import Relevance
from causalpatch.engine.resolve import targets_of
from causalpatch.engine.slopes import Rule, is_rounding, require_steep
from causalpatch.experiment import Experiment
from causalpatch.experiment.cells import Grid, grid_of
from causalpatch.experiment.measured import Measured
from causalpatch.experiment.provenance import describe_setup, describe_source, notes_on
from causalpatch.patches import Intervention, Patch
from causalpatch.results.provenance import describe_program
from causalpatch.results.score_words import UNSIGNED
from causalpatch.results.scores import Scores
from causalpatch.sites import Every, Site, SiteSet, parse

Method = Literal["atp", "ig", "ig-activations", "clean-corrupted", "atp*", "relp"]
Wanted = str | Site | SiteSet


@overload
def attribute(
    experiment: Experiment,
    site: Wanted,
    method: Method = ...,
    *,
    over: str | Sequence[str] | None = ...,
    steps: int = ...,
    rule: Rule = ...,
) -> Scores: ...
@overload
def attribute(
    experiment: Experiment,
    site: list[Wanted] | list[str] | tuple[Wanted, ...],
    method: Method = ...,
    *,
    over: str | Sequence[str] | None = ...,
    steps: int = ...,
    rule: Rule = ...,
) -> dict[str, Scores]: ...
def attribute(
    experiment: Experiment,
    site: Wanted | list[Wanted] | list[str] | tuple[Wanted, ...],
    method: Method = "atp",
    *,
    over: str | Sequence[str] | None = None,
    steps: int = 5,
    rule: Rule = "midpoint",
) -> Scores | dict[str, Scores]:
    """Score every cell of a grid of sites, without patching any.

    Args:
        experiment: Model, pairs, metric and direction; of several metrics the first.
        site: What is scored, as for ``sweep``: ``"z"``, ``"mlp_post@-1"``, ``"resid_pre"``; or a list of such, all from
            the same runs.
        method: How; see the table above.
        over: Axes of the grid, as for ``sweep``.
        steps: Points of ``"ig"`` and ``"ig-activations"``.
        rule: Which points: ``"midpoint"``, which makes both directions alike, or ``"eap-ig"``.

    Returns:
        Scores with the axes asked for, then ``pair``, with the sign of the effect on the metric; those of ``"atp*"``
        are magnitudes. For a list of sites a dictionary, by what they were called.

    Raises:
        SiteNotFound: A layer, unit or module is not in the model.
        SiteUnsupported: The model does not have the site, or what stands there has no gradient.
        MetricError: The metric has no gradient, such as ``rank``, or spells out answers.
        NoGradient: The metric has no slope at the base run, such as ``kl_from_base``.
        ModelUnsupported: The method needs parts of the model that are not known.
        SettingError: The method, rule, axes or number of steps do not fit.
        PairError: Prompts of unequal lengths have no alignment.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:4])
        >>> cp.attribute(experiment, "z").dims
        ('layer', 'head', 'pair')

    Cost:
        Per pair three forwards and a backward for all sites together; ``"ig"`` one more forward and backward for each
        point, ``"atp*"`` a backward for each layer. ``"ig-activations"`` takes a forward and backward for each cell and
        point.
    """
    if method not in get_args(Method):
        raise SettingError(
            f"unknown method {method!r} for scores", facts=[("known", ", ".join(get_args(Method)))], fix='method="atp"'
        )
    given = [site] if isinstance(site, str | Site | SiteSet) else list(site)
    with undisturbed():
        found = _Asked(experiment, method, steps, rule).scores([parse(each) for each in given], over)
    if isinstance(site, str | Site | SiteSet):
        return found[0]
    return {str(each): scores for each, scores in zip(given, found, strict=True)}


class _Asked:
    """A request for scores.

    Args:
        experiment: Model, pairs, metric and direction.
        method: How.
        steps: Points of a way.
        rule: Which points.
    """

    def __init__(self, experiment: Experiment, method: Method, steps: int, rule: Rule) -> None:
        one = experiment if len(experiment.metrics) == 1 else experiment.measuring(experiment.metrics[:1])
        self.experiment, self.method, self.steps, self.rule = one, method, steps, rule
        self.points = points_of(method, steps, rule, experiment.base)

    def scores(self, asked: Sequence[Site | SiteSet], over: str | Sequence[str] | None) -> list[Scores]:
        """Return the scores of each set of sites."""
        started, experiment = time.perf_counter(), self.experiment
        grids = [grid_of(experiment, each, over) for each in asked]
        # Positions of two streams are counted apart.
        walks = [("position" in grid.axes, str(each.stream or "")) for grid, each in zip(grids, asked, strict=True)]
        kinds = [(walked, stream if walked else "") for walked, stream in walks]
        found: list[Scores | None] = [None] * len(asked)
        for kind in sorted(set(kinds)):
            numbers, walked = [n for n, each in enumerate(kinds) if each == kind], kind[0]
            some = [asked[n] for n in numbers]
            slopes, places, rules = self._prepared([grids[n] for n in numbers], some, walked=walked)
            work = self._work(some, over, slopes)
            sums = scored(experiment, work, partial(_measured, slopes))
            require_steep(sums.steepest, experiment.metrics[0].name, "site that was asked for")
            values = sums.values.reshape(slopes.values.shape)
            seconds = round(time.perf_counter() - started, 3)
            for n, begin, end in zip(numbers, places[:-1], places[1:], strict=True):
                notes = notes_on(experiment.pairs, experiment.base, slopes.job.interventions)
                record = {
                    **self._record(asked[n], grids[n], sums),
                    "notes": [*notes, *_small(values[begin:end], sums)],
                    **({"rules": rules.describe()} if rules else {}),
                    "cost": {**sums.cost, "seconds": seconds},
                }
                found[n] = self._made(grids[n], values[begin:end], record, walked=walked)
        return [each for each in found if each is not None]

    def measured(self, asked: Sequence[Site | SiteSet], over: str | Sequence[str] | None) -> Measured:
        """Score sets of sites of one kind here, and return the numbers before they are labelled."""
        grids = [grid_of(self.experiment, each, over) for each in asked]
        return _measured(self._prepared(grids, asked, walked="position" in grids[0].axes)[0])

    def _prepared(
        self, grids: Sequence[Grid], asked: Sequence[Site | SiteSet], *, walked: bool
    ) -> tuple[NodeSlopes, list[int], Relevance | None]:
        """Return what takes the slopes, where the cells of each grid begin, and by which rules."""
        groups, places = self._groups(grids, asked)
        rules = Relevance(self.experiment.model) if self.method == "relp" else None
        return self._slopes(groups, places[-1], by_position=walked, rules=rules), places, rules

    def _work(
        self, asked: Sequence[Site | SiteSet], over: str | Sequence[str] | None, slopes: NodeSlopes
    ) -> "NodeScoring":
        n_cells, n_columns = slopes.values.shape[:2]
        n_layers = self.experiment.model.shape.n_layers
        n_slopes = count_slopes(self.method, self.points, n_cells * n_columns, n_layers)
        axes = over if over is None or isinstance(over, str) else tuple(over)
        sites = tuple(map(str, asked))
        return NodeScoring(
            sites=sites,
            over=axes,
            method=self.method,
            steps=self.steps,
            rule=self.rule,
            positions=slopes.by_position,
            n_cells=n_cells * n_columns,
            n_slopes=n_slopes,
        )

    def _slopes(self, groups: list[Group], n_cells: int, *, by_position: bool, rules: Relevance | None) -> NodeSlopes:
        experiment = self.experiment
        patches = [Patch(_at(group.target.site, group.target.position)) for group in groups]
        one = experiment.model.streams is None and "resid_pre" not in experiment.model.shape.refused
        if self.method in ("ig", "clean-corrupted") and one:
            patches.append(Patch("resid_pre.0"))
        unique = list({str(patch.site): patch for patch in patches}.values())
        job = experiment.job([Intervention(tuple(unique))])
        if self.method == "atp*":
            inside = [Patch(Site("pattern", g.target.site.layer, 0)) for g in groups if g.target.site.name in _FIXED]
            if inside:
                job = experiment.job([Intervention((*unique, *{str(p.site): p for p in inside}.values()))])
        gauge = Gauge(experiment.metrics[:1], experiment.pairs, experiment.model)
        return NodeSlopes(
            job,
            gauge,
            groups,
            n_cells,
            self.points,
            by_position=by_position,
            own=self.method == "ig-activations",
            fixes=self.method == "atp*",
            rules=rules.applied if rules else no_rules,
        )

    def _groups(self, grids: Sequence[Grid], asked: Sequence[Site | SiteSet]) -> tuple[list[Group], list[int]]:
        """Return sites by layer with the cells that they belong to, and where the cells of each grid begin."""
        groups: list[Group] = []
        places = [0]
        for grid, wanted in zip(grids, asked, strict=True):
            position = None if isinstance(wanted.position, Every) else wanted.position
            fixed = {axis: values for axis, values in grid.axes.items() if axis != "position"}
            of: dict[tuple[object, ...], list[tuple[Site, int]]] = {}
            n_cells = 0
            for coordinates in itertools.product(*fixed.values()):
                for site in grid.sites(dict(zip(fixed, coordinates, strict=True))):
                    key = (site.name, site.layer, site.module, site.dictionary)
                    of.setdefault(key, []).append((site.at(None), places[-1] + n_cells))
                n_cells += 1
            for members in of.values():
                (target,) = targets_of(self.experiment.model, Intervention((Patch(_at(members[0][0], position)),)))
                sites, cells = zip(*members, strict=True)
                groups.append(Group(target, sites, np.array(cells)))
            places.append(places[-1] + n_cells)
            self._require_one_layer(grid, wanted, of)
        return groups, places

    def _require_one_layer(self, grid: Grid, wanted: Site | SiteSet, of: dict[tuple[object, ...], Any]) -> None:
        if self.method == "ig-activations" and len(of) > 1 and not {"layer", "intervention"} & set(grid.axes):
            raise SettingError(
                f"'{wanted}' cannot be moved at once along the way of ig-activations: it is in several layers",
                facts=[("axes", ", ".join(grid.axes))],
                fix='walk along the layers: over="layer"',
            )

    def _made(self, grid: Grid, values: np.ndarray, record: dict[str, Any], *, walked: bool) -> Scores:
        axes = dict(grid.axes)
        fixed = [axis for axis in axes if axis != "position"]
        shape = [len(axes[axis]) for axis in fixed]
        pairs = self.experiment.pairs
        if walked:
            table = values.reshape(*shape, values.shape[1], len(pairs))
            order = [*fixed, "position"]
            table = np.moveaxis(table, range(len(order)), [list(axes).index(axis) for axis in order])
        else:
            table = values[:, 0].reshape(*shape, len(pairs))
        scores = Scores(table, axes, [pair.id for pair in pairs], record, dict(grid.labels))
        return scores.confirmed_by(partial(confirm_scores, self.experiment))

    def _record(self, wanted: Site | SiteSet, grid: Grid, sums: Scored) -> dict[str, Any]:
        experiment = self.experiment
        where = f"@{wanted.position}" if wanted.position is not None else "all aligned"
        return {
            **describe_program(),
            **describe_setup(
                experiment.model, experiment.pairs, experiment.metrics[:1], experiment.direction, experiment.seed
            ),
            **describe_source(experiment.source_model),
            "site": str(wanted),
            "method": self.method,
            "points": self.points.rule,
            "mean_base": float(sums.base.mean()),
            "mean_source": float(sums.source.mean()),
            "contraction": contraction_of(experiment.model),
            **({UNSIGNED: True} if self.method == "atp*" else {}),
            "facts": {
                "granularity": wanted.info.unit_axis or wanted.name,
                "kind": "node",
                "value": "source",
                "positions": "each aligned column by itself" if "position" in grid.axes else where,
                "direction": experiment.direction,
                "circuit": "single sites, the rest of the run intact; a gradient, not a run",
            },
        }


def _small(values: np.ndarray, sums: Scored) -> list[str]:
    """Say so where all scores are as small as rounding."""
    sizes, gap = np.abs(values[np.isfinite(values)]), float((sums.source - sums.base).mean())
    largest = float(sizes.max()) if sizes.size else 0.0
    if not is_rounding(largest, gap):
        return []
    beside = f"the largest score is {largest:.1e}, of a gap of {gap:.3g}"
    return [f"{beside}: the metric has hardly any slope where it is taken"]


def _measured(slopes: NodeSlopes) -> Measured:
    started = time.perf_counter()
    sums = slopes.measure()
    values = sums.values.reshape(-1, sums.values.shape[-1])
    return measured_of(sums, values, pooled=False, seconds=time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class NodeScoring(Scoring):
    """Scores of nodes as a work; a cell for each of the grid and column.

    Args:
        sites: Sets of sites of one kind, by name.
        over: Axes of the grid.
    """

    kind = "scores of nodes"

    method: Method
    sites: tuple[str, ...]
    over: str | tuple[str, ...] | None

    def measured(self, experiment: Experiment) -> Measured:
        """Score nodes here."""
        with undisturbed():
            asked = _Asked(experiment, self.method, self.steps, self.rule)
            return asked.measured([parse(each) for each in self.sites], self.over)


_FIXED = ("q", "q_rot", "k", "k_rot")


def _at(site: Site, position: Any) -> Site:
    return site if position is None else site.at(position)
