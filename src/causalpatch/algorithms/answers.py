"""Answers: which tokens an output of the algorithm is, what the network answers, and whether that is the same."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.algorithms.hypothesis import Hypothesis
from causalpatch.algorithms.pool import Pool
from causalpatch.base.errors import AlgorithmError, AnswerError
from causalpatch.metrics import Metric, Outputs
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.pair import Answers
from causalpatch.pairs.prompts import Prompts

CHOICE = "choice"
"""Name of the metric that says what the network answers."""


@dataclass(frozen=True, eq=False)
class AnswerKey:
    """The answers that outputs of an algorithm stand for.

    Args:
        of: The ids of each output, any of which is right.
        allowed: The ids that the network's answer is chosen from; None for its whole vocabulary.
        position: The real token at which it answers.
    """

    of: Mapping[Any, tuple[int, ...]]
    allowed: tuple[int, ...] | None
    position: int

    @property
    def metric(self) -> Metric:
        """The id that the network gives the highest logit, of those that are allowed; NaN where a logit is."""
        allowed = self.allowed

        def choose(outputs: Outputs, pairs: Pairs) -> Float[Tensor, " row"]:
            logits = outputs.distribution
            if allowed is None:
                chosen = logits.argmax(-1)
            else:
                ids = torch.tensor(allowed, device=logits.device)
                logits = logits[:, ids]
                chosen = ids[logits.argmax(-1)]
            # Ids are whole numbers below 2 ** 24, which float32 holds exactly.
            return torch.where(logits.isnan().any(-1), torch.nan, chosen.to(torch.float32))

        return Metric(CHOICE, choose, position=self.position, columns="all")

    def is_right(self, chosen: Float[np.ndarray, " row"], outputs: Sequence[Any]) -> Float[np.ndarray, " row"]:
        """Say whether what was chosen is what the algorithm says: 1 or 0; NaN where nothing was."""
        right = [float(choice in self.of[output]) for choice, output in zip(chosen.tolist(), outputs, strict=True)]
        return np.where(np.isnan(chosen), np.nan, np.array(right, dtype=np.float64))

    def chance(self, outputs: Sequence[Any]) -> float:
        """Return the share of outputs that the best constant answer would be right for."""
        counts: dict[int, int] = {}
        for output in outputs:
            for token in self.of[output]:
                counts[token] = counts.get(token, 0) + 1
        return max(counts.values(), default=0) / max(1, len(outputs))

    def answers(self, output: Any) -> Answers:
        """Return the answers of an output, as pairs hold them."""
        return tuple((token,) for token in self.of[output])

    def wrong_answers(self, output: Any) -> Answers:
        """Return all other answers that are allowed; none where all of the vocabulary is."""
        return tuple((token,) for token in self.allowed or () if token not in self.of[output])

    def describe(self) -> str:
        """Return in words what the network's answer is."""
        if self.allowed is None:
            return "likeliest token of the whole vocabulary"
        return f"likeliest of {len(self.allowed)} possible answers"


def make_key(model: Model, hypothesis: Hypothesis, pool: Pool, outputs: Iterable[Any]) -> AnswerKey:
    """Find the ids of all outputs.

    Args:
        model: The network, for its tokenizer and the number of its answers.
        hypothesis: What outputs stand for.
        pool: The inputs; answers in words are tokenised behind its first prompt.
        outputs: Outputs that occur, those of the pool's inputs aside.

    Raises:
        AnswerError: An answer is not one token, or not an output of the network.
        AlgorithmError: The hypothesis does not say what an output stands for.
    """
    prompts = Prompts(pool.tokenizer) if pool.tokenizer is not None else None
    of = {}
    for output in dict.fromkeys([*pool.outputs(hypothesis), *outputs]):
        meant = _meant(hypothesis, output)
        listed = list(meant) if isinstance(meant, list | tuple | set | frozenset) else [meant]
        ids = [_id(prompts, pool, each, output) for each in listed]
        outside = next((token for token in ids if token < 0 or 0 < model.vocab_size <= token), None)
        if outside is not None or not ids:
            raise AnswerError(
                f"output {output!r} of '{hypothesis.algorithm.name}' stands for {outside}, which is no answer"
                if ids
                else f"output {output!r} of '{hypothesis.algorithm.name}' stands for no answer",
                facts=[("answers", f"0 to {model.vocab_size - 1}" if model.vocab_size else "token ids or classes")],
                fix="give the id of a token or class: Hypothesis(…, answers={…})",
            )
        of[output] = tuple(dict.fromkeys(ids))
    every = tuple(sorted({token for ids in of.values() for token in ids}))
    return AnswerKey(of, every if hypothesis.read == "answers" else None, hypothesis.position)


def _meant(hypothesis: Hypothesis, output: Any) -> Any:
    answers = hypothesis.answers
    if answers is None:
        return output
    if callable(answers):
        return answers(output)
    if output not in answers:
        raise AlgorithmError(
            f"the hypothesis does not say which answer output {output!r} is",
            facts=[("output", hypothesis.algorithm.output), ("known", ", ".join(map(repr, answers))[:88])],
            fix=f"add it: answers={{{output!r}: …}}",
        )
    return answers[output]


def _id(prompts: Prompts | None, pool: Pool, meant: Any, output: Any) -> int:
    if isinstance(meant, bool | np.bool_) or not isinstance(meant, str | int | np.integer):
        raise AnswerError(
            f"output {output!r} stands for {meant!r}, which is neither a token id nor a text",
            facts=[("needed", "an id, a class, a text, or a list of these")],
            fix="Hypothesis(…, answers={…}), such as {True: ' yes', False: ' no'}",
        )
    if not isinstance(meant, str):
        return int(meant)
    if prompts is None or pool.texts[0] is None:
        raise AnswerError(
            f"output {output!r} stands for the text {meant!r}, but the prompts are not texts",
            fix="give the token's id instead",
        )
    ids = prompts.answer(pool.texts[0], meant, f"output {output!r}")
    if len(ids) > 1:
        raise AnswerError(
            f"output {output!r} stands for {meant!r}, which is {len(ids)} tokens",
            facts=[("tokens", list(ids))],
            fix="give an answer of one token, or the id of its first one",
        )
    return ids[0]
