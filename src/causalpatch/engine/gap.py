"""How far an engine's untouched runs lie from the model's own: the largest gap, recorded with every number.

An engine that replays layers computes attention by another kernel than the model's, so its untouched runs differ by
rounding. Some base prompts of a job are run once more by the model as it is, each by itself, the shortest first, and
measured. What was found out about a kernel may be out of date in ways that cannot be seen from outside, such as a
number in the closure of a function: then this gap shows it. (It does not show what layers make of rows that are no
whole prompts: of that the noise floor tells, from identity patches.)
"""

from dataclasses import replace
from functools import partial

import numpy as np
import torch
from jaxtyping import Float, Int

from causalpatch.engine.capture import capture
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.job import Block, Cost, Job
from causalpatch.engine.untouched import Fork, run_role, spell
from causalpatch.models import Model
from causalpatch.pairs import Batch

RUNS_PER_LOOK = 1000
"""One prompt is run again for so many runs: below 2 % of a sweep of 192 cells on 4 prompts of 16 tokens with GPT-2."""


def gap_of(job: Job, gauge: Gauge, block: Block) -> tuple[dict[str, float], bool]:
    """Compare untouched base runs with the model's own.

    Args:
        job: The job.
        gauge: The metrics.
        block: Cells of untouched base runs.

    Returns:
        The largest gap of each metric, in its own unit; and whether one is larger than rounding explains.

    Cost:
        A plain forward per 1,000 runs of the job, at least one; two where a metric compares with the source run.
    """
    n_looks = max(1, job.n_asked * len(job.pairs) // RUNS_PER_LOOK)
    order = np.argsort(job.pairs.lengths(job.base)[block.pairs], kind="stable")
    chosen = order[np.unique(np.linspace(0, len(order) - 1, min(n_looks, len(order))).astype(int))]
    plain = np.stack([_plain(job, gauge, block.pairs[place : place + 1]) for place in chosen], 1)
    gaps = np.abs(block.values[:, chosen] - plain).max(1)
    sizes = np.maximum(np.abs(block.values).max(1), np.abs(plain).max(1))
    # Far above rounding, and far below what another kernel or a lost token does.
    allowed = min(1e4 * torch.finfo(job.model.dtype).eps, 0.1) * sizes
    names = [metric.name for metric in gauge.metrics]
    return dict(zip(names, gaps.tolist(), strict=True)), bool((gaps > allowed).any())


def _plain(job: Job, gauge: Gauge, indices: Int[np.ndarray, " one"]) -> Float[np.ndarray, " metric"]:
    """Measure one base prompt by the model as it is, with the kernel of its own."""
    job = replace(job, interventions=[], n_controls=0)
    pair = torch.as_tensor(indices, device=job.model.device)
    reads_source = any("source" in metric.compares for metric in gauge.metrics)

    def go_on(model: Model, fork: Fork, inputs: Batch) -> Run:
        del fork
        return Run(model.logits(capture(model, inputs, ()).output), inputs, pair)

    runs: dict[str, Run] = {}
    models = (job.model_of("base"), job.model_of("source"))
    for name, role, model in zip(("base", "source"), (job.base, job.source), models, strict=True):
        if name == "base" or reads_source:
            captured = run_role(job, role, indices, (), Cost(), model)
            run = Run(model.logits(captured.output), captured.batch, pair)
            runs[name] = spell(job, gauge, role, run, partial(go_on, model))
    runs.setdefault("source", runs["base"])  # which no metric reads
    values: np.ndarray = gauge.values(runs["base"], runs, torch.zeros(1, dtype=torch.long, device=pair.device))[:, 0]
    return values
