"""Scores of sites by gradients, for all sites of a model from the same runs.

    score(u) = sum over elements of delta_u . g_u,    delta_u = u(source) - u(base),  g_u the slope of the metric

per pair and, where it is asked for, per token. A site is written by its view, which is linear in the new value; so the
tensor at its port is written with the source's value as a patch would, and what that changes is multiplied by the slope
at the port. Units that lie side by side in a tensor (heads in z, neurons) come out of one product.

======================  ===============================================================================================
method                  what is done
======================  ===============================================================================================
AtP                     slopes at the base run
IG over inputs          slopes averaged over points between the base's and the source's inputs
IG over activations     each cell's own output is moved, all else as in the base run: a run for each cell and point
GradDrop (AtP*)         for each layer once more without the gradient of what it writes; the mean of the magnitudes
QK-fix (AtP*)           queries and keys by what they change of the attention weights, times the slope there
======================  ===============================================================================================

References:
    Nanda 2023, "Attribution Patching"; Kramár et al. 2024, "AtP*", 2403.00745; Sundararajan et al. 2017, 1703.01365.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine.before import Before
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.gradient import differentiable
from causalpatch.engine.hooks import Write
from causalpatch.engine.job import Cost, Job, batches_of_pairs
from causalpatch.engine.means import Means
from causalpatch.engine.meeting import Meeting, columns_of
from causalpatch.engine.probes import Probes
from causalpatch.engine.qk_fix import KEYS, QUERIES, QKFix
from causalpatch.engine.resolve import Placement, Placer, Target
from causalpatch.engine.slopes import (
    Points,
    check_slopes,
    forward_with,
    input_port,
    measured_in_batches,
    moved_to,
    require_one_stream,
    require_slope,
    take_slopes,
)
from causalpatch.engine.untouched import Untouched, run_untouched
from causalpatch.engine.values import Row, writes_of_rows
from causalpatch.models import Columns, Port
from causalpatch.models.taps import STEPS
from causalpatch.sites import Site

Rules = Callable[[], AbstractContextManager[Mapping[Port, float]]]
"""Changes how gradients go back while it is open; gives what they are multiplied by at ports."""


_NO_DOORS = {
    "routes": "weights are put in by choosing experts anew, which has no slope",
    **dict.fromkeys(STEPS, "one step of a recurrent module hands it to the next, where no gradient is met"),
}


def no_rules() -> AbstractContextManager[Mapping[Port, float]]:
    """Let gradients go back as they are."""
    return nullcontext({})


@dataclass(frozen=True, eq=False)
class Group:
    """Sites of one kind in one layer, which differ in their unit alone.

    Args:
        target: The first of them, as a target.
        sites: All of them.
        cells: The cell of each.
    """

    target: Target
    sites: tuple[Site, ...]
    cells: np.ndarray


@dataclass(frozen=True, eq=False)
class NodeSums:
    """Scores of cells.

    Args:
        values: ``(cell, column, pair)``; one column where positions are not walked along, NaN where a pair lacks one.
        base: The metric of each pair's base run.
        source: The metric of each pair's source run.
        cost: What was spent.
        steepest: The largest slope; ``require_steep`` refuses scores of a metric that has none.
    """

    values: Float[np.ndarray, "cell column pair"]
    base: Float[np.ndarray, " pair"]
    source: Float[np.ndarray, " pair"]
    cost: Cost
    steepest: float


@dataclass(eq=False)
class NodeSlopes:
    """Scores of nodes by gradients.

    Args:
        job: Its one intervention patches the first site of each group.
        gauge: The metric.
        groups: The sites, group by group.
        n_cells: Number of cells.
        points: Where slopes are taken.
        by_position: Whether positions are walked along.
        own: Whether each cell's output is moved by itself (IG over activations).
        fixes: Whether scores are those of AtP*.
        rules: How gradients go back, where that is not as they are.
    """

    job: Job
    gauge: Gauge
    groups: Sequence[Group]
    n_cells: int
    points: Points
    by_position: bool = False
    own: bool = False
    fixes: bool = False
    rules: Rules = no_rules
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self) -> None:
        self.model = self.job.model
        self.placer = Placer(self.job.pairs, self.job.base)
        self.stream = self.groups[0].target.stream  # where positions are walked along, all are of one stream
        n_columns = self.job.pairs.of(self.stream).aligned().n_columns if self.by_position else 1
        self.values = np.zeros((self.n_cells, n_columns, len(self.job.pairs)))
        taps = [self.model.tap(group.target.site) for group in self.groups]
        self.ports = tuple(dict.fromkeys(tap.port for tap in taps))
        self.fix = QKFix(self.job, [group.target.site for group in self.groups]) if self.fixes else None

    def measure(self) -> NodeSums:
        """Return the scores of all cells on all pairs.

        Raises:
            MetricError: The metric has no gradient.
            NoGradient: The metric is smallest where slopes are taken.
            SiteUnsupported: What stands at a site has no gradient, such as whole numbers.
            PairError: Prompts of unequal lengths have no alignment.
        """
        require_slope(self.job, self.gauge, self.points)
        self._require_doors()
        found, steepest = measured_in_batches(self.job, batches_of_pairs(self.job), self._measure)
        return NodeSums(self.values, found["base"], found["source"], self.cost, steepest)

    def _measure(self, indices: np.ndarray) -> tuple[Untouched, float]:
        """Fill in the scores of some pairs; return their runs and the largest slope."""
        sites = [target.site for target in self.job.interventions[0]]
        self.values[:, :, indices] = 0  # what was begun when memory ran out
        batch = run_untouched(self.job, self.gauge, Means(), self.cost, indices, base_sites=sites).lean(self.gauge)
        with self.rules() as scaled:
            return batch, self._add(batch, scaled)

    def _add(self, batch: Untouched, scaled: Mapping[Port, float]) -> float:
        """Fill in the scores of some pairs; return the largest slope."""
        if self.by_position:
            columns = columns_of(self.job, batch, self.stream)
            is_there = columns < self._n_tokens(batch)
            self.values[:, :, batch.indices] = np.where(is_there.T.cpu().numpy(), 0.0, np.nan)
        if self.own:
            return self._add_own(batch)
        if self.fixes:
            return self._add_fixed(batch, scaled)
        start = input_port(self.model) if any(self.points.shares) else None
        difference = None if start is None else self._inputs(batch, start)
        sums: dict[Port, Tensor] = {}
        steepest = 0.0
        for share in self.points.shares:
            moved = {} if start is None or difference is None else moved_to(share, start, difference)
            probes = Probes.at(self.ports, moved, scaled)
            take_slopes(self.job, self.gauge, batch, probes, opens=self.job.opens_attention)
            self._count(batch)
            self._require_met(probes)
            for port in self.ports:
                if port in probes.slopes:
                    slope = probes.slopes[port] / len(self.points.shares)
                    sums[port] = sums[port] + slope if port in sums else slope
                    steepest = max(steepest, float(slope.abs().amax()))
        for group in self.groups:
            self._fill(batch, group, self._scores(batch, group, sums))
        return steepest

    def _add_own(self, batch: Untouched) -> float:
        """Fill in scores with each cell's own output moved."""
        steepest = 0.0
        for group in self.groups:
            port = self.model.tap(group.target.site).port
            parts: dict[int, Tensor] = {}
            for change, cell in zip(self._changes(batch, group), group.cells.tolist(), strict=True):
                parts[cell] = parts[cell] + change if cell in parts else change
            for cell, whole in parts.items():
                for column, change in self._one_at_a_time(batch, whole):
                    total: Tensor | float = 0.0
                    for share in self.points.shares:
                        probes = Probes.at([port], {port: share * change})
                        take_slopes(self.job, self.gauge, batch, probes, opens=self.job.opens_attention)
                        self._count(batch)
                        self._require_met(probes)
                        if port in probes.slopes:
                            slope = probes.slopes[port].to(change.dtype)
                            steepest = max(steepest, float(slope.abs().amax()))
                            total = total + (slope * change).flatten(1).sum(-1) / len(self.points.shares)
                    if isinstance(total, Tensor):
                        self.values[cell, column, batch.indices] += total.double().cpu().numpy()
        return steepest

    def _one_at_a_time(self, batch: Untouched, change: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield a change column by column where positions are walked along."""
        if not self.by_position:
            yield 0, change
            return
        columns = columns_of(self.job, batch, self.stream)
        for column, places in enumerate(columns.T):
            is_here = torch.zeros(self._n_tokens(batch) + 1, dtype=torch.bool, device=change.device)
            is_here[places] = True
            mask = is_here[:-1].reshape(change.shape[:2])
            yield column, change * mask.reshape(*mask.shape, *[1] * (change.ndim - 2))

    def _add_fixed(self, batch: Untouched, scaled: Mapping[Port, float]) -> float:
        """Fill in scores of AtP*: queries and keys by attention weights, and the mean over dropped layers."""
        require_one_stream(self.model, "layers cannot be dropped one after the other", 'method="atp"')
        writes = [self._written_by(layer) for layer in range(self.model.shape.n_layers)]
        inside = () if self.fix is None else self.fix.ports
        probes = Probes.at([*self.ports, *inside, *(port for ports in writes for port in ports)], None, scaled)
        totals: list[Tensor | None] = [None] * len(self.groups)
        steepest = 0.0
        known = None if self.fix is None else self.fix.prepare(batch, self.placer)
        with differentiable(self.model):
            metric = forward_with(
                self.job, self.gauge, batch, probes, opens=self.job.opens_attention or bool(inside)
            ).sum()
            self._count(batch)
            for ports in writes:
                probes.dropped, probes.slopes = set(ports), {}
                torch.autograd.backward(metric, retain_graph=True)
                check_slopes(self.job, self.gauge, probes)
                self._require_met(probes)
                steepest = max([steepest, *(float(slope.abs().amax()) for slope in probes.slopes.values())])
                for number, group in enumerate(self.groups):
                    if known is not None and group.target.site.name in (*QUERIES, *KEYS):
                        found = known.scores(group.target.site, [site.unit or 0 for site in group.sites], probes.slopes)
                    else:
                        found = self._scores(batch, group, probes.slopes)
                    of_cells = self._by_cell(group, found)
                    if not self.by_position:
                        of_cells = of_cells.sum(-1, keepdim=True) if of_cells.ndim == 3 else of_cells[..., None]
                    before = totals[number]
                    totals[number] = of_cells.abs() if before is None else before + of_cells.abs()
        for group, total in zip(self.groups, totals, strict=True):
            if total is not None:
                share = total / max(1, len(writes) - 1)
                self._put(batch, np.unique(group.cells), share, summed=not self.by_position)
        return steepest

    def _written_by(self, layer: int) -> list[Port]:
        return [self.model.tap(Site(name, layer)).port for name in ("attn_out", "mlp_out")]

    def _scores(self, batch: Untouched, group: Group, slopes: Mapping[Port, Tensor]) -> Tensor:
        """Return the scores of a group's sites: ``[pair, site, token]``, or ``[pair, site]`` without positions."""
        port = self.model.tap(group.target.site).port
        shape = batch.known.base.tensors[port].shape
        has_tokens = group.target.has_position
        if port not in slopes:  # nothing of it reaches the metric
            return torch.zeros(shape[0], len(group.sites), *shape[1 : 2 if has_tokens else 1], device=self.model.device)
        views = [self.model.tap(site).view for site in group.sites] if self._are_columns(group) else []
        starts = [view.start for view in views if isinstance(view, Columns)]
        if starts:
            change = self._whole(batch, group.target)
            product = slopes[port].to(change.dtype) * change
            width = views[0].width if isinstance(views[0], Columns) else 1
            places = torch.tensor(starts, device=product.device)[:, None]
            places = places + torch.arange(width, device=product.device)
            found = product[..., places].sum(-1)  # pair, token where there are any, site
            return found.movedim(-1, 1)
        found_of_sites = []
        for change in self._changes(batch, group):
            product = slopes[port].to(change.dtype) * change
            found_of_sites.append(
                product.flatten(2).sum(-1)
                if has_tokens and product.ndim > 2
                else (product if has_tokens else product.flatten(1).sum(-1))
            )
        return torch.stack(found_of_sites, 1)

    def _are_columns(self, group: Group) -> bool:
        return isinstance(self.model.tap(group.target.site).view, Columns)

    def _whole(self, batch: Untouched, target: Target) -> Tensor:
        """Return by how much the whole tensor at a target's port differs, where the target lies."""
        port = self.model.tap(target.site).port
        base, source = batch.known.base.tensors[port], batch.known.source.tensors[port]
        if not target.has_position:
            wide = torch.promote_types(base.dtype, torch.float32)
            return source.to(wide) - base.to(wide)
        return Meeting.of(self.job, batch, target, self.placer).difference(base, source)

    def _changes(self, batch: Untouched, group: Group) -> Iterator[Tensor]:
        """Yield by how much the tensor at the port changes when each site of a group is patched from the source."""
        tap = self.model.tap(group.target.site)
        base = batch.known.base.tensors[tap.port]
        wide = torch.promote_types(base.dtype, torch.float64 if base.device.type != "mps" else torch.float32)
        nothing = np.zeros(0, dtype=np.int64)
        places = (
            self.placer.places(group.target, batch.indices.tolist())
            if group.target.has_position
            else [None] * len(batch.indices)
        )
        for site in group.sites:
            target = replace(group.target, site=site)
            rows = []
            for local, (pair, place) in enumerate(zip(batch.indices.tolist(), places, strict=True)):
                is_lost = target.has_position and place is None
                rows.append(
                    Row(0, pair, local, ((target, Placement(nothing, nothing, nothing) if is_lost else place),))
                )
            x = base.to(wide, copy=True)
            with torch.no_grad():
                for write in writes_of_rows(self.model, batch.known, rows, batch.known.base.batch):
                    _apply(write, x, tuple(batch.known.base.tensors[port] for port in write.tap.companions))
            yield x - base.to(wide)

    def _fill(self, batch: Untouched, group: Group, found: Tensor) -> None:
        self._put(batch, np.unique(group.cells), self._by_cell(group, found), summed=False)

    def _by_cell(self, group: Group, found: Tensor) -> Tensor:
        """Return scores of sites summed into those of cells, and columns where positions are walked along."""
        cells, owner = np.unique(group.cells, return_inverse=True)
        summed = found.new_zeros(found.shape[0], len(cells), *found.shape[2:])
        return summed.index_add_(1, torch.as_tensor(owner, device=found.device), found)

    def _put(self, batch: Untouched, cells: np.ndarray, found: Tensor, *, summed: bool) -> None:
        """Add scores ``[pair, cell, token]`` or ``[pair, cell]`` to the table."""
        if self.by_position:
            columns = columns_of(self.job, batch, self.stream)
            flat = found.movedim(1, -1).flatten(0, 1)  # token of all pairs, cell
            flat = torch.cat([flat, flat.new_zeros(1, flat.shape[1])])
            chosen = flat[columns].double().cpu().numpy()  # pair, column, cell
            self.values[cells[:, None], :, batch.indices] += np.moveaxis(chosen, (0, 1, 2), (1, 2, 0))
            return
        total = found[..., 0] if summed else found.flatten(2).sum(-1) if found.ndim > 2 else found
        self.values[cells[:, None], 0, batch.indices] += total.T.double().cpu().numpy()

    def _inputs(self, batch: Untouched, start: Port) -> Tensor:
        """Return by how much inputs differ."""
        base, source = batch.known.base, batch.known.source
        if start.path == "" and base.batch.values is not None and source.batch.values is not None:
            both = [
                torch.as_tensor(run.batch.values, device=self.model.device).to(self.model.dtype)
                for run in (base, source)
            ]
            return both[1] - both[0]
        site = Site("resid_pre", 0)
        target = next(target for target in self.job.interventions[0] if target.site == site)
        return self._whole(batch, replace(target, position=None, column=None))

    def _n_tokens(self, batch: Untouched) -> int:
        return int(batch.known.base.batch.of(self.stream).mask.size)

    def _count(self, batch: Untouched) -> None:
        self.cost.forwards, self.cost.rows = self.cost.forwards + 1, self.cost.rows + len(batch.indices)

    def _require_doors(self) -> None:
        """Make sure that what is scored is met where gradients pass.

        Raises:
            SiteUnsupported: It is chosen by a router, or handed from step to step.
        """
        for group in self.groups:
            port = self.model.tap(group.target.site).port
            if port.side in _NO_DOORS:
                raise SiteUnsupported(
                    f"'{group.target.site}' has no score",
                    facts=[("why", _NO_DOORS[port.side])],
                    fix=f"patch it: sweep(experiment, '{group.target.site.name}')",
                )

    def _require_met(self, probes: Probes) -> None:
        for group in self.groups:
            port = self.model.tap(group.target.site).port
            if port in probes.ports and port not in probes.values:
                raise SiteUnsupported(
                    f"'{group.target.site}' has no gradient",
                    facts=[("its tensor", "holds whole numbers")],
                    fix="patch it: sweep(experiment, …)",
                )


def _apply(write: Write, x: Tensor, companions: tuple[Tensor, ...]) -> None:
    """Write new values into a tensor that is wider than the model's."""
    before = Before.of(x, write.tap.view, None)
    if before is not None:
        before.write(write.tap.view, x, companions, write.index, write.value)
        return
    if not isinstance(write.value, Tensor):
        raise AssertionError(write)  # values of the source run are known
    write.tap.view.write(x, companions, write.index, write.value.to(x.dtype))
