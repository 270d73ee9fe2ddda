"""Interchange accuracy: how often a patched run gives the answer that the interchange asks for.

The part of the base run that holds a variable is replaced by that of the source run. If it does hold the variable, the
run answers as one with the source's variable would. *Wanted* is that answer: by default the source's own one; a column
of the pairs may hold another, for variables that are only a part of what the answer depends on.

References:
    Geiger et al. 2021, "Causal Abstractions of Neural Networks", 2106.02997 (interchange intervention accuracy).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from causalpatch.base.errors import AnswerError, PairError
from causalpatch.experiment import Experiment
from causalpatch.metrics import Metric, top1
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.components import vertices
from causalpatch.patches import Patch
from causalpatch.statistics import commonest_share, share_interval

_DIGEST_BYTES = 8


@dataclass(frozen=True)
class Accuracy:
    """Share of the pairs whose patched run gives the wanted answer.

    Args:
        share: The share.
        low: Lower end of its 95 % interval; NaN where there is none.
        high: Upper end, likewise.
        chance: Share of the commonest wanted answer: what always giving one answer gets.
        unpatched: Share of the pairs whose base run gives the wanted answer already.
        n_pairs: Pairs that were measured.
        n_groups: Independent groups among them.
        on: Their name.
        note: How the interval was made, or why there is none.
    """

    share: float
    low: float
    high: float
    chance: float
    unpatched: float
    n_pairs: int
    n_groups: int
    on: str
    note: str = ""

    def __str__(self) -> str:
        ends = f"[{self.low:.3f}, {self.high:.3f}]" if self.low == self.low else f"(no interval: {self.note})"
        return f"{self.share:.3f} {ends} on {self.n_pairs} pairs of '{self.on}', chance {self.chance:.3f}"


def patched_accuracy(experiment: Experiment, patches: Patch | Sequence[Patch], wanted: str | None = None) -> Accuracy:
    """Measure how often patched runs give the wanted answer, as the first choice of the whole vocabulary.

    Args:
        experiment: Model, pairs and direction; its metrics are not read.
        patches: What is patched in one run, such as ``Patch("resid_mid.1@-1", subspace)``.
        wanted: The column of the pairs that holds each pair's wanted answer, as a token id or class, or a list of ids
            that all count: ``"answer"``, ``"wrong_answer"`` or any other. By default the source run's: the answer when
            denoising, the wrong answer when noising.

    Raises:
        AnswerError: A pair has no wanted answer, or one of several tokens.
        PairError: There is no such column, or no pair has the patched positions.

    Examples:
        >>> import causalpatch as cp
        >>> model = cp.open_model("zoo:stories")
        >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
        >>> whole = cp.patched_accuracy(experiment, cp.Patch("resid_post.3@-1"))
        >>> whole.share > 0.9
        True

    Cost:
        A patched run per pair, and four for the untouched runs and controls.
    """
    return accuracies(measured_on(experiment, aimed(experiment, wanted), top1), [patches])[0]


def accuracies(experiment: Experiment, interventions: Sequence[Patch | Sequence[Patch]]) -> list[Accuracy]:
    """Return the accuracy of interventions on pairs whose answers are the wanted ones, measured by ``top1``."""
    numbers = {"intervention": list(range(len(interventions)))}
    effects = experiment.run([[one] if isinstance(one, Patch) else one for one in interventions], axes=numbers)
    table: np.ndarray = effects.to_xarray()["metric"].values
    return [accuracy_of(experiment, values) for values in table]


def accuracy_of(experiment: Experiment, values: Float[np.ndarray, " pair"]) -> Accuracy:
    """Return the share of pairs that are 1, with what it must be held against; NaN where a pair was not measured."""
    kept = np.isfinite(values)
    pairs = experiment.pairs
    if not kept.any():
        raise PairError(
            f"no pair of '{pairs.name}' has the patched position",
            fix="align the pairs, or name a position that every prompt has, such as @-1",
        )
    found = share_interval(values[kept], pairs.components[kept], seed=experiment.seed)
    untouched = experiment.baseline.corrupt if experiment.base == "corrupt" else experiment.baseline.clean
    answers = [pair.answer[0][0] for pair, is_kept in zip(pairs, kept, strict=True) if is_kept]
    return Accuracy(
        share=found.estimate,
        low=found.low,
        high=found.high,
        chance=commonest_share(answers),
        unpatched=float(untouched[0][kept].mean()),
        n_pairs=found.n_pairs,
        n_groups=found.n_groups,
        on=pairs.name,
        note=found.note,
    )


def measured_on(experiment: Experiment, pairs: Pairs, metric: Metric | Sequence[Metric]) -> Experiment:
    """Return an experiment on other pairs by another metric, all else as it was, but not screened."""
    return Experiment(
        experiment.model,
        pairs,
        metric,
        experiment.direction,
        engine=experiment.engine,
        padding_side=experiment.padding_side,
        budget_gib=experiment.budget_gib,
        max_rows=experiment.max_rows,
        seed=experiment.seed,
        show_progress=experiment.show_progress,
    )


def aimed(experiment: Experiment, wanted: str | None) -> Pairs:
    """Return the pairs of an experiment with the wanted answers as their answers.

    Raises:
        AnswerError: A pair has none, or it is no token id.
        PairError: There is no such column.
    """
    pairs, column = experiment.pairs, wanted or ("answer" if experiment.base == "corrupt" else "wrong_answer")
    known = {"answer", "wrong_answer"}.union(*(pair.extra for pair in pairs))
    if column not in known:
        raise PairError(
            f"'{pairs.name}' has no column '{column}' of wanted answers",
            facts=[("columns", ", ".join(sorted(known)))],
            fix="name one of these, or leave wanted= out for the source's own answers",
        )
    return pairs.with_answers([_wanted(pairs, number, pair, column) for number, pair in enumerate(pairs)])


def _wanted(pairs: Pairs, number: int, pair: Pair, column: str) -> tuple[tuple[int, ...], ...]:
    held = getattr(pair, column) if column in ("answer", "wrong_answer") else pair.extra.get(column)
    listed = list(held) if isinstance(held, list | tuple | np.ndarray) else [] if held is None else [held]
    found = [tuple(one) if isinstance(one, list | tuple | np.ndarray) else (one,) for one in listed]
    is_number = all(
        isinstance(token, int | np.integer) and not isinstance(token, bool) for one in found for token in one
    )
    if not found or not is_number or any(len(one) != 1 for one in found):
        raise AnswerError(
            f"pair {number} of '{pairs.name}' has no wanted answer of one token in '{column}'",
            facts=[("holds", repr(held)[:60]), ("needed", "a token id or class, or a list of them")],
            fix="give ids, or read the pairs with first_token=True",
        )
    return tuple((int(one[0]),) for one in found)


def marks_of(pairs: Pairs) -> UInt8[np.ndarray, "mark 8"]:
    """Return a mark of each prompt, entity and group of some pairs, sorted: those that share none share no mark."""
    held = {repr(vertex) for pair in pairs for vertex in vertices(pair)}
    digests = sorted(hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES] for text in held)
    return np.frombuffer(b"".join(digests), dtype=np.uint8).reshape(-1, _DIGEST_BYTES).copy()


def refuse_shared(marks: UInt8[np.ndarray, "mark 8"], name: str, pairs: Pairs) -> None:
    """Make sure that pairs share no prompt, entity or group with those that a subspace was learnt on.

    Raises:
        PairError: They share one.
    """
    known = {row.tobytes() for row in marks}
    shared = [n for n, pair in enumerate(pairs) if known & {row.tobytes() for row in marks_of(pairs.take([n]))}]
    if shared:
        raise PairError(
            f"pair {shared[0]} of '{pairs.name}' shares a prompt, an entity or a group with the pairs of '{name}'",
            facts=[("shared", f"{len(shared)} of {len(pairs)} pairs"), ("why not", "the subspace was learnt on those")],
            fix="learn on one side and measure on the other: learning, held_out = pairs.split(0.5)",
        )
