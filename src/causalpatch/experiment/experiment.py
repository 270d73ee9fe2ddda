"""An experiment holds a model, pairs, metrics and a direction, and owns the one verb: run interventions.

Everything that measures anything goes through ``Experiment.run``. Plan, then run, then read::

    experiment = Experiment(model, pairs, metric=logit_difference, direction="denoise")
    print(experiment.plan(["z.2.1", "z.2.3"]))
    experiment.run(["z.2.1", "z.2.3"]).summary()
"""

import copy
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from causalpatch.base.collector import undisturbed
from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine import (
    BASE,
    ENGINES,
    Cost,
    EngineName,
    Gauge,
    Job,
    Means,
    Plan,
    Precision,
    Remembered,
    Role,
    Route,
    Screen,
    Target,
    budget_within,
    check_answers,
    fit_patches,
    fit_values,
    likely_tier,
    measure,
    measure_screened,
    plan_job,
    plan_screen,
    probe,
    targets_of,
)
from causalpatch.experiment.baseline import Baseline
from causalpatch.experiment.measured import Measured, Runner
from causalpatch.experiment.provenance import (
    describe_precision,
    describe_request,
    describe_setup,
    describe_source,
    notes_on,
)
from causalpatch.experiment.reference import Reference, reference_of
from causalpatch.experiment.requests import (
    Request,
    as_interventions,
    as_metrics,
    check_grid,
    check_precision,
    meet,
    one_of,
    reads_both_answers,
    warn_of,
)
from causalpatch.experiment.sources import check_same_shape, makers_of_runs, require_sites
from causalpatch.experiment.tally import Tally
from causalpatch.metrics import Metric, logit_difference, top1
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.batch import PaddingSide
from causalpatch.patches import Identity, Intervention
from causalpatch.results.effects import Effects
from causalpatch.results.provenance import describe_program
from causalpatch.sites import Site

Direction = Literal["denoise", "noise"]


