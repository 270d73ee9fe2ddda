"""Layer restart: patched runs begin at the first layer that their patches touch.

1. Before anything is measured, a short and a long pair are run once, their source runs are made, and then the base
   runs are repeated from every layer at which patches enter: the logits must be those of the whole run. A model that
   passes anything between layers besides the stream is refused here (see ``layers``).
2. Pairs are taken in batches, whose base runs keep the stream into each such layer, beside what patches read.
3. A row (intervention, pair) all of whose new values are those that the base run has already is not run.
4. The other rows are sorted by the layer at which they enter and stacked into forwards of the model, each beginning at
   the first layer that its rows need. Metrics, answers of several tokens and memory are as in ``reference``.

What stands before the layers enters in front of them: a whole forward. ``resid_post`` is the stream into the next
layer and enters there; the final norm and the logits need the last layer alone.

Symbols: L layers, of which a row that enters at layer l runs L - l.
Cost: per row (L - l) / L of a forward, and one embedding and unembedding. Kept: the stream into each entry layer for
the pairs of a batch.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.batches import in_batches, in_forwards
from causalpatch.engine.canonical import shared_outputs
from causalpatch.engine.capture import Captured, inputs_of
from causalpatch.engine.few_logits import agree, few_columns, may_take_few, reads_logits, tokens_at
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.hooks import Write, quiet, run_with_hooks, users_hooks
from causalpatch.engine.job import Block, Cost, Job, batches_of_pairs, lay_rows, most_rows
from causalpatch.engine.layers import Layers, entering, look_at, refuse_layers
from causalpatch.engine.means import Means
from causalpatch.engine.memory import row_cost
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.routes import watching
from causalpatch.engine.untouched import Fork, Untouched, run_role, run_untouched, spell
from causalpatch.engine.values import Known, Row, Taps, unchanged, writes_of_rows
from causalpatch.pairs import Batch
from causalpatch.patches import Identity, Mean, Source
from causalpatch.results.status import Status
from causalpatch.sites import Site

# A layer's calls cost about as much as this many floating-point operations on its weights: .3 ms at 100 GFLOP/s on a
# CPU, at 20 TFLOP/s on a GPU. Rows of two entry layers go into one forward where that is less than what they waste.
_CALLS_ON_CPU, _CALLS_ON_GPU = 3e7, 6e9


def why_not(job: Job, gauge: Gauge) -> str | None:
    """Return why layers cannot be left out of such runs at all, or None."""
    model = job.model
    if gauge.steps:
        return "what the model goes on to write is read, which takes whole forwards"
    if model.family is None:
        return f"the layers of '{model.name}' are not known by name"
    if "resid_pre" in model.shape.refused:
        return "its layers hand on more than one stream"
    if job.pairs.in_tokens.kind != "tokens":
        return f"'{job.pairs.name}' holds arrays whose tokens are not known"
    modules = Layers(model).modules
    if len(set(modules)) < len(modules):
        return f"layers of '{model.name}' are one and the same module"
    if any(getattr(module, "_compiled_call_impl", None) is not None for module in modules):
        return f"layers of '{model.name}' are compiled"
    return None


def why_rather_not(job: Job) -> str | None:
    """Return why layers had better not be left out of runs unless someone asks for it, or None.

    A reader's hooks on the layers give the same numbers, but what they see is in no run: a layer that is left out is
    handed the embedding and hands it on, and modules inside it do not run at all.
    """
    paths = tuple(port.path for port in Layers(job.model).ports)
    hooked = [name for name in users_hooks(job.model) if name == "all modules" or _is_inside(name.strip("'"), paths)]
    return f"hooks stand on {hooked[0]}, and they would see streams that are in no run" if hooked else None


def _is_inside(path: str, layers: Sequence[str]) -> bool:
    return any(path == layer or path.startswith(f"{layer}.") for layer in layers)


def measure(job: Job, gauge: Gauge, means: Means, cost: Cost) -> Iterator[Block]:
    """Measure every intervention on every pair, beginning each run at the first layer that is patched.

    Args:
        job: What is to be measured.
        gauge: The metrics.
        means: Means of the sites that are replaced by one.
        cost: Counts what is spent.

    Yields:
        Blocks of cells: for each batch of pairs first the untouched runs, then the patched ones.

    Raises:
        ModelUnsupported: Layers leave more to the next ones than the stream; nothing was yielded before.
        MemoryExhausted: One row does not fit into memory.
        PatchDidNotFire: A module of a patch did not run.
        NotFinite: An untouched run gives NaN or infinity.
    """
    layers = Layers(job.model)
    job, means = _enter_late(job, means, layers)
    job = replace(job, interventions=[_from_first_change(layers, group) for group in job.interventions])
    entries = np.array([min((_entry(layers, t) for t in group), default=0) for group in job.interventions], dtype=int)
    later = sorted({*entries.tolist()} - {0})
    stream = list(dict.fromkeys(site for entry in later for site in layers.kept_for(entry)))
    is_few = verify(job, gauge, layers, later, cost)
    keeps = [is_few and not any(reads_logits(layers, target) for target in group) for group in job.interventions]
    setup = _Setup(job, gauge, cost, layers, entries, keeps)
    placer, taps = Placer(job.pairs, job.base), Taps(job.model)
    sources = [target.site for group in job.interventions[: job.n_asked] if _may_derive(group) for target in group]
    base_sites = [*stream, *dict.fromkeys(sources)]
    also = _asked_later(job, layers)
    make = partial(run_untouched, job, gauge, means, cost, base_sites=base_sites, fork_sites=stream, also=also)
    for batch in in_batches(job, _batches(job, len(stream) * (1 + len(gauge.forks))), make):
        yield from batch.blocks()
        rows, lost = lay_rows(job, placer, batch.indices)
        if lost:
            yield Block.lost(lost, len(gauge.metrics))
        controls = [row for row in rows if row.intervention >= job.n_asked]
        derived, asked = split_derived(taps, batch.known, [row for row in rows if row.intervention < job.n_asked])
        run = partial(_run_rows, setup, batch)
        yield from in_forwards(job, _stacked(setup, controls), run)
        if derived:
            yield _derived(batch, derived)
        yield from in_forwards(job, _stacked(setup, asked), run)
        del batch, run  # its tensors go before those of the next are made


@dataclass(frozen=True)
class _Setup:
    """What does not change from batch to batch.

    Args:
        job: The job.
        gauge: The metrics.
        cost: Counts what is spent.
        layers: The model's layers.
        entries: For each intervention the first layer that is run.
        keeps: For each intervention whether logits may be computed for the tokens alone that are read.
    """

    job: Job
    gauge: Gauge
    cost: Cost
    layers: Layers
    entries: Int[np.ndarray, " intervention"]
    keeps: Sequence[bool]

    def entry(self, row: Row) -> int:
        """Return the first layer that has to be run for a row."""
        return int(self.entries[row.intervention])


def split_derived(taps: Taps, known: Known, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Part rows whose new values all are those of the base run already from the others.

    Args:
        taps: Where the targets are read.
        known: The untouched runs; both hold the sites whose value is the source's.
        rows: Rows that were asked for, no controls.

    Returns:
        Rows that need no run, since they are the base run; and the others.
    """
    may = [_may_derive([target for target, _ in row.targets]) for row in rows]
    entries = [
        (target, row.local, place)
        for row, is_open in zip(rows, may, strict=True)
        if is_open
        for target, place in row.targets
        if place is not None and isinstance(target.value, Source)
    ]
    same = iter(unchanged(taps, known, entries))
    derived: list[Row] = []
    others: list[Row] = []
    for row, is_open in zip(rows, may, strict=True):
        # What keeps the value of the base run is never another.
        answers = [next(same) for target, _ in row.targets if isinstance(target.value, Source)] if is_open else []
        is_same = is_open and all(answer.all() for answer in answers)
        (derived if is_same else others).append(row)
    return derived, others


