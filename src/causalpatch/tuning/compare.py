"""The comparison: the located parts and all else that could have been changed, at matched target success.

1. Every arm gets the same search: each rate once, chosen on validation alone, then further seeds at that rate.
2. An arm's checkpoint is the one that moved the validation retain set least among those at which enough validation
   pairs succeed, by ``ahead`` nats; of an arm that never gets so far ahead, the one at which most do. An arm of which a
   seed's checkpoint has not enough pairs that succeed at all has infinite damage.
3. All are measured on the same test data (``checks``); the located one is looked into (``mechanism``).
4. The report's verdict compares with random matched components, whose place the located arm could have taken.

Arms that are finished may be kept as plain data, so that a comparison that was stopped goes on where it was.

Cost: (rates + seeds - 1) trainings for each arm in which something is trained; ``plan_tuning`` counts them.
"""

from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import asdict
from typing import Any

from causalpatch.base.progress import bar
from causalpatch.experiment import Experiment
from causalpatch.results.provenance import describe_program
from causalpatch.results.tuning import Arm, TuningReport
from causalpatch.results.words import counted
from causalpatch.statistics.binomial import clopper_pearson
from causalpatch.tuning.arms import KINDS, Candidate, Request, candidates
from causalpatch.tuning.comparison import LEAST_SEEDS, Comparison, ComparisonPlan
from causalpatch.tuning.data import TuningData
from causalpatch.tuning.parts import sites_of
from causalpatch.tuning.runner import Runner
from causalpatch.validation.components import Asked


def plan_tuning(
    experiment: Experiment, components: Asked, data: TuningData, comparison: Comparison | None = None
) -> ComparisonPlan:
    """Count what ``compare_tuning`` will train, without training anything.

    Args:
        experiment: As for ``compare_tuning``.
        components: Likewise.
        data: Likewise.
        comparison: Likewise.

    Cost:
        One run for each component whose effect is asked for the arm ``lowest effect``.
    """
    asked = comparison or Comparison()
    made, notes = candidates(_request(experiment, components, data, asked))
    return _plan(made, notes, asked)


def compare_tuning(
    experiment: Experiment,
    components: Asked,
    data: TuningData,
    comparison: Comparison | None = None,
    *,
    seed: int = 0,
    kept: MutableMapping[str, Any] | None = None,
    show_progress: bool | None = None,
) -> TuningReport:
    """Tune what was located, and everything that it must be compared with, and say what each reached and broke.

    Args:
        experiment: The model, with pairs on which effects are measured (``lowest effect``, and the mechanism).
        components: A claim, ``effects.top(k)``, a circuit, a localisation, or sites.
        data: The behaviour to change, what must stay, and what else is tested.
        comparison: The arms and the rules.
        seed: First seed of batches and adapters.
        kept: Where each finished arm, and at last the mechanism, is put as plain data for JSON, and is taken from
            instead of being made again. Its keys, fit for names of files, hold a hash of the model, the data, the
            rules and the arm's components: what is there of another comparison is left alone. What a user's
            ``evaluate`` does is not part of it, only its name.
        show_progress: Whether to show a bar; by default where the error stream is a terminal.

    Returns:
        The report. After Ctrl-C it holds the arms made until then, and says that it is not complete.

    Raises:
        SettingError: No component is named, an arm or a way is unknown, or numbers are impossible.
        ModelUnsupported: Components are of another model, or the way cannot change its weights.

    Cost:
        See the module; ``plan_tuning`` counts the trainings. Where arms were kept and the mechanism was not, one more
        training of what was located, and of all weights.
    """
    asked = comparison or Comparison()
    request = _request(experiment, components, data, asked)
    made, notes = candidates(request)
    runner = Runner(request, asked, seed, kept)
    arms = [runner.base()]
    with bar("tuning", len(made) * asked.n_each, is_shown=show_progress) as advance:
        arms += runner.trained(made, advance)
    arms += runner.untrained()
    arms.sort(key=lambda each: ("base", "located", *KINDS).index(each.kind))
    mechanism = runner.mechanism() if asked.mechanism else {}
    notes += [*runner.notes, *_limits(arms, asked, data), *(f"{arm.name}: {arm.ended}" for arm in arms if arm.ended)]
    spec = {
        "components": [str(site) for site in request.sites],
        "model": {"name": request.model.name, "hash": request.model.content_hash},
        "data": data.record(),
        **{name: value for name, value in asdict(asked).items() if name not in ("mechanism",)},
        "seed": seed,
        "n_trainings": _plan(made, notes, asked).n_trainings,
    }
    return TuningReport(spec, tuple(arms), mechanism, tuple(notes), describe_program(), not runner.is_stopped)


def _limits(arms: Sequence[Arm], asked: Comparison, data: TuningData) -> Iterator[str]:
    """Yield what so few test pairs and seeds cannot show, and what is tested that was trained on."""
    n, enough = arms[0].n_tested, asked.schedule.enough
    told = next((k for k in range(n, -1, -1) if clopper_pearson(k, n, 0.9)[1] < enough), None)
    shown = "no share" if told is None else f"a share of {told / n:.0%} or less"
    pairs = counted(n, "independent test pair")
    yield f"matched on validation pairs; {pairs} can tell {shown} from the target, {enough:.0%}"
    for name, n_seen, n_all in data.seen_before():
        yield f"{n_seen} of {counted(n_all, 'prompt')} of '{name}' were trained or validated on: they are not held out"
    if asked.n_seeds < LEAST_SEEDS:
        yield f"only {counted(asked.n_seeds, 'seed')} of each arm: seeds may differ as much as arms do"


def _request(experiment: Experiment, components: Asked, data: TuningData, asked: Comparison) -> Request:
    sites = sites_of(components, experiment.model)
    return Request(experiment, sites, data, asked.way, asked.rank, asked.shared, asked.n_random, asked.arms)


def _plan(made: Sequence[Candidate], notes: Sequence[str], asked: Comparison) -> ComparisonPlan:
    names = tuple(each.name for each in made)
    n_random = sum(each.kind == "random" for each in made)
    schedule = asked.schedule
    return ComparisonPlan(
        names, n_random, asked.n_each, len(schedule.rates), asked.n_seeds, schedule.steps, tuple(dict.fromkeys(notes))
    )
