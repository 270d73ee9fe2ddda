"""The engines, from the fastest to the plainest, and which of them makes which runs of a job.

| tier | recomputes | needs |
|---|---|---|
| ``wavefront`` | rows of tokens that can have changed, all interventions together | causal layers known by name |
| ``restart`` | whole prompts from the first patched layer on | layers known by name |
| ``graph`` | what depends on the patched tensors, on an exported graph | a module that can be exported |
| ``rows`` | full forwards, interventions stacked into rows | nothing |
| ``reference`` | one full forward after the other, with plain hooks | nothing |

``auto`` takes for each intervention the first that can make it. Tiers that leave work out, and stacked prompts of
several lengths, are checked against single forwards first (``selfcheck``); one that cannot run a model, or drifts, is
passed over and the reason is kept.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Literal, get_args

import numpy as np

from causalpatch.base.errors import ModelUnsupported, SettingError
from causalpatch.engine import breadth_first, graph, reference, restart, wavefront
from causalpatch.engine.gap import gap_of
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import BASE, Block, Cost, Job
from causalpatch.engine.ledger import Ledger
from causalpatch.engine.means import Means
from causalpatch.engine.resolve import Target
from causalpatch.engine.routes import Ties, router_layers
from causalpatch.engine.selfcheck import Measure, why_batches_differ, why_drifts
from causalpatch.models import Model

EngineName = Literal["auto", "wavefront", "restart", "graph", "rows", "reference"]
ENGINES: tuple[EngineName, ...] = get_args(EngineName)


@dataclass(frozen=True)
class Tier:
    """One engine.

    Args:
        name: Its name.
        does: What it recomputes, for records.
        why_not: Says why it cannot make the runs of a job at all, or None.
        measure: Measures a job.
        why_not_targets: Says why it cannot make one run of a job, or None.
        check: Compares it with single forwards before it is trusted, and says how it fails; None where it is not.
    """

    name: EngineName
    does: str
    why_not: Callable[[Job, Gauge], str | None]
    measure: Callable[[Job, Gauge, Means, Cost], Iterator[Block]]
    why_not_targets: Callable[[Model, Sequence[Target]], str | None] = lambda model, targets: None
    check: Callable[[str, Measure, Job], str | None] | None = None


# Exporting a graph takes seconds, in which thousands of runs of a small network are made by full forwards.
MANY_RUNS = 4096


def _why_not(tier: Tier, job: Job, gauge: Gauge, *, is_auto: bool) -> str | None:
    """Say why a tier cannot make the runs of a job, or why it is better not to where nobody asked for it, or None."""
    if is_auto and tier.name == "graph":
        return _why_not_graph(job, gauge)
    why = tier.why_not(job, gauge)
    return restart.why_rather_not(job) if why is None and is_auto and tier.name == "restart" else why


def _why_not_graph(job: Job, gauge: Gauge) -> str | None:
    """Say why a graph is not worth its export where nobody asked for it."""
    if job.model.family is not None:
        return "its layers are known by name"
    n_runs = len(job.interventions) * len(job.pairs)
    return f"{n_runs:,} runs are too few to export for" if n_runs < MANY_RUNS else graph.why_not(job, gauge)


TIERS = (
    Tier(
        "wavefront",
        "rows of tokens that can have changed",
        wavefront.why_not,
        breadth_first.measure,
        wavefront.why_not_targets,
        check=why_drifts,
    ),
    Tier(
        "restart", "whole prompts from the first patched layer on", restart.why_not, restart.measure, check=why_drifts
    ),
    Tier("graph", "what depends on the patched tensors", graph.why_not, graph.measure, graph.why_not_targets),
    Tier(
        "rows",
        "full forwards, interventions stacked",
        reference.why_not,
        reference.measure_rows,
        check=why_batches_differ,
    ),
    Tier("reference", "full forwards with plain hooks, one by one", reference.why_not, reference.measure_reference),
)


@dataclass
class Route:
    """Which engines made the runs of a job.

    Args:
        engine: What was asked for.
        made: Interventions by tier.
        passed_over: Why faster tiers were not used, by tier.
        gap: By metric, the largest gap seen between untouched runs and the model's own plain forwards.
        opened: Tiers that computed attention step by step, base and patched runs alike.
        margin: The smallest margin by which a router chose; infinite where none did.
        n_ties: Cells so near a tie of a router that each was measured by a forward of its own.
    """

    engine: EngineName
    made: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)
    gap: dict[str, float] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)
    margin: float = math.inf
    n_ties: int = 0

    def describe(self) -> dict[str, Any]:
        """Return it as plain data: the tier that made most, what it does, and why not another."""
        tier = max(self.made, key=lambda name: self.made[name], default="rows")
        does = next(each.does for each in TIERS if each.name == tier)
        why = [f"{name}: {reason}" for name, reason in self.passed_over.items()]
        reason = "; ".join([does, *why]) if self.engine == "auto" else f"{does}; asked for by name"
        more: dict[str, Any] = {}
        opened = sorted(self.opened & set(self.made))
        if self.gap and (opened or "wavefront" in self.made):
            more["gap"] = dict(self.gap)
        if opened:
            more["kernel"] = f"eager, laid open, in base and patched runs ({', '.join(opened)})"
        if self.n_ties or self.margin < math.inf:
            margin = self.margin if self.margin < math.inf else None
            more["routers"] = {"smallest_margin": margin, "measured_alone": self.n_ties}
        return {"tier": tier, "reason": reason, "asked": self.engine, "interventions": dict(self.made), **more}


def likely_tier(job: Job, gauge: Gauge, engine: EngineName) -> str:
    """Return the tier that will make most runs of a job, so far as can be said before anything runs."""
    for tier in TIERS:
        if engine not in ("auto", tier.name):
            continue
        why = _why_not(tier, job, gauge, is_auto=engine == "auto")
        if why is None and any(tier.why_not_targets(job.model, targets) is None for targets in job.interventions):
            return tier.name
    return "rows"


def measure(job: Job, gauge: Gauge, means: Means, cost: Cost, *, route: Route) -> Iterator[Block]:
    """Measure every intervention on every pair, each by the fastest engine that can make it.

    Args:
        job: What is to be measured.
        gauge: The metrics.
        means: Means of the sites that are replaced by one.
        cost: Counts what is spent.
        route: Which engine is asked for; filled with what was used.

    Yields:
        Blocks of cells, as each engine does; the untouched runs are the first engine's.

    Raises:
        SettingError: The engine that was asked for cannot make the runs; the message says why.
    """
    ledger = Ledger(job, gauge)
    for tier in TIERS:
        # Untouched runs alone are the same by any engine that can make them, and ties of routers take single forwards.
        is_last = tier.name == "reference" and (not job.interventions or bool(ledger.held.any()))
        is_asked = route.engine in ("auto", tier.name) or is_last
        if not (ledger.is_open and is_asked):
            continue
        pending = ledger.pending(alone=tier.name == "reference")
        if not pending and job.interventions:
            continue
        mine, why = _takes(tier, job, gauge, pending, is_auto=route.engine == "auto")
        if why is not None:
            route.passed_over[tier.name] = why
        if mine is not None:
            yield from _measure_by(tier, ledger, mine, (means, cost), route)
    if ledger.is_open:
        n_left = sum(number < job.n_asked for number in ledger.pending())
        raise SettingError(
            f"engine {route.engine!r} cannot make {f'{n_left} of {job.n_asked}' if n_left else 'these'} runs",
            facts=[*route.passed_over.items()],
            fix='let causalpatch choose: engine="auto"',
        )


def _takes(
    tier: Tier, job: Job, gauge: Gauge, pending: Sequence[int], *, is_auto: bool
) -> tuple[list[int] | None, str | None]:
    """Return which runs a tier takes (None: it is not used), and why it does not take all."""
    why = _why_not(tier, job, gauge, is_auto=is_auto)
    if why is None and tier.check is not None:
        why = tier.check(tier.name, tier.measure, replace(job, remembered=None))
    if why is not None:
        return None, why
    reasons = {number: tier.why_not_targets(job.model, job.interventions[number]) for number in pending}
    mine = [number for number, reason in reasons.items() if reason is None]
    why = next((reason for reason in reasons.values() if reason is not None), None)
    return (mine if mine or not pending else None), why


def _look(tier: Tier, job: Job, gauge: Gauge, first: Block | None, route: Route) -> str | None:
    """Note how far untouched runs lie from the model's own; where that is far, check the engine again."""
    # The other tiers' untouched runs are the model's own, unless attention is laid open.
    if job.opens_attention:
        route.opened.add(tier.name)
    elif tier.name != "wavefront":
        return None
    if first is None or first.interventions[0] != BASE:
        return None
    found, is_wide = gap_of(job, gauge, first)
    route.gap = {name: max(size, route.gap.get(name, 0.0)) for name, size in found.items()}
    if tier.name != "wavefront":
        return None  # the proof of the site has held its kernel against the model's own
    return why_drifts(tier.name, tier.measure, replace(job, remembered=None), anew=True) if is_wide else None


