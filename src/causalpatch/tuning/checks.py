"""What else changed: endpoints on data that training never saw, each held against a margin that was set beforehand.

==================  ==================================================================================================
endpoint            is
==================  ==================================================================================================
retain KL, mean     KL(base || tuned) per token of the retain set, nats
retain KL, p95      its 95th percentile over tokens; likewise p99
perplexity          -log p per token, tuned minus base, nats: the logarithm of how many times the perplexity is
neighbours, others  share of the prompts that the base model answers right and the tuned one does not
evaluation          what the user's functions give, base minus tuned
==================  ==================================================================================================

The unit is the document, or the connected component of pairs. An endpoint is *within* its margin where the upper end of
the one-sided 95 % interval lies within it, *beyond* where the lower end lies beyond, else *not shown*. A change did not
disrupt where every endpoint is within; "not significant" is never taken for that.

One-sided 95 % ends are those of two-sided 90 % intervals: of means the cluster-t interval, of percentiles that of
resampled documents, of shares of lost answers the exact one where prompts are independent.

References:
    Piaggio et al. 2012, "Reporting of Noninferiority and Equivalence Randomized Trials", JAMA 308(24).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from causalpatch.base.errors import SettingError
from causalpatch.base.seeds import generator
from causalpatch.models import Model
from causalpatch.results.tuning import Endpoint, Margins
from causalpatch.statistics.binomial import share_interval
from causalpatch.statistics.intervals import MIN_GROUPS, TOO_FEW, mean_interval
from causalpatch.tuning.data import TuningData
from causalpatch.tuning.losses import Answers, Kept
from causalpatch.tuning.ways import Way

Floats = NDArray[np.float64]
_LEVEL: Final = 0.90  # two-sided: each end alone is a one-sided 95 % one
_DRAWS: Final = 999


@dataclass(frozen=True, eq=False)
class Measured:
    """What one changed model does on test data.

    Args:
        success: Whether each target pair of the test side succeeds, ``(pair,)``.
        paraphrased: Likewise of paraphrases; empty where there are none.
        moved: KL(base || tuned) of each retain token, ``(token,)``.
        document: Independent component of each of these tokens.
        rise: -log p of each retain token given those before it, tuned minus base, ``(token,)``.
        risen: Independent component of each of these.
        lost: By behaviour, 1 where the base model answers right and the changed one does not, 0 where both do or
            neither, -1 where only the changed one does, ``(pair,)``.
        evaluation: By name, what a user's function gave, tuned, and of the base; empty where there is none.
    """

    success: Floats
    paraphrased: Floats
    moved: Floats
    document: NDArray[np.int64]
    rise: Floats
    risen: NDArray[np.int64]
    lost: Mapping[str, Floats]
    evaluation: Mapping[str, tuple[Floats, Floats]] = field(default_factory=dict)

    @property
    def damage(self) -> float:
        """Mean KL per retain token."""
        return float(self.moved.mean())

    def per_document(self) -> Floats:
        """Return sum of KL and number of tokens of each document, ``(document, 2)``."""
        return np.stack([np.bincount(self.document, self.moved), np.bincount(self.document)], axis=1)


class Bench:
    """Measures changed models on test data; what the base model does is measured once.

    Args:
        model: The model, as it is.
        data: The data.
    """

    def __init__(self, model: Model, data: TuningData) -> None:
        self.model, self.data = model, data
        near = {} if data.neighbours is None else {"neighbours": data.neighbours}
        self._target = Answers(model, data.target["test"])
        self._paraphrases = None if data.paraphrases is None else Answers(model, data.paraphrases)
        self._behaviours = {name: Answers(model, pairs) for name, pairs in {**near, **data.others}.items()}
        self._retain = Kept(model, data.retain["test"])
        self._evaluated: dict[str, Floats] = {}

    def measure(self, way: Way | None, evaluated: Mapping[str, Any] | None = None) -> Measured:
        """Measure a change, or the model as it is.

        Args:
            way: The change; None for the base.
            evaluated: What the user's functions gave of the changed model, by name.
        """
        retain = self.data.retain["test"]
        lengths = retain.lengths("clean")
        moved, rise = np.zeros(int(lengths.sum())), np.zeros(int((lengths - 1).sum()))
        if way is not None:
            moved, rise = (each.double().cpu().numpy() for each in self._retain.compared(way))
        lost = {name: self.right[name] - _numbers(one.succeed(way)) for name, one in self._behaviours.items()}
        said = np.zeros(0) if self._paraphrases is None else _numbers(self._paraphrases.succeed(way))
        return Measured(
            _numbers(self._target.succeed(way)),
            said,
            moved,
            np.repeat(retain.components, lengths),
            rise,
            np.repeat(retain.components, lengths - 1),
            lost,
            {name: self._evaluation(name, given) for name, given in (evaluated or {}).items()},
        )

    @cached_property
    def right(self) -> dict[str, Floats]:
        """Whether the base model answers each prompt of each other behaviour right, by name, ``(pair,)``."""
        return {name: _numbers(one.succeed(None)) for name, one in self._behaviours.items()}

    @property
    def of_base(self) -> dict[str, Floats]:
        """What the user's functions gave of the base model, by name."""
        return dict(self._evaluated)

    def evaluate_base(self) -> None:
        """Let the user's functions look at the base model, where there are some."""
        for name, evaluate in self.data.evaluations.items():
            self._evaluated.setdefault(name, as_scores(evaluate(self.model)))

    def _evaluation(self, name: str, given: Any) -> tuple[Floats, Floats]:
        found, base = as_scores(given), self._evaluated[name]
        if found.shape != base.shape:
            raise SettingError(
                "the user's evaluation does not give as many numbers for every model",
                facts=[("base", len(base)), ("tuned", len(found))],
                fix="let it give one number, or one for each of its items in the same order",
            )
        return found, base


