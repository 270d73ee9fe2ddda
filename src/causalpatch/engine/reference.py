"""The reference engine: full forwards with plain hooks. It is the oracle for every faster engine and stays simple.

1. Pairs are taken in batches of like length. For each batch the base and source runs are made once: they give the
   baselines, and the values of every site that is read.
2. Rows are (intervention, pair). As many as fit into memory are stacked into one forward of the whole model, in which
   hooks replace the sites' values.
3. Metrics read the outputs. Answers of several tokens are spelt out by further forwards that go on through the answer,
   with the same patches on the prompt.
4. When memory runs out the number of rows is halved, down to one.

Symbols: K interventions, P pairs in a batch, R rows in a forward.
Cost: K x pairs rows of a full forward, plus two per pair.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from causalpatch.base.errors import MemoryExhausted, NotFinite
from causalpatch.engine.capture import Captured, capture, inputs_of
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.engine.means import Means, fit_means
from causalpatch.engine.memory import is_out_of_memory, release_memory, row_cost, rows_per_forward
from causalpatch.engine.plan import ModelCost, Plan, make_plan
from causalpatch.engine.resolve import Placer, Role, Target
from causalpatch.engine.values import Known, Row, writes_of_rows
from causalpatch.models import Model
from causalpatch.pairs import Batch, Pairs
from causalpatch.pairs.batch import PaddingSide
from causalpatch.pairs.role import ROLE_WORDS
from causalpatch.patches import Identity, Mean
from causalpatch.sites import Site

BASE, SOURCE = -1, -2
"""Indices that stand for the untouched runs in a block."""


@dataclass(frozen=True)
class Job:
    """What is to be measured.

    Args:
        model: The model.
        pairs: The pairs.
        interventions: The targets of each intervention.
        base: Which side is the base run's, the other being the source's.
        padding_side: Where short prompts are padded.
        budget_gib: Memory for activations in GiB, or None for the default.
        max_rows: Most rows in one forward, or None for what memory allows.
        reference: Index of the intervention that ablates everything at once, or None. Where a pair lacks one of its
            positions the rest is ablated all the same.
    """

    model: Model
    pairs: Pairs
    interventions: Sequence[tuple[Target, ...]]
    base: Role
    padding_side: PaddingSide = "right"
    budget_gib: float | None = None
    max_rows: int | None = None
    reference: int | None = None

    @property
    def source(self) -> Role:
        """Which side is the source run's."""
        return "clean" if self.base == "corrupt" else "corrupt"


@dataclass(frozen=True)
class Block:
    """Numbers of some cells, as they become known.

    Args:
        interventions: Indices of interventions; ``BASE`` and ``SOURCE`` stand for the untouched runs.
        pairs: Indices of pairs.
        values: Metric values; NaN where a pair lacks a position that the intervention writes.
        is_aligned: Whether the pair has all those positions.
    """

    interventions: Int[np.ndarray, " cell"]
    pairs: Int[np.ndarray, " cell"]
    values: Float[np.ndarray, "metric cell"]
    is_aligned: Bool[np.ndarray, " cell"]


@dataclass
class Cost:
    """What was spent: calls of the model, and rows in them."""

    forwards: int = 0
    rows: int = 0


@dataclass(frozen=True)
class _PairBatch:
    """Some pairs with their untouched runs."""

    indices: np.ndarray
    known: Known
    runs: dict[str, Run]


def measure(job: Job, gauge: Gauge, means: Means, cost: Cost) -> Iterator[Block]:
    """Measure every intervention on every pair.

    Args:
        job: What is to be measured.
        gauge: The metrics.
        means: Means of the sites that are replaced by one.
        cost: Counts what is spent.

    Yields:
        Blocks of cells: for each batch of pairs first the untouched runs, then the patched ones.

    Raises:
        MemoryExhausted: One row does not fit into memory.
        PatchDidNotFire: A module of a patch did not run.
        NotFinite: An untouched run gives NaN or infinity.
    """
    placer = Placer(job.pairs, job.base)
    waiting = list(batches_of_pairs(job))
    while waiting:
        indices = waiting.pop(0)
        try:
            batch = _run_untouched(job, gauge, indices, means, cost)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            waiting[:0] = _halves(job, indices, error)
            release_memory()
            continue
        local = torch.arange(len(indices), device=job.model.device)
        for name, code in (("base", BASE), ("source", SOURCE)):
            values = gauge.values(batch.runs[name], batch.runs, local)
            _check_finite(job, gauge, name, indices, values)
            yield Block(np.full(len(indices), code), indices, values, np.ones(len(indices), dtype=bool))
        rows, lost = _lay_rows(job, placer, indices)
        if lost:
            cells = np.array(lost)
            nothing = np.full((len(gauge.metrics), len(cells)), np.nan)
            yield Block(cells[:, 0], cells[:, 1], nothing, np.zeros(len(cells), dtype=bool))
        yield from _run_patched(job, gauge, batch, rows, cost)


