"""An experiment holds a model, pairs, metrics and a direction, and owns the one verb: run interventions.

Everything that measures anything goes through ``Experiment.run``. Plan, then run, then read::

    experiment = Experiment(model, pairs, metric=logit_difference, direction="denoise")
    print(experiment.plan(["z.2.1", "z.2.3"]))
    effects = experiment.run(["z.2.1", "z.2.3"])
    effects.summary()
"""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from causalpatch.base.axes import AXES
from causalpatch.base.errors import (
    CausalPatchWarning,
    MetricError,
    PairError,
    PatchError,
    SettingError,
    SiteUnsupported,
)
from causalpatch.base.progress import bar
from causalpatch.base.suggest import closest
from causalpatch.engine import (
    BASE,
    ENGINES,
    Cost,
    EngineName,
    Gauge,
    Job,
    Means,
    Plan,
    Role,
    Route,
    Target,
    check_answers,
    fit_all_means,
    likely_tier,
    measure,
    plan_job,
    probe,
    require_positions,
    require_proofs,
    targets_of,
)
from causalpatch.experiment.baseline import Baseline
from causalpatch.experiment.provenance import describe_request, describe_setup, notes_on
from causalpatch.experiment.reference import Reference, reference_of
from causalpatch.experiment.tally import Tally
from causalpatch.metrics import METRICS, Metric, logit_difference, named_metric, top1
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.pairs.batch import PaddingSide
from causalpatch.patches import Identity, Intervention, Patch
from causalpatch.results.effects import Effects
from causalpatch.results.provenance import describe_program
from causalpatch.sites import Site, SiteSet

Direction = Literal["denoise", "noise"]
Request = Intervention | Patch | Site | SiteSet | str | Sequence[Patch | Site | SiteSet | str]