def _without(ties: Ties | None, blocks: Iterator[Block]) -> Iterator[Block]:
    """Leave out cells that are too near a tie, and all cells of pairs whose untouched runs are."""
    for block in blocks:
        if ties is None:
            yield block
            continue
        cells = zip(block.interventions.tolist(), block.pairs.tolist(), strict=True)
        kept = np.array([(number, pair) not in ties.cells and (BASE, pair) not in ties.cells for number, pair in cells])
        if kept.any():
            parts = (block.interventions, block.pairs, block.values, block.status)
            yield block if kept.all() else Block(*(part[..., kept] for part in parts))


def _measure_by(
    tier: Tier, ledger: Ledger, mine: Sequence[int], spent: tuple[Means, Cost], route: Route
) -> Iterator[Block]:
    """Measure what is open of some interventions by one engine, as far as it goes."""
    job, before = ledger.job, ledger.known.copy()
    try:
        is_alone = tier.name == "reference"
        for share in ledger.shares(mine, alone=is_alone):
            ties = None if is_alone or not router_layers(job.model) else Ties()
            blocks = _without(ties, tier.measure(replace(share.job, ties=ties), share.gauge, *spent))
            first = next(blocks, None)
            why = _look(tier, share.job, share.gauge, first, route)
            if why is not None:
                route.passed_over[tier.name] = why
                return
            for block in ledger.entering(share, blocks if first is None else chain([first], blocks)):
                route.made[tier.name] = sum(number < job.n_asked for number in mine)
                yield block
            if ties is not None:
                ledger.hold(share, ties.cells)
                route.margin, route.n_ties = min(route.margin, ties.margin), int(ledger.held[: job.n_asked].sum())
    except ModelUnsupported as error:
        # Some prompts may have shown what others did not: what is measured stays, the next engine makes the rest.
        n_made = int((ledger.known & ~before)[: job.n_asked].any(1).sum())
        n_left = int((~ledger.known[mine]).any(0).sum())
        route.made.pop(tier.name, None)
        route.made |= {tier.name: n_made} if n_made else {}
        where = f" on {n_left} of {len(job.pairs)} pairs" if n_made else ""
        route.passed_over[tier.name] = f"{error.what}{where}"
        if tier.name in (route.engine, "rows"):
            raise
