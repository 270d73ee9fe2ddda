"""Untouched runs by way of what is remembered: made where they are not, and handed out as if they had just been made.

A run that is made keeps what its own job asks for, and what other jobs on the same pairs are said to ask for, as far as
that fits beside it. Ports inside attention are an exception: whether attention spells its steps out changes rounding,
so that a run serves jobs with the same of these alone. Runs in few bits, runs whose tensors are kept elsewhere than on
the device, and those whose routers are watched are made each time.
"""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from causalpatch.engine.canonical import canonical
from causalpatch.engine.capture import Captured, capture, ports_of
from causalpatch.engine.drawn import Donated
from causalpatch.engine.job import Cost, Job
from causalpatch.engine.planning import numbers_of
from causalpatch.engine.segments import entry_of
from causalpatch.engine.shares import bytes_per_token, captured_bytes
from causalpatch.engine.shelf import OnShelf, Where
from causalpatch.engine.stack import Stack, StackRun
from causalpatch.engine.unchanged_rows import kept_ports
from causalpatch.engine.values import Taps
from causalpatch.models import Model, Port
from causalpatch.pairs import Batch
from causalpatch.sites import Site


def run_stack(job: Job, stack: Stack, batch: Batch, where: Where = "device") -> tuple[StackRun, bool]:
    """Run prompts up to the final norm, and say whether they were run now.

    Args:
        job: What is measured.
        stack: The layers.
        batch: The prompts, padded on the right.
        where: Where the tensors of the run are kept.

    Raises:
        MemoryExhausted: They are to be kept on disk, and it is full.
        ModelUnsupported: The model's layers cannot be replayed one by one; the message says why.
    """
    own, projected = ports_of_job(job, stack)
    memory = job.remembered
    if memory is None or where != "device" or job.few_bits is not None or job.ties is not None:
        return stack.run(batch, own, projected, where), True
    inside = frozenset(port for port in own if port.is_inside)
    further = _further(job, stack, batch)

    def make(asked: Collection[tuple[Port, bool]]) -> StackRun:
        kept, if_once = ([port for port, is_one in asked if is_one is which] for which in (False, True))
        return stack.run(batch, kept, if_once)

    wanted = [(port, False) for port in own] + [(port, True) for port in projected]
    found, is_new = memory.run(
        ("stack", content_of(batch), inside),
        wanted,
        make,
        beside=further,
        bytes_of=_stack_bytes,
        allowed=captured_bytes(job),
    )
    kept = {port: found.kept[port] for port in dict.fromkeys([*own, *projected]) if port in found.kept}
    return replace(found, kept=OnShelf(found.shelf, kept)), is_new


def ports_of_job(job: Job, stack: Stack) -> tuple[list[Port], list[Port]]:
    """Return what is kept of the untouched runs for a job's patches.

    Args:
        job: What is measured.
        stack: The layers.

    Returns:
        The ports whose base and source values the patches need, or a replay that enters behind attention; and modules'
        outputs in which rows of patched runs are as in the base run.
    """
    ports: dict[Port, None] = {}
    taps = Taps(stack.model)
    for target in (target for group in job.interventions for target in group):
        tap = taps.kind(target).tap
        if target.needs_source or target.needs_base or isinstance(target.value, Donated):
            ports |= dict.fromkeys((tap.port, *tap.companions))
        layer = target.site.layer
        if layer is None:
            continue
        block = stack.blocks[layer]
        ports |= dict.fromkeys(stack.kept_for(block, entry_of(target, layer, stack.n_layers).stage))
    return list(ports), kept_ports(job)


def capture_once(
    job: Job, cost: Cost, model: Model, batch: Batch, sites: Sequence[Site], beside: Iterable[Site] = ()
) -> Captured:
    """Run a batch and keep what sites need, unless it was run before; runs that are made are counted.

    Args:
        job: What is measured.
        cost: Counts what is spent.
        model: The model that runs.
        batch: Its inputs.
        sites: The sites.
        beside: Sites that other jobs will ask for, of the same inputs.
    """
    memory, opens = job.remembered, job.opens_attention

    def make(wanted: Collection[Site]) -> Captured:
        return capture(model, batch, wanted, opens_attention=opens)

    if memory is None or job.ties is not None:
        captured = make(sites)
        cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(batch)
        return captured
    ports = ports_of(model, sites)
    inside = frozenset(port for port in ports if port.is_inside)
    allowed = captured_bytes(job)
    more = [site for site in dict.fromkeys(beside) if not any(port.is_inside for port in ports_of(model, [site]))]
    if _site_bytes(model, batch, more) > allowed:
        more = []
    found, is_new = memory.run(
        ("capture", model is job.model, content_of(batch), opens, inside),
        [*sites],
        make,
        beside=more,
        bytes_of=_captured_bytes,
        allowed=allowed,
    )
    if is_new:
        cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(batch)
    return replace(found, batch=batch, tensors={port: found.tensors[port] for port in ports})


def content_of(batch: Batch) -> str:
    """Return what tells a batch from others: all that a run of it reads."""
    seen = hashlib.sha256()
    for part in (batch, batch.encoder, batch.seen):
        if part is None:
            seen.update(b"none")
            continue
        arrays: list[tuple[str, np.ndarray | None]] = [
            (name, getattr(part, name)) for name in ("ids", "mask", "position_ids", "start", "lengths", "values")
        ]
        arrays += [*part.beside.items(), *part.common.items()]
        for name, array in arrays:
            said = np.zeros(0) if array is None else np.ascontiguousarray(array)
            seen.update(f"{name} {said.dtype} {said.shape}".encode())
            seen.update(said.tobytes())
    return seen.hexdigest()


def _further(job: Job, stack: Stack, batch: Batch) -> list[tuple[Port, bool]]:
    """Return what other jobs on the same prompts will ask for, if it fits beside the runs."""
    memory, numbers = job.remembered, numbers_of(stack.model)
    if memory is None or not memory.beside or numbers is None:
        return []
    others = [canonical(targets, stack.model) for targets in memory.beside]
    wide = replace(job, interventions=[*others, *job.interventions])
    longest = batch.ids.shape[1]
    if bytes_per_token(wide, numbers, longest) * batch.ids.size > captured_bytes(job):
        return []
    own, projected = ports_of_job(wide, stack)
    return [(port, False) for port in own if not port.is_inside] + [(port, True) for port in projected]


def _stack_bytes(run: StackRun) -> int:
    tensors = [*run.inputs.values(), *run.kept.values()]
    tensors += [part for seen in run.attention for part in (seen.keys, seen.values)]
    return _bytes(tensors)


def _captured_bytes(run: Captured) -> int:
    output = run.output if isinstance(run.output, Tensor) else run.model.logits(run.output)
    return _bytes([*run.tensors.values(), output])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _site_bytes(model: Model, batch: Batch, sites: Sequence[Site]) -> int:
    """Estimate the bytes that sites take: as many tokens of the widest activation each."""
    if not model.width:
        return 2**63 if sites else 0  # of modules that are known by no name, nothing is known
    widest = max(model.width, model.shape.units.get("neuron", 0))
    return len(sites) * batch.ids.size * widest * (torch.finfo(model.dtype).bits // 8)