class Experiment:
    """A model, pairs, metrics and a direction.

    Args:
        model: The model.
        pairs: Clean and corrupted inputs.
        metric: A metric, its name, or a list of them: one sweep feeds them all and costs once.
        direction: ``"denoise"`` puts clean activations into the corrupted run and asks what restores the behaviour;
            ``"noise"`` puts corrupted ones into the clean run and asks what breaks it.
        engine: How runs are made. ``"auto"`` takes the fastest way that the model allows, after a check against full
            forwards: ``"wavefront"`` (only the tokens and layers that a patch can change, on unmodified layers),
            ``"restart"`` (whole prompts from the first patched layer on), ``"graph"`` (what depends on the patched
            tensors, on an exported graph), ``"rows"`` (full forwards, interventions stacked). ``"reference"`` makes one
            full forward after the other with plain hooks. Results say which it was, and why.
        padding_side: Where short prompts are padded. It changes nothing but rounding.
        budget_gib: Memory for activations in GiB; by default 2 on a CPU, half of what is free on a GPU.
        max_rows: Most rows in one forward; by default what the budget allows. 1 gives each run a forward of its own.
        seed: Seed of the statistics.
        show_progress: Whether to show a bar; by default where the error stream is a terminal.

    Raises:
        SettingError: The direction or engine is unknown.
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
        engine: EngineName = "auto",
        padding_side: PaddingSide = "right",
        budget_gib: float | None = None,
        max_rows: int | None = None,
        seed: int = 0,
        show_progress: bool | None = None,
    ) -> None:
        _one_of("direction", direction, ("denoise", "noise"))
        _one_of("engine", engine, ENGINES)
        _one_of("padding_side", padding_side, ("right", "left"))
        _check_kinds(model, pairs)
        self.model = model
        self.pairs = pairs
        self.metrics = _as_metrics(metric)
        self.direction = direction
        self.engine: EngineName = engine
        self.padding_side: PaddingSide = padding_side
        self.budget_gib = budget_gib
        self.max_rows = max_rows
        self.seed = seed
        self.show_progress = show_progress
        if model.vocab_size and model.kind == "tokens":
            check_answers(pairs, model.vocab_size, model.name)
        self._gauge = Gauge(self.metrics, pairs, model)

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
        extra = [m for m in (logit_difference, top1) if _fits(m, self.pairs)]
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
        )

    def plan(self, interventions: Iterable[Request] | Request) -> Plan:
        """Say what a run would cost; nothing runs.

        Args:
            interventions: As for ``run``.

        Returns:
            Rows, forwards, FLOPs and memory by the engine that will likely be used, and the first pair's tokens; it
            prints as a table.
        """
        targets = self._targets(_as_interventions(interventions))
        job = self._job(targets, reference_of(targets, self.direction))
        tier = likely_tier(job, self._gauge, self.engine)
        return plan_job(job, len(self._gauge.forks), gauge=self._gauge, tier=tier)

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
            identity patch, whose largest effect is the noise floor, and for ablations the reference. What a run costs
            is the engine's affair: on the wavefront, the tokens and layers that a patch can change.
        """
        asked = _as_interventions(interventions)
        targets = self._targets(asked)
        axes = {"intervention": [each.label for each in asked]} if axes is None else axes
        _check_grid(axes, len(asked))
        self._require(targets)
        reference = reference_of(targets, self.direction)
        job = self._job(targets, reference)
        tally = Tally.of(job, len(self.metrics))
        started = time.perf_counter()
        means = fit_all_means(job)
        route = Route(self.engine)
        is_complete = self._measure(job, means, tally, route)
        kept = tally.pairs_with_baselines(job.reference)
        shape = tuple(len(values) for values in axes.values())
        n_cells = job.n_asked
        return Effects.build(
            axes=axes,
            pair_ids=[self.pairs[int(i)].id for i in kept],
            groups=self.pairs.components[kept],
            metrics=[metric.name for metric in self.metrics],
            values=tally.values[:, :n_cells, kept].reshape(len(self.metrics), *shape, len(kept)),
            status=tally.status[:n_cells, kept].reshape(*shape, len(kept)),
            baselines=self._baselines(tally, kept, job.reference),
            labels=labels,
            positions=self._aligned_positions(kept) if "position" in axes else None,
            provenance={
                **describe_program(),
                **describe_setup(self.model, self.pairs, self.metrics, self.direction, self.seed),
                **describe_request(asked, targets, reference, self.direction),
                **({"site": title} if title else {}),
                "engine": route.describe(),
                "noise_floor": tally.noise_floor([metric.name for metric in self.metrics]),
                "notes": notes_on(self.pairs, self.base, targets),
                "complete": is_complete,
                "cost": {**vars(tally.cost), "seconds": round(time.perf_counter() - started, 3)},
            },
        )

    def count_units(self, site: Site) -> int:
        """Count the entries of a module's unit axis, such as its channels, in a run of the first clean input.

        Args:
            site: A ``module(…)`` site with named axes and no unit.

        Raises:
            SiteUnsupported: The module's tensor does not have the axes that were named.
        """
        axes = site.module.axes if site.module else ()
        captured = probe(self.model, self.pairs, self.base, 0, [site])
        shape = tuple(captured.value(site).shape[1:])
        if len(shape) != len(axes) or site.unit_axis is None:
            raise SiteUnsupported(
                f"'{site}' names {len(axes)} axes",
                facts=[("its tensor", f"has {len(shape)} after the pair, of sizes {shape}")],
                fix="name every axis after the pair, such as axes=(channel,height,column)",
            )
        # The value of a site has its positions first, wherever the module has them.
        return shape[sorted(axes, key=lambda axis: axis != "position").index(site.unit_axis)]

    def _measure(self, job: Job, means: Means, tally: Tally, route: Route) -> bool:
        """Fill the tally; return False where the user stopped it in between."""
        total = max(1, len(job.interventions) * len(job.pairs))
        try:
            with bar(f"patching '{self.model.name}'", total, is_shown=self.show_progress) as advance:
                for block in measure(job, self._gauge, means, tally.cost, route=route):
                    tally.add(block)
                    advance(len(block.pairs) if block.interventions[0] >= 0 else 0)
        except KeyboardInterrupt:
            n_done = tally.n_made(job.n_asked)
            if not n_done:
                raise
            total -= len(job.pairs) * job.n_controls
            warnings.warn(
                CausalPatchWarning(f"stopped: {n_done:,} of {total:,} runs were made and are kept"), stacklevel=3
            )
            return False
        return True

    def _require(self, targets: Sequence[tuple[Target, ...]]) -> None:
        """Make sure that all sites are what their names say, before anything is measured."""
        asked = [target for group in targets for target in group]
        require_proofs(self.model, {target.site.name for target in asked})
        if self.pairs.kind == "tokens":
            by_token = {target.site for target in asked if target.site.module and target.has_position}
            require_positions(self.model, self.pairs, self.base, by_token)

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
        )

    def _baselines(self, tally: Tally, kept: np.ndarray, reference: int | None) -> dict[str, np.ndarray]:
        base, source = tally.untouched[:, :, kept]
        runs = {"base": base, "source": source}
        runs |= {"clean": base, "corrupt": source} if self.base == "clean" else {"clean": source, "corrupt": base}
        if reference is not None:
            runs["reference"] = tally.values[:, reference, kept]
        return runs

    def _aligned_positions(self, kept: np.ndarray) -> np.ndarray:
        columns: np.ndarray = self.pairs.aligned().columns[kept]
        return columns if self.base == "clean" else columns[..., ::-1]


