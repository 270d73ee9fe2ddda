"""Arms, a few at a time: each is searched, trained, measured, and kept when it is finished.

What is kept of an arm is what a report holds of it, under a key that changes with all that the arm depends on. A
change itself is not kept: where the mechanism is looked into after arms were taken from there, the located parts are
trained once more at the rate that was chosen, which gives the same change.
"""

from collections.abc import MutableMapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np

from causalpatch.base.errors import ModelUnsupported
from causalpatch.base.progress import Advance
from causalpatch.base.spec import content_hash, finite, to_plain
from causalpatch.models import open_model
from causalpatch.results.tuning import Arm
from causalpatch.tuning.arms import Candidate, Request, candidates
from causalpatch.tuning.checks import Bench, Measured, endpoints
from causalpatch.tuning.comparison import Comparison
from causalpatch.tuning.mechanism import Rows, look_inside
from causalpatch.tuning.train import KeptSides, Look, Training, Trial, look, train, train_all
from causalpatch.tuning.tune import search_all
from causalpatch.tuning.tuned import Tuned, merged_module
from causalpatch.tuning.untrained import STRENGTHS, prefixes, steering
from causalpatch.tuning.ways import Way

_STOPPED: Final = "stopped by the user"
_BESIDE_ARMS: Final = ("arms", "n_random", "alpha", "mechanism")  # rules that change no arm
_LOOKED_INTO: Final = ("located", "full")
_AT_ONCE: Final = 8  # arms of a small model that are trained side by side


