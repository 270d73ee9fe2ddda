"""Training: steps on the target, held to the base model on the retain set, stopped and chosen on validation alone.

1. A step takes a batch of target pairs and one of retain prompts. Loss: the target's plus ``keep`` times the mean
   KL(base || tuned) per retain token.
2. Adam without weight decay on what the way trains. ``rate`` is the share of a weight's usual size that a step moves
   it, the same for all ways and models; it rises over the first ten steps.
3. Every few steps the validation pairs are looked at. The best checkpoint is, of those at which enough of them succeed,
   the one that moved the validation retain set least; where there is none, the one at which most succeed.
4. Training ends after ``steps``, or when ``patience`` looks were no better. Where the loss is not a number, or a user
   stops it, the best checkpoint so far is put back, and the record says so.

Cost: per step a forward and a backward of both batches, and once a forward of each retain prompt by the base model.
"""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np
import torch

from causalpatch.base.errors import SettingError
from causalpatch.base.seeds import generator
from causalpatch.engine.gradient import differentiable
from causalpatch.engine.hooks import quiet
from causalpatch.pairs import Pairs
from causalpatch.tuning.data import TuningData
from causalpatch.tuning.losses import OBJECTIVES, Kept, said_of, target_loss
from causalpatch.tuning.ways import Way

_WARM: Final = 10  # steps over which the rate rises
_MOST_ROWS: Final = 32  # prompts in a forward that only looks


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
    rates: tuple[float, ...] = (0.003, 0.01, 0.03)

    def __post_init__(self) -> None:
        numbers = {"steps": self.steps, "batch": self.batch, "every": self.every, "patience": self.patience}
        wrong = next((name for name, value in numbers.items() if value < 1), None)
        if wrong or not 0 < self.enough <= 1 or not self.rates or min(self.rates) <= 0 or self.retain_batch < 0:
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
        moved: Mean KL(base || tuned) per retain token, nats.
        loss: The objective's loss on the target pairs.
    """

    step: int
    success: float
    moved: float
    loss: float

    def rank(self, enough: float) -> tuple[float, ...]:
        """Return what the smallest of is best."""
        return (0.0, self.moved) if self.success >= enough else (1.0, -self.success, self.loss)


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

    def reached(self, enough: float) -> bool:
        """Say whether enough validation pairs succeed."""
        return self.best.success >= enough

    def to_plain(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


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
        kept: What the base model says of the retain set, where that is known from another training.

    Returns:
        How it went. After Ctrl-C it is what was reached until then; whoever trains several looks at ``is_whole``.
    """
    kept = kept or KeptSides(way, data)
    trained, sizes = way.trained(), way.sizes()
    groups = [{"params": [each], "lr": rate * sizes[name], "size": sizes[name]} for name, each in trained.items()]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.98))
    batches = _batches(data, schedule, seed)
    looks: list[Look] = []
    best, state = Look(0, 0.0, 0.0, math.inf), way.state()  # until something was seen
    n_steps, since, ended = 0, 0, f"{schedule.steps} steps were made"
    is_whole = True
    try:
        looks.append(look(way, data, schedule, kept, 0))
        best = looks[0]
        while n_steps < schedule.steps:
            for group in optimizer.param_groups:
                group["lr"] = rate * group["size"] * min(1.0, (n_steps + 1) / _WARM)
            optimizer.zero_grad()
            loss = _loss(way, data, schedule, kept, next(batches))
            if not math.isfinite(loss):
                ended, is_whole = f"diverged at step {n_steps + 1}: the loss is {loss}", False
                break
            optimizer.step()
            n_steps += 1
            if n_steps % schedule.every and n_steps < schedule.steps:
                continue
            looks.append(look(way, data, schedule, kept, n_steps))
            if not math.isfinite(looks[-1].loss + looks[-1].moved):
                ended, is_whole = f"diverged at step {n_steps}: what the model says is no number", False
                break
            if looks[-1].rank(schedule.enough) < best.rank(schedule.enough):
                best, state, since = looks[-1], way.state(), 0
            else:
                since += 1
            if since >= schedule.patience:
                ended = f"validation was no better for {since} looks"
                break
    except KeyboardInterrupt:
        ended, is_whole = f"stopped by the user at step {n_steps}", False
    finally:
        way.restore(state)
        for each in trained.values():
            each.grad = None
    ended += f"; the best checkpoint, of step {best.step}, was put back"
    return Training(rate, seed, tuple(looks or [best]), best, way.n_trained, n_steps, ended, is_whole)


class KeptSides:
    """What the base model says of both retain sets that training sees, so that many trainings can share it.

    Args:
        way: For the model.
        data: The data.
    """

    def __init__(self, way: Way, data: TuningData) -> None:
        self.train = Kept(way.model, data.retain["train"])
        self.validation = Kept(way.model, data.retain["validation"])


def look(way: Way, data: TuningData, schedule: Schedule, kept: KeptSides, step: int) -> Look:
    """Look at the validation pairs as things are."""
    target, retain = data.target["validation"], data.retain["validation"]
    with quiet(way.model):
        with way.running() as module:
            said = [said_of(way.model, module, target, some) for some in in_rows(len(target))]
        losses = [float(target_loss(each, schedule.objective, schedule.margin)) for each in said]
        moved = [kept.validation.distances(way, some).double() for some in in_rows(len(retain))]
    sizes = [len(each.wanted) for each in said]
    success = torch.cat([each.succeeds() for each in said]).double().mean()
    return Look(step, float(success), float(torch.cat(moved).mean()), float(np.average(losses, weights=sizes)))


def in_rows(n: int, most: int = _MOST_ROWS) -> Iterator[range]:
    """Yield numbers from 0 in blocks."""
    for first in range(0, n, most):
        yield range(first, min(first + most, n))


def _loss(way: Way, data: TuningData, schedule: Schedule, kept: KeptSides, batch: tuple[list[int], list[int]]) -> float:
    """Compute the loss of a step and its gradient; return it, without a gradient where it is not a number."""
    targets, retained = batch
    with differentiable(way.model):
        with way.running() as module:
            said = said_of(way.model, module, data.target["train"], targets)
        loss = target_loss(said, schedule.objective, schedule.margin)
        if retained:
            loss = loss + schedule.keep * kept.train.distances(way, retained).mean()
        value = float(loss.detach())
        if math.isfinite(value):
            torch.autograd.backward(loss)
    return value


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