def _may_derive(targets: Sequence[Target]) -> bool:
    kept = [target for target in targets if not isinstance(target.value, Identity)]
    return bool(kept) and all(isinstance(target.value, Source) and target.has_position for target in kept)


def _derived(batch: Untouched, rows: Sequence[Row]) -> Block:
    local = [row.local for row in rows]
    numbers = np.array([row.intervention for row in rows])
    return Block.of(numbers, batch.indices[local], batch.values["base"][:, local], Status.DERIVED)


def _enter_late(job: Job, means: Means, layers: Layers) -> tuple[Job, Means]:
    """Write the stream out of a layer as the stream into the next one, where nothing stands between."""
    fitted = dict(means.of)

    def late(targets: tuple[Target, ...]) -> tuple[Target, ...]:
        if all(target.site.name != "resid_post" for target in targets):
            return targets
        shared = {layers.of(site) for site in shared_outputs(job.model, targets)}
        entered = {(port.path, port.side) for port in (job.model.tap(target.site).port for target in targets)}
        found = []
        for target in targets:
            layer = layers.of(target.site) if target.site.module is None else None
            is_late = target.site.name == "resid_post" and layer not in shared
            if not is_late or layer is None or layers.is_last(layer):
                found.append(target)
                continue
            site = layers.sites[layer + 1]
            # The reader's own hooks on the next layer's input come after resid_post and before resid_pre.
            next_port = layers.ports[layer + 1]
            if (next_port.path, next_port.side) in entered or layers.modules[layer + 1]._forward_pre_hooks:
                return targets
            if isinstance(target.value, Mean):
                fitted[site, target.value] = fitted[target.site, target.value]
            found.append(replace(target, site=site))
        return tuple(found)

    return replace(job, interventions=[late(targets) for targets in job.interventions]), replace(means, of=fitted)


