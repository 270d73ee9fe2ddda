"""Arms one after the other: each is searched, trained, measured, and kept when it is finished.

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
from causalpatch.tuning.tune import search
from causalpatch.tuning.tuned import Tuned, merged_module
from causalpatch.tuning.untrained import STRENGTHS, prefixes, steering
from causalpatch.tuning.ways import Way

_STOPPED: Final = "stopped by the user"
_BESIDE_ARMS: Final = ("arms", "n_random", "alpha", "mechanism")  # rules that change no arm
_LOOKED_INTO: Final = ("located", "full")


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
        return self._arm("base", "base", (), 0, 0, np.nan, [seen], [self._bench.measure(None)])

    def trained(self, candidate: Candidate, advance: Advance) -> Arm:
        """Return an arm: kept, or trained with each rate, then with more seeds at the chosen one."""
        key = self._key(candidate.name, (candidate.kind, candidate.components, candidate.n_weights))
        arm = self._taken(key)
        if arm is not None:
            advance(self.asked.n_each)
        else:
            n_known = len(self.notes)
            arm = self._trained(candidate, advance)
            if not self.is_stopped:
                self._keep(key, arm, self.notes[n_known:])
        if candidate.kind in _LOOKED_INTO:
            self._arms[candidate.kind] = candidate, arm
        return arm

    def untrained(self) -> list[Arm]:
        """Return the arms without training, kept or made."""
        found = []
        for kind in ("prefix", "steering"):
            if kind not in self.asked.arms:
                continue
            key = self._key(kind, kind)
            arm = self._taken(key)
            if arm is None:
                n_known = len(self.notes)
                arm = self._untrained(kind)
                if arm is not None:
                    self._keep(key, arm, self.notes[n_known:])
            found += [] if arm is None else [arm]
        return found

    def mechanism(self) -> dict[str, Rows]:
        """Return the looks into the located arm, kept or made."""
        components = self._arms["located"][0].components
        key = self._key("mechanism", (components, sorted(self._arms), self.request.experiment.pairs.content_hash))
        held = self._finished.get(key)
        if held is None:
            tuned = {kind: self._change_of(kind) for kind in self._arms}
            looks = look_inside(
                self.request.experiment, tuned["located"], tuned.get("full"), self.request.data, self.asked.schedule
            )
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

    def _trained(self, candidate: Candidate, advance: Advance) -> Arm:
        schedule, data = self.asked.schedule, self.request.data
        searched, way = search(candidate.make, data, schedule, seed=self.seed, kept=self._kept)
        advance(len(searched))
        done, every = [(searched[0], way)], list(searched)
        if not any(_STOPPED in each.ended for each in every):
            seeds = range(self.seed + 1, self.seed + self.asked.n_seeds)
            fresh = [Trial(candidate.make(seed), searched[0].rate, seed) for seed in seeds]
            more = train_all(fresh, data, schedule, kept=self._kept) if fresh else []
            done += [(training, trial.way) for training, trial in zip(more, fresh, strict=False)]
            every += more
            advance(len(more))
        self.is_stopped = any(_STOPPED in each.ended for each in every)
        if candidate.kind in _LOOKED_INTO:
            self._tuned[candidate.kind] = self._as_tuned(way, searched)
        arm = self._arm(
            candidate.name,
            candidate.kind,
            candidate.components,
            way.n_trained,
            len(every),
            searched[0].rate,
            [training.best for training, _ in done],
            [self._bench.measure(each, self._evaluated(each)) for _, each in done],
        )
        return replace(arm, ended="; ".join(each.ended for each in every if not each.is_whole))

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