def _as_metrics(asked: Metric | str | Sequence[Metric | str]) -> tuple[Metric, ...]:
    listed = [asked] if isinstance(asked, Metric | str) or not isinstance(asked, Sequence) else list(asked)
    for one in listed:
        if not isinstance(one, Metric | str):
            raise MetricError(
                f"{repr(one)[:60]} is not a metric",
                facts=[("built-in", ", ".join(METRICS))],
                fix="wrap a function: causalpatch.metric(function)" if callable(one) else 'metric="logit_difference"',
            )
    metrics = tuple(named_metric(one) if isinstance(one, str) else one for one in listed)
    names = [metric.name for metric in metrics]
    if not names or len(set(names)) < len(names):
        raise SettingError(
            "an experiment needs one or more metrics with different names",
            facts=[("given", ", ".join(names) or "none")],
            fix='name your own: causalpatch.metric(function, name="…")',
        )
    return metrics


def _as_interventions(requests: Iterable[Request] | Request) -> list[Intervention]:
    if isinstance(requests, str | Patch | Site | SiteSet | Intervention) or not isinstance(requests, Iterable):
        requests = [requests]
    made = [Intervention.of(request) for request in requests]
    if not made:
        raise PatchError("there is nothing to run", fix="name at least one site, such as 'resid_pre.0'")
    return made


def _check_grid(axes: Mapping[str, Sequence[Any]], n_interventions: int) -> None:
    unknown = [axis for axis in axes if axis not in AXES]
    if unknown:
        raise SettingError(
            f"results have no axis named {unknown[0]!r}",
            facts=[("axes", ", ".join(axis for axis in AXES if axis != "pair"))],
            fix='use one of these, such as "intervention"',
        )
    for axis, values in axes.items():
        texts = list(map(str, values))
        twice = next((text for text in texts if texts.count(text) > 1), None) if len(set(texts)) < len(texts) else None
        if twice is not None:
            raise SettingError(
                f"axis {axis!r} holds {twice!r} more than once",
                facts=[("cells", len(texts))],
                fix="name every cell once; to run the same again, give it a label: Intervention(patches, label)",
            )
    cells = int(np.prod([len(values) for values in axes.values()]))
    if cells != n_interventions:
        sizes = " x ".join(f"{name} {len(values)}" for name, values in axes.items())
        raise SettingError(
            f"{n_interventions} interventions do not fill the axes",
            facts=[("axes", f"{sizes} = {cells} cells")],
            fix="give one intervention per cell, the last axis fastest, or leave axes= out",
        )


def _check_kinds(model: Model, pairs: Pairs) -> None:
    if not len(pairs):
        raise PairError(f"'{pairs.name}' holds no pairs", fix="give at least one")
    if model.kind == "arrays" and pairs.kind == "tokens":
        raise PairError(
            f"'{pairs.name}' holds prompts, but '{model.name}' takes arrays",
            fix="make pairs of arrays: Pairs.from_arrays(clean, corrupt, answer=…)",
        )


def _fits(metric: Metric, pairs: Pairs) -> bool:
    has_answers = all(pair.answer and pair.wrong_answer for pair in pairs)
    return has_answers and all(len(a) == 1 for pair in pairs for a in (*pair.answer, *pair.wrong_answer))


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        near = closest(str(value), known, 1)
        raise SettingError(
            f"{name} cannot be {value!r}",
            facts=[("known", ", ".join(known))],
            fix=f'{name}="{near[0] if near else known[0]}"',
        )
