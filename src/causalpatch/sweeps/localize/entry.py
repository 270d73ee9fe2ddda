"""``localize``: from the whole model down to heads and neurons, within a budget."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import ModelUnsupported, SettingError
from causalpatch.engine.wiring import graph_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.edges import EdgeSets, run_edges
from causalpatch.results.localization import Localization
from causalpatch.sites import Site
from causalpatch.statistics.missed import check_level
from causalpatch.statistics.racing import BURN_IN
from causalpatch.sweeps.localize.budget import Budget, Meter, plain
from causalpatch.sweeps.localize.nodes import cells_of
from causalpatch.sweeps.localize.parts import Tree, Units, together, tree_of
from causalpatch.sweeps.localize.scored import ScoredBy
from causalpatch.sweeps.localize.search import SCORE_RUNS, Search

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
        experiment: Model, discovery pairs, metric and direction; of several metrics the first. Values come from the
            source run.
        budget: What may be spent: a number of runs (forwards of one prompt; a backward counts as two), or a text:
            ``"2000 runs"``, ``"5 min"``, ``"3 TFLOP"``. It is never exceeded, but for seconds by what the last runs
            take longer than was foretold from those before them.
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
        SettingError: The budget does not even allow the coarsest parts; or a setting is impossible.
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
    with undisturbed():
        made = plain(experiment)
        tree = tree_of(made, positions, units, features)
        plan = _plan(made, tree, budget, halves=halves, sample=sample, scored=scores is not None)
        meter = Meter(made, budget)
        _require_first(meter, plan, tree)
        meter.count_baseline()
        meter.reserve = _RESERVE * budget.amount if sample else 0.0
        search = Search(meter, tree, delta, halves, scores, sample, races)
        search.run()
        found = _localization(search, plan, level)
        return _with_edges(search, found) if edges else found


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


def _localization(search: Search, plan: SearchPlan, level: float) -> Localization:
    """Return what a search found."""
    meter = search.meter
    record = dict(meter.effects.provenance) if meter.effects else {}
    notes = [*map(str, record.get("notes", [])), *search.notes]
    if meter.is_stopped:
        notes.append("stopped by the user: what was not measured until then stayed closed")
    if search.races and search.n_components >= 2 * BURN_IN and search.meter.experiment.metrics[0].bounds is None:
        notes.append("races by asymptotic intervals: this metric has no bounds")
    record |= {
        "budget": str(meter.budget),
        "planned": str(plan),
        "level": level,
        "whole": search.whole,
        "stopped": meter.is_stopped,
        "n_whole": len(search.tree.whole.sites),
        "saved": 1 - search.n_raced / search.n_could if search.n_could else 0.0,
        "notes": list(dict.fromkeys(notes)),
        "site": "parts of the model",
    }
    return Localization(cells_of(search.nodes), search.closed, search.sets, search.pending, meter.spent, {}, record)


def _with_edges(search: Search, found: Localization) -> Localization:
    """Return what was found, with the edges between heads and MLPs among it, and into the logits."""
    meter = search.meter
    try:
        graph = graph_of(meter.experiment.model)
    except ModelUnsupported as error:
        found.provenance["notes"].append(f"edges were not measured: {error.what}")
        return found
    names = list(dict.fromkeys(filter(None, map(_sender, found.components))))
    ends = [
        (sender, receiver)
        for sender in map(graph.find_sender, names)
        for receiver in range(graph.n_receivers)
        if graph.exists[sender, receiver] and graph.receiver_label(receiver).partition("<")[0] in (*names, "logits")
    ]
    # A run for each head that shares a key, at most.
    shared = meter.experiment.model.n_heads // max(1, meter.experiment.model.n_kv_heads)
    runs = (shared * len(ends) + _CONTROLS) * len(meter.experiment.pairs)
    if not ends or not meter.has(runs):
        why = "they did not fit into the budget" if ends else "there are none"
        found.provenance["notes"].append(f"edges were not measured: {why}")
        return found
    edges = np.array(ends)
    labels = list(graph.names(edges))
    effects = run_edges(meter.experiment, EdgeSets.of_edges(edges, labels))
    meter.count(effects.provenance["cost"]["rows"], meter.flops_of(runs), effects.provenance["cost"]["seconds"])
    values = effects.recovered().values.tolist()
    ranked = sorted(zip(labels, values, strict=True), key=lambda each: -abs(each[1]))
    told = {name: value for name, value in ranked if abs(value) > (search.delta or _EDGE)}
    return Localization(found.cells, found.closed, found.sets, found.pending, meter.spent, told, found.provenance)


_EDGE: Final = 0.02  # share of the gap that an edge has to move


def _sender(site: Site) -> str:
    """Return the name of a component in the graph of edges; nothing for parts of others."""
    if site.name in ("z", "head_out"):
        return f"a{site.layer}.h{site.unit}"
    return f"m{site.layer}" if site.name in ("mlp_out", "mlp_post") else ""


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
