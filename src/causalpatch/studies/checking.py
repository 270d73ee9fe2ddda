"""What can be known of a study before anything is measured: whether it can be made, and what it would cost.

The model is opened and the pairs are read; sites, axes and components are looked up, pairs are split and counted, and
every sweep is planned. A store that is there already is looked at. No run of the model is made, and nothing is written.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeAlias, get_args

from causalpatch.attribution.edges import EdgeMethod
from causalpatch.attribution.nodes import Method
from causalpatch.attribution.pieces import SLOPE_RUNS, count_slopes, points_of
from causalpatch.base.errors import PairError, SettingError
from causalpatch.base.extras import require
from causalpatch.base.suggest import closest
from causalpatch.circuits.learn import runs_of_learning
from causalpatch.engine.memory import GIB, budget_bytes, row_cost
from causalpatch.engine.wiring import graph_of
from causalpatch.experiment import Experiment
from causalpatch.experiment.cells import grid_of
from causalpatch.patches.value import as_value
from causalpatch.sites import parse
from causalpatch.statistics.areas import FRACTIONS
from causalpatch.studies.opened import Opened, n_workers, threads_of
from causalpatch.studies.steps import comparison_of
from causalpatch.studies.study import (
    AttributeStep,
    ConfirmStep,
    DiscoverStep,
    EvaluateStep,
    LocalizeStep,
    Side,
    Step,
    SweepStep,
    TuneStep,
)
from causalpatch.sweeps import plan_localize, plan_sweep
from causalpatch.sweeps.grid import draw_numbers
from causalpatch.sweeps.localize.budget import Budget
from causalpatch.tuning.parts import sites_of
from causalpatch.validation.components import members_of
from causalpatch.validation.confirm import Checks
from causalpatch.validation.held_out import require_enough

_Plan: TypeAlias = tuple[int | None, int | None, float | None, str]  # runs, patched runs, seconds, in words


@dataclass(frozen=True)
class Planned:
    """What one step would cost.

    Args:
        name: Its name.
        kind: What it does.
        side: On which pairs.
        n_pairs: How many.
        runs: Runs of the model, where these vary as the text says; None where they depend on what is found.
        patched: Those of them that progress counts; None where they are only about so many.
        seconds: The least that the arithmetic takes; None where that is not known.
        text: The whole plan.
    """

    name: str
    kind: str
    side: Side
    n_pairs: int
    runs: int | None
    patched: int | None
    seconds: float | None
    text: str


@dataclass(frozen=True)
class Checked:
    """What a study would cost.

    Args:
        hash: Name of its run.
        steps: Its steps, one seed each.
        n_seeds: How often they are made.
        lines: What else is to be known.
    """

    hash: str
    steps: tuple[Planned, ...]
    n_seeds: int
    lines: tuple[str, ...]

    @property
    def runs(self) -> int:
        """Runs of the model that are known beforehand, of all seeds."""
        return self.n_seeds * sum(step.runs or 0 for step in self.steps)

    def __str__(self) -> str:
        parts = [f"run {self.hash}: {len(self.steps)} steps, {self.runs:,} runs of the model planned", *self.lines]
        for number, step in enumerate(self.steps, start=1):
            parts += ["", f"{number}. {step.name} ({step.kind}, {step.side} pairs: {step.n_pairs})", step.text]
        return "\n".join(parts)


def check(opened: Opened) -> Checked:
    """Check a study.

    Args:
        opened: The study, opened.

    Raises:
        SiteNotFound: A site, a layer or a unit is not in the model.
        SiteUnsupported: The model does not have a site.
        PairError: Pairs do not fit the model, cannot be split, or are too few for a claim.
        MetricError: A metric is not known, or needs answers that pairs do not have.
        SettingError: The steps plan more runs than the budget allows.
        ModelUnsupported: A step needs parts of the model that are not known.
        MissingExtra: The study is to run on Ray, or its store needs a package, which is not installed.
        StoreUnreachable: The store's address is none, or it does not answer.
        StoreCorrupt: Where the store is to be, something else is.
        UnsupportedError: A later version wrote the store.
    """
    study = opened.study
    _ = opened.store  # first: it is soon told, before a model is loaded
    planned = []
    for step, name in zip(study.steps, study.step_names, strict=True):
        side = study.side_of(step)
        if side not in opened.sides:
            raise PairError(
                f"step '{name}' wants {side} pairs, and the study divides none",
                facts=[("split", "null")],
                fix="split: {discovery: 0.5}, or leave on: out",
            )
        experiment = opened.experiment(side, study.seeds[0])
        runs, patched, seconds, text = _PLANS[type(step)](step, experiment, opened)
        planned.append(Planned(name, step.kind, side, len(experiment.pairs), runs, patched, seconds, text))
    part = study.executor
    if part.kind == "ray":
        require("ray")
    n = n_workers(part) if part.kind != "ray" or part.workers else "as many as the cluster holds"
    threads = threads_of(part)
    lines = (
        f"pairs: {len(opened.pairs)} of '{study.pairs.name}', {len(set(opened.pairs.components.tolist()))} independent",
        f"executor: {part.kind}, {n} at once, {threads} CPU threads each, {_where(opened)}",
        f"memory: {_memory(opened)}",
    )
    made = Checked(study.hash, tuple(planned), len(study.seeds), lines)
    if study.budget.runs is not None and made.runs > study.budget.runs:
        raise SettingError(
            f"the steps plan {made.runs:,} runs of the model, more than the budget",
            facts=[("budget", f"{study.budget.runs:,} runs"), *((s.name, f"{s.runs:,}") for s in planned if s.runs)],
            fix=f"--set budget.runs={made.runs}, or narrow a step",
        )
    return made


def _where(opened: Opened) -> str:
    """Return where shards are measured."""
    part = opened.study.executor
    if part.kind != "ray":
        return f"on {opened.model.device}"
    place = "this machine" if part.address == "local" else f"the cluster {part.address}"
    gpus = "a GPU each where it has any" if part.gpus_per_worker is None else f"{part.gpus_per_worker:g} GPUs each"
    return f"on {place}, {gpus}"


def _memory(opened: Opened) -> str:
    """Return what one whole run takes and what there is."""
    lengths = (int(opened.pairs.sizes(role).max()) for role in ("clean", "corrupt"))
    needed = row_cost(opened.model, max(lengths)).total / GIB
    there = budget_bytes(opened.model.device, opened.study.budget.gib) / GIB
    said = f"{there:.2g} GiB for activations, of which one run of the longest prompt takes {needed:.2g}"
    return said if needed <= there else f"{said}: less than one run, and one is made at a time all the same"


def _plan_sweep(step: SweepStep, experiment: Experiment, opened: Opened) -> _Plan:
    plan = plan_sweep(
        experiment, step.site, step.over, value=as_value(step.value), window=step.window, frozen=step.frozen
    )
    if step.draws is not None:
        draw_numbers(as_value(step.value), step.draws)  # refuses draws of what is not drawn
    times = step.draws or 1
    more = f"\ndraws          {times}, each as much" if times > 1 else ""
    seconds = None if plan.seconds is None else plan.seconds * times
    return plan.rows * times, plan.n_interventions * plan.n_pairs * times, seconds, f"{plan}{more}"


def _plan_localize(step: LocalizeStep, experiment: Experiment, opened: Opened) -> _Plan:
    budget = Budget.of(step.budget)
    plan = plan_localize(experiment, budget, positions=step.positions, units=step.units)
    runs = int(budget.amount) if budget.unit == "runs" else None
    return runs, runs, budget.amount if budget.unit == "seconds" else None, str(plan)


def _plan_attribute(step: AttributeStep, experiment: Experiment, opened: Opened) -> _Plan:
    known = get_args(EdgeMethod if step.site is None else Method)
    if step.method is not None and step.method not in known:
        near = closest(step.method, known, 1)
        raise SettingError(
            f"no method '{step.method}' scores {'edges' if step.site is None else 'nodes'}",
            facts=[("known", ", ".join(known))],
            fix=f"method: {near[0] if near else known[0]}",
        )
    if step.site is None:
        graph = graph_of(experiment.model)
        what, n_moved, method = f"{graph.n_edges:,} edges", graph.n_senders, step.method or "eap-ig"
    else:
        grid = grid_of(experiment, parse(step.site), None)
        what = " x ".join(f"{axis} {len(values)}" for axis, values in grid.axes.items())
        n_moved, method = math.prod(map(len, grid.axes.values())), step.method or "atp"
    points = points_of(method, step.steps, "midpoint", experiment.base)
    n_slopes = count_slopes(method, points, n_moved, experiment.model.shape.n_layers)
    runs = len(experiment.pairs) * (2 + SLOPE_RUNS * n_slopes)
    return runs, runs, None, f"scores of {what}, by gradients: {runs:,} runs, a backward counted as two"


def _plan_discover(step: DiscoverStep, experiment: Experiment, opened: Opened) -> _Plan:
    graph, n_pairs = graph_of(experiment.model), len(experiment.pairs)
    size = f"{step.n_edges:,}" if step.n_edges else f"{step.fraction:.1%}" if step.fraction else "as many as matter"
    if step.n_edges is not None and step.n_edges > graph.n_edges:
        raise SettingError(
            f"a circuit of {step.n_edges:,} edges is larger than the model",
            facts=[("edges", f"{graph.n_edges:,}")],
            fix=f"n_edges: {graph.n_edges // 10}",
        )
    what = f"{size} of {graph.n_edges:,} edges, {step.method}"
    if step.scores is not None:
        return 0, 0, None, f"{what}: no run, by the scores of '{step.scores}'"
    if step.method == "acdc":
        runs = (graph.n_edges + 2) * n_pairs
        return runs, None, None, f"{what}: about {runs:,} runs, one for each edge and pair"
    runs = runs_of_learning(n_pairs, step.steps)
    return runs, None, None, f"{what}: {runs:,} runs in {step.steps} steps, a backward counted as two"


def _plan_evaluate(step: EvaluateStep, experiment: Experiment, opened: Opened) -> _Plan:
    graph_of(experiment.model)
    source = _step_called(step.circuit, opened)
    n_circuits, n_sizes = (1, 1) if isinstance(source, DiscoverStep) else (2 * len(FRACTIONS), len(FRACTIONS))
    sets = 2 * n_circuits + step.n_random * n_sizes
    runs = (sets + 3) * len(experiment.pairs)  # clean, corrupted, and without any edge
    what = f"f of '{step.circuit}', its complement, and {step.n_random} random circuits of each size"
    return runs, None, None, f"{what}: at most {runs:,} runs, sets that are alike run once"


def _plan_confirm(step: ConfirmStep, experiment: Experiment, opened: Opened) -> _Plan:
    n_components = require_enough(experiment.pairs, step.alpha)
    n_members = len(members_of(step.components, experiment.model)) if step.components else None
    if step.found is not None and isinstance(_step_called(step.found, opened), SweepStep):
        n_members = step.top
    n_unrelated = sum(len(opened.unrelated(name, 0).pairs) for name in step.unrelated)
    asked = f"what '{step.found}' finds" if step.found else ", ".join(step.components)
    what = f"{asked}, on {n_components} independent components; this opens them in the store's ledger"
    if n_members is None:
        return None, None, None, f"{what}; how many runs depends on how many are found"
    checks = Checks.none() if step.checks == "few" else Checks()
    is_apart = experiment.pairs is opened.sides.get("held_out")
    n_discovery = len(opened.sides["discovery"]) if is_apart else 0
    runs = checks.most_runs(n_members, len(experiment.pairs), n_discovery=n_discovery, n_unrelated=n_unrelated)
    return runs, None, None, f"{what}; at most {runs:,} runs, controls included"


def _step_called(name: str, opened: Opened) -> Step:
    study = opened.study
    return dict(zip(study.step_names, study.steps, strict=True))[name]


def _plan_tune(step: TuneStep, experiment: Experiment, opened: Opened) -> _Plan:
    data, comparison = opened.tuning_data(step), comparison_of(step)
    if step.components:
        sites_of(step.components, experiment.model)
    trained = [arm for arm in comparison.arms if arm not in ("random", "prefix", "steering")]
    n_arms = 1 + len(trained) + ("random" in comparison.arms) * comparison.n_random
    what = f"what '{step.found}' finds" if step.found else ", ".join(step.components)
    text = f"{what}: up to {n_arms} arms x {comparison.n_each} trainings of at most {step.steps} steps; {data}"
    return None, None, None, text


_PLANS: Final[Mapping[type, Callable[[Any, Experiment, Opened], _Plan]]] = {
    SweepStep: _plan_sweep,
    LocalizeStep: _plan_localize,
    AttributeStep: _plan_attribute,
    DiscoverStep: _plan_discover,
    EvaluateStep: _plan_evaluate,
    ConfirmStep: _plan_confirm,
    TuneStep: _plan_tune,
}
