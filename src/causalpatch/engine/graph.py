"""Tier 3, the graph cone: of any module that can be exported, run again only what lies behind the patched tensors.

1. The module is exported once, with a mark at every port (``export``). On a few rows the graph must give every port's
   tensor bit for bit, and the answer to rounding, also for a single row; each set of patched ports is replayed once
   with nothing changed. What does not agree is refused before anything is measured.
2. For each batch of pairs the untouched runs are made as everywhere, and one run of the graph keeps what the
   subgraphs read from outside.
3. Rows (intervention, pair) that patch the same ports are stacked, and one replay of their subgraph measures them.
4. Rows whose new values are those of the base run already are not run.

Symbols: K interventions, P pairs in a batch, R rows in a replay.
Cost: K x P rows of what lies behind the patched ports, three full forwards per pair, and an export per module, kept.
"""

import threading
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine.batches import in_batches, in_forwards
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.export import Exported, export, refusal
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.hooks import Write, quiet, run_with_hooks, users_hooks
from causalpatch.engine.job import Block, Cost, Job, batches_of_pairs, lay_rows, most_rows
from causalpatch.engine.means import Means
from causalpatch.engine.memory import is_out_of_memory
from causalpatch.engine.reference import measure_rows
from causalpatch.engine.resolve import Placer, Target
from causalpatch.engine.structure import Structure, structure_of
from causalpatch.engine.subgraph import BaseRun, Subgraph, run_base
from causalpatch.engine.untouched import Untouched, run_untouched
from causalpatch.engine.values import Row, writes_of_rows
from causalpatch.models import Model, Port
from causalpatch.models.taps import STEPS
from causalpatch.models.views import take
from causalpatch.pairs import Batch
from causalpatch.patches import Source
from causalpatch.results.status import Status
from causalpatch.sites.names import ATTENTION_SITES

Entries = frozenset[tuple[Port, tuple[Port, ...]]]
"""The ports that some rows write, each with the others that writing needs."""

_EXPORTS: "weakref.WeakKeyDictionary[nn.Module, list[Exported]]" = weakref.WeakKeyDictionary()
_GUARD = threading.Lock()
_MOST_EXPORTS = 8  # per module: one per shape of inputs


def why_not(job: Job, gauge: Gauge) -> str | None:
    """Say why a job cannot be run on a graph, or None. It looks at the module only; nothing runs.

    Args:
        job: What is to be measured.
        gauge: The metrics.
    """
    module = job.model.module
    if job.pairs.encoder is not None:
        return "it has prompts of two streams"
    if gauge.steps:
        return "what the model goes on to write is read, which takes whole forwards"
    if gauge.forks:
        return "answers of several tokens are spelt out by runs of their own"
    if job.pairs.common:
        return f"'{next(iter(job.pairs.common))}' is the same for all rows, and an export gives each row its own"
    if isinstance(module, torch.jit.ScriptModule):
        return "the module was compiled by torch.jit"
    for target in (target for group in job.interventions for target in group):
        if job.model.tap(target.site).port.like is not None:
            return f"the tensor of {target.site} has its rows and positions elsewhere than on its first two axes"
        if job.model.tap(target.site).port.side in STEPS:
            return f"{target.site} stands between the steps of a recurrent module, which a graph holds as one"
    hooked = [
        *users_hooks(job.model),
        *(_shown(name) for name, part in module.named_modules() if hasattr(part, "_hf_hook")),
    ]
    if hooked:
        return f"hooks are registered on {hooked[0]}, which an export would lose"
    if job.model.weights is not None:
        return "its weights are fetched layer by layer, and an export holds them all"
    mixing = [
        name for name, part in module.named_modules() if isinstance(part, _BatchNorm) and part.running_mean is None
    ]
    if mixing:
        return f"{_shown(mixing[0])} normalises over the batch, so that runs are not independent"
    return None


def why_not_targets(model: Model, targets: Sequence[Target]) -> str | None:
    """Say why a run with some targets cannot be made on a graph, or None."""
    del model
    features = [str(target.site) for target in targets if target.anchor]
    if features:
        return f"{features[0]} is computed by a dictionary, which is no part of the graph"
    inside = [str(target.site) for target in targets if target.site.name in ATTENTION_SITES]
    return f"{inside[0]} stands inside attention, where a graph has no marks" if inside else None


