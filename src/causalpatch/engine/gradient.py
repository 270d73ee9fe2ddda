"""Patched forwards that can be differentiated, with respect to whatever the patched values are computed from.

1. The model is held as for any run (``hooks.quiet``): in eval mode, in full float32, alone. Its parameters are frozen
   for as long, so that memory goes to what is asked for and a user's ``.grad`` stays as it was. Activations that would
   keep several tensors for the backward are computed by a form that keeps one (``fused``).
2. Rows (intervention, pair) are stacked into one forward of the whole model with plain hooks, as the reference engine
   does. Values that are functions, such as one that returns a learnt constant, are called with gradients on.
3. Metrics read the logits as tensors. Runs of the base and the source are constants.

Cost: a forward and a backward per row; memory grows with the layers, so fewer rows fit than in plain runs. Where not
even one fits, layers compute their insides once more in the backward (``checkpoint``), a further forward per row.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.fused import fused
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.hooks import quiet, run_with_hooks
from causalpatch.engine.job import Job, most_rows
from causalpatch.engine.memory import budget_bytes, row_cost
from causalpatch.engine.untouched import Untouched
from causalpatch.engine.values import Row, writes_of_rows
from causalpatch.models import Model
from causalpatch.sites import Site


@contextmanager
def differentiable(model: Model) -> Iterator[None]:
    """Hold a model as for a run, with gradients on and its parameters frozen; put everything back afterwards.

    Raises:
        ModelUnsupported: Its weights are fetched layer by layer, which a backward would hold all at once.
    """
    if model.weights is not None:
        raise ModelUnsupported(
            f"gradients of '{model.name}' need the weights of all its layers at once",
            facts=[("weights", f"fetched from {model.weights.store.place}, layer by layer")],
            fix="measure exact effects (sweep), or open the model without weights= and memory_gib=",
        )
    with quiet(model), fused(model):
        trained = [parameter for parameter in model.module.parameters() if parameter.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)  # noqa: FBT003 - torch's own spelling
            with torch.enable_grad():
                yield
        finally:
            for parameter in trained:
                parameter.requires_grad_(True)  # noqa: FBT003


@dataclass(frozen=True)
class Room:
    """How rows are run so that their activations fit into memory.

    Args:
        rows: Rows in one forward.
        is_checkpointed: Whether layers compute their insides once more in the backward.
        can_checkpoint: Whether they could.
    """

    rows: int
    is_checkpointed: bool = False
    can_checkpoint: bool = False

    def tighter(self, rows: int) -> "Room | None":
        """Return what needs less, after so many rows were too many; None where nothing does."""
        if rows > 1:
            return replace(self, rows=rows // 2)
        return replace(self, is_checkpointed=True) if self.can_checkpoint and not self.is_checkpointed else None


def room_for(job: Job) -> Room:
    """Return how rows of a job are run whose activations are kept for the backward."""
    model, longest = job.model, int(job.pairs.sizes(job.base).max())
    n_layers, can_checkpoint = max(1, model.shape.n_layers), bool(layers_of(model))
    fitting = budget_bytes(model.device, job.budget_gib) // max(1, row_cost(model, longest).total)
    if fitting < n_layers and can_checkpoint:
        # The inputs of all layers come on top of one layer's insides.
        return Room(max(1, fitting // 2), is_checkpointed=True, can_checkpoint=True)
    return Room(max(1, most_rows(job, longest) // n_layers), can_checkpoint=can_checkpoint)


def layers_of(model: Model) -> list[nn.Module]:
    """Return the layers of a model through which one stream flows; none where they are not known by name."""
    if model.main_stream is not None or "resid_post" in model.shape.refused:
        return []
    ports = [model.tap(Site("resid_post", layer)).port for layer in model.shape.layers_with("resid_post")]
    return [model.module.get_submodule(port.path) for port in ports if port.side == "output"]


def measure_rows(
    job: Job, gauge: Gauge, batch: Untouched, rows: Sequence[Row], *, is_checkpointed: bool = False
) -> Float[Tensor, "metric row"]:
    """Measure patched rows by every metric, with gradients; to be called inside ``differentiable``.

    Args:
        job: The job.
        gauge: The metrics, none of which spells answers out.
        batch: The pairs of the rows with their untouched runs.
        rows: The rows.
        is_checkpointed: Whether layers compute their insides once more in the backward, which is then to be run inside
            ``differentiable`` too.
    """
    device = job.model.device
    numbers = [row.pair for row in rows]
    inputs = job.pairs.batch(job.base, numbers, padding_side=job.padding_side)
    writes = writes_of_rows(job.model, batch.known, rows, inputs)
    layers = layers_of(job.model) if is_checkpointed else []
    output, _ = run_with_hooks(job.model, inputs_of(job.model, inputs), writes, with_gradient=True, recomputed=layers)
    logits = job.model.logits(output)
    run = Run(logits, inputs, torch.tensor(numbers, device=device))
    local = torch.tensor([row.local for row in rows], device=device)
    return torch.stack(gauge.tensors(run, batch.runs, local))
