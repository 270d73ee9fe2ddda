"""Metrics on what a model goes on to write: greedy tokens, and whether they are the answer."""

import torch
from torch import Tensor

from causalpatch.metrics.metric import Generation, Metric
from causalpatch.metrics.outputs import Outputs
from causalpatch.pairs import Pairs


def _generated_answer(outputs: Outputs, pairs: Pairs) -> Tensor:
    del pairs
    ids, lengths = outputs.answers.ids["answer"][outputs.pair], outputs.answers.lengths["answer"][outputs.pair]
    written = outputs.generated[:, None, : ids.shape[-1]]
    within = torch.arange(ids.shape[-1], device=ids.device) < lengths[..., None]
    is_written = ((ids[..., : written.shape[-1]] == written) | ~within[..., : written.shape[-1]]).all(-1)
    return (is_written & (lengths > 0) & (lengths <= written.shape[-1])).any(1).double()


generated_answer = Metric(
    "generated_answer", _generated_answer, answers=("answer",), generates=Generation(), bounds=(0.0, 1.0)
)
"""1 where the model goes on with one of the answers, token for token, when it takes the likeliest token each time."""