class Experiment:
    """A model, pairs, metrics and a direction.

    Args:
        model: The model.
        pairs: Clean and corrupted inputs.
        metric: A metric, its name, or a list of them: one sweep feeds them all and costs once.
        direction: ``"denoise"`` puts clean activations into the corrupted run and asks what restores the behaviour;
            ``"noise"`` puts corrupted ones into the clean run and asks what breaks it.
        source_model: Another model of the same shape that makes the source runs, such as an older checkpoint.
        engine: How runs are made. ``"auto"`` takes the fastest way that the model allows, after a check against full
            forwards: ``"wavefront"`` (only the tokens and layers that a patch can change, on unmodified layers),
            ``"restart"`` (whole prompts from the first patched layer on), ``"graph"`` (what depends on the patched
            tensors, on an exported graph), ``"rows"`` (full forwards, interventions stacked); ``"reference"`` makes one
            after the other with plain hooks. Results say which it was, and why.
        precision: ``"screen"`` multiplies the layers' linear maps in few bits where that is faster, rounded relative to
            what a patch changes, and measures the largest effects and a random sample again in float32, which says how
            far the others may be off. For models in float32 on the wavefront; by default as the model is.
        recheck_top: How many of the largest mean effects of a screen must be those that float32 gives.
        padding_side: Where short prompts are padded. It changes nothing but rounding.
        budget_gib: Memory for activations in GiB; by default 2 on a CPU, half of what is free on a GPU; at most what
            weights leave of the model's ``memory_gib``.
        max_rows: Most rows in one forward; by default what the budget allows. 1 gives each run a forward of its own.
        seed: Seed of the statistics.
        show_progress: Whether to show a bar; by default where the error stream is a terminal.

    Raises:
        SettingError: The direction, engine or precision is unknown, or does not fit the model; or the source model is
            on another device or in another dtype.
        ModelUnsupported: The source model is not of the same shape; the message says in what.
        MetricError: A metric does not exist, or is a function that was not wrapped by ``metric``.
        AnswerError: The pairs do not have the answers that a metric needs.
        PairError: There are no pairs, or they are of another kind than the model.

    References:
        Meng et al. 2022, "Locating and Editing Factual Associations in GPT", 2202.05262 (causal tracing); Zhang &
        Nanda 2024, "Towards Best Practices of Activation Patching", 2309.16042; Heimersheim & Nanda 2024, "How to use
        and interpret activation patching", 2404.15255 (denoising and noising).
    """

    def __init__(  # noqa: PLR0913 - an experiment is the one place where all of these meet; each has a default
        self,
        model: Model,
        pairs: Pairs,
        metric: Metric | str | Sequence[Metric | str] = logit_difference,
        direction: Direction = "denoise",
        *,
        source_model: Model | None = None,
        engine: EngineName = "auto",
        precision: Precision | None = None,
        recheck_top: int = 20,
        padding_side: PaddingSide = "right",
        budget_gib: float | None = None,
        max_rows: int | None = None,
        seed: int = 0,
        show_progress: bool | None = None,
    ) -> None:
        one_of("direction", direction, ("denoise", "noise"))
        one_of("engine", engine, ENGINES)
        one_of("padding_side", padding_side, ("right", "left"))
        model, pairs = meet(model, pairs)
        source_model = source_model.reading(pairs.kind) if isinstance(source_model, Model) else source_model
        check_precision(precision, engine, model, recheck_top)
        self.model = model
        self.source_model = source_model
        self.pairs = pairs
        self.metrics = as_metrics(metric)
        self.direction = direction
        self.engine: EngineName = engine
        self.precision: Precision | None = precision
        self.recheck_top = recheck_top
        self.padding_side: PaddingSide = padding_side
        self.budget_gib = budget_within(model, budget_gib)
        self.max_rows = max_rows
        self.seed = seed
        self.show_progress = show_progress
        self.runner: Runner | None = None
        self.remembered: Remembered | None = None
        if model.vocab_size and model.kind == "tokens":
            check_answers(pairs, model.vocab_size, model.name)
        if source_model is not None:
            check_same_shape(model, source_model, pairs)
        self.gauge = Gauge(self.metrics, pairs, model)

    def __repr__(self) -> str:
        names = ", ".join(metric.name for metric in self.metrics)
        return f"Experiment({self.model.name!r}, {self.pairs.name!r}, {names}, {self.direction})"

    @property
    def base(self) -> Role:
        """Which side the base run is: the run that is changed."""
        return "corrupt" if self.direction == "denoise" else "clean"

    @cached_property
    def baseline(self) -> Baseline:
        """The untouched clean and corrupted runs, measured; two runs per pair, made once."""
        extra = [m for m in (logit_difference, top1) if reads_both_answers(m, self.pairs)]
        gauge = Gauge([*self.metrics, *extra], self.pairs, self.model)
        n_metrics = len(self.metrics)
        table = np.full((2, len(gauge.metrics), len(self.pairs)), np.nan)
        for block in measure(self._job([]), gauge, Means(), Cost(), route=Route("rows")):
            table[0 if block.interventions[0] == BASE else 1][:, block.pairs] = block.values
        clean, corrupt = table if self.base == "clean" else table[::-1]
        is_answered = len(extra) == 2
        return Baseline(
            tuple(metric.name for metric in self.metrics),
            clean[:n_metrics],
            corrupt[:n_metrics],
            clean[n_metrics] > 0 if is_answered else None,
            corrupt[n_metrics] < 0 if is_answered else None,
            clean[n_metrics + 1] == 1 if is_answered else None,
            makers_of_runs(self.model, self.source_model, self.base),
        )

    def plan(self, interventions: Iterable[Request] | Request) -> Plan:
        """Say what a run would cost; the model does not run.

        Args:
            interventions: As for ``run``.

        Returns:
            Rows, forwards, FLOPs and memory by the engine that will likely be used, and the first pair's tokens; it
            prints as a table. For a screen also what is measured again in float32, from the least to the most.

        Raises:
            SettingError: A screen was asked for, and the wavefront cannot make the runs.

        Cost:
            Arithmetic on counts. For a screen products in few bits are timed, 0.2 s once per device and width.
        """
        targets = self._targets(as_interventions(interventions))
        job = self._job(targets, reference_of(targets, self.direction))
        if self.precision == "screen":
            return plan_screen(job, self.gauge, Screen(self.recheck_top, self.seed))
        tier = likely_tier(job, self.gauge, self.engine)
        return plan_job(job, self.gauge.n_more_forwards, gauge=self.gauge, tier=tier)

    def run(
        self,
        interventions: Iterable[Request] | Request,
        *,
        axes: Mapping[str, Sequence[Any]] | None = None,
        labels: Mapping[str, Sequence[str]] | None = None,
        title: str | None = None,
    ) -> Effects:
        """Measure interventions on every pair.

        Args:
            interventions: Each one a ``Patch``, a site or its text (patched from the source run), or a list of these
                made together in one run.
            axes: Axes that the interventions fill in row-major order, with their coordinates; by default the one axis
                ``intervention`` with each one's text.
            labels: Labels along axes, such as tokens along ``position``.
            title: What results call the patched sites; by default their names.

        Returns:
            Effects with the axes asked for, then ``pair``.

        Raises:
            SiteNotFound: A site is not in the model.
            SiteUnsupported: The model does not have a site, or it failed its proof.
            PairError: Pairs of unequal length are patched at all positions without an alignment.
            SettingError: The axes do not fit, or the engine or precision that was asked for cannot make the runs.
            PatchDidNotFire: A module of a patch did not run.
            NotFinite: An untouched run gives NaN or infinity.

        Examples:
            >>> import causalpatch as cp
            >>> model = cp.open_model("zoo:stories")
            >>> experiment = cp.Experiment(model, cp.load_pairs("ioi", model))
            >>> experiment.run(["resid_pre.0", "z.0.0"]).dims
            ('intervention', 'pair')

        Cost:
            One run per intervention and pair, and three or four per pair for the untouched runs and the controls: the
            identity patch, whose largest effect is the noise floor, and for ablations the reference. On the wavefront
            a run costs the tokens and layers that its patch can change.
        """
        with undisturbed():
            return self._run(as_interventions(interventions), axes, labels, title)

    def _run(
        self,
        asked: Sequence[Intervention],
        axes: Mapping[str, Sequence[Any]] | None,
        labels: Mapping[str, Sequence[str]] | None,
        title: str | None,
    ) -> Effects:
        targets = self._targets(asked)
        axes = {"intervention": [each.label for each in asked]} if axes is None else axes
        check_grid(axes, len(asked))
        require_sites(self.model, self.source_model, self.pairs, self.base, targets)
        warned = warn_of(self.model, self.pairs, self.base, targets)
        found = self.measured(asked) if self.runner is None else self.runner.measure(self, asked)
        kept, shape = found.kept, tuple(len(values) for values in axes.values())
        told = {"notes": [*warned, *notes_on(self.pairs, self.base, targets), *found.record["notes"]]}
        return Effects.build(
            axes=axes,
            pair_ids=[self.pairs[int(i)].id for i in kept],
            groups=self.pairs.components[kept],
            metrics=[metric.name for metric in self.metrics],
            values=found.values.reshape(len(self.metrics), *shape, len(kept)),
            status=found.status.reshape(*shape, len(kept)),
            baselines=found.baselines,
            labels=labels,
            positions=self._aligned_positions(kept, targets) if "position" in axes else None,
            provenance={
                **describe_program(),
                **describe_setup(self.model, self.pairs, self.metrics, self.direction, self.seed),
                **describe_source(self.source_model),
                **describe_request(asked, targets, reference_of(targets, self.direction), self.direction, self.model),
                **({"site": title} if title else {}),
                **found.record,
                **told,
            },
        )

    def measured(self, asked: Sequence[Intervention]) -> Measured:
        """Run interventions here and return the numbers before they are labelled.

        Args:
            asked: The interventions.
        """
        targets = self._targets(asked)
        job = self._job(targets, reference_of(targets, self.direction))
        tally = Tally.of(job, len(self.metrics))
        started = time.perf_counter()
        fitted = fit_values(job)
        job = fitted.job
        route = Route(self.engine)
        screen = Screen(self.recheck_top, self.seed) if self.precision == "screen" else None
        how = (job, self.gauge, fitted.means, tally.cost)
        blocks = measure_screened(*how, route=route, screen=screen) if screen else measure(*how, route=route)
        is_complete = tally.fill(blocks, job, f"patching '{self.model.name}'", is_shown=self.show_progress)
        kept = tally.pairs_with_baselines(job.reference)
        record = {
            **({"fitted": list(fitted.record)} if fitted.record else {}),
            "engine": route.describe(),
            "precision": screen.describe() if screen else describe_precision(self.model, self.precision),
            "noise_floor": tally.noise_floor([metric.name for metric in self.metrics]),
            "notes": list(screen.notes()) if screen else [],
            "complete": is_complete,
            "cost": {**vars(tally.cost), "seconds": round(time.perf_counter() - started, 3)},
        }
        values, status = tally.values[:, : job.n_asked, kept], tally.status[: job.n_asked, kept]
        return Measured(values, status, tally.baselines(kept, self.base, job.reference), kept, record)

    def turned(self, direction: Direction) -> "Experiment":
        """Return the same experiment in a direction."""
        one_of("direction", direction, ("denoise", "noise"))
        made = copy.copy(self)
        made.direction = direction
        made.__dict__.pop("baseline", None)
        return made

    def measuring(self, metric: Metric | str | Sequence[Metric | str]) -> "Experiment":
        """Return the same experiment with other metrics."""
        made = copy.copy(self)
        made.metrics = as_metrics(metric)
        made.gauge = Gauge(made.metrics, self.pairs, self.model)
        made.__dict__.pop("baseline", None)
        return made

    def fit(self, interventions: Iterable[Request] | Request) -> list[Intervention]:
        """Fit means and widths of noise on these pairs, so that other pairs can be patched with them.

        What is fitted on the pairs that it is measured on fits them better than others. So fit on discovery pairs, and
        measure on held-out ones; the record of their effects names the pairs of both.

        Args:
            interventions: As for ``run``; sets of sites become a patch per site.

        Returns:
            The interventions with ``Fitted`` for each mean and a sigma for each noise, all else as it was.

        Raises:
            PairError: A pair has no group, and a mean per group is asked for.

        Cost:
            One run per prompt for each different mean, and one for all widths of a side.
        """
        asked = as_interventions(interventions)
        return fit_patches(self.job(asked), asked)

    def job(self, interventions: Sequence[Intervention]) -> Job:
        """Return what the engine is asked for by some interventions, their sites proven."""
        targets = self._targets(interventions)
        require_sites(self.model, self.source_model, self.pairs, self.base, targets)
        return self._job(targets)

    def count_units(self, site: Site, axis: str) -> int:
        """Count the entries of an axis of a module, such as its channels, in a run of the first clean input.

        Args:
            site: A ``module(…)`` site with named axes and no unit.
            axis: One of its axes.

        Raises:
            SiteUnsupported: The module's tensor does not have the axes that were named.
        """
        axes = site.module.axes if site.module else ()
        captured = probe(self.model, self.pairs, self.base, 0, [site])
        shape = tuple(captured.value(site).shape[1:])
        if len(shape) != len(axes) or axis not in axes:
            raise SiteUnsupported(
                f"'{site}' names {len(axes)} axes",
                facts=[("its tensor", f"has {len(shape)} after the pair, of sizes {shape}")],
                fix="name every axis after the pair, such as axes=(channel,height,column)",
            )
        # The value of a site has its positions first, wherever the module has them.
        return shape[sorted(axes, key=lambda each: each != "position").index(axis)]

    def _targets(self, interventions: Sequence[Intervention]) -> list[tuple[Target, ...]]:
        return [targets_of(self.model, intervention) for intervention in interventions]

    def _job(self, asked: Sequence[tuple[Target, ...]], reference: Reference | None = None) -> Job:
        """Return the job of some interventions, followed by its controls: the reference run, and the noise floor."""
        controls = [reference.targets] if reference and reference.targets else []
        place = len(asked) if controls else None
        if asked:
            controls.append(tuple(replace(target, value=Identity(), align=None) for target in asked[0]))
        return Job(
            self.model,
            self.pairs,
            [*asked, *controls],
            self.base,
            self.padding_side,
            self.budget_gib,
            self.max_rows,
            place,
            len(controls),
            source_model=self.source_model,
            remembered=self.remembered,
        )

    def _aligned_positions(self, kept: np.ndarray, targets: Sequence[tuple[Target, ...]]) -> np.ndarray:
        columns: np.ndarray = self.pairs.of(targets[0][-1].stream).aligned().columns[kept]
        return columns if self.base == "clean" else columns[..., ::-1]
