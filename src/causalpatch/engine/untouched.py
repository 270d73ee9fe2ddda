"""Untouched runs of some pairs: what they measure, and what patched runs and means read of them.

1. The base and the source run of each pair are made in one forward each, which keep the tensors at the sites asked for.
2. Answers of several tokens are spelt out by further forwards (forks) that go on from the prompt through the answer.
3. Metrics read both; a run that gives NaN is refused here, before anything is compared with it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, TypeAlias

import numpy as np
import torch
from jaxtyping import Float, Int

from causalpatch.engine.canonical import canonical
from causalpatch.engine.capture import Captured, capture
from causalpatch.engine.drawn import Donated
from causalpatch.engine.gauge import Gauge, Mode, Run
from causalpatch.engine.generate import generate
from causalpatch.engine.job import BASE, SOURCE, Block, Cost, Job, check_finite
from causalpatch.engine.means import Means
from causalpatch.engine.once import capture_once
from causalpatch.engine.resolve import Role
from causalpatch.engine.routes import watching
from causalpatch.engine.values import Known, Row
from causalpatch.models import Model
from causalpatch.pairs import Batch
from causalpatch.results.status import Status
from causalpatch.sites import Site

Fork: TypeAlias = tuple[Literal["answer", "wrong_answer"], int] | Mode
"""What follows a prompt: an answer of several tokens that is spelt out, by its side and which of the set; or what the
model writes itself, by what is patched meanwhile."""


@dataclass(frozen=True)
class Untouched:
    """Some pairs with their untouched runs.

    Args:
        indices: The pairs.
        known: What is kept of the runs, for patches to read.
        runs: The ``"base"`` and the ``"source"`` run.
        values: What they measure, by the same names.
        forks: What is kept of the base runs that go on through an answer.
    """

    indices: Int[np.ndarray, " pair"]
    known: Known
    runs: Mapping[str, Run]
    values: Mapping[str, Float[np.ndarray, "metric pair"]]
    forks: Mapping[Fork, Captured] = field(default_factory=dict)

    def lean(self, gauge: Gauge) -> "Untouched":
        """Return these without the runs' logits, which are large, unless a metric compares with them."""
        ends = {name: replace(getattr(self.known, name), output=None) for name in ("source", "base")}
        has_compared = any(metric.compares for metric in gauge.metrics)
        return replace(self, known=replace(self.known, **ends), runs=self.runs if has_compared else {})

    def bare(self, gauge: Gauge) -> "Untouched":
        """Return these without what is kept of the runs, and without the logits that ``lean`` drops."""
        lean = self.lean(gauge)
        ends = {name: replace(getattr(lean.known, name), tensors={}) for name in ("source", "base")}
        return replace(lean, known=replace(lean.known, **ends))

    @property
    def n_bytes(self) -> int:
        """Bytes of the tensors that are held."""
        ends = (self.known.base, self.known.source, *self.forks.values())
        tensors = sum(tensor.nbytes for run in ends for tensor in run.tensors.values())
        return tensors + sum(run.logits.nbytes for run in self.runs.values())

    def blocks(self) -> list[Block]:
        """Return the cells of the untouched runs."""
        codes = {"base": BASE, "source": SOURCE}
        return [
            Block.of(np.full(len(self.indices), codes[name]), self.indices, values, Status.MEASURED)
            for name, values in self.values.items()
        ]


