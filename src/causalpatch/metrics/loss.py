"""Metrics on probabilities, with answer sets summed and answers of several tokens spelt out.

The log-probability of an answer of several tokens is the sum over its tokens, each given the patched prompt and the
tokens before it. An answer set counts with the sum of its probabilities.
"""

from torch import Tensor

from causalpatch.metrics.metric import Metric
from causalpatch.metrics.outputs import Outputs
from causalpatch.pairs import Pairs


def _log_probability(outputs: Outputs, pairs: Pairs) -> Tensor:
    return outputs.answer_log_probs("answer").logsumexp(1)


def _log_probability_difference(outputs: Outputs, pairs: Pairs) -> Tensor:
    return _log_probability(outputs, pairs) - outputs.answer_log_probs("wrong_answer").logsumexp(1)


def _probability(outputs: Outputs, pairs: Pairs) -> Tensor:
    return outputs.answer_log_probs("answer").exp().sum(1)


def _probability_difference(outputs: Outputs, pairs: Pairs) -> Tensor:
    return _probability(outputs, pairs) - outputs.answer_log_probs("wrong_answer").exp().sum(1)


def _cross_entropy(outputs: Outputs, pairs: Pairs) -> Tensor:
    return -_log_probability(outputs, pairs)


log_probability = Metric(
    "log_probability", _log_probability, needs_normaliser=True, answers=("answer",), spells_answers=True, bounds=None
)
"""Natural logarithm of the probability of the answer (of the whole set)."""

log_probability_difference = Metric(
    "log_probability_difference",
    _log_probability_difference,
    needs_normaliser=True,
    answers=("answer", "wrong_answer"),
    spells_answers=True,
)
"""log P(answer) - log P(wrong_answer); the logit difference for answers of several tokens."""

probability = Metric(
    "probability", _probability, needs_normaliser=True, answers=("answer",), spells_answers=True, bounds=(0.0, 1.0)
)
"""Probability of the answer (of the whole set)."""

probability_difference = Metric(
    "probability_difference",
    _probability_difference,
    needs_normaliser=True,
    answers=("answer", "wrong_answer"),
    spells_answers=True,
    bounds=(-1.0, 1.0),
)
"""P(answers) - P(wrong answers), as for greater-than (Hanna et al. 2023, 2305.00586)."""

cross_entropy = Metric(
    "cross_entropy",
    _cross_entropy,
    needs_normaliser=True,
    higher_is_better=False,
    answers=("answer",),
    spells_answers=True,
)
"""-log P(answer), in nats."""