class Runner:
    """Trains and measures arms, and keeps what they share.

    Args:
        request: What is compared.
        asked: The rules.
        seed: The first seed.
        kept: Where finished arms are put, and taken from.
    """

    def __init__(
        self, request: Request, asked: Comparison, seed: int, kept: MutableMapping[str, Any] | None = None
    ) -> None:
        self.request, self.asked, self.seed = request, asked, seed
        self._finished = {} if kept is None else kept
        anyone = candidates(replace(request, kinds=()))[0][0].make(seed)  # a change that does nothing yet
        self._kept = KeptSides(request.model, request.data)
        self._bench = Bench(request.model, request.data)
        self._anyone = anyone
        self._arms: dict[str, tuple[Candidate, Arm]] = {}
        self._tuned: dict[str, Tuned] = {}
        self.is_stopped = False
        self.notes: list[str] = []

    def base(self) -> Arm:
        """Return the model as it is."""
        self._bench.evaluate_base()
        seen = look(self._anyone, self.asked.schedule, self._kept, 0)
        measured = self._bench.measure(None, self._bench.of_base)
        return self._arm("base", "base", (), 0, 0, np.nan, [seen], [measured])

    def trained(self, made: Sequence[Candidate], advance: Advance) -> list[Arm]:
        """Return arms: kept, or trained with each rate, then with more seeds at the chosen one.

        Args:
            made: What is trained; the located parts first.
            advance: Is told of each training.

        Returns:
            The arms. After Ctrl-C those that had made a step, and the located one.

        Raises:
            KeyboardInterrupt: The user stopped it before anything could be said of the located arm.
        """
        arms: dict[str, Arm] = {}
        for candidate in made:
            kept = self._taken(self._key_of(candidate))
            if kept is not None:
                arms[candidate.name] = kept
                advance(self.asked.n_each)
        lacking = [each for each in made if each.name not in arms]
        n = max(1, min(_AT_ONCE, self._kept.at_once(self.asked.schedule) // len(self.asked.schedule.rates)))
        for first in range(0, len(lacking), n):
            try:
                self._train(lacking[first : first + n], advance, arms)
            except KeyboardInterrupt:  # in what is measured, or in a user's evaluation
                if made[0].name not in arms:
                    raise
                self.is_stopped = True
            if self.is_stopped:
                break
        found = [each for each in made if each.name in arms]
        self._arms = {each.kind: (each, arms[each.name]) for each in found if each.kind in _LOOKED_INTO}
        return [arms[each.name] for each in found]

    def untrained(self) -> list[Arm]:
        """Return the arms without training, kept or made; none after Ctrl-C."""
        found: list[Arm] = []
        for kind in ("prefix", "steering"):
            if kind not in self.asked.arms or self.is_stopped:
                continue
            key = self._key(kind, kind)
            arm = self._taken(key)
            if arm is None:
                n_known = len(self.notes)
                try:
                    arm = self._untrained(kind)
                except KeyboardInterrupt:
                    self.is_stopped = True
                if arm is not None:
                    self._keep(key, arm, self.notes[n_known:])
            found += [] if arm is None else [arm]
        return found

    def mechanism(self) -> dict[str, Rows]:
        """Return the looks into the located arm, kept or made; none after Ctrl-C."""
        if self.is_stopped:
            return {}
        components = self._arms["located"][0].components
        key = self._key("mechanism", (components, sorted(self._arms), self.request.experiment.pairs.content_hash))
        held = self._finished.get(key)
        if held is None:
            try:
                tuned = {kind: self._change_of(kind) for kind in self._arms}
                looks = look_inside(
                    self.request.experiment, tuned["located"], tuned.get("full"), self.request.data, self.asked.schedule
                )
            except KeyboardInterrupt:
                self.is_stopped = True
                return {}
            held = self._finished[key] = {"mechanism": finite(to_plain(looks))}
        return {name: tuple(rows) for name, rows in held["mechanism"].items()}

    def _key(self, name: str, what: Any) -> str:
        """Return the key that something is kept under: a name of a file for one set of weights, data and rules."""
        asked = {each: value for each, value in asdict(self.asked).items() if each not in _BESIDE_ARMS}
        model, data = self.request.model.content_hash, self.request.data.record()
        return f"{name.replace(' ', '-')}-{content_hash([model, data, asked, self.seed, what])}"

    def _taken(self, key: str) -> Arm | None:
        held = self._finished.get(key)
        if held is None:
            return None
        self.notes += held["notes"]
        return Arm.of_plain(held["arm"])

    def _keep(self, key: str, arm: Arm, notes: Sequence[str]) -> None:
        self._finished[key] = {"arm": arm.to_plain(), "notes": list(notes)}

    def _train(self, made: Sequence[Candidate], advance: Advance, arms: MutableMapping[str, Arm]) -> None:
        """Train some arms, of a small model side by side, keep those that are finished, and put them among others."""
        schedule, data = self.asked.schedule, self.request.data
        searches = search_all([each.make for each in made], data, schedule, seed=self.seed, kept=self._kept)
        advance(len(made) * len(schedule.rates))
        seeds = range(self.seed + 1, self.seed + self.asked.n_seeds)
        trials = [
            Trial(candidate.make(seed), searched[0].rate, seed)
            for candidate, (searched, _) in zip(made, searches, strict=True)
            for seed in seeds
        ]
        more: list[Training] = []
        if trials and not any(_STOPPED in each.ended for searched, _ in searches for each in searched):
            more = train_all(trials, data, schedule, kept=self._kept)
            advance(len(more))
        for number, (candidate, (searched, way)) in enumerate(zip(made, searches, strict=True)):
            own = slice(number * len(seeds), (number + 1) * len(seeds))
            further = [(training, trial.way) for training, trial in zip(more[own], trials[own], strict=False)]
            every = [*searched, *(training for training, _ in further)]
            if candidate.kind in _LOOKED_INTO:
                self._tuned[candidate.kind] = self._as_tuned(way, searched)
            is_stopped = any(_STOPPED in each.ended for each in every)
            self.is_stopped = self.is_stopped or is_stopped
            if is_stopped and candidate.kind != "located" and not any(each.n_steps for each in every):
                continue
            n_known = len(self.notes)
            arm = self._measured(candidate, every, [(searched[0], way), *further])
            if not is_stopped:
                self._keep(self._key_of(candidate), arm, self.notes[n_known:])
            arms[candidate.name] = arm

    def _measured(self, candidate: Candidate, every: Sequence[Training], done: Sequence[tuple[Training, Way]]) -> Arm:
        """Return an arm of its trainings, measured with each seed."""
        arm = self._arm(
            candidate.name,
            candidate.kind,
            candidate.components,
            done[0][1].n_trained,
            len(every),
            done[0][0].rate,
            [training.best for training, _ in done],
            [self._bench.measure(way, self._evaluated(way)) for _, way in done],
        )
        return replace(arm, ended="; ".join(each.ended for each in every if not each.is_whole))

    def _key_of(self, candidate: Candidate) -> str:
        return self._key(candidate.name, (candidate.kind, candidate.components, candidate.n_weights))

    def _change_of(self, kind: str) -> Tuned:
        """Return the change of an arm's first seed; made again, where the arm was kept."""
        if kind not in self._tuned:
            candidate, arm = self._arms[kind]
            way = candidate.make(self.seed)
            schedule = self.asked.schedule
            made = train(way, self.request.data, schedule, rate=arm.rate, seed=self.seed, kept=self._kept)
            self._tuned[kind] = self._as_tuned(way, [made])
        return self._tuned[kind]

    def _as_tuned(self, way: Way, searched: Sequence[Training]) -> Tuned:
        record = {"data": self.request.data.record(), "shared": self.asked.shared}
        return Tuned(self.request.model, way, searched[0], tuple(searched), record)

    def _untrained(self, kind: str) -> Arm | None:
        """Return an arm without training, what is tried chosen on validation; None where there is nothing to try."""
        model, data = self.request.model, self.request.data
        tried: Sequence[Way] = prefixes(model, data, self.asked.prefix) if kind == "prefix" else steering(model, data)
        if not tried:
            self.notes.append(f"{kind}: not made, it needs unwanted answers and a stream that is known by name")
            return None
        looks = [look(way, self.asked.schedule, self._kept, 0) for way in tried]
        best = min(range(len(tried)), key=lambda k: looks[k].rank(self.asked.schedule.enough))
        told = getattr(tried[best], "told", kind)
        n = str(len(tried)) if kind == "prefix" else f"{len(tried)} layers and strengths ({len(STRENGTHS)} each)"
        self.notes.append(f"{kind}: {told}, chosen on validation among {n}")
        return self._arm(kind, kind, (told,), 0, 0, np.nan, [looks[best]], [self._bench.measure(tried[best])])

    def _evaluated(self, way: Way) -> dict[str, Any]:
        """Return what the user's functions give of a changed model, by name; nothing where there are none."""
        evaluations = self.request.data.evaluations
        if not evaluations:
            return {}
        try:
            module = merged_module(way)
        except ModelUnsupported as error:
            self.notes.append(f"the user's evaluation was not made: {error.what}")
            return {}
        model = open_model(module, tokenizer=self.request.model.tokenizer)
        return {name: evaluate(model) for name, evaluate in evaluations.items()}

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
            n_tested=len(np.unique(self.request.data.target["test"].components)),
            enough=enough,
        )
