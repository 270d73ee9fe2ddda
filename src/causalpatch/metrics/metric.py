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
class Generation:
    """How a model goes on behind a prompt, taking the likeliest token each time, for a metric that reads what it wrote.

    Args:
        max_new_tokens: How many tokens at most; by default as many as the longest answer of the pairs. A token that
            ends the text (the model's ``eos_token_id``) is the last.
        patched: Positions are those of the prompt. ``"prompt"`` patches it alone: what is written sees the patched
            prompt and is left to itself. ``"all"`` also patches the tokens that are written, by those patches that
            name no position and whose value is the same at all: zero, a number or an array, ``Steer``, ``ProjectOut``.
    """

    max_new_tokens: int | None = None
    patched: Literal["prompt", "all"] = "prompt"

    def __post_init__(self) -> None:
        if self.patched not in ("prompt", "all"):
            raise MetricError(
                f"what is generated cannot be patched {self.patched!r}",
                facts=[("known", "prompt, all")],
                fix='patched="prompt"',
            )
        most = self.max_new_tokens
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            raise MetricError(f"a model cannot write {most!r} tokens", fix="max_new_tokens=8")


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
        generates: How the model goes on where the metric reads what it writes, ``outputs.generated``; else None.
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
    generates: Generation | None = None

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

    def generating(
        self, max_new_tokens: int | None = None, *, patched: Literal["prompt", "all"] = "prompt"
    ) -> "Metric":
        """Return the same metric, reading in ``outputs.generated`` what the model goes on to write.

        Args:
            max_new_tokens: How many tokens at most; by default as many as the longest answer of the pairs.
            patched: ``"prompt"`` or ``"all"``: what is patched while it goes on, see ``Generation``.

        Raises:
            MetricError: The number or ``patched`` is impossible.
        """
        return replace(self, generates=Generation(max_new_tokens, patched), spells_answers=False)

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
            MetricError: Generated tokens are read at another position than the prompt's last; or a pair lacks the span
                that the metric reads, or the span is not one token.
        """
        if self.generates is not None and self.position != -1:
            raise MetricError(
                f"metric '{self.name}' reads generated tokens at position {self.position!r}",
                facts=[("generated", "tokens follow the whole prompt")],
                fix="position=-1",
            )
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
                if self.generates is not None:
                    continue
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
