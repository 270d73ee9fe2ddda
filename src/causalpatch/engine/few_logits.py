"""Logits of the tokens alone that metrics read, for models that can be asked for them.

The unembedding of a small model with a large vocabulary costs more than several layers. Where every metric is built in,
and so known to read its own position alone, forwards that take ``logits_to_keep`` are asked for the range of columns
from the first that is read to the last. A metric that reads a span reads another column in each pair. Where no metric
needs the normaliser, runs that are differentiated compute the answers' entries of the vocabulary alone, too.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.capture import capture
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.hooks import quiet
from causalpatch.engine.job import Job
from causalpatch.engine.layers import Layers
from causalpatch.engine.recorders import own_hooks
from causalpatch.engine.resolve import Target
from causalpatch.engine.structure import Findings
from causalpatch.engine.unembedding import cut_down, unembedding_of
from causalpatch.metrics import is_built_in
from causalpatch.pairs import Batch

_KNOWN: Findings[tuple[bool, bool]] = Findings()


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


@dataclass(frozen=True, eq=False)
class Few:
    """Which logits are computed in runs of whole prompts.

    Args:
        is_cut: Whether they are those of the tokens alone that metrics read.
        vocab: The vocabulary entries that they belong to, or None for all.
        unembedding: The model's last linear map, where it computes these entries alone.
    """

    is_cut: bool = False
    vocab: Int[Tensor, " column"] | None = None
    unembedding: nn.Linear | None = None

    def columns(self, gauge: Gauge, inputs: Batch) -> range | None:
        """Return the columns whose logits are computed; None for all."""
        return few_columns(gauge, inputs) if self.is_cut else None

    def cut(self) -> AbstractContextManager[None]:
        """Let the model compute no other entries of the vocabulary while it is open."""
        if self.vocab is None or self.unembedding is None:
            return nullcontext()
        return cut_down(self.unembedding, self.vocab)


WHOLE = Few()
"""All logits are computed."""


def few_of(job: Job, gauge: Gauge) -> Few:
    """Return which logits a model may be asked for alone; what it gives then is tried out once for a model.

    Args:
        job: The job; its shortest prompt is run three times.
        gauge: The metrics.
    """
    if not may_take_few(Layers(job.model), gauge):
        return WHOLE
    is_cut, is_apart = _KNOWN.of(job.model, "few", partial(_try_few, job, gauge))
    vocab, last = gauge.answer_columns, unembedding_of(job.model.module)
    is_small = 0 < 2 * len(vocab) < job.model.vocab_size
    if not is_apart or last is None or gauge.needs_vocabulary or not is_small:
        return Few(is_cut)
    return Few(is_cut, vocab, last)


def _try_few(job: Job, gauge: Gauge) -> tuple[bool, bool]:
    """Say whether a model gives the same logits when it is asked for those of some tokens, and of some entries."""
    shortest = int(np.argmin(job.pairs.lengths(job.base)))
    inputs = job.pairs.batch(job.base, [shortest])
    wanted = job.model.logits(capture(job.model, inputs, ()).output)
    columns = range(max(0, inputs.ids.shape[1] - 2), inputs.ids.shape[1])
    part = slice(columns.start, columns.stop)
    last = unembedding_of(job.model.module)
    # More than one entry, and not in a row: what is done to all of them together would show.
    vocab = torch.arange(0, job.model.vocab_size, max(1, job.model.vocab_size // 8), device=job.model.device)
    is_apart = last is not None and wanted.shape[-1] == job.model.vocab_size
    try:
        few = job.model.logits(capture(job.model, inputs, (), columns=columns).output)
        if last is not None and is_apart:
            with quiet(job.model), cut_down(last, vocab):
                some = job.model.logits(capture(job.model, inputs, ()).output)
            is_apart = agree(some, wanted[..., vocab], inputs.mask)
    except ModelUnsupported:
        return False, False
    return agree(few, wanted[:, part], inputs.mask[:, part]), is_apart


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