def _from_first_change(layers: Layers, targets: tuple[Target, ...]) -> tuple[Target, ...]:
    """Leave out what keeps the value of the base run in layers before the first that is changed: it has it there."""
    changed = [_entry(layers, target) for target in targets if not isinstance(target.value, Identity)]
    first = min(changed, default=0)

    def counts(target: Target) -> bool:
        layer = _layer(layers, target)
        return not isinstance(target.value, Identity) or layer is None or layer >= first

    return tuple(filter(counts, targets))


def _asked_later(job: Job, layers: Layers) -> list[Site]:
    """Return what later jobs on the same pairs will ask for in the base runs: their sites, and streams to begin at."""
    found: dict[Site, None] = {}
    for target in (target for some in (job.remembered.beside if job.remembered else ()) for target in some):
        entry = _entry(layers, target)
        for layer in {entry, min(entry + 1, len(layers) - 1)} - {0}:  # what leaves a layer may enter at the next
            found |= dict.fromkeys(layers.kept_for(layer))
        found[target.site] = None
    return list(found)


def _entry(layers: Layers, target: Target) -> int:
    """Return the first layer that has to be run for a target."""
    return _layer(layers, target) or 0


def _layer(layers: Layers, target: Target) -> int | None:
    """Return the layer of a target, the last one for what is behind them all; None where it is in none of them."""
    site = target.site
    return layers.of(site) if site.module is None else layers.holding(site.module.path)


def _batches(job: Job, n_kept: int) -> Iterator[np.ndarray]:
    """Yield batches of pairs, the streams kept of which take no more memory than the rows of a forward do."""
    size = torch.finfo(job.model.dtype).bits // 8
    for indices in batches_of_pairs(job):
        n_tokens = int(job.pairs.sizes(job.base)[indices].max())
        most = most_rows(job, n_tokens) * row_cost(job.model, n_tokens).total
        at_once = most // max(1, n_kept * n_tokens * job.model.width * size)
        yield from np.array_split(indices, math.ceil(len(indices) / max(1, at_once)))


def _stacked(setup: _Setup, rows: Sequence[Row]) -> list[list[Row]]:
    """Sort rows by the layer at which they enter, in groups that may share a forward."""
    layers, lengths = setup.layers, setup.job.pairs.sizes(setup.job.base)
    weights = sum(parameter.numel() for parameter in layers.modules[0].parameters())
    calls = (_CALLS_ON_GPU if layers.model.device.type == "cuda" else _CALLS_ON_CPU) / (2 * max(1, weights))
    groups: list[list[Row]] = []
    first = 0
    for entry, some in groupby(sorted(rows, key=setup.entry), key=setup.entry):
        group = list(some)
        n_tokens = int(lengths[[row.pair for row in group]].sum())
        if groups and n_tokens * (entry - first) <= calls * (len(layers) - entry):
            groups[-1] += group
        else:
            groups.append(group)
            first = entry
    return groups


def _run_rows(setup: _Setup, batch: Untouched, rows: Sequence[Row]) -> Float[np.ndarray, "metric row"]:
    job, gauge = setup.job, setup.gauge
    entry = min(map(setup.entry, rows))
    is_few = all(setup.keeps[row.intervention] for row in rows)
    local = torch.tensor([row.local for row in rows])

    def run(fork: Fork | None, inputs: Batch) -> Run:
        writes = writes_of_rows(job.model, batch.known, rows, inputs)
        columns = few_columns(gauge, inputs, is_fork=fork is not None) if is_few else None
        needs_fork = bool(setup.layers.kept_for(entry))  # of runs from the first layer on nothing is kept
        kept = batch.forks[fork] if fork is not None and needs_fork else batch.known.base
        known = known_before(setup.layers, entry, kept, local, inputs, job)
        setup.cost.forwards, setup.cost.rows = setup.cost.forwards + 1, setup.cost.rows + len(rows)
        with watching(job.ties, job.model, rows, inputs):
            start = (setup.layers, entry, known, inputs, writes, columns)
            logits = logits_from(*start, opens_attention=job.opens_attention)
        return Run(logits, inputs, pair, tokens=tokens_at(columns, inputs))

    numbers = np.array([row.pair for row in rows])
    pair = torch.as_tensor(numbers, device=job.model.device)
    prompts = job.pairs.batch(job.base, numbers, padding_side=job.padding_side)
    whole = spell(job, gauge, job.base, run(None, prompts), run)
    return gauge.values(whole, batch.runs, local.to(pair.device))


