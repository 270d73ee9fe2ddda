"""The comparison: the located parts and all else that could have been changed, at matched target success.

1. Every arm gets the same search: each rate once, chosen on validation alone, then further seeds at that rate.
2. An arm's checkpoint is the one that moved the validation retain set least among those at which enough validation
   pairs succeed. An arm of which a seed never gets there has infinite damage.
3. All are measured on the same test data (``checks``); the located one is looked into (``mechanism``).
4. The report's verdict compares with random matched components, whose place the located arm could have taken.

Cost: (rates + seeds - 1) trainings for each arm in which something is trained; ``plan_tuning`` counts them.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import ModelUnsupported, SettingError
from causalpatch.base.progress import Advance, bar
from causalpatch.experiment import Experiment
from causalpatch.models import open_model
from causalpatch.results.provenance import describe_program
from causalpatch.results.tuning import Arm, Margins, TuningReport
from causalpatch.results.words import counted
from causalpatch.tuning.arms import KINDS, Candidate, Request, candidates
from causalpatch.tuning.checks import Bench, Measured, endpoints
from causalpatch.tuning.data import TuningData
from causalpatch.tuning.mechanism import look_inside
from causalpatch.tuning.parts import sites_of
from causalpatch.tuning.train import KeptSides, Look, Schedule, Training, look, train
from causalpatch.tuning.tune import search
from causalpatch.tuning.tuned import Tuned, merged_module
from causalpatch.tuning.untrained import EXAMPLES, STRENGTHS, prefixes, steering
from causalpatch.tuning.ways import Way
from causalpatch.validation.components import Asked

LEAST_DRAWN: Final = 19  # so that p can be .05
_STOPPED: Final = "stopped by the user"


@dataclass(frozen=True)
class Comparison:
    """What is compared, and by which rules.

    Args:
        way: ``"slice"``, ``"offset"`` or ``"lora"``; the same for all arms but full fine-tuning.
        schedule: How each training goes.
        margins: What may change at most.
        arms: Arms beside the base and the located one; all by default.
        n_random: Random draws, where there are more matched sets; 19 or more.
        n_seeds: Seeds of each arm.
        alpha: Largest rank p that counts as evidence.
        rank: Of adapters.
        shared: Whether keys and values are changed that other heads use too.
        prefix: The words of the arm ``prefix``; by default examples of the training pairs.
        mechanism: Whether the located arm is looked into afterwards.

    Raises:
        SettingError: There are too few seeds or draws.
    """

    way: str = "slice"
    schedule: Schedule = Schedule()  # noqa: RUF009 - it cannot be changed
    margins: Margins = Margins()  # noqa: RUF009 - likewise
    arms: tuple[str, ...] = KINDS
    n_random: int = LEAST_DRAWN
    n_seeds: int = 3
    alpha: float = 0.05
    rank: int = 4
    shared: str = "leave"
    prefix: str | None = None
    mechanism: bool = True

    def __post_init__(self) -> None:
        if self.n_seeds < 1 or self.n_random < LEAST_DRAWN or not 0 < self.alpha < 1:
            raise SettingError(
                f"no comparison is made with n_random={self.n_random}, n_seeds={self.n_seeds}, alpha={self.alpha}",
                facts=[
                    ("n_random", f"{LEAST_DRAWN} or more, so that p can be .05"),
                    ("n_seeds", "at least 1"),
                ],
                fix="Comparison()",
            )

    @property
    def n_each(self) -> int:
        """Trainings of each arm."""
        return len(self.schedule.rates) + self.n_seeds - 1


@dataclass(frozen=True)
class ComparisonPlan:
    """What a comparison will take, counted beforehand.

    Args:
        arms: Arms in which something is trained.
        n_random: How many of these are random draws.
        n_each: Trainings of each.
        n_rates: Rates that are tried.
        n_seeds: Seeds.
        n_steps: Most steps of a training.
        notes: What is to be known of the arms.
    """

    arms: tuple[str, ...]
    n_random: int
    n_each: int
    n_rates: int
    n_seeds: int
    n_steps: int
    notes: tuple[str, ...]

    @property
    def n_trainings(self) -> int:
        """Trainings in all."""
        return len(self.arms) * self.n_each

    def __str__(self) -> str:
        others = [name for name in self.arms if not name.startswith("random ")]
        lines = [
            f"{self.n_trainings} trainings of at most {self.n_steps} steps: {len(self.arms)} arms "
            f"({', '.join(others)}, {counted(self.n_random, 'random draw')}) x ({self.n_rates} rates + "
            f"{self.n_seeds - 1} more seeds at the chosen one)"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


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
    show_progress: bool | None = None,
) -> TuningReport:
    """Tune what was located, and everything that it must be compared with, and say what each reached and broke.

    Args:
        experiment: The model, with pairs on which effects are measured (``lowest effect``, and the mechanism).
        components: A claim, ``effects.top(k)``, a circuit, a localisation, or sites.
        data: The behaviour to change, what must stay, and what else is tested.
        comparison: The arms and the rules.
        seed: First seed of batches and adapters.
        show_progress: Whether to show a bar; by default where the error stream is a terminal.

    Returns:
        The report. After Ctrl-C it holds the arms made until then, and says that it is not complete.

    Raises:
        SettingError: No component is named, an arm or a way is unknown, or numbers are impossible.
        ModelUnsupported: Components are of another model, or the way cannot change its weights.

    Cost:
        See the module; ``plan_tuning`` counts the trainings.
    """
    asked = comparison or Comparison()
    request = _request(experiment, components, data, asked)
    made, notes = candidates(request)
    runner = _Runner(request, asked, seed)
    arms = [runner.base()]
    with bar("tuning", len(made) * asked.n_each, is_shown=show_progress) as advance:
        for candidate in made:
            arms.append(runner.trained(candidate, advance))
            if runner.is_stopped:
                break
    if not runner.is_stopped:
        arms += runner.untrained()
    arms.sort(key=lambda each: ("base", "located", *KINDS).index(each.kind))
    mechanism: dict[str, tuple[dict[str, Any], ...]] = {}
    if asked.mechanism and not runner.is_stopped and runner.located is not None:
        mechanism = look_inside(experiment, runner.located, runner.full, data, asked.schedule)
    notes += runner.notes
    if any(arm.ended for arm in arms):
        notes += [f"{arm.name}: {arm.ended}" for arm in arms if arm.ended]
    plan = _plan(made, notes, asked)
    spec = {
        "components": [str(site) for site in request.sites],
        "model": {"name": request.model.name, "hash": request.model.content_hash},
        "data": data.record(),
        **{name: value for name, value in asdict(asked).items() if name not in ("mechanism",)},
        "seed": seed,
        "n_trainings": plan.n_trainings,
    }
    return TuningReport(spec, tuple(arms), mechanism, tuple(notes), describe_program(), not runner.is_stopped)


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


class _Runner:
    """Trains and measures arms, and keeps what they share.

    Args:
        request: What is compared.
        asked: The rules.
        seed: The first seed.
    """

    def __init__(self, request: Request, asked: Comparison, seed: int) -> None:
        self.request, self.asked, self.seed = request, asked, seed
        anyone = candidates(replace(request, kinds=()))[0][0].make(seed)  # a change that does nothing yet
        self._kept = KeptSides(anyone, request.data)
        self._bench = Bench(anyone, request.data)
        self._anyone = anyone
        self.is_stopped = False
        self.located: Tuned | None = None
        self.full: Tuned | None = None
        self.notes: list[str] = []

    def base(self) -> Arm:
        """Return the model as it is."""
        self._bench.evaluate_base()
        seen = look(self._anyone, self.request.data, self.asked.schedule, self._kept, 0)
        return self._arm("base", "base", (), 0, 0, np.nan, [seen], [self._bench.measure(None)])

    def trained(self, candidate: Candidate, advance: Advance) -> Arm:
        """Train an arm: each rate, then more seeds at the chosen one."""
        schedule, data = self.asked.schedule, self.request.data
        searched, way = search(candidate.make, data, schedule, seed=self.seed, kept=self._kept)
        advance(len(searched))
        done: list[tuple[Training, Way]] = [(searched[0], way)]
        every = list(searched)
        for seed in range(self.seed + 1, self.seed + self.asked.n_seeds):
            if _STOPPED in every[-1].ended or any(_STOPPED in each.ended for each in searched):
                break
            fresh = candidate.make(seed)
            done.append((train(fresh, data, schedule, rate=searched[0].rate, seed=seed, kept=self._kept), fresh))
            every.append(done[-1][0])
            advance(1)
        self.is_stopped = any(_STOPPED in each.ended for each in every)
        if candidate.kind in ("located", "full"):
            record = {"data": data.record(), "shared": self.asked.shared}
            tuned = Tuned(self.request.model, way, searched[0], tuple(searched), record)
            self.located = tuned if candidate.kind == "located" else self.located
            self.full = tuned if candidate.kind == "full" else self.full
        measured = [self._bench.measure(each, self._evaluated(each)) for _, each in done]
        odd = [each.ended for each in every if not each.is_whole]
        return replace(
            self._arm(
                candidate.name,
                candidate.kind,
                candidate.components,
                way.n_trained,
                len(every),
                searched[0].rate,
                [training.best for training, _ in done],
                measured,
            ),
            ended="; ".join(odd),
        )

    def untrained(self) -> list[Arm]:
        """Return the arms without training, what is tried chosen on validation."""
        found = []
        model, data = self.request.model, self.request.data
        tried: dict[str, Sequence[Way]] = {}
        if "prefix" in self.asked.arms:
            tried["prefix"] = prefixes(model, data, self.asked.prefix)
        if "steering" in self.asked.arms:
            tried["steering"] = steering(model, data)
        for kind, ways in tried.items():
            if not ways:
                self.notes.append(f"{kind}: not made, it needs unwanted answers and a stream that is known by name")
                continue
            looks = [look(way, data, self.asked.schedule, self._kept, 0) for way in ways]
            best = min(range(len(ways)), key=lambda k: looks[k].rank(self.asked.schedule.enough))
            told = getattr(ways[best], "told", kind)
            measured = [self._bench.measure(ways[best])]
            found.append(self._arm(kind, kind, (told,), 0, 0, np.nan, [looks[best]], measured))
            n = len(EXAMPLES) if kind == "prefix" else f"{len(ways)} layers and strengths ({len(STRENGTHS)} each)"
            self.notes.append(f"{kind}: {told}, chosen on validation among {n if self.asked.prefix is None else 1}")
        return found

    def _evaluated(self, way: Way) -> Any:
        """Return what the user's function gives of a changed model; None where there is none."""
        if self.request.data.evaluate is None:
            return None
        try:
            module = merged_module(way)
        except ModelUnsupported as error:
            self.notes.append(f"the user's evaluation was not made: {error.what}")
            return None
        return self.request.data.evaluate(open_model(module, tokenizer=self.request.model.tokenizer))

    def _arm(  # noqa: PLR0913 - what an arm is, and what came of it
        self,
        name: str,
        kind: str,
        components: tuple[str, ...],
        n_trained: int,
        n_trainings: int,
        rate: float,
        looks: Sequence[Look],
        measured: Sequence[Measured],
    ) -> Arm:
        enough = self.asked.schedule.enough
        documents = np.mean([each.per_document() for each in measured], axis=0)
        return Arm(
            name,
            kind,
            components,
            n_trained,
            n_trainings,
            rate,
            tuple(each.success >= enough for each in looks),
            tuple(float(each.success.mean()) for each in measured),
            tuple(each.damage for each in measured),
            tuple(float(each.paraphrased.mean()) for each in measured if len(each.paraphrased)),
            documents,
            tuple(endpoints(measured, self.request.data, self.asked.margins, self.seed)),
        )