def measure(job: Job, gauge: Gauge, means: Means, cost: Cost) -> Iterator[Block]:
    """Measure every intervention on every pair by replays of subgraphs.

    Args:
        job: What is to be measured.
        gauge: The metrics.
        means: Means of the sites that are replaced by one.
        cost: Counts what is spent; a replay is a call, and so is the run of the graph that replays start from.

    Yields:
        Blocks of cells: for each batch of pairs first the untouched runs, then the patched ones.

    Raises:
        ModelUnsupported: The model cannot be run as a graph; raised before anything is yielded.
        MemoryExhausted: One row does not fit into memory.
        NotFinite: An untouched run gives NaN or infinity.
    """
    reason = why_not(job, gauge)
    if reason is not None:
        raise refusal(job.model, reason)
    if not any(job.interventions):
        yield from measure_rows(job, gauge, means, cost)
        return
    replayer = _Replayer(job, gauge, cost)
    replayer.prepare()
    for started in in_batches(job, batches_of_pairs(job), partial(replayer.start, means)):
        yield from started.batch.blocks()
        if started.lost:
            yield Block.lost(started.lost, len(gauge.metrics))
        for rows in started.groups.values():
            rest, derived = replayer.derive(started, rows)
            if derived:
                yield replayer.block_of(started, derived)
            yield from in_forwards(job, [rest], partial(replayer.replay, started))
        del started  # its tensors go before those of the next are made


@dataclass(frozen=True, eq=False)
class _Started:
    """Some pairs with their untouched runs, on the model itself and on the graph, and the rows to run.

    Args:
        batch: The pairs and their runs on the model itself.
        exported: The graph.
        base: The base runs on the graph.
        groups: Rows by the ports that they write.
        lost: Cells whose pair lacks a position.
    """

    batch: Untouched
    exported: Exported
    base: BaseRun
    groups: Mapping[Entries, Sequence[Row]]
    lost: Sequence[tuple[int, int]]

    def rows_of(self, local: np.ndarray) -> Batch:
        """Return the inputs of rows, laid out as those of the base run are."""
        return self.batch.known.base.batch.take(local)


