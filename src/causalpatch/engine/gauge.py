"""Metrics applied to runs: which outputs they need, and one number per metric and row."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.base.errors import AnswerError, MetricError
from causalpatch.metrics import AnswerTable, Metric, Outputs, is_built_in
from causalpatch.models import Model
from causalpatch.pairs import Batch, Pairs
from causalpatch.pairs.role import ROLES, Role

Mode = Literal["prompt", "all"]
"""What is patched while a model goes on writing: the prompt alone, or what is written too."""


@dataclass(frozen=True)
class Run:
    """The outputs of a batch of rows.

    Args:
        logits: The model's output, ``[row, position, vocab]`` or ``[row, …]``.
        batch: The inputs, with the first real column and the prompt length of each row.
        pair: The pair of each row, ``[row]``.
        forks: Log-probabilities of whole answers by side, ``[row, answer]``.
        tokens: The real tokens that the logits belong to, where they are not those of all columns, ``(row, read)``.
        vocab: The vocabulary entries that the logits belong to, sorted, where they are not all.
        written: What the model went on to write, ``[row, step]``, by what was patched meanwhile.
    """

    logits: Float[Tensor, "row *shape"]
    batch: Batch
    pair: Int[Tensor, " row"]
    forks: Mapping[str, Float[Tensor, "row answer"]] = field(default_factory=dict)
    tokens: Int[np.ndarray, "row read"] | None = None
    vocab: Int[Tensor, " column"] | None = None
    written: Mapping[Mode, Int[Tensor, "row step"]] = field(default_factory=dict)

    def columns(self, tokens: Int[np.ndarray, " row"]) -> Int[Tensor, " row"]:
        """Return the column of the logits that holds a real token of each row."""
        found = self.batch.start + tokens if self.tokens is None else (self.tokens == tokens[:, None]).argmax(1)
        return torch.as_tensor(found, device=self.logits.device)


class Gauge:
    """The metrics of an experiment, ready to be applied.

    Args:
        metrics: The metrics, checked against the pairs.
        pairs: The pairs.
        model: The model, for its device and vocabulary.
        keeps_nothing: Whether no metric keeps a tensor that it was given; by default whether all are built in, since
            of functions of the user's own nobody knows.

    Raises:
        AnswerError: A pair lacks an answer that a metric needs, or it is outside the vocabulary.
        MetricError: A metric that reads text is asked of a model that is not text.
    """

    def __init__(
        self, metrics: Sequence[Metric], pairs: Pairs, model: Model, *, keeps_nothing: bool | None = None
    ) -> None:
        for metric in metrics:
            metric.check(pairs)
        self.metrics = tuple(metrics)
        spelling = [metric for metric in metrics if metric.spells_answers]
        if model.sees_ahead:
            if spelling:
                _require_single_tokens(spelling[0], pairs, model.name)
            _require_no_writing(metrics, model.name)
        self.keeps_nothing = all(map(is_built_in, metrics)) if keeps_nothing is None else keeps_nothing
        self.pairs = pairs
        self.answers = AnswerTable.of(pairs, model.device)

    @property
    def forks(self) -> list[tuple[Literal["answer", "wrong_answer"], int]]:
        """Sides and numbers of the answers that have to be spelt out by runs of their own."""
        sides = {side for metric in self.metrics if metric.spells_answers for side in metric.answers}
        return [
            (side, number)
            for side in sorted(sides)
            if self.answers.longest(side) > 1
            for number in range(self.answers.ids[side].shape[1])
        ]

    @property
    def steps(self) -> dict[Mode, int]:
        """How many tokens are generated, by what is patched meanwhile."""
        found: dict[Mode, int] = {}
        for metric in self.metrics:
            if metric.generates is not None:
                found[metric.generates.patched] = max(self._steps_of(metric), found.get(metric.generates.patched, 0))
        return found

    @property
    def n_more_forwards(self) -> int:
        """How many more forwards a run takes than that of its prompt, at most."""
        return len(self.forks) + sum(n_steps - 1 for n_steps in self.steps.values())

    def _steps_of(self, metric: Metric) -> int:
        most = None if metric.generates is None else metric.generates.max_new_tokens
        return most or max(1, *(self.answers.longest(side) for side in metric.answers))

    def continuations(self, side: Literal["answer", "wrong_answer"], number: int, rows: np.ndarray) -> list[list[int]]:
        """Return the tokens that follow each row's prompt when an answer is spelt out: all but its last."""
        sets = [getattr(self.pairs[int(pair)], side) for pair in rows]
        return [list(answers[number][:-1]) if number < len(answers) else [] for answers in sets]

    def spelt(self, run: Run, side: Literal["answer", "wrong_answer"], number: int) -> Float[Tensor, " row"]:
        """Return the log-probability of an answer in runs that went on through it.

        Args:
            run: Runs whose inputs are the prompt and the answer without its last token.
            side: Which answers.
            number: Which of the set.

        Returns:
            The sum over the answer's tokens; minus infinity where a pair has no such answer.
        """
        ids = self.answers.ids[side][run.pair, number]
        lengths = self.answers.lengths[side][run.pair, number]
        first, last = run.batch.lengths - 1, run.batch.mask.sum(1) - 1
        total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
        rows = torch.arange(len(ids), device=ids.device)
        for token in range(int(lengths.max())):
            logits = run.logits[rows, run.columns(np.minimum(first + token, last))]
            logits = logits if logits.dtype == torch.float64 else logits.float()
            chosen = logits.log_softmax(-1).gather(1, ids[:, token : token + 1])[:, 0]
            total += torch.where(token < lengths, chosen, 0.0).double()
        return total.masked_fill(lengths == 0, -torch.inf)

    def values(
        self, run: Run, untouched: Mapping[str, Run], local: Int[Tensor, " row"]
    ) -> Float[np.ndarray, "metric row"]:
        """Measure every row by every metric.

        Args:
            run: The rows.
            untouched: The ``"base"`` and ``"source"`` runs of the same pairs.
            local: For each row the index of its pair in the untouched runs.

        Returns:
            Values, ``(metric, row)``, float64.
        """
        return np.stack([values.double().cpu().numpy() for values in self.tensors(run, untouched, local)])

    def tensors(
        self, run: Run, untouched: Mapping[str, Run], local: Int[Tensor, " row"]
    ) -> list[Float[Tensor, " row"]]:
        """Measure every row by every metric, as tensors, through which gradients can go; see ``values``."""
        return [self._measured(metric, run, untouched, local) for metric in self.metrics]

    def _measured(
        self, metric: Metric, run: Run, untouched: Mapping[str, Run], local: Int[Tensor, " row"]
    ) -> Float[Tensor, " row"]:
        """Measure every row by a metric; one of all positions is handed rows of one length at a time, unpadded."""
        is_padded = self._is_text(run) and run.tokens is None and not run.batch.mask.all()
        if metric.position != "all" or not is_padded:
            return metric(self._outputs(run, metric, untouched, local), self.pairs.take(run.pair.tolist()))
        lengths = run.batch.mask.sum(1)
        same = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
        parts = [
            self._measured(metric, _unpadded(run, rows), untouched, local[torch.as_tensor(rows, device=local.device)])
            for rows in same
        ]
        return torch.cat(parts)[torch.as_tensor(np.argsort(np.concatenate(same)), device=local.device)]

    def _outputs(self, run: Run, metric: Metric, untouched: Mapping[str, Run], local: Int[Tensor, " row"]) -> Outputs:
        is_text = self._is_text(run)
        is_whole = not is_text or (metric.position == "all" and run.tokens is None)
        return Outputs(
            run.logits,
            self.answers,
            run.pair,
            self._column(run, metric) if is_text else None,
            run.forks if metric.spells_answers else {},
            {name: self._reference(untouched[name], metric, local) for name in metric.compares},
            run.vocab,
            is_whole,
            torch.as_tensor(run.batch.mask, device=run.logits.device) if is_text and is_whole else None,
            metric.reads_vocabulary,
            None if metric.generates is None else run.written[metric.generates.patched][:, : self._steps_of(metric)],
        )

    def _reference(self, run: Run, metric: Metric, local: Int[Tensor, " row"]) -> Float[Tensor, "row ..."]:
        """Return what some pairs gave in an untouched run, for text at the token that a metric reads."""
        return run.logits[local, self._column(run, metric)[local]] if self._is_text(run) else run.logits[local]

    def _is_text(self, run: Run) -> bool:
        return self.pairs.kind == "tokens" and run.logits.ndim == 3

    @property
    def reads_all(self) -> bool:
        """Whether a metric reads the outputs at all positions."""
        return any(metric.position == "all" for metric in self.metrics)

    def reads(self, lengths: Int[np.ndarray, " row"], rows: np.ndarray, role: Role) -> Int[np.ndarray, "row read"]:
        """Return the real tokens that the metrics read, one column for each position.

        Args:
            lengths: Tokens of each row's prompt.
            rows: The pair of each row.
            role: Whose prompts they are.

        Raises:
            MetricError: A prompt does not have a token that a metric reads.
        """
        asked = {metric.position: metric for metric in self.metrics}
        return np.stack([self._token(metric, lengths, rows, role) for metric in asked.values()], 1)

    @property
    def needs_vocabulary(self) -> bool:
        """Whether a metric needs the logits of more than the answers."""
        return any(metric.reads_vocabulary for metric in self.metrics)

    @property
    def n_copies(self) -> int:
        """Copies of logits that metrics make of them at most: softmaxes, differences and whatever else in between."""
        return 1 if self.keeps_nothing and not any(metric.compares for metric in self.metrics) else 7

    @property
    def answer_columns(self) -> Int[Tensor, " column"]:
        """The vocabulary entries that begin an answer of any pair, sorted."""
        first = [ids[..., 0][self.answers.lengths[side] > 0] for side, ids in self.answers.ids.items() if ids.numel()]
        return torch.unique(torch.cat(first)) if first else torch.zeros(0, dtype=torch.long)

    def _column(self, run: Run, metric: Metric) -> Int[Tensor, " row"]:
        return run.columns(self._token(metric, run.batch.lengths, run.pair.cpu().numpy(), run.batch.role))

    def _token(
        self, metric: Metric, lengths: np.ndarray, rows: np.ndarray, role: Role | None
    ) -> Int[np.ndarray, " row"]:
        if metric.span is not None:
            if role is None:
                raise LookupError(metric.name)  # spans are those of pairs' prompts
            ranges = [self.pairs[int(pair)].spans[metric.span][ROLES.index(role)] for pair in rows]
            return np.array([start for start, _ in ranges], dtype=np.int64)
        position = metric.position if isinstance(metric.position, int) else -1
        real = np.where(position < 0, lengths + position, position)
        outside = (real < 0) | (real >= lengths)
        if outside.any():
            row = int(np.argmax(outside))
            raise MetricError(
                f"metric '{metric.name}' reads token {position}, which pair {int(rows[row])} does not have",
                facts=[("prompt", f"{int(lengths[row])} tokens")],
                fix="read a position that every prompt has, such as -1",
            )
        return real