def known_before(
    layers: Layers, entry: int, kept: Captured, local: Int[Tensor, " row"], inputs: Batch, job: Job
) -> dict[Site, Float[Tensor, "row position width"]]:
    """Gather what runs that begin at a layer take from the base run, for some rows, padded as far as these are."""
    known = {}
    for site in layers.kept_for(entry):
        stream = kept.tensors[layers.model.tap(site).port]
        n_columns = inputs.of(layers.model.stream_of(site)).ids.shape[1]
        first = stream.shape[1] - n_columns if job.padding_side == "left" else 0
        known[site] = stream.narrow(1, first, n_columns)[local.to(stream.device)]
    return known


def logits_from(
    layers: Layers,
    entry: int,
    known: Mapping[Site, Float[Tensor, "row position width"]],
    inputs: Batch,
    writes: Sequence[Write] = (),
    columns: range | None = None,
    *,
    opens_attention: bool = False,
) -> Float[Tensor, "row *axes"]:
    """Run prompts from a layer on; return the logits of all columns, or of some."""
    model = layers.model
    call = dict(inputs_of(model, inputs, columns))
    if layers.encoder_output is not None and layers.encoder_output in known:
        call["encoder_outputs"] = (known[layers.encoder_output],)
    stream = known.get(layers.sites[entry])
    with quiet(model), ExitStack() as left_out:
        if stream is not None:
            left_out.enter_context(entering(layers, entry, stream))
        output, _ = run_with_hooks(model, call, writes, opens_attention=opens_attention)
    return model.logits(output)


def verify(job: Job, gauge: Gauge, layers: Layers, entries: Sequence[int], cost: Cost) -> bool:
    """Make sure on a few pairs that runs may begin at the layers in question.

    Returns:
        Whether the model computes logits for some of the tokens alone when it is asked to.

    Raises:
        ModelUnsupported: They may not.
    """
    if not entries:
        return False
    # Pairs whose runs differ, so that what a model keeps from its last run would show; a padded one among them.
    telling = [n for n, pair in enumerate(job.pairs) if pair.digests[0] != pair.digests[1]] or range(len(job.pairs))
    sizes = job.pairs.sizes(job.base)
    ordered = sorted(telling, key=lambda number: sizes[number])
    chosen = np.array(sorted({ordered[0], ordered[-1]}))
    pieces = np.array_split(chosen, len(chosen) if job.max_rows == 1 else 1)
    return all(list(in_batches(job, pieces, partial(_look, job, gauge, layers, entries, cost))))


def _look(
    job: Job, gauge: Gauge, layers: Layers, entries: Sequence[int], cost: Cost, indices: Int[np.ndarray, " pair"]
) -> bool:
    stream = list(dict.fromkeys(site for entry in entries for site in layers.kept_for(entry)))
    inputs = job.pairs.batch(job.base, indices, padding_side=job.padding_side)
    kept = look_at(layers, inputs, stream)
    wanted = job.model.logits(kept.output)
    # What a model has put aside is now that of other prompts: the base run must come out without it.
    run_role(replace(job, remembered=None), job.source, indices, (), cost)
    n_runs = 1 + len(entries)
    cost.forwards, cost.rows = cost.forwards + n_runs, cost.rows + len(indices) * n_runs
    local = torch.arange(len(indices))
    for entry in entries:
        got = logits_from(layers, entry, known_before(layers, entry, kept, local, inputs, job), inputs)
        if not agree(got, wanted, inputs.mask):
            refuse_layers(job.model, "the run does not come out the same from this layer on", entry)
    if not may_take_few(layers, gauge):
        return False
    columns = few_columns(gauge, inputs)
    part = slice(columns.start, columns.stop)
    cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(indices)
    try:
        few = logits_from(layers, 0, {}, inputs, columns=columns)
    except ModelUnsupported:
        return False
    return agree(few, wanted[:, part], inputs.mask[:, part])
