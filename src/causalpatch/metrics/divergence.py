"""Metrics that compare a patched run with the untouched source or base run of the same pair."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from causalpatch.metrics.metric import Metric
from causalpatch.metrics.outputs import Outputs
from causalpatch.pairs import Pairs


def _kl(reference: Literal["base", "source"]) -> Metric:
    def measure(outputs: Outputs, pairs: Pairs) -> Tensor:
        wanted = outputs.reference(reference).log_softmax(-1)
        got = outputs.distribution.log_softmax(-1)
        # An impossible token adds nothing: 0 * log 0 = 0.
        return torch.where(wanted > -torch.inf, wanted.exp() * (wanted - got), 0.0).sum(-1)

    name = "kl_divergence" if reference == "source" else "kl_from_base"
    return Metric(
        name,
        measure,
        columns="all",
        needs_normaliser=True,
        higher_is_better=False,
        compares=(reference,),
        bounds=(0.0, float("inf")),
    )


def _cosine(outputs: Outputs, pairs: Pairs) -> Tensor:
    if outputs.column is not None:
        return cosine_similarity(outputs.distribution, outputs.reference("source"), dim=-1)
    return cosine_similarity(outputs.logits.flatten(1), outputs.reference("source").flatten(1), dim=-1)


kl_divergence = _kl("source")
"""KL(source || patched) over the whole vocabulary, in nats: 0 when the patch brings back the source's predictions."""

kl_from_base = _kl("base")
"""KL(base || patched) over the whole vocabulary, in nats: how far the patch moves the predictions at all."""

cosine = Metric("cosine", _cosine, columns="all", compares=("source",), bounds=(-1.0, 1.0))
"""Cosine of the patched output with the source's output, for models whose output is any vector."""
