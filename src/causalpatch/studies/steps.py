"""The steps of a study, each by the library's own call; later ones take what earlier ones found."""

from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Final, cast

from causalpatch.attribution import attribute, attribute_edges
from causalpatch.circuits.acdc import acdc
from causalpatch.circuits.discover import discover_circuit
from causalpatch.circuits.evaluate import evaluate_circuit
from causalpatch.circuits.learn import learn_circuit
from causalpatch.experiment import Experiment
from causalpatch.pairs import Pairs
from causalpatch.patches.value import as_value
from causalpatch.results.effects import Effects
from causalpatch.results.tuning import Margins
from causalpatch.studies.opened import Opened
from causalpatch.studies.openings import StoreLedger
from causalpatch.studies.results import Result
from causalpatch.studies.study import (
    AttributeStep,
    ConfirmStep,
    DiscoverStep,
    EvaluateStep,
    LocalizeStep,
    Step,
    SweepStep,
    TuneStep,
)
from causalpatch.sweeps import localize, sweep
from causalpatch.tuning.compare import compare_tuning
from causalpatch.tuning.comparison import Comparison
from causalpatch.tuning.train import Schedule
from causalpatch.validation.confirm import Checks, confirm


@dataclass(frozen=True)
class Making:
    """What a step is made with.

    Args:
        opened: The study, opened.
        experiment: Model, the step's pairs, metric and direction.
        seed: Of draws and statistics.
        earlier: What earlier steps found, by name.
        ledger: Where openings of held-out pairs are entered.
        kept: Where parts of a step that are no runs are kept when they are finished.
    """

    opened: Opened
    experiment: Experiment
    seed: int
    earlier: Mapping[str, Result]
    ledger: StoreLedger
    kept: MutableMapping[str, Any]

    @property
    def found_on(self) -> Pairs | None:
        """The pairs that earlier steps searched on, where the step is made on others."""
        discovery = self.opened.sides.get("discovery")
        is_other = discovery is not None and self.experiment.pairs is self.opened.sides.get("held_out")
        return discovery if is_other else None


def make(step: Step, making: Making) -> Result:
    """Make a step.

    Args:
        step: What is asked for.
        making: What it is made with.
    """
    return _MAKERS[type(step)](step, making)


def _sweep(step: SweepStep, making: Making) -> Result:
    return sweep(
        making.experiment,
        step.site,
        step.over,
        value=as_value(step.value),
        budget=making.opened.study.budget.runs,
        draws=step.draws,
        window=step.window,
        frozen=step.frozen,
    )


def _localize(step: LocalizeStep, making: Making) -> Result:
    return localize(
        making.experiment,
        step.budget,
        positions=step.positions,
        units=step.units,
        edges=step.edges,
        delta=step.delta,
    )


def _attribute(step: AttributeStep, making: Making) -> Result:
    asked: dict[str, Any] = {"steps": step.steps, **({"method": step.method} if step.method else {})}
    if step.site is None:
        return attribute_edges(making.experiment, **asked)
    return cast(Result, attribute(making.experiment, step.site, **asked))


def _discover(step: DiscoverStep, making: Making) -> Result:
    if step.threshold is not None:
        return acdc(making.experiment, step.threshold, value=step.value)
    method: Any = step.method
    if step.scores is None:
        size: dict[str, Any] = {"n_edges": step.n_edges, "fraction": step.fraction}
        return learn_circuit(making.experiment, **size, method=method, steps=step.steps, value=step.value)
    scores: Any = making.earlier[step.scores]
    return discover_circuit(scores, step.n_edges, fraction=step.fraction, method=method, by=step.by)


def _evaluate(step: EvaluateStep, making: Making) -> Result:
    circuit: Any = making.earlier[step.circuit]
    return evaluate_circuit(
        making.experiment, circuit, n_random=step.n_random, found_on=making.found_on, value=step.value
    )


def _tune(step: TuneStep, making: Making) -> Result:
    report = compare_tuning(
        making.experiment,
        step.components or _located(making.earlier[str(step.found)], step.top),
        making.opened.tuning_data(step),
        comparison_of(step),
        seed=making.seed,
        kept=making.kept,
        show_progress=False,
    )
    if not report.is_complete:
        raise KeyboardInterrupt  # the user stopped it: what is finished is kept, and the rest is made next time
    return report


def comparison_of(step: TuneStep) -> Comparison:
    """Return by which rules a step compares.

    Args:
        step: The step.
    """
    schedule = Schedule(
        objective=step.objective,
        keep=step.keep,
        steps=step.steps,
        batch=step.batch,
        ahead=step.ahead,
        rates=tuple(step.rates),
    )
    arms = tuple(step.arms)
    return Comparison(
        way=step.way,
        schedule=schedule,
        margins=Margins(**step.margins),
        arms=arms,
        n_random=step.n_random,
        n_seeds=step.n_seeds,
        rank=step.rank,
        shared=step.shared,
    )


def _located(found: Any, top: int) -> Any:
    """Return the components that an earlier step found: of a sweep its largest cells."""
    return found.over_draws().top(top) if isinstance(found, Effects) else found


def _confirm(step: ConfirmStep, making: Making) -> Result:
    components: Any = step.components
    if step.found is not None:
        components = _located(making.earlier[step.found], step.top)
    return confirm(
        making.experiment,
        components,
        delta=step.delta,
        alpha=step.alpha,
        found_on=making.found_on,
        unrelated=[making.opened.unrelated(name, making.seed) for name in step.unrelated],
        checks=Checks.none() if step.checks == "few" else None,
        ledger=making.ledger,
    )


_MAKERS: Final[Mapping[type, Callable[[Any, Making], Result]]] = {
    SweepStep: _sweep,
    LocalizeStep: _localize,
    AttributeStep: _attribute,
    DiscoverStep: _discover,
    EvaluateStep: _evaluate,
    ConfirmStep: _confirm,
    TuneStep: _tune,
}