class _Replayer:
    """Measures the rows of a job on graphs of its model."""

    def __init__(self, job: Job, gauge: Gauge, cost: Cost) -> None:
        self.job, self.gauge, self.cost, self.model = job, gauge, cost, job.model
        self._placer = Placer(job.pairs, job.base)
        taps = {site: self.model.tap(site) for site in {t.site for group in job.interventions for t in group}}
        self._entry = {site: (tap.port, tap.companions) for site, tap in taps.items()}
        self._ports = list(dict.fromkeys(port for tap in taps.values() for port in (*tap.companions, tap.port)))
        self._subgraphs: dict[tuple[Exported, Entries], Subgraph] = {}
        self._structure: Structure  # when it was prepared

    def prepare(self) -> None:
        """Export the model for inputs of every shape, and see that the graphs do what the model does."""
        sets = {frozenset(self._entry[target.site] for target in group) for group in self.job.interventions}
        seen = set()
        self._structure = structure_of(self.model)
        for indices in batches_of_pairs(self.job):
            inputs = _example(self.job, indices)
            shapes = tuple((name, tuple(x.shape[1:])) for name, x in inputs.items() if isinstance(x, Tensor))
            if shapes in seen:
                continue
            seen.add(shapes)
            try:
                self._check(inputs, {shapes, *sets})
            except Exception as error:
                _forget(self.model)
                if not is_out_of_memory(error):
                    raise
                raise refusal(self.model, "memory runs out while its graph is compared with it") from error

    def _check(self, inputs: Mapping[str, Any], things: set[Any]) -> None:
        """Compare a graph with the model where that was not done yet: for some shapes, and sets of entries."""
        exported = self._find(inputs)
        new = things - exported.checked
        if new:
            entries = [each for each in new if isinstance(each, frozenset)]
            _compare(self.model, exported, inputs, [self._subgraph(exported, each) for each in entries])
            exported.checked.update(new)
            exported.structure.settle(structure_of(self.model))

    def _find(self, inputs: Mapping[str, Any]) -> Exported:
        return _find(self.model, self._structure, inputs, self._ports)

    def start(self, means: Means, indices: Int[np.ndarray, " pair"]) -> _Started:
        """Make the untouched runs of some pairs."""
        batch = run_untouched(self.job, self.gauge, means, self.cost, indices)
        rows, lost = lay_rows(self.job, self._placer, indices)
        groups: dict[Entries, list[Row]] = {}
        for row in rows:
            groups.setdefault(self._entries(row), []).append(row)
        try:
            exported, base = self._run_base(batch, groups)
        except ModelUnsupported:
            # What is no weight, such as a number that the forward reads off the module, may have changed since.
            _forget(self.model)
            self.prepare()
            exported, base = self._run_base(batch, groups)
        return _Started(batch, exported, base, groups, lost)

    def _run_base(self, batch: Untouched, groups: Collection[Entries]) -> tuple[Exported, BaseRun]:
        inputs = inputs_of(self.model, batch.known.base.batch)
        exported = self._find(inputs)
        keep = {exported.ports[port] for port in self._ports}
        keep |= {node for entries in groups for node in self._subgraph(exported, entries).reads}
        with quiet(self.model):
            base = run_base(exported, exported.find_weights(self.model.module) or {}, inputs, keep)
        self.cost.forwards, self.cost.rows = self.cost.forwards + 1, self.cost.rows + len(batch.indices)
        _require_close(
            self.model, base.answer, self.model.logits(batch.known.base.output), "its graph answers otherwise"
        )
        return exported, base

    def derive(self, started: _Started, rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
        """Part rows into those that have to run and those whose new values are the base run's already."""
        rest: list[Row] = []
        derived: list[Row] = []
        asked: list[Row] = []
        for row in rows:
            is_source = all(isinstance(target.value, Source) and target.inside is None for target, _ in row.targets)
            is_source = is_source and row.intervention < self.job.n_asked
            (asked if is_source else rest).append(row)
        for some in _chunks(asked, most_rows(self.job, int(self.job.pairs.lengths(self.job.base).max()))):
            changed = self._changed(started, some)
            for number, row in enumerate(some):
                (rest if changed[number] else derived).append(row)
        return rest, derived

    def _changed(self, started: _Started, rows: Sequence[Row]) -> np.ndarray:
        """Tell which rows write a value that their base run does not have already, bit for bit."""
        local = np.array([row.local for row in rows])
        place = torch.as_tensor(local, device=self.model.device)
        tensors = {port: started.base.values[started.exported.ports[port]] for port in self._ports}
        changed = np.zeros(len(rows), dtype=bool)
        for write in writes_of_rows(self.model, started.batch.known, rows, started.rows_of(local)):
            index = (place[write.index[0]], *write.index[1:])
            companions = tuple(tensors[port] for port in write.tap.companions)
            current = take(write.tap.view, tensors[write.tap.port], companions, index)
            same = torch.as_tensor(current == write.value).reshape(len(current), -1).all(1)
            changed[write.index[0][~same].cpu().numpy()] = True
        return changed

    def block_of(self, started: _Started, rows: Sequence[Row]) -> Block:
        """Return the cells of rows that give what their base runs give."""
        numbers, pairs = np.array([row.intervention for row in rows]), np.array([row.pair for row in rows])
        values = started.batch.values["base"][:, [row.local for row in rows]]
        return Block.of(numbers, pairs, values, Status.DERIVED)

    def replay(self, started: _Started, rows: Sequence[Row]) -> Float[np.ndarray, "metric row"]:
        """Measure rows that write the same ports in one replay."""
        local = np.array([row.local for row in rows])
        inputs = started.rows_of(local)
        place = torch.as_tensor(local, device=self.model.device)
        writes: dict[Port, list[Write]] = {}
        for write in writes_of_rows(self.model, started.batch.known, rows, inputs):
            writes.setdefault(write.tap.port, []).append(write)
        with quiet(self.model):
            answer = self._subgraph(started.exported, self._entries(rows[0])).run(started.base, place, writes)
        self.cost.forwards, self.cost.rows = self.cost.forwards + 1, self.cost.rows + len(rows)
        pair = torch.tensor([row.pair for row in rows], device=self.model.device)
        return self.gauge.values(Run(answer, inputs, pair), started.batch.runs, place)

    def _entries(self, row: Row) -> Entries:
        return frozenset(self._entry[target.site] for target, _ in row.targets)

    def _subgraph(self, exported: Exported, entries: Entries) -> Subgraph:
        key = (exported, entries)
        if key not in self._subgraphs:
            self._subgraphs[key] = Subgraph(exported, entries)
        return self._subgraphs[key]


def _chunks(rows: Sequence[Row], most: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), most):
        yield rows[start : start + most]


