"""Metrics on logits: no normaliser is needed but for the rank.

Logits are read, not probabilities, because the residual stream reaches them linearly: a patch that adds evidence for
the answer moves them in proportion, while a probability saturates (Zhang & Nanda 2024, 2309.16042).
"""

import torch
from torch import Tensor

from causalpatch.metrics.metric import Metric
from causalpatch.metrics.outputs import Outputs
from causalpatch.pairs import Pairs


def _answer_logit(outputs: Outputs, pairs: Pairs) -> Tensor:
    return outputs.answer_logits("answer").logsumexp(1)


def _logit_difference(outputs: Outputs, pairs: Pairs) -> Tensor:
    return outputs.answer_logits("answer").logsumexp(1) - outputs.answer_logits("wrong_answer").logsumexp(1)


def _rank(outputs: Outputs, pairs: Pairs) -> Tensor:
    best = outputs.answer_logits("answer").amax(1, keepdim=True)
    return (outputs.distribution > best).sum(1).to(torch.float32)


def _top1(outputs: Outputs, pairs: Pairs) -> Tensor:
    return (outputs.answer_logits("answer").amax(1) >= outputs.distribution.amax(1)).to(torch.float32)


answer_logit = Metric("answer_logit", _answer_logit, columns="answers", answers=("answer",))
"""Logit of the answer; of a set, the log of the summed exponentials."""

logit_difference = Metric("logit_difference", _logit_difference, columns="answers", answers=("answer", "wrong_answer"))
"""logit(answer) - logit(wrong_answer); of sets, the log odds of one set against the other,
logsumexp(answers) - logsumexp(wrong answers), which is the plain difference for single answers."""

rank = Metric(
    "rank",
    _rank,
    columns="all",
    needs_normaliser=True,
    higher_is_better=False,
    answers=("answer",),
    bounds=(0.0, torch.inf),
)
"""How many vocabulary entries have a higher logit than the (best) answer: 0 is the top."""

top1 = Metric("top1", _top1, columns="all", needs_normaliser=True, answers=("answer",), bounds=(0.0, 1.0))
"""1 where the answer (one of the set) has the highest logit of all, ties counted for it, else 0."""