def run_untouched(  # noqa: PLR0913 - what is kept beside what patches read, each with a default
    job: Job,
    gauge: Gauge,
    means: Means,
    cost: Cost,
    indices: Int[np.ndarray, " pair"],
    *,
    base_sites: Sequence[Site] = (),
    fork_sites: Sequence[Site] = (),
    also: Sequence[Site] = (),
) -> Untouched:
    """Make the base and source runs of some pairs, and keep there what the patches read.

    Args:
        job: The job.
        gauge: The metrics.
        means: Fitted means.
        cost: Counts what is spent.
        indices: The pairs.
        base_sites: Sites to keep in the base runs besides those that patches read.
        fork_sites: Sites to keep in the base runs that go on through an answer.
        also: Sites that later jobs on the same pairs will ask for in both kinds of base runs.

    Raises:
        NotFinite: A run gives NaN or infinity.
    """
    targets = [target for group in job.interventions for target in group]
    sites = {
        "base": [*(t.site for t in targets if t.needs_base), *base_sites],
        "source": [t.site for t in targets if t.needs_source],
    }
    others = job.remembered.beside if job.remembered else ()
    later = [target for some in others for target in (*some, *canonical(some, job.model))]
    # Of base runs, too: each job's identity patch reads there what its first patch reads of the source.
    beside = {"base": [*(t.site for t in later), *also], "source": [t.site for t in later if t.needs_source]}
    roles: dict[Literal["base", "source"], Role] = {"base": job.base, "source": job.source}
    # Both are captured before any is spelt out: what runs out of memory should do so early.
    models = {name: job.model_of(name) for name in ("base", "source")}
    kept = {
        name: run_role(job, role, indices, list(dict.fromkeys(sites[name])), cost, models[name], beside[name])
        for name, role in roles.items()
    }
    donors = run_donors(job, indices, cost)
    pair = torch.as_tensor(indices, device=job.model.device)
    runs: dict[str, Run] = {}
    forks: dict[Fork, Captured] = {}

    def go_on(name: str, fork: Fork, inputs: Batch) -> Run:
        sites = fork_sites if name == "base" else ()
        with watching(job.ties, models[name], _rows(indices), inputs):
            found = capture_once(job, cost, models[name], inputs, sites, also if name == "base" else ())
        if name == "base" and fork_sites:
            forks[fork] = replace(found, output=None)
        return Run(models[name].logits(found.output), inputs, pair)

    for name, role in roles.items():
        run = Run(models[name].logits(kept[name].output), kept[name].batch, pair)
        runs[name] = spell(job, gauge, role, run, partial(go_on, name))
    values = {
        name: gauge.values(run, runs, torch.arange(len(indices), device=pair.device)) for name, run in runs.items()
    }
    for name in roles:
        check_finite(job, gauge, name, indices, values[name])
    groups = [job.pairs[number].group for number in indices.tolist()]
    known = Known(kept["source"], kept["base"], means, groups=groups, donors=donors)
    return Untouched(indices, known, runs, values, forks)


def run_role(
    job: Job,
    role: Role,
    indices: Int[np.ndarray, " pair"],
    sites: Sequence[Site],
    cost: Cost,
    model: Model | None = None,
    beside: Iterable[Site] = (),
) -> Captured:
    """Run one side of some pairs as it is, and keep what the sites need.

    Args:
        job: The job.
        role: Which side.
        indices: The pairs.
        sites: The sites.
        cost: Counts what is spent.
        model: The model that runs, by default the one that is patched.
        beside: Sites that later jobs on the same pairs will ask for.
    """
    inputs = job.pairs.batch(role, indices, padding_side=job.padding_side)
    with watching(job.ties, model or job.model, _rows(indices), inputs):
        return capture_once(job, cost, model or job.model, inputs, sites, beside)


def _rows(indices: Int[np.ndarray, " pair"]) -> list[Row]:
    """Return untouched runs as rows in which nothing is patched."""
    return [Row(BASE, pair, local, ()) for local, pair in enumerate(indices.tolist())]


def run_donors(job: Job, indices: Int[np.ndarray, " pair"], cost: Cost) -> dict[Donated, Captured]:
    """Run the prompts that the values of some pairs are resampled from, and keep what is.

    Args:
        job: The job.
        indices: The pairs.
        cost: Counts what is spent.
    """
    sites: dict[Donated, dict[Site, None]] = {}
    for target in (target for group in job.interventions for target in group):
        if isinstance(target.value, Donated):
            sites.setdefault(target.value, {})[target.site] = None
    kept = {}
    for value, wanted in sites.items():
        numbers = [value.donor(job.pairs[number]) for number in indices.tolist()]
        batch = value.pool.batch(value.value.side, numbers, padding_side=job.padding_side)
        captured = capture(job.model, batch, wanted, opens_attention=job.opens_attention)
        kept[value] = replace(captured, output=None)
        cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(indices)
    return kept


def spell(job: Job, gauge: Gauge, role: Role, run: Run, go_on: Callable[[Fork, Batch], Run]) -> Run:
    """Add the log-probabilities of answers of several tokens to a run, and what the model goes on to write.

    Args:
        job: The job.
        gauge: The metrics.
        role: The side whose prompts the run has.
        run: The run of the prompts.
        go_on: Runs the prompts followed by an answer without its last token, or by what was written, with the same
            patches.
    """
    pairs = run.pair.cpu().numpy()
    found: dict[str, list[torch.Tensor]] = {}
    for side, number in gauge.forks:
        going_on = gauge.continuations(side, number, pairs)
        inputs = job.pairs.batch(role, pairs, padding_side=job.padding_side, continuations=going_on)
        found.setdefault(side, []).append(gauge.spelt(go_on((side, number), inputs), side, number))
    forks = {side: torch.stack(columns, 1) for side, columns in found.items()}
    return generate(job, gauge, role, replace(run, forks=forks), go_on)
