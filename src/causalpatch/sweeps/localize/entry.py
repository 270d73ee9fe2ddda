"""``localize``: from the whole model down to heads and neurons, within a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import SettingError
from causalpatch.experiment import Experiment
from causalpatch.patches import Resample, Source, Value
from causalpatch.patches.value import spell
from causalpatch.results.localization import Localization, Measured
from causalpatch.statistics.missed import check_level
from causalpatch.statistics.racing import BURN_IN
from causalpatch.sweeps.localize.between import measured_edges
from causalpatch.sweeps.localize.budget import Budget, Meter, plain
from causalpatch.sweeps.localize.nodes import cells_of
from causalpatch.sweeps.localize.parts import Tree, Units, together, tree_of
from causalpatch.sweeps.localize.scored import ScoredBy
from causalpatch.sweeps.localize.search import SCORE_RUNS, Search
from causalpatch.sweeps.localize.values import value_of

_BASELINES: Final = 2  # untouched runs of each pair, clean and corrupted
_CONTROLS: Final = 3  # of each pair and call: both untouched runs, and the identity patch
_RESERVE: Final = 0.2  # of the budget, at most, for the sample of what stays closed


@dataclass(frozen=True)
class SearchPlan:
    """What a search would run, before it does.

    Args:
        steps: What is done, and how many runs of the model that takes at most; None where it depends on what is found.
        first: Runs without which there is no search.
        grid: Runs that a full grid of all units would take.
        budget: What may be spent.
        n_pairs: Pairs.
    """

    steps: tuple[tuple[str, int | None], ...]
    first: int
    grid: int
    budget: Budget
    n_pairs: int

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.steps)
        lines = [f"search with a budget of {self.budget}, {self.n_pairs} pairs; runs at most"]
        lines += [f"  {name:<{width}}  {'what is left' if runs is None else f'{runs:,}'}" for name, runs in self.steps]
        return "\n".join([*lines, f"  {'every unit by itself would take':<{width}}  {self.grid:,}"])


def localize(  # noqa: PLR0913 - what is searched, by which rules; each has a default
    experiment: Experiment,
    budget: Budget | float | str,
    *,
    value: Value | str | float | None = None,
    positions: str | Sequence[str] | None = None,
    units: Units = "all",
    features: str | None = None,
    edges: bool = False,
    delta: float | None = None,
    scores: ScoredBy = "atp",
    halves: int = 2,
    sample: int = 59,
    races: bool = True,
    level: float = 0.95,
) -> Localization:
    """Find the parts of a model that move the metric, coarse to fine, by exact patching.

    Layers' attention and MLPs are patched first; what is opened is patched by position, then by head and neuron (or by
    modules and their channels, in models of no known family). Parts are opened by their effect, by the scores of their
    units, by the effect of a random half of what they are made of, or because a set of them matters together: so that
    parts that cancel each other, or stand in for each other, are found too. The search claims nothing: confirm what
    it found on pairs that it never saw.

    Args:
        experiment: Model, discovery pairs, metric and direction; of several metrics the first.
        budget: What may be spent: a number of runs (forwards of one prompt; a backward counts as two), or a text:
            ``"2000 runs"``, ``"5 min"``, ``"3 TFLOP"``. It is never exceeded, but for seconds by what the last runs
            take longer than was foretold from those before them.
        value: What is put in: the source run's values, or ``Interpolate``; in the direction noise also an ablation:
            ``"zero"``, a number, ``"mean"``, ``"resample"`` or ``"noise"``. Shares are then of the gap between the
            clean run and the run in which all parts are ablated, and nothing is scored. What is fitted is fitted on
            these pairs, once for each site.
        positions: What is told apart: ``"each"`` aligned column, ``"all"`` for nothing, or a list such as
            ``["subject", "-1"]``; by default spans that all pairs have and the last token, or each column where all
            prompts are equally long.
        units: Which units are looked at: ``"heads"``, ``"neurons"`` (or experts), ``"all"`` or ``"none"``.
        features: A dictionary whose features are looked at in place of the units of the sublayers that it describes.
        edges: Whether edges between the heads and MLPs that were found, and into the logits, are measured too.
        delta: Which |effect| matters, as a share of the gap; by default .02 of neurons and features, .1 of all else.
        scores: How units are scored; None for no scores.
        halves: Random halves that are drawn of each part that nothing else opens.
        sample: Units of each kind that are drawn of what stayed closed; 59 without a find bound their share at 5 %.
        races: Whether pairs are drawn in rounds from 60 independent components on, and parts leave when it is decided
            on which side of delta they are.
        level: With which probability the bounds on what stayed closed hold.

    Returns:
        What was found, what stayed closed, what was spent.

    Raises:
        SettingError: The budget does not even allow the coarsest parts; a setting is impossible; or the value cannot be
            put into parts of every size, or not in this direction.
        NoGap: Clean and corrupted runs do not differ enough, so a share means nothing.
        ModelUnsupported: The model has several streams of tokens, or no parts.
        PairError: Prompts of unequal lengths have no alignment.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:6], show_progress=False)
        >>> found = cp.localize(experiment, budget=600, units="heads", positions="all")
        >>> found.spent["runs"] <= 600
        True

    Cost:
        Never more than the budget; ``plan_localize`` says what is done for it.
    """
    budget = Budget.of(budget)
    check_level(level)
    _check(delta, halves, sample, scores)
    put = value_of(value, experiment.direction)
    asked = {"value": spell(put or Source()), "positions": positions, "units": units, "features": features}
    with undisturbed():
        made = plain(experiment)
        tree = tree_of(made, positions, units, features)
        meter = Meter(made, budget, put)
        scored = scores is not None and not meter.filling.is_ablation
        plan = _plan(made, tree, budget, halves=halves, sample=sample, scored=scored)
        _require_first(meter, plan, tree)
        meter.count_baseline()
        meter.reserve = _RESERVE * budget.amount if sample else 0.0
        # The donors of a round are drawn among its own pairs.
        search = Search(meter, tree, delta, halves, scores, sample, races and not isinstance(put, Resample))
        search.run()
        told = measured_edges(search) if edges else {}
        return _localization(search, plan, level, asked, told)


def plan_localize(
    experiment: Experiment,
    budget: Budget | float | str,
    *,
    positions: str | Sequence[str] | None = None,
    units: Units = "all",
    features: str | None = None,
    halves: int = 2,
    sample: int = 59,
) -> SearchPlan:
    """Say what ``localize`` would do for a budget; of models of no known family, which modules run is tried out.

    Args:
        experiment: As for ``localize``, as are all others.
        budget: What may be spent.
        positions: What is told apart.
        units: Which units are looked at.
        features: A dictionary.
        halves: Random halves of each part.
        sample: Units of each kind that are drawn.
    """
    made = plain(experiment)
    tree = tree_of(made, positions, units, features)
    return _plan(made, tree, Budget.of(budget), halves=halves, sample=sample, scored=True)


def _plan(experiment: Experiment, tree: Tree, budget: Budget, *, halves: int, sample: int, scored: bool) -> SearchPlan:
    n_pairs = len(experiment.pairs)
    (parts,) = tree.groups(tree.whole)
    units = [unit.level for unit in tree.units(tree.whole)] or [part.level for part in parts]
    first = (_BASELINES + _CONTROLS + 1 + len(parts)) * n_pairs
    drawn = sum(min(sample, units.count(level)) + _CONTROLS for level in set(units)) if sample else 0
    steps: list[tuple[str, int | None]] = [
        (f"untouched runs, the whole, and {len(parts)} {parts[0].level}s", first),
        ("scores of all units", SCORE_RUNS * n_pairs if scored and tree.scored else 0),
        (
            f"{halves} random halves of each that nothing opens",
            (halves * len(parts) + _CONTROLS * (halves > 0)) * n_pairs,
        ),
        ("what opened parts are made of, level by level", None),
        (f"a sample of closed units, {sample} of each kind", drawn * n_pairs),
    ]
    return SearchPlan(tuple(steps), first, (len(units) + _BASELINES + 1) * n_pairs, budget, n_pairs)


def _require_first(meter: Meter, plan: SearchPlan, tree: Tree) -> None:
    """Make sure that the coarsest parts can be measured.

    Raises:
        SettingError: The budget does not allow it.
    """
    (parts,) = tree.groups(tree.whole)
    asked = [together([tree.whole], "whole"), *(together([part], part.name) for part in parts)]
    needed = meter.cost(asked)
    untouched = _BASELINES * plan.n_pairs
    needed += {"runs": untouched, "FLOP": meter.flops_of(untouched), "seconds": 0.0}[meter.budget.unit]
    if needed > meter.budget.amount:
        raise SettingError(
            f"a budget of {meter.budget} does not allow the coarsest parts",
            facts=[
                ("parts", f"{len(parts)} {parts[0].level}s on {plan.n_pairs} pairs"),
                ("needed", f"{Budget(needed, meter.budget.unit)} for these alone"),
            ],
            fix=f'budget="{Budget(4 * needed, meter.budget.unit)}", or use fewer pairs',
        )


def _localization(
    search: Search, plan: SearchPlan, level: float, asked: Mapping[str, Any], edges: Mapping[str, float]
) -> Localization:
    """Return what a search found."""
    meter = search.meter
    record = dict(meter.effects.provenance) if meter.effects else {}
    notes = [*map(str, record.get("notes", [])), *search.notes]
    if meter.is_stopped:
        notes.append("stopped by the user: what was not measured until then stayed closed")
    if search.races and search.n_components >= 2 * BURN_IN and search.meter.experiment.metrics[0].bounds is None:
        notes.append("races by asymptotic intervals: this metric has no bounds")
    n_whole = len(search.tree.whole.sites)
    if meter.filling.is_ablation:
        record |= {"reference": f"{meter.value} at all {n_whole} parts together", "no_share": ""}
    record |= {
        "budget": str(meter.budget),
        "planned": str(plan),
        "level": level,
        "whole": search.whole,
        "stopped": meter.is_stopped,
        "n_whole": n_whole,
        "saved": 1 - search.n_raced / search.n_could if search.n_could else 0.0,
        "search": {**asked, "delta": search.delta},
        "notes": list(dict.fromkeys(notes)),
        "site": "parts of the model",
    }
    n_pairs = len(search.gap)
    of_sets = np.stack(search.of_sets) if search.of_sets else np.zeros((0, n_pairs))
    moved = np.stack([node.moved for node in search.nodes])
    measured = Measured(moved, of_sets, search.gap, meter.experiment.pairs.components)
    cells = cells_of(search.nodes)
    return Localization(cells, search.closed, search.sets, search.pending, meter.spent, edges, record, measured)


def _check(delta: float | None, halves: int, sample: int, scores: str | None) -> None:
    wrong = [f"{name}={value}" for name, value in (("halves", halves), ("sample", sample)) if value < 0]
    wrong += [f"delta={delta}"] if delta is not None and not delta > 0 else []
    wrong += [f"scores={scores!r}"] if scores not in ("atp", "relp", None) else []
    if wrong:
        raise SettingError(
            f"a search cannot have {wrong[0]}",
            facts=[("allowed", "delta above 0; halves and sample from 0; scores atp, relp or None")],
            fix="localize(experiment, budget=2000)",
        )
