"""What edges carry instead of what their senders give: the source run's value, zero, or a mean.

For the port of every sender there is what stands there instead, at the base's tokens: for a head that is its z, so that
zero is nothing at all behind the output projection, whose bias is no head's.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from causalpatch.engine.job import Job
from causalpatch.engine.meeting import Meeting
from causalpatch.engine.resolve import Placement, Placer
from causalpatch.engine.untouched import Untouched
from causalpatch.engine.wiring import Wiring
from causalpatch.models import Port
from causalpatch.patches import Mean, Patch, Value, Zero
from causalpatch.sites import Site


@dataclass(frozen=True, eq=False)
class PutIn:
    """What is put in, for some pairs.

    Args:
        there: By the port of a sender, ``[pair, position, columns]``.
        placed: Which tokens are changed at all, ``[pair, position, 1]``: of a source run those that have a partner.
    """

    there: Mapping[Port, Tensor]
    placed: Tensor

    @classmethod
    def of(cls, job: Job, batch: Untouched, wiring: Wiring, placer: Placer) -> "PutIn":
        """Return what the job's one intervention puts in.

        Args:
            job: Its one intervention patches all senders; see ``patches_of_senders``.
            batch: The pairs with their untouched runs, in which the ports of senders are kept.
            wiring: How the model is wired.
            placer: Which tokens meet.

        Raises:
            PairError: Prompts of unequal lengths have no alignment.
            PatchError: No prompt that a mean was taken over has a token.
        """
        base, targets = batch.known.base, job.interventions[0]
        ports = [wiring.layers[0].stream, *(wired.z for wired in wiring.layers)]
        ports += [wired.mlp_out.port for wired in wiring.layers]
        meeting = Meeting.of(job, batch, targets[0], placer)
        here = (meeting.row, meeting.base)
        placed = torch.zeros(base.tensors[ports[0]].shape[:2], dtype=torch.bool, device=meeting.row.device)
        placed[here] = True
        value = targets[0].value
        if isinstance(value, Zero):
            return cls({port: torch.zeros_like(base.tensors[port]) for port in ports}, placed[..., None])
        there = {port: base.tensors[port].clone() for port in ports}
        if not isinstance(value, Mean):
            for port, tensor in there.items():
                tensor[here] = batch.known.source.tensors[port][meeting.row, meeting.source]
            return cls(there, placed[..., None])
        rows = meeting.row.cpu().numpy()
        tokens = meeting.base.cpu().numpy() - base.batch.start[rows]
        placement, groups = Placement(tokens, tokens, tokens + 1), batch.known.groups_of(rows)
        for target in targets:
            tap = job.model.tap(target.site)
            mean = batch.known.means.at(target.site, value, placement, groups)
            tap.view.write(there[tap.port], (), here, mean.to(there[tap.port]))
        return cls(there, placed[..., None])


def patches_of_senders(value: Value, n_layers: int, n_heads: int) -> list[Patch]:
    """Return patches of all senders, the stream into the first layer first; of z one head where it stands for all.

    Args:
        value: ``Source()``, ``Zero()`` or a ``Mean``.
        n_layers: Layers of the model.
        n_heads: Heads of a layer.
    """
    # One head tells the port. Means are fitted head by head.
    heads = range(n_heads if isinstance(value, Mean) else 1)
    sites = [Site("resid_pre", 0)]
    for layer in range(n_layers):
        sites += [*(Site("z", layer, head) for head in heads), Site("mlp_out", layer)]
    return [Patch(site, value) for site in sites]