def batches_of_pairs(job: Job) -> Iterator[np.ndarray]:
    """Yield the indices of pairs in batches of like length, each with at most as many pairs as rows fit."""
    lengths = np.maximum(job.pairs.lengths("clean"), job.pairs.lengths("corrupt"))
    order = np.argsort(lengths, kind="stable")
    start = 0
    while start < len(order):
        # Sorted by length, so the last pair of a batch is its longest: take as many as fit at that length.
        stop = min(len(order), start + _most_rows(job, int(lengths[order[start]])))
        stop = start + min(stop - start, _most_rows(job, int(lengths[order[stop - 1]])))
        yield np.sort(order[start:stop])
        start = stop


def _most_rows(job: Job, n_tokens: int) -> int:
    fitting = rows_per_forward(job.model, n_tokens, job.budget_gib)
    return fitting if job.max_rows is None else max(1, min(fitting, job.max_rows))


def _run_untouched(job: Job, gauge: Gauge, indices: np.ndarray, means: Means, cost: Cost) -> _PairBatch:
    """Make the base and source runs of some pairs, and keep there what the patches read."""
    targets = [target for group in job.interventions for target in group]
    read = {
        job.source: list(dict.fromkeys(t.site for t in targets if t.needs_source)),
        job.base: list(dict.fromkeys(t.site for t in targets if isinstance(t.value, Identity))),
    }
    captured = {role: _capture(job, role, indices, sites, cost) for role, sites in read.items()}
    runs = {
        name: _finish_run(job, gauge, role, captured[role], indices, cost)
        for name, role in (("base", job.base), ("source", job.source))
    }
    return _PairBatch(indices, Known(captured[job.source], captured[job.base], means), runs)


def _capture(job: Job, role: Role, indices: np.ndarray, sites: Sequence[Site], cost: Cost) -> Captured:
    cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(indices)
    return capture(job.model, job.pairs.batch(role, indices, padding_side=job.padding_side), sites)


def _finish_run(job: Job, gauge: Gauge, role: Role, captured: Captured, indices: np.ndarray, cost: Cost) -> Run:
    """Turn a captured run into one that metrics can read, spelling answers out where they have several tokens."""
    pair = torch.as_tensor(indices, device=job.model.device)
    run = Run(job.model.logits(captured.output), captured.batch, pair)
    return _spell(job, gauge, role, run, (), None, cost)


def _lay_rows(job: Job, placer: Placer, indices: np.ndarray) -> tuple[list[Row], list[tuple[int, int]]]:
    """Return the rows to run for some pairs, and the (intervention, pair) cells that have no such position."""
    rows, lost = [], []
    for number, targets in enumerate(job.interventions):
        for local, pair in enumerate(indices.tolist()):
            placed = [(target, placer.place(target, pair) if target.has_position else None) for target in targets]
            if number == job.reference:
                placed = [(target, place) for target, place in placed if place is not None or not target.has_position]
            if any(place is None and target.has_position for target, place in placed):
                lost.append((number, pair))
            else:
                rows.append(Row(number, pair, local, tuple(placed)))
    return rows, lost


def _run_patched(job: Job, gauge: Gauge, batch: _PairBatch, rows: Sequence[Row], cost: Cost) -> Iterator[Block]:
    """Run rows in forwards as large as memory allows, halving them when it runs out."""
    lengths = job.pairs.lengths(job.base)
    most = _most_rows(job, int(lengths[batch.indices].max()))
    start = 0
    while start < len(rows):
        some = rows[start : start + most]
        try:
            values = _run_rows(job, gauge, batch, some, cost)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            if len(some) == 1:
                raise _exhausted(job, some[0].pair) from error
            most = len(some) // 2
            release_memory()
            continue
        start += len(some)
        numbers = np.array([row.intervention for row in some])
        pairs = np.array([row.pair for row in some])
        yield Block(numbers, pairs, values, np.ones(len(some), dtype=bool))


def _run_rows(
    job: Job, gauge: Gauge, batch: _PairBatch, rows: Sequence[Row], cost: Cost
) -> Float[np.ndarray, "metric row"]:
    pairs = np.array([row.pair for row in rows])
    inputs = job.pairs.batch(job.base, pairs, padding_side=job.padding_side)
    run = _forward(job, batch.known, rows, inputs, cost)
    run = _spell(job, gauge, job.base, run, rows, batch.known, cost)
    local = torch.tensor([row.local for row in rows], device=job.model.device)
    return gauge.values(run, batch.runs, local)


def _forward(job: Job, known: Known, rows: Sequence[Row], inputs: Batch, cost: Cost) -> Run:
    writes = writes_of_rows(job.model, known, rows, inputs)
    output, _ = run_with_hooks(job.model, inputs_of(job.model, inputs), writes)
    cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(rows)
    pair = torch.tensor([row.pair for row in rows], device=job.model.device)
    return Run(job.model.logits(output), inputs, pair)


