"""What a model goes on to write behind patched prompts: the likeliest token each time, by whole forwards.

1. The logits at the last token of a row give its next token; the row goes on with it, up to the token that ends the
   text, and the next forward runs the prompt with all that was written.
2. The same patches are made in each of these forwards. Positions are the prompt's, so that what is written sees the
   patched prompt and is left to itself; a patch that names no position, and has one value for all tokens, may also be
   made at the tokens that are written (``at_all``).

Exact in any model, since nothing is kept from one forward to the next. Cost: a forward for each further token.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from causalpatch.engine.gauge import Gauge, Mode, Run
from causalpatch.engine.job import Job
from causalpatch.engine.resolve import Placement, Role, Target
from causalpatch.engine.values import Row
from causalpatch.pairs import Batch
from causalpatch.patches import Constant, ProjectOut, Steer, Zero

GoOn = Callable[[Mode, Batch], Run]
"""Runs prompts followed by what was written, with the same patches, made as the mode says."""


def generate(job: Job, gauge: Gauge, role: Role, run: Run, go_on: GoOn) -> Run:
    """Add what the model goes on to write to a run, for each way in which a metric asks for it.

    Args:
        job: The job.
        gauge: The metrics.
        role: The side whose prompts the run has.
        run: The run of the prompts.
        go_on: Runs them with what was written.
    """
    found = {mode: _written(job, role, run, n_steps, _with_mode(go_on, mode)) for mode, n_steps in gauge.steps.items()}
    return replace(run, written=found) if found else run


def at_all(job: Job, rows: Sequence[Row], inputs: Batch) -> list[Row]:
    """Return rows whose patches are also made at the tokens that follow the prompt, where they can be.

    Args:
        job: The job.
        rows: The rows.
        inputs: Their prompts, with what was written behind them.
    """
    n_tokens = inputs.mask.sum(1)
    known: dict[int, Placement] = {}

    def place(target: Target, given: Placement | None, length: int) -> Placement | None:
        if given is None or target.is_ahead or not is_same_at_all(target):
            return given
        if length not in known:
            tokens = np.arange(length)
            known[length] = Placement(tokens, tokens, tokens + 1)
        return known[length]

    return [
        replace(row, targets=tuple((target, place(target, given, int(length))) for target, given in row.targets))
        for row, length in zip(rows, n_tokens, strict=True)
    ]


def is_same_at_all(target: Target) -> bool:
    """Say whether a patch names no position and has one value for all tokens."""
    value = target.value
    is_one = isinstance(value, Zero | Steer | ProjectOut) or (isinstance(value, Constant) and np.ndim(value.array) <= 1)
    return target.has_position and target.position is None and target.column is None and is_one


def _with_mode(go_on: GoOn, mode: Mode) -> Callable[[Batch], Run]:
    return lambda inputs: go_on(mode, inputs)


def _written(job: Job, role: Role, run: Run, n_steps: int, go_on: Callable[[Batch], Run]) -> Int[Tensor, "row step"]:
    pairs, stops = run.pair.cpu().numpy(), set(job.model.stop_ids)
    texts: list[list[int]] = [[] for _ in pairs]
    is_open = np.ones(len(pairs), dtype=bool)
    while True:
        next_ids = _likeliest(run)
        for row in np.flatnonzero(is_open).tolist():
            texts[row].append(int(next_ids[row]))
            is_open[row] = texts[row][-1] not in stops and len(texts[row]) < n_steps
        if not is_open.any():
            break
        run = go_on(job.pairs.batch(role, pairs, padding_side=job.padding_side, continuations=texts))
    written = np.full((len(pairs), n_steps), -1, dtype=np.int64)
    for row, text in enumerate(texts):
        written[row, : len(text)] = text
    return torch.as_tensor(written, device=run.logits.device)


def _likeliest(run: Run) -> Int[np.ndarray, " row"]:
    """Return the token with the largest logit behind the last token of each row; of equal ones the first."""
    last = run.columns(run.batch.mask.sum(1) - 1)
    rows = torch.arange(len(last), device=last.device)
    ids: np.ndarray = run.logits[rows, last].argmax(-1).cpu().numpy()
    return ids
