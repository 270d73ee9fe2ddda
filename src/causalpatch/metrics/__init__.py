"""What to measure: outputs and pairs to one number per pair, with what each metric reads declared beforehand."""

from causalpatch.metrics.custom import metric
from causalpatch.metrics.divergence import cosine, kl_divergence, kl_from_base
from causalpatch.metrics.generation import generated_answer
from causalpatch.metrics.logits import answer_logit, logit_difference, rank, top1
from causalpatch.metrics.loss import (
    cross_entropy,
    log_probability,
    log_probability_difference,
    probability,
    probability_difference,
)
from causalpatch.metrics.metric import Generation, Metric
from causalpatch.metrics.named import METRICS, is_built_in, named_metric
from causalpatch.metrics.outputs import AnswerTable, Outputs

__all__ = [
    "METRICS",
    "AnswerTable",
    "Generation",
    "Metric",
    "Outputs",
    "answer_logit",
    "cosine",
    "cross_entropy",
    "generated_answer",
    "is_built_in",
    "kl_divergence",
    "kl_from_base",
    "log_probability",
    "log_probability_difference",
    "logit_difference",
    "metric",
    "named_metric",
    "probability",
    "probability_difference",
    "rank",
    "top1",
]