def _spell(job: Job, gauge: Gauge, role: Role, run: Run, rows: Sequence[Row], known: Known | None, cost: Cost) -> Run:
    """Add the log-probabilities of answers of several tokens, by forwards that go on through each of them."""
    pairs = run.pair.cpu().numpy()
    found: dict[str, list[torch.Tensor]] = {}
    for side, number in gauge.forks:
        going_on = gauge.continuations(side, number, pairs)
        inputs = job.pairs.batch(role, pairs, padding_side=job.padding_side, continuations=going_on)
        if known is None:
            output, _ = run_with_hooks(job.model, inputs_of(job.model, inputs))
            cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(pairs)
            fork = Run(job.model.logits(output), inputs, run.pair)
        else:
            fork = _forward(job, known, rows, inputs, cost)
        found.setdefault(side, []).append(gauge.spelt(fork, side, number))
    forks = {side: torch.stack(columns, 1) for side, columns in found.items()}
    return Run(run.logits, run.batch, run.pair, forks)


def _check_finite(job: Job, gauge: Gauge, name: str, indices: np.ndarray, values: np.ndarray) -> None:
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        metric, row = bad[0]
        role = job.base if name == "base" else job.source
        raise NotFinite(
            f"the {ROLE_WORDS[role]} run of pair {indices[row]} of '{job.pairs.name}' gives {values[metric, row]}",
            facts=[("metric", gauge.metrics[metric].name), ("model", f"'{job.model.name}' in {job.model.dtype}")],
            fix="check the checkpoint for NaN weights, or open the model in float32",
        )


def _halves(job: Job, indices: np.ndarray, error: Exception) -> list[np.ndarray]:
    if len(indices) == 1:
        raise _exhausted(job, int(indices[0])) from error
    middle = len(indices) // 2
    return [indices[:middle], indices[middle:]]


def _exhausted(job: Job, pair: int) -> MemoryExhausted:
    n_tokens = max(int(job.pairs.lengths(role)[pair]) for role in (job.base, job.source))
    needed = row_cost(job.model, n_tokens)
    return MemoryExhausted(
        f"one run of pair {pair} of '{job.pairs.name}' does not fit into memory",
        facts=[
            ("tokens", n_tokens),
            ("needs", f"about {needed.total / 2**20:,.0f} MiB, {needed.logits / 2**20:,.0f} of them for logits"),
            ("device", job.model.device),
        ],
        fix="shorten the prompts, open the model in bfloat16, or use a device with more memory",
    )


def fit_all_means(job: Job) -> Means:
    """Fit every mean that the interventions of a job put in; nothing runs where there is none."""
    targets = [target for group in job.interventions for target in group if isinstance(target.value, Mean)]
    fitted: dict[tuple[Site, Mean], torch.Tensor] = {}
    for mean in dict.fromkeys(target.value for target in targets if isinstance(target.value, Mean)):
        sites = list(dict.fromkeys((t.site, t.has_position) for t in targets if t.value == mean))
        names = [site for site, _ in sites]
        runs = (_capture(job, mean.side, indices, names, Cost()) for indices in batches_of_pairs(job))
        fitted |= fit_means(runs, sites, mean, int(job.pairs.lengths(mean.side).max())).of
    return Means(fitted)


def plan_job(job: Job, n_forks: int) -> Plan:
    """Count what a job would cost; nothing runs.

    Args:
        job: The job.
        n_forks: Forwards per row beyond the first.
    """
    model, pairs = job.model, job.pairs
    placer = Placer(pairs, job.base)
    cells = [len(_lay_rows(job, placer, np.array([pair]))[0]) for pair in range(len(pairs))]
    lengths = np.maximum(pairs.lengths("clean"), pairs.lengths("corrupt"))
    longest = int(lengths.max())
    tables = {id(p) for m in model.module.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    head_width = model.head_width
    unembedding = model.vocab_size * model.width
    weights = sum(p.numel() for p in model.module.parameters() if id(p) not in tables)
    is_tied = not any(p.shape[0] == model.vocab_size and id(p) not in tables for p in model.module.parameters())
    cost = ModelCost(
        weights + (unembedding if is_tied else 0),
        model.shape.n_layers * model.shape.units.get("head", 0) * head_width,
        row_cost(model, longest).total,
    )
    sites = dict.fromkeys(str(target.site) for group in job.interventions for target in group)
    first = [
        " ".join(map(repr, pairs.tokens(role, 0))) if pairs.kind == "tokens" else f"array {pairs[0].input(role).shape}"
        for role in ("clean", "corrupt")
    ]
    return make_plan(
        cost,
        lengths.tolist(),
        cells,
        n_interventions=len(job.interventions),
        n_forks=n_forks,
        rows_per_forward=_most_rows(job, longest),
        shown=((first[0], first[1]), tuple(sites)),
    )
