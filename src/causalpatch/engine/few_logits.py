"""Logits of the tokens alone that metrics read, for models that can be asked for them.

The unembedding of a small model with a large vocabulary costs more than several layers. Where every metric is built in,
and so known to read its own position alone, forwards that take ``logits_to_keep`` are asked for the range of columns
from the first that is read to the last. A metric that reads a span reads another column in each pair.
"""

import inspect

import numpy as np

from causalpatch.engine.gauge import Gauge
from causalpatch.engine.layers import Layers
from causalpatch.engine.recorders import own_hooks
from causalpatch.engine.resolve import Target
from causalpatch.metrics import is_built_in
from causalpatch.pairs import Batch


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
