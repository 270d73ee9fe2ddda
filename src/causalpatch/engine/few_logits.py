"""Logits of the tokens alone that metrics read, for models that can be asked for them.

The unembedding of a small model with a large vocabulary costs more than several layers. Where every metric is built in,
and so known to read its own position alone, forwards that take ``logits_to_keep`` are asked for the range of columns
from the first that is read to the last. A metric that reads a span reads another column in each pair.
"""

import inspect
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.capture import capture
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import Job
from causalpatch.engine.layers import Layers
from causalpatch.engine.recorders import own_hooks
from causalpatch.engine.resolve import Target
from causalpatch.engine.structure import Findings
from causalpatch.metrics import is_built_in
from causalpatch.pairs import Batch

_KNOWN: Findings[bool] = Findings()


def may_take_few(layers: Layers, gauge: Gauge) -> bool:
    """Say whether a model may be asked for some logits alone; whether it then gives the same ones is to be tested.

    Args:
        layers: The layers of the model.
        gauge: The metrics.
    """
    module = layers.model.module
    if "logits_to_keep" not in inspect.signature(module.forward).parameters:
        return False
    if any(not is_built_in(metric) or isinstance(metric.position, str) for metric in gauge.metrics):
        return False
    # A reader's own hook outside of the layers may read the logits of any token.
    outside = [part for path, part in module.named_modules() if layers.holding(path) is None]
    return not any(own_hooks(part) for part in outside)


def gives_few(job: Job, gauge: Gauge) -> bool:
    """Say whether a model may be asked for some logits alone, and gives the same ones; tried out once for a model.

    Args:
        job: The job; its shortest prompt is run twice.
        gauge: The metrics.
    """
    return may_take_few(Layers(job.model), gauge) and _KNOWN.of(job.model, "few", partial(_try_few, job))


def _try_few(job: Job) -> bool:
    shortest = int(np.argmin(job.pairs.lengths(job.base)))
    inputs = job.pairs.batch(job.base, [shortest])
    wanted = job.model.logits(capture(job.model, inputs, ()).output)
    columns = range(max(0, inputs.ids.shape[1] - 2), inputs.ids.shape[1])
    part = slice(columns.start, columns.stop)
    try:
        few = job.model.logits(capture(job.model, inputs, (), columns=columns).output)
    except ModelUnsupported:
        return False
    return agree(few, wanted[:, part], inputs.mask[:, part])


def reads_logits(layers: Layers, target: Target) -> bool:
    """Say whether a patch may read or write logits of tokens that no metric reads."""
    site = target.site
    return site.name == "logits" or (site.module is not None and layers.holding(site.module.path) is None)


def few_columns(gauge: Gauge, inputs: Batch, *, is_fork: bool = False) -> range:
    """Return the columns from the first that is read to the last.

    Args:
        gauge: The metrics.
        inputs: The inputs.
        is_fork: Whether an answer follows the prompts, which is read from their last token on.
    """
    n_columns = inputs.ids.shape[1]
    if is_fork:
        return range(int((inputs.start + inputs.lengths - 1).min()), n_columns)
    read = [
        inputs.start + (inputs.lengths + metric.position if metric.position < 0 else metric.position)
        for metric in gauge.metrics
        if not isinstance(metric.position, str)
    ]
    columns = np.clip(np.concatenate(read), 0, n_columns - 1)
    return range(int(columns.min()), int(columns.max()) + 1)


def tokens_at(columns: range | None, inputs: Batch) -> Int[np.ndarray, "row read"] | None:
    """Return the real tokens of each row whose logits are computed; None for those of all columns."""
    return None if columns is None else np.array(columns) - inputs.start[:, None]


def agree(got: Tensor, wanted: Tensor, mask: np.ndarray) -> bool:
    """Say whether logits of real tokens are the same but for rounding, which other shapes may bring."""
    if got.shape != wanted.shape:
        return False
    # A classifier's answers have no positions.
    real = torch.as_tensor(mask if got.ndim > 2 else np.ones(len(got), dtype=bool), device=got.device)
    # 16 units in the last place of the largest logit: a wrong stream is off by much more.
    allowed = 16 * torch.finfo(wanted.dtype).eps * max(1.0, float(wanted[real].nan_to_num(0.0).abs().max()))
    got, wanted = got[real].double(), wanted[real].double()
    return bool(torch.isclose(got, wanted, rtol=0, atol=allowed, equal_nan=True).all())