def _find(model: Model, now: Structure, inputs: Mapping[str, Any], ports: Collection[Port]) -> Exported:
    """Return a graph of the model that holds the ports and fits the inputs, exporting it where there is none yet."""
    with _GUARD:
        known = list(_EXPORTS.get(model.module, ()))
    # Weights are looked up in the module; everything else is as it was when the graph was made.
    known = [each for each in known if each.structure.is_still(now, may_move_weights=True)]
    known = [each for each in known if each.find_weights(model.module) is not None]
    fitting = [each for each in known if each.sizes(inputs) is not None]
    for each in fitting:
        if all(port in each.ports for port in ports):
            return each
    # Ports of earlier jobs are exported along, so that two jobs in turns do not export each time.
    paths = {path for path, _ in model.module.named_modules()}
    earlier = [port for each in fitting for port in each.ports if port not in ports and port.path in paths]
    try:
        made = export(model, inputs, [*earlier, *ports])
    except ModelUnsupported:
        if not earlier:
            raise
        made = export(model, inputs, ports)
    kept = [each for each in known if each not in fitting]
    with _GUARD:
        _EXPORTS[model.module] = [*kept, made][-_MOST_EXPORTS:]
    return made


def _forget(model: Model) -> None:
    with _GUARD:
        _EXPORTS.pop(model.module, None)


def _compare(model: Model, exported: Exported, inputs: Mapping[str, Any], subgraphs: Collection[Subgraph]) -> None:
    """Compare a graph with the model itself, on all rows and on the first alone, and replay subgraphs as they are.

    Raises:
        ModelUnsupported: They do not agree, or the model's rows are not independent.
    """
    single = {name: x[:1] if isinstance(x, Tensor) else x for name, x in inputs.items()}
    keep = {*exported.ports.values(), *(node for each in subgraphs for node in each.reads)}
    weights = exported.find_weights(model.module) or {}
    alone, wanted = (_compare_run(model, exported, weights, given, keep) for given in (single, inputs))
    _require_close(model, alone.answer, wanted.answer[:1], "a run by itself answers otherwise than in a batch")
    # In another order and number than in the base run.
    rows = torch.arange(len(wanted.answer) - 1, -1, -1, device=wanted.answer.device)[:3]
    for subgraph in subgraphs:
        with quiet(model):
            answer = subgraph.run(wanted, rows, {})
        _require_close(model, answer, wanted.answer[rows], "a replay with nothing changed answers otherwise")


def _compare_run(
    model: Model,
    exported: Exported,
    weights: Mapping[fx.Node, Any],
    inputs: Mapping[str, Any],
    keep: Collection[fx.Node],
) -> BaseRun:
    output, tensors = run_with_hooks(model, inputs, keep=exported.ports)
    with quiet(model):
        run = run_base(exported, weights, inputs, keep)
    _require_close(model, run.answer, model.logits(output), "its graph answers otherwise")
    for port, tensor in tensors.items():
        if not _is_same(run.values[exported.ports[port]], tensor):
            raise refusal(model, f"its graph has another tensor at the {port.side} of '{port.path}'")
    return run


def _example(job: Job, indices: np.ndarray) -> dict[str, Any]:
    """Return inputs of a few rows, as wide as a batch is: two base runs, and the source runs where they fit."""
    lengths = job.pairs.lengths(job.base)[indices]
    chosen = np.unique(indices[[int(lengths.argmax()), int(lengths.argmin())]])
    base, source = (
        inputs_of(job.model, job.pairs.batch(role, chosen, padding_side=job.padding_side))
        for role in (job.base, job.source)
    )
    tensors = {name: x for name, x in base.items() if isinstance(x, Tensor)}
    fits = all(isinstance(source.get(name), Tensor) and source[name].shape == x.shape for name, x in tensors.items())
    other = source if fits else base
    return {name: torch.cat([x, other[name]]) if name in tensors else x for name, x in base.items()}


def _require_close(model: Model, got: Tensor, wanted: Tensor, problem: str) -> None:
    """Refuse a model whose answers differ by more than rounding."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        raise refusal(model, problem, f"{got.dtype} {tuple(got.shape)}, not {wanted.dtype} {tuple(wanted.shape)}")
    finite = torch.isfinite(wanted)
    if not torch.equal(finite, torch.isfinite(got)):
        raise refusal(model, problem, "NaN or infinity elsewhere")
    if finite.any():
        scale = float(wanted[finite].abs().max().clamp_min(1.0))
        off = float((got - wanted)[finite].abs().max()) / scale
        # A batch of another size is summed in another order: rounding of many layers, but never of the third digit.
        tolerance = min(1e3 * torch.finfo(wanted.dtype).eps, 0.05) if wanted.is_floating_point() else 0.0
        if off > tolerance:
            raise refusal(model, problem, f"off by {off:.1e} of the largest")


def _is_same(got: Tensor, wanted: Tensor) -> bool:
    """Tell whether two tensors are equal bit for bit, NaN being NaN."""
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    return bool(((got == wanted) | ((got != got) & (wanted != wanted))).all())


def _shown(path: str) -> str:
    return f"'{path}'" if path else "the model"
