"""Training: steps on the target, held to the base model on the retain set, stopped and chosen on validation alone.

1. A step takes a batch of target pairs and one of retain prompts. Loss: the target's plus ``keep`` times the mean
   KL(base || tuned) per retain token.
2. Adam without weight decay on what the way trains. ``rate`` is the share of a weight's usual size that a step moves
   it, the same for all ways and models; it rises over the first ten steps.
3. Every few steps the validation pairs are looked at. The best checkpoint is, of those at which enough of them succeed
   by ``ahead`` nats, the one that moved the validation retain set least; where there is none, the one at which most do.
4. Training ends after ``steps``, or when ``patience`` looks were no better. Where the loss is not a number, or a user
   stops it, the best checkpoint so far is put back, and the record says so.

Trainings of a small model are made side by side (``together``), each as it would be alone.

Cost: per step a forward and a backward of both batches, from the first layer on that is changed; once a forward of each
retain prompt by the base model.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch

from causalpatch.base.errors import ModelUnsupported, SettingError
from causalpatch.base.seeds import generator
from causalpatch.engine.gradient import differentiable
from causalpatch.engine.hooks import quiet
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.tuning.data import Side, TuningData
from causalpatch.tuning.losses import OBJECTIVES, Answers, Kept, target_loss
from causalpatch.tuning.together import may_be_together
from causalpatch.tuning.ways import Way

_WARM: Final = 10  # steps over which the rate rises
_STOPPED: Final = "stopped by the user"
_MOST_NUMBERS: Final = 2**20  # of the stream of trainings side by side: beyond, arithmetic costs more than calls


@dataclass(frozen=True)
class Schedule:
    """How training goes; the same for every arm of a comparison.

    Args:
        objective: ``"cross_entropy"`` or ``"margin"``.
        margin: Of the latter, how far ahead is enough, in nats.
        keep: Weight of the retain set's KL.
        steps: Most steps.
        batch: Target pairs in a step.
        retain_batch: Retain prompts in a step; 0 leaves the retain set out of training.
        every: Steps between two looks at the validation pairs.
        patience: Looks without gain after which it ends.
        enough: Share of the validation pairs that must succeed: where arms are compared.
        ahead: Where a checkpoint is chosen, by how many nats the wanted answer must be ahead of the unwanted one. What
            only just gets there on validation pairs does not on some of the others.
        rates: Rates that are tried, each the share of a weight's usual size that a step moves it.

    Raises:
        SettingError: A number is impossible.
    """

    objective: str = "cross_entropy"
    margin: float = 2.0
    keep: float = 1.0
    steps: int = 200
    batch: int = 16
    retain_batch: int = 8
    every: int = 5
    patience: int = 8
    enough: float = 0.95
    ahead: float = 0.0
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)

    def __post_init__(self) -> None:
        numbers = {"steps": self.steps, "batch": self.batch, "every": self.every, "patience": self.patience}
        wrong = next((name for name, value in numbers.items() if value < 1), None)
        if (
            wrong
            or not 0 < self.enough <= 1
            or not self.rates
            or min(self.rates) <= 0
            or min(self.retain_batch, self.ahead) < 0
        ):
            raise SettingError(
                f"no training goes with {wrong}={numbers[wrong]}" if wrong else "no training goes with these numbers",
                facts=[
                    ("at least 1", "steps, batch, every, patience"),
                    ("above 0", f"rates, now {self.rates}; enough, now {self.enough}, is at most 1"),
                ],
                fix="Schedule()",
            )
        if self.objective not in OBJECTIVES:
            raise SettingError(
                f"objective={self.objective!r} is none", facts=[("known", " ".join(OBJECTIVES))], fix="Schedule()"
            )


@dataclass(frozen=True)
class Look:
    """What the validation pairs showed.

    Args:
        step: Steps made.
        success: Share of the target pairs that succeed.
        clear: Share of them that do so by as much as the schedule asks for.
        moved: Mean KL(base || tuned) per retain token, nats.
        loss: The objective's loss on the target pairs.
    """

    step: int
    success: float
    clear: float
    moved: float
    loss: float

    def rank(self, enough: float) -> tuple[float, ...]:
        """Return what the smallest of is best.

        Args:
            enough: Share of the pairs that must succeed clearly.
        """
        return (0.0, self.moved) if self.clear >= enough else (1.0, -self.clear, self.loss)


@dataclass(frozen=True)
class Training:
    """How a training went.

    Args:
        rate: Its rate.
        seed: Its seed.
        looks: What validation showed, the model as it was first.
        best: The look whose checkpoint was kept.
        n_trained: Numbers that were trained.
        n_steps: Steps made.
        ended: Why it ended, in words.
        is_whole: Whether nothing went wrong: no divergence, no stop by the user.
    """

    rate: float
    seed: int
    looks: tuple[Look, ...]
    best: Look
    n_trained: int
    n_steps: int
    ended: str
    is_whole: bool

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class Trial:
    """A training that is to be made.

    Args:
        way: What is trained, at the model as it is.
        rate: Share of a weight's usual size that a step moves it.
        seed: Seed of the order of batches.
    """

    way: Way
    rate: float
    seed: int


def train(
    way: Way, data: TuningData, schedule: Schedule, *, rate: float, seed: int, kept: "KeptSides | None" = None
) -> Training:
    """Train what a way trains, and leave the best checkpoint in it.

    Args:
        way: What is trained, at the model as it is.
        data: Target and retain data.
        schedule: How.
        rate: Share of a weight's usual size that a step moves it.
        seed: Seed of the order of batches.
        kept: The prompts laid out, where they are from another training on the same data.

    Returns:
        How it went. After Ctrl-C it is what was reached until then; whoever trains several looks at ``is_whole``.
    """
    return train_all([Trial(way, rate, seed)], data, schedule, kept=kept)[0]


def train_all(
    trials: Sequence[Trial], data: TuningData, schedule: Schedule, *, kept: "KeptSides | None" = None
) -> list[Training]:
    """Make several trainings, of a small model several side by side, and leave the best checkpoints in their ways.

    Args:
        trials: What is trained, of one model, and how fast.
        data: Target and retain data.
        schedule: How.
        kept: The prompts laid out, where they are from other trainings on the same data.

    Returns:
        How they went, in order. Each goes as it would alone. After Ctrl-C the rest have made no step.
    """
    kept = kept or KeptSides(trials[0].way.model, data)
    courses = [_Course(trial, data, schedule) for trial in trials]
    is_stopped = False
    for group in _groups(courses, kept.at_once(schedule)):
        _make([] if is_stopped else group, schedule, kept)
        is_stopped = is_stopped or any(_STOPPED in each.ended for each in group)
        for each in group:
            each.end(f"{_STOPPED} at step 0", is_whole=False)
    return [each.told() for each in courses]


class KeptSides:
    """What trainings on the same data share: prompts laid out, and what the base model makes of them.

    Args:
        model: The model, as it is.
        data: The data.
    """

    def __init__(self, model: Model, data: TuningData) -> None:
        sides: tuple[Side, ...] = ("train", "validation")
        self.target = {side: Answers(model, data.target[side]) for side in sides}
        self.retain = {side: Kept(model, data.retain[side]) for side in sides}

    def ready(self, way: Way) -> None:
        """Keep what runs with a change begin with; the change must not be running."""
        for prompts in (held.prompts for side in (self.target, self.retain) for held in side.values()):
            prompts.ready(way)

    def at_once(self, schedule: Schedule) -> int:
        """Return how many trainings are worth making side by side."""
        target, retain = self.target["train"], self.retain["train"]
        n_tokens = min(schedule.batch, len(target.pairs)) * target.prompts.longest
        n_tokens += min(schedule.retain_batch, len(retain.pairs)) * retain.prompts.longest
        per_step = n_tokens * target.prompts.model.width
        return max(1, _MOST_NUMBERS // max(1, per_step))


def look(way: Way, schedule: Schedule, kept: KeptSides, step: int) -> Look:
    """Look at the validation pairs as things are."""
    return looks([way], schedule, kept, step)[0]


def looks(ways: Sequence[Way], schedule: Schedule, kept: KeptSides, step: int) -> list[Look]:
    """Look at the validation pairs with each of several changes that may run side by side."""
    target, retain, n = kept.target["validation"], kept.retain["validation"], len(ways)
    kept.ready(ways[0])
    with quiet(ways[0].model):
        said = [target.said_by(ways, [some] * n) for some in target.prompts.in_rows(len(target.pairs), n)]
        moved = [retain.distances_by(ways, [some] * n) for some in retain.prompts.in_rows(len(retain.pairs), n)]
    found = []
    for own, distances in zip(zip(*said, strict=True), zip(*moved, strict=True), strict=True):
        losses = [float(target_loss(each, schedule.objective, schedule.margin)) for each in own]
        loss = float(np.average(losses, weights=[len(each.wanted) for each in own]))
        success, clear = (
            float(torch.cat([each.succeeds(nats) for each in own]).double().mean()) for nats in (0.0, schedule.ahead)
        )
        found.append(Look(step, success, clear, float(torch.cat(distances).double().mean()), loss))
    return found


class _Course:
    """A training on its way.

    Args:
        trial: What is trained, and how fast.
        data: For the batches.
        schedule: How.
    """

    def __init__(self, trial: Trial, data: TuningData, schedule: Schedule) -> None:
        self.trial, self.way, self._schedule = trial, trial.way, schedule
        sizes = self.way.sizes()
        groups = [{"params": [each], "size": sizes[name]} for name, each in self.way.trained().items()]
        is_fused = self.way.model.device.type in ("cpu", "cuda")  # one call for all of a step's arithmetic
        self._optimizer = torch.optim.Adam(groups, lr=trial.rate, betas=(0.9, 0.98), fused=is_fused)
        self.batches = _batches(data, schedule, trial.seed)
        self.looks: list[Look] = []
        self._best = Look(0, 0.0, 0.0, 0.0, math.inf)  # until something was seen
        self._state = self.way.state()
        self._since = 0
        self.n_steps, self.ended, self.is_whole = 0, "", True

    @property
    def is_due(self) -> bool:
        """Whether it is to be looked at before it goes on."""
        return self.n_steps % self._schedule.every == 0 or self.n_steps >= self._schedule.steps

    def step(self, loss: float) -> None:
        """Make a step, where the gradient is there; else end."""
        if not math.isfinite(loss):
            self.end(f"diverged at step {self.n_steps + 1}: the loss is {loss}", is_whole=False)
            return
        for group in self._optimizer.param_groups:
            group["lr"] = self.trial.rate * group["size"] * min(1.0, (self.n_steps + 1) / _WARM)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.n_steps += 1

    def see(self, seen: Look) -> None:
        """Take note of what the validation pairs showed, and end where that says so."""
        self.looks.append(seen)
        if not math.isfinite(seen.loss + seen.moved):
            self.end(f"diverged at step {self.n_steps}: what the model says is no number", is_whole=False)
        elif len(self.looks) == 1:
            self._best = seen
        elif seen.rank(self._schedule.enough) < self._best.rank(self._schedule.enough):
            self._best, self._state, self._since = seen, self.way.state(), 0
        else:
            self._since += 1
        if self._since >= self._schedule.patience:
            self.end(f"validation was no better for {self._since} looks")
        elif self.n_steps >= self._schedule.steps:
            self.end(f"{self._schedule.steps} steps were made")

    def end(self, why: str, *, is_whole: bool = True) -> None:
        """End, for the first reason that there is, with the best checkpoint put back."""
        if self.ended:
            return
        self.ended, self.is_whole = why, is_whole
        self.way.restore(self._state)
        self._state = {}
        self._optimizer.state.clear()
        for each in self.way.trained().values():
            each.grad = None

    def told(self) -> Training:
        """Return how it went."""
        ended = f"{self.ended}; the best checkpoint, of step {self._best.step}, was put back"
        seen, n = tuple(self.looks or [self._best]), self.way.n_trained
        return Training(self.trial.rate, self.trial.seed, seen, self._best, n, self.n_steps, ended, self.is_whole)


def _groups(courses: Sequence[_Course], most: int) -> Iterator[list[_Course]]:
    """Yield trainings that are made side by side: of changes that can run so, and at most so many."""
    group: list[_Course] = []
    for each in sorted(courses, key=lambda one: one.way.entry):
        if group and (len(group) >= most or not may_be_together([group[0].way, each.way])):
            yield group
            group = []
        group.append(each)
    yield group


def _make(courses: Sequence[_Course], schedule: Schedule, kept: KeptSides) -> None:
    """Make trainings side by side, until each has ended."""
    if not courses:
        return
    try:
        with differentiable(courses[0].way.model):
            _see(courses, schedule, kept)
            while going := [each for each in courses if not each.ended]:
                _step(going, schedule, kept)
                due = [each for each in going if not each.ended and each.is_due]
                if due:
                    _see(due, schedule, kept)
    except ModelUnsupported:
        if len(courses) == 1 or courses[0].looks:
            raise
        for each in courses:  # rows cannot be told apart inside this model
            _make([each], schedule, kept)
    except KeyboardInterrupt:
        for each in courses:
            each.end(f"{_STOPPED} at step {each.n_steps}", is_whole=False)
    except Exception:
        for each in courses:
            each.end("an error", is_whole=False)
        raise


def _see(courses: Sequence[_Course], schedule: Schedule, kept: KeptSides) -> None:
    ways = [each.way for each in courses]
    for course, seen in zip(courses, looks(ways, schedule, kept, courses[0].n_steps), strict=True):
        course.see(seen)


def _step(courses: Sequence[_Course], schedule: Schedule, kept: KeptSides) -> None:
    """Make a step of each training, from one run of the target pairs and one of the retain prompts of all of them."""
    ways = [each.way for each in courses]
    targets, retained = zip(*(next(each.batches) for each in courses), strict=True)
    said = kept.target["train"].said_by(ways, targets)
    losses = [target_loss(each, schedule.objective, schedule.margin) for each in said]
    if retained[0]:
        moved = kept.retain["train"].distances_by(ways, retained)
        losses = [loss + schedule.keep * each.mean() for loss, each in zip(losses, moved, strict=True)]
    values = torch.stack(losses).tolist()
    sound = [loss for loss, value in zip(losses, values, strict=True) if math.isfinite(value)]
    if sound:
        torch.autograd.backward(sum(sound[1:], start=sound[0]))
    for course, value in zip(courses, values, strict=True):
        course.step(value)


def _batches(data: TuningData, schedule: Schedule, seed: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield target pairs and retain prompts of each step, all of them once before any comes again."""
    both = ((data.target["train"], schedule.batch), (data.retain["train"], schedule.retain_batch))
    streams = [_stream(pairs, size, seed, name) for (pairs, size), name in zip(both, ("target", "retain"), strict=True)]
    while True:
        yield next(streams[0]), next(streams[1])


def _stream(pairs: Pairs, size: int, seed: int, name: str) -> Iterator[list[int]]:
    draw = generator(seed, "tuning", name)
    left: list[int] = []
    while True:
        while len(left) < min(size, len(pairs)):
            left += draw.permutation(len(pairs)).tolist()
        yield left[:size]
        left = left[size:]
