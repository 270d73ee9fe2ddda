"""Metrics by name, for the command line and for files."""

from types import MappingProxyType

from causalpatch.base.errors import MetricError
from causalpatch.base.suggest import closest
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
from causalpatch.metrics.metric import Metric
from causalpatch.sites.index import SPAN_NAME

METRICS = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            logit_difference,
            log_probability,
            log_probability_difference,
            probability,
            probability_difference,
            answer_logit,
            rank,
            top1,
            cross_entropy,
            kl_divergence,
            kl_from_base,
            cosine,
            generated_answer,
        )
    }
)
"""All built-in metrics by name."""


def is_built_in(metric: Metric) -> bool:
    """Say whether a metric measures by one of our functions: these keep nothing, and what they read is known.

    Args:
        metric: The metric, at whatever position.
    """
    return any(metric.function is own.function for own in METRICS.values())


def named_metric(name: str) -> Metric:
    """Return the built-in metric of this name; ``NAME@POSITION`` reads it at another real token or a span of one.

    Raises:
        MetricError: There is no such metric.
    """
    stem, _, position = name.partition("@")
    is_number = position.lstrip("-").isdigit()
    if stem not in METRICS or not (is_number or SPAN_NAME.fullmatch(position or "all")):
        near = closest(stem, METRICS)
        raise MetricError(
            f"there is no metric {name!r}",
            facts=[("metrics", ", ".join(METRICS))],
            fix=f"did you mean {near[0]}?" if near else "choose one of them",
        )
    return METRICS[stem].at(int(position) if is_number else position) if position else METRICS[stem]
