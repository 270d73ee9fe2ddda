"""Which linear maps read a tensor, and how far it moves from the base run to the source run: seen in untouched runs.

A module whose input is the site's own tensor, bit for bit, reads it. So readers are found in models of any kind.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from causalpatch.engine.batches import in_batches
from causalpatch.engine.bypass import in_this_thread
from causalpatch.engine.capture import inputs_of, probe
from causalpatch.engine.hooks import quiet
from causalpatch.engine.job import Cost, Job, batches_of_pairs
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.untouched import run_role
from causalpatch.models import plain_rows
from causalpatch.sites import Site


def paths_that_read(job: Job, site: Site) -> list[str]:
    """Return the linear maps whose input is a site's tensor in a run of the first base prompt.

    Args:
        job: The job, for its model and pairs.
        site: The site.

    Raises:
        MemoryExhausted: The run does not fit into memory.
        PatchDidNotFire: The module of the site did not run.
    """
    model, role = job.model, job.base
    value = probe(model, job.pairs, role, 0, [site]).value(site)
    found: dict[str, bool] = {}

    def see(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        given = args[0] if args and isinstance(args[0], Tensor) else None
        is_same = (
            given is not None and given.numel() == value.numel() and torch.equal(given.reshape(value.shape), value)
        )
        found[path] = found.get(path, True) and is_same

    with quiet(model), torch.no_grad(), ExitStack() as hooks:
        for path, module in model.module.named_modules():
            weight = plain_rows(module)
            if weight is not None and len(weight) == value.shape[-1]:
                hook = in_this_thread(partial(see, path))
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        model.module(**inputs_of(model, job.pairs.batch(role, [0])))
    return [path for path, reads in found.items() if reads]


def moves_of(job: Job, target: Target) -> Float[np.ndarray, "element width"]:
    """Return source minus base at every token that a target writes, over all pairs.

    Args:
        job: The job, for its model and pairs.
        target: The target, whose value is taken from the source.

    Returns:
        The differences with all value axes in one, in float64; a pair without the position gives none.

    Raises:
        MemoryExhausted: One run does not fit into memory.
    """
    placer = Placer(job.pairs, job.base)

    def differences(indices: np.ndarray) -> np.ndarray:
        base = run_role(job, job.base, indices, [target.site], Cost())
        source = run_role(job, job.source, indices, [target.site], Cost(), job.model_of("source"))
        here, there = base.value(target.site).double(), source.value(target.site).double()
        if not target.has_position:
            return _flat([there - here])
        found = []
        for row, place in enumerate(placer.places(target, indices.tolist())):
            for token, start, stop in [] if place is None else zip(place.base, place.start, place.stop, strict=True):
                shift = source.batch_of(target.site).start[row]
                mean = there[row, shift + start : shift + stop].mean(0)
                found.append((mean - here[row, base.batch_of(target.site).start[row] + token])[None])
        return _flat(found)

    parts = [part for part in in_batches(job, batches_of_pairs(job), differences) if len(part)]
    return np.concatenate(parts) if parts else np.zeros((0, 1))


def _flat(parts: Sequence[Tensor]) -> np.ndarray:
    if not parts:
        return np.zeros((0, 1))
    whole = torch.cat(list(parts))
    flat: np.ndarray = whole.reshape(len(whole), -1).cpu().numpy()
    return flat