def _unpadded(run: Run, rows: Int[np.ndarray, " some"]) -> Run:
    """Return rows of one length, which are padded alike, without their padding."""
    batch, index = run.batch, torch.as_tensor(rows, device=run.logits.device)
    real = slice(int(batch.start[rows[0]]), int(batch.start[rows[0]] + batch.mask[rows[0]].sum()))
    ids, mask, positions = batch.ids[rows, real], batch.mask[rows, real], batch.position_ids[rows, real]
    return replace(
        run,
        logits=run.logits[index, real],
        batch=Batch(ids, mask, positions, np.zeros_like(rows), batch.lengths[rows], role=batch.role),
        pair=run.pair[index],
        forks={side: table[index] for side, table in run.forks.items()},
    )


def _require_no_writing(metrics: Sequence[Metric], model_name: str) -> None:
    for metric in metrics:
        if metric.generates is not None:
            raise MetricError(
                f"metric '{metric.name}' reads what '{model_name}' writes on, but its tokens see later ones",
                fix="read the answer where it is masked, such as log_probability.at('mask')",
            )


def _require_single_tokens(metric: Metric, pairs: Pairs, model_name: str) -> None:
    """Make sure that no answer is to be spelt out behind prompts whose tokens would see it.

    Raises:
        AnswerError: One would be.
    """
    for number, pair in enumerate(pairs):
        longest = max((answer for side in metric.answers for answer in getattr(pair, side)), key=len, default=())
        if len(longest) > 1:
            raise AnswerError(
                f"an answer of pair {number} of '{pairs.name}' has {len(longest)} tokens, and '{model_name}' reads one",
                facts=[("tokens", list(longest)), ("why", "the prompt's tokens would see an answer spelt out behind")],
                fix="give answers of one token, or load_pairs(…, first_token=True)",
            )


def check_answers(pairs: Pairs, n_columns: int, model_name: str) -> None:
    """Make sure that every answer is a column of the output.

    Raises:
        MetricError: An answer id is outside the vocabulary or the classes.
    """
    for number, pair in enumerate(pairs):
        for side in ("answer", "wrong_answer"):
            for answer in getattr(pair, side):
                outside = [token for token in answer if not 0 <= token < n_columns]
                if outside:
                    raise MetricError(
                        f"{side} {outside[0]} of pair {number} of '{pairs.name}' is not an output of '{model_name}'",
                        facts=[("outputs", f"0 to {n_columns - 1}")],
                        fix="check that the pairs were made for this model's tokenizer",
                    )
