"""What metrics read of a batch of runs.

Rows are runs: one intervention on one pair each. Metrics ask for logits of answers, probabilities, whole distributions
or raw outputs; how much of the model was computed to answer them is the engine's affair.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from causalpatch.base.errors import MetricError
from causalpatch.pairs import Pairs

Side = Literal["answer", "wrong_answer"]

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class AnswerTable:
    """Answer sets of all pairs as padded tensors.

    Args:
        ids: Token ids by side, ``[pair, answer, token]``, padded with 0.
        lengths: Number of tokens of each answer by side, ``[pair, answer]``; 0 where a pair has fewer answers.
    """

    ids: Mapping[str, Int[Tensor, "pair answer token"]]
    lengths: Mapping[str, Int[Tensor, "pair answer"]]

    @classmethod
    def of(cls, pairs: Pairs, device: torch.device) -> "AnswerTable":
        """Read the answers of ``pairs`` onto ``device``."""
        ids: dict[str, Tensor] = {}
        lengths: dict[str, Tensor] = {}
        for side in ("answer", "wrong_answer"):
            sets = [getattr(pair, side) for pair in pairs]
            n_answers = max((len(answers) for answers in sets), default=0)
            n_tokens = max((len(answer) for answers in sets for answer in answers), default=0)
            table = torch.zeros(len(sets), n_answers, n_tokens, dtype=torch.long)
            count = torch.zeros(len(sets), n_answers, dtype=torch.long)
            for row, answers in enumerate(sets):
                for column, answer in enumerate(answers):
                    table[row, column, : len(answer)] = torch.tensor(answer, dtype=torch.long)
                    count[row, column] = len(answer)
            ids[side], lengths[side] = table.to(device), count.to(device)
        return cls(ids, lengths)

    def longest(self, side: Side) -> int:
        """Return the number of tokens of the longest answer of a side; 0 where there are none."""
        return int(self.ids[side].shape[-1])


@dataclass(frozen=True)
class Outputs:
    """The outputs of a batch of runs, as metrics read them.

    Args:
        computed: What was computed of the model's output: ``[row, position, vocab]`` for text, ``[row, …]`` for other
            models; functions of one's own read ``logits``.
        answers: Answers of all pairs.
        pair: For each row the index of its pair in the answer table, ``[row]``.
        column: For text, the padded column of the position that the metric reads, ``[row]``.
        forks: Log-probabilities of answers of several tokens by side, ``[row, answer]``, from runs that went on
            through the answer.
        references: What the same pair gave in the untouched ``"base"`` and ``"source"`` runs at the same position,
            ``[row, vocab]`` or ``[row, …]``.
        vocab: The vocabulary entries that were computed, sorted, where only those of answers were.
        is_whole: Whether the outputs at all positions may be read.
        mask: For text whose outputs at all positions are read, which columns hold tokens of the row's own prompt,
            ``[row, position]``: all of them, since such rows come without padding, those of one length at a time.
        reads_vocabulary: Whether the metric says that it reads more than the logits of answers.
        written: The tokens that the model went on to write, ``[row, step]``, where the metric reads them.
    """

    computed: Float[Tensor, "row *shape"]
    answers: AnswerTable
    pair: Int[Tensor, " row"]
    column: Int[Tensor, " row"] | None = None
    forks: Mapping[str, Float[Tensor, "row answer"]] = field(default_factory=dict)
    references: Mapping[str, Float[Tensor, "row ..."]] = field(default_factory=dict)
    vocab: Int[Tensor, " column"] | None = None
    is_whole: bool = True
    mask: Bool[Tensor, "row position"] | None = None
    reads_vocabulary: bool = True
    written: Int[Tensor, "row step"] | None = None

    @property
    def generated(self) -> Int[Tensor, "row step"]:
        """The tokens that the model went on to write, ``[row, step]``; -1 behind the token that ends the text.

        Raises:
            MetricError: The metric does not say that it reads them.
        """
        if self.written is None:
            raise MetricError(
                "a metric reads outputs.generated, and does not say how the model goes on",
                fix="declare it: metric(…, position=-1).generating(8)",
            )
        return self.written

    @property
    def logits(self) -> Float[Tensor, "row *shape"]:
        """The model's output, ``[row, position, vocab]`` for text, ``[row, …]`` for other models.

        Rows of one length come at a time, so that there is no padding, which would depend on what runs beside them.

        Raises:
            MetricError: The metric says that it reads one position.
        """
        if not self.is_whole:
            raise MetricError(
                "a metric that names a position reads outputs.logits, which holds all positions",
                fix='read outputs.distribution, which is that position, or declare it: metric(…, position="all")',
            )
        return self.computed

    @property
    def distribution(self) -> Float[Tensor, "row vocab"]:
        """Logits over the vocabulary (or classes) at the position that the metric reads, in float32 or better.

        Raises:
            MetricError: The metric says that it reads answers alone, or the output of a model that is not text is not
                one row of class logits.
        """
        if not self.reads_vocabulary:
            raise MetricError(
                'a metric with columns="answers" reads outputs.distribution, which holds the whole vocabulary',
                fix='read outputs.answer_logits("answer"), or declare it: columns="all"',
            )
        return self._computed_here

    @property
    def _computed_here(self) -> Float[Tensor, "row column"]:
        """Logits at the position that the metric reads, of the vocabulary or of the columns that were computed."""
        if self.column is not None:
            if self.computed.shape[1] == 1:
                return _precise(self.computed[:, 0])  # not copied: this may be most of what a run takes
            rows = torch.arange(len(self.column), device=self.computed.device)
            return _precise(self.computed[rows, self.column])
        if self.computed.ndim != 2:
            raise MetricError(
                "this metric needs class logits",
                facts=[("output", f"shape {tuple(self.computed.shape)}"), ("needed", "(row, class)")],
                fix="measure the output with your own function: metric(lambda outputs, pairs: …)",
            )
        return _precise(self.computed)

    def present(self, side: Side) -> Bool[Tensor, "row answer"]:
        """Say which answers of the set each row's pair has."""
        return self.answers.lengths[side][self.pair] > 0

    def answer_logits(self, side: Side) -> Float[Tensor, "row answer"]:
        """Return the logits of the (first tokens of the) answers; minus infinity where a pair has fewer answers.

        Raises:
            MetricError: No pair has answers on this side.
        """
        self._require_answers(side)
        first = self.answers.ids[side][self.pair][:, :, 0]
        if self.vocab is not None:
            # A pair with fewer answers than others is filled up with 0, which need not be among the columns.
            first = torch.searchsorted(self.vocab, first).clamp(max=len(self.vocab) - 1)
        here = self._computed_here
        if self.column is None and int(first.max()) >= here.shape[1]:
            raise MetricError(
                f"{side} {int(first.max())} is none of the classes that the model tells apart",
                facts=[("classes", f"0 to {here.shape[1] - 1}")],
                fix=f"give the number of a class, in a column {side}_id",
            )
        return here.gather(1, first).masked_fill(~self.present(side), -torch.inf)

    def answer_log_probs(self, side: Side) -> Float[Tensor, "row answer"]:
        """Return the log-probabilities of whole answers, summed over their tokens; minus infinity where absent.

        Raises:
            MetricError: No pair has answers on this side; or an answer has several tokens, and the metric does not say
                that it reads whole answers.
        """
        if side in self.forks:
            return self.forks[side]
        self._require_answers(side)
        if self.answers.longest(side) > 1:
            raise MetricError(
                f"a metric reads whole answers with {self.answers.longest(side)} tokens, and does not say so",
                facts=[("side", side), ("needed", "runs that go on through the answers")],
                fix=f'declare it: metric(…, answers=("{side}",), position=-1)',
            )
        return self.answer_logits(side) - _log_normaliser(self.distribution)

    def _require_answers(self, side: Side) -> None:
        if self.answers.longest(side) == 0:
            raise MetricError(
                f"a metric reads the {side} of pairs of which none has one",
                fix=f"add a column '{side}' to the pairs, or measure something else",
            )

    def reference(self, run: Literal["base", "source"]) -> Float[Tensor, "row ..."]:
        """Return what the same pair gave in the untouched run.

        Raises:
            MetricError: The metric did not declare that it compares with this run.
        """
        if run not in self.references:
            raise MetricError(
                f"the {run} run was not kept for this metric", fix=f'declare it: metric(…, compares=("{run}",))'
            )
        return _precise(self.references[run])


def _log_normaliser(logits: Float[Tensor, "row vocab"]) -> Float[Tensor, "row 1"]:
    """Return the logarithm of the sum of exponentials, a few rows at once so that they stay in the cache."""
    return torch.cat([some.logsumexp(-1, keepdim=True) for some in torch.split(logits, _ROWS_AT_ONCE)])


def _precise(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