def _numbers(is_so: Bool[Tensor, " pair"]) -> Floats:
    return np.asarray(is_so.double().cpu().numpy())


def as_scores(given: Any) -> Floats:
    """Return what a user's evaluation gave as numbers: one, or one for each item.

    Raises:
        SettingError: It gave something else, or no number.
    """
    try:
        found = np.atleast_1d(np.asarray(given, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise SettingError(
            f"the user's evaluation gave a {type(given).__name__}",
            facts=[("needed", "a number, or one for each item")],
            fix="let it return a float, or a list of floats",
        ) from error
    if found.ndim != 1 or not np.isfinite(found).all():
        raise SettingError("the user's evaluation gave no numbers", fix="let it return a float, or a list of floats")
    return found


def endpoints(measured: Sequence[Measured], data: TuningData, margins: Margins, seed: int = 0) -> list[Endpoint]:
    """Hold what changed models do, seeds of one arm, against the margins.

    Args:
        measured: One for each seed. Means are of a token's or a pair's mean over seeds, percentiles of the tokens of
            all seeds together: means of them would hide what each seed moves far.
        data: The data, for the components of pairs.
        margins: The margins.
        seed: Seed of the draws.
    """
    first = measured[0]
    moved = np.stack([each.moved for each in measured])
    rise = np.mean([each.rise for each in measured], axis=0)
    found = [_mean("retain KL, mean", moved.mean(0), first.document, margins.kl_mean, "nat per token")]
    for q, margin in ((95, margins.kl_p95), (99, margins.kl_p99)):
        found.append(_percentile(f"retain KL, p{q}", moved, first.document, q, margin, seed))
    found.append(_mean("perplexity, log ratio", rise, first.risen, margins.perplexity, "nat per token"))
    near = {} if data.neighbours is None else {"neighbours": data.neighbours}
    for name, pairs in {**near, **data.others}.items():
        rows = np.stack([each.lost[name] for each in measured])
        found.append(_lost(f"answers lost, {name}", rows, pairs.components, margins.accuracy))
    for name in data.evaluations:
        if any(name not in each.evaluation for each in measured):
            why = "not made: this change cannot be merged into a model"
            found.append(Endpoint(f"{name}, drop", np.nan, np.nan, np.nan, margins.evaluation, "the user's", 0, why))
            continue
        both = [each.evaluation[name] for each in measured]
        drop = np.mean([base - tuned for tuned, base in both], axis=0)
        found.append(_mean(f"{name}, drop", drop, np.arange(len(drop)), margins.evaluation, "the user's"))
    return found


def _mean(name: str, values: Floats, group: NDArray[np.int64], margin: float, unit: str) -> Endpoint:
    interval = mean_interval(values, group, level=_LEVEL)
    return Endpoint(
        name, interval.estimate, interval.low, interval.high, margin, unit, interval.n_groups, interval.note
    )


def _percentile(name: str, rows: Floats, group: NDArray[np.int64], q: int, margin: float, seed: int) -> Endpoint:
    """Return a percentile over the tokens of all seeds, ``(seed, token)``, with the interval of resampled documents."""
    groups = [rows[:, group == number].reshape(-1) for number in np.unique(group)]
    estimate = float(np.percentile(rows, q))
    low = high = np.nan
    note = TOO_FEW
    if len(groups) >= MIN_GROUPS:
        draw = generator(seed, "percentile", q)
        drawn = [
            np.percentile(np.concatenate([groups[k] for k in draw.integers(len(groups), size=len(groups))]), q)
            for _ in range(_DRAWS)
        ]
        low, high = (float(each) for each in np.quantile(drawn, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]))
        note = f"{_DRAWS} draws of whole documents"
    return Endpoint(name, estimate, low, high, margin, "nat per token", len(groups), note)


def _lost(name: str, rows: Floats, group: NDArray[np.int64], margin: float) -> Endpoint:
    """Return the share of answers lost; its upper end is that of the worst seed, and counts no gain.

    Args:
        name: Of the endpoint.
        rows: 1 where an answer was lost, -1 where one was won, ``(seed, pair)``.
        group: Component of each pair.
        margin: What may be lost.
    """
    estimate = float(rows.mean())
    # Of each seed by itself: shares of 0 and 1 alone have an exact interval.
    upper = max(
        (share_interval((own > 0).astype(np.float64), group, level=_LEVEL) for own in rows), key=lambda each: each.high
    )
    low = mean_interval(rows.mean(axis=0), group, level=_LEVEL)
    return Endpoint(name, estimate, low.low, upper.high, margin, "share", upper.n_groups, upper.note)
