"""The one interface of metrics: what it reads, and one number per row."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import AnswerError, MetricError
from causalpatch.metrics.outputs import Outputs
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.rows import MASK


@dataclass(frozen=True)
class Metric:
    """Outputs and pairs to one number per row.

    Args:
        name: How results call it.
        function: Takes ``outputs`` and the rows' ``pairs`` and returns a tensor ``[row]``.
        position: The real token whose outputs are read (``-1``: the last of the prompt), the name of a span of one
            token, such as ``"mask"``, or ``"all"``.
        columns: The vocabulary columns that are read: ``"all"``, or those of the ``"answers"`` where nothing but
            ``outputs.answer_logits`` is asked for; other columns are then not computed, and cannot be read.
        needs_normaliser: Whether the sum over the whole vocabulary is needed.
        higher_is_better: Whether the clean run is expected to have the higher value; for metrics that compare with
            another run, whether being close to it gives the higher value.
        answers: Which answers every pair must have.
        compares: Which untouched runs the outputs are compared with.
        spells_answers: Whether answers of several tokens are measured whole. If not, they are an error.
        bounds: Smallest and largest possible value where there are any.
    """

    name: str
    function: Callable[[Outputs, Pairs], Tensor] = field(repr=False)
    position: int | str = -1
    columns: Literal["answers", "all"] = "all"
    needs_normaliser: bool = False
    higher_is_better: bool = True
    answers: tuple[Literal["answer", "wrong_answer"], ...] = ()
    compares: tuple[Literal["base", "source"], ...] = ()
    spells_answers: bool = False
    bounds: tuple[float, float] | None = None

    @property
    def reads_vocabulary(self) -> bool:
        """Whether more than the logits of answers at one position is read."""
        has_all = self.columns == "all" or self.needs_normaliser
        return has_all or bool(self.compares) or self.position == "all"

    @property
    def span(self) -> str | None:
        """The span whose one token is read, or None."""
        return self.position if isinstance(self.position, str) and self.position != "all" else None

    def at(self, position: int | str) -> "Metric":
        """Return the same metric read at another real token of the prompt, such as ``-2`` or the span ``"mask"``."""
        return replace(self, position=position, name=f"{self.name}@{position}")

    def is_higher_when_clean(self, direction: str) -> bool:
        """Say whether the clean run should have the higher value.

        Metrics that compare with another run depend on the direction: denoising takes values from the clean run, so
        being close to the source means being clean; noising takes them from the corrupted one.

        Args:
            direction: ``"denoise"`` or ``"noise"``.
        """
        clean_run = "source" if direction == "denoise" else "base"
        if self.compares and clean_run not in self.compares:
            return not self.higher_is_better
        return self.higher_is_better

    def check(self, pairs: Pairs) -> None:
        """Say before any run whether the pairs have what the metric needs.

        Raises:
            AnswerError: A pair lacks an answer, or an answer has several tokens where one is needed.
            MetricError: A pair lacks the span that the metric reads, or the span is not one token.
        """
        for number, pair in enumerate(pairs):
            self._check_span(pair, f"pair {number} of '{pairs.name}'")
            for side in self.answers:
                answers = getattr(pair, side)
                if not answers:
                    raise AnswerError(
                        f"pair {number} of '{pairs.name}' has no {side}, which {self.name} needs",
                        facts=[("pair", pair.id), ("metric", self.name)],
                        fix=f"add a column '{side}', or choose a metric that does without, such as kl_divergence",
                    )
                longest = max(answers, key=len)
                if len(longest) > 1 and not self.spells_answers:
                    raise AnswerError(
                        f"{side} of pair {number} of '{pairs.name}' has {len(longest)} tokens; {self.name} reads one",
                        facts=[("tokens", list(longest)), ("metric", self.name)],
                        fix="measure log_probability (whole answers), or load_pairs(…, first_token=True)",
                    )
                if len(longest) > 1 and self.position != -1:
                    raise AnswerError(
                        f"{side} of pair {number} of '{pairs.name}' has {len(longest)} tokens, read at {self.position}",
                        facts=[("metric", self.name)],
                        fix="whole answers can only follow the prompt: use position -1",
                    )

    def _check_span(self, pair: Pair, where: str) -> None:
        """Make sure that a pair has the span that is read, and that it is one token on both sides."""
        if self.span is None:
            return
        if self.span not in pair.spans:
            is_mask = self.span == MASK
            raise MetricError(
                f"metric '{self.name}' reads the span '{self.span}', which {where} does not have",
                facts=[("its spans", ", ".join(pair.spans) or "none")],
                fix="put the tokenizer's mask once into each prompt, or name it in spans"
                if is_mask
                else f'name it in the column spans: {{"{self.span}": [first, last + 1]}}',
            )
        sizes = [stop - start for start, stop in pair.spans[self.span]]
        if sizes != [1, 1]:
            raise MetricError(
                f"metric '{self.name}' reads one token, but the span '{self.span}' of {where} has more",
                facts=[("clean", f"{sizes[0]} tokens"), ("corrupted", f"{sizes[1]} tokens")],
                fix="name a span of one token",
            )

    def __call__(self, outputs: Outputs, pairs: Pairs) -> Float[Tensor, " row"]:
        """Measure.

        Args:
            outputs: Outputs of a batch of runs.
            pairs: The pair of each row, in order.

        Returns:
            One number per row.

        Raises:
            MetricError: The function did not return one real number per row.
        """
        n_rows = len(outputs.pair)
        values = self.function(outputs, pairs)
        if not isinstance(values, Tensor) or values.shape != (n_rows,):
            shape = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
            raise MetricError(
                f"metric '{self.name}' did not return one number per row",
                facts=[("returned", shape), ("needed", f"shape ({n_rows},)")],
                fix="return a tensor with one entry per row of outputs.logits",
            )
        if values.is_complex():
            raise MetricError(f"metric '{self.name}' returned complex numbers", fix="return real numbers")
        return values if values.dtype == torch.float64 else values.float()
