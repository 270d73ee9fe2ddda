"""Patched forwards that can be differentiated, with respect to whatever the patched values are computed from.

1. The model is held as for any run (``hooks.quiet``): in eval mode, in full float32, alone. Its parameters are frozen
   for as long, so that memory goes to what is asked for and a user's ``.grad`` stays as it was.
2. Rows (intervention, pair) are stacked into one forward of the whole model with plain hooks, as the reference engine
   does. Values that are functions, such as one that returns a learnt constant, are called with gradients on.
3. Metrics read the logits as tensors. Runs of the base and the source are constants.

Cost: a forward and a backward per row; memory grows with the layers, so fewer rows fit than in plain runs.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.engine.capture import inputs_of
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.hooks import Write, quiet, run_with_hooks
from causalpatch.engine.job import Job, most_rows
from causalpatch.engine.untouched import Untouched
from causalpatch.engine.values import Row, writes_of_rows
from causalpatch.models import Model


@contextmanager
def differentiable(model: Model) -> Iterator[None]:
    """Hold a model as for a run, with gradients on and its parameters frozen; put everything back afterwards."""
    with quiet(model):
        trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)  # noqa: FBT003 - torch's own spelling
            with torch.enable_grad():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)  # noqa: FBT003


def rows_at_once(job: Job) -> int:
    """Return how many rows go into one forward whose activations are all kept for the backward."""
    longest = int(job.pairs.sizes(job.base).max())
    n_layers = max(1, job.model.shape.n_layers)
    return max(1, most_rows(job, longest) // n_layers)


def measure_rows(job: Job, gauge: Gauge, batch: Untouched, rows: Sequence[Row]) -> Float[Tensor, "metric row"]:
    """Measure patched rows by every metric, with gradients; to be called inside ``differentiable``.

    Args:
        job: The job.
        gauge: The metrics, none of which spells answers out.
        batch: The pairs of the rows with their untouched runs.
        rows: The rows.
    """
    device = job.model.device
    numbers = [row.pair for row in rows]
    inputs = job.pairs.batch(job.base, numbers, padding_side=job.padding_side)
    writes = writes_of_rows(job.model, batch.known, rows, inputs)
    logits = logits_of(job.model, inputs_of(job.model, inputs), writes)
    run = Run(logits, inputs, torch.tensor(numbers, device=device))
    local = torch.tensor([row.local for row in rows], device=device)
    return torch.stack(gauge.tensors(run, batch.runs, local))


def logits_of(model: Model, inputs: Mapping[str, Any], writes: Sequence[Write] = ()) -> Float[Tensor, "row *shape"]:
    """Return the logits of one patched forward, with gradients; to be called inside ``differentiable``."""
    output, _ = run_with_hooks(model, inputs, writes, with_gradient=True)
    return model.logits(output)
