"""The slope of a metric at every port at once: one forward and one backward for all pairs of a batch.

Rows are pairs: each has a metric of its own that no other row touches, so the gradient of the sum over rows is each
row's own. The model is held as for any run and its parameters are frozen, so gradients flow to activations alone,
whatever kind of weights there is.

*Points* are where slopes are taken on the straight way from the base run's input to the source run's. The stream into
the first layer, or an array itself, is moved there; one point at 0 is the base run. Slopes are averaged over points.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from causalpatch.base.errors import MetricError, ModelUnsupported, NoGradient, NotFinite, SettingError
from causalpatch.engine.batches import in_batches
from causalpatch.engine.capture import Captured, capture, inputs_of, ports_of
from causalpatch.engine.few_logits import WHOLE, Few, tokens_at
from causalpatch.engine.fused import fused
from causalpatch.engine.gauge import Gauge, Run
from causalpatch.engine.gradient import differentiable
from causalpatch.engine.hooks import quiet, run_with_hooks
from causalpatch.engine.job import Cost, Job, check_finite
from causalpatch.engine.means import Means
from causalpatch.engine.probes import Probes
from causalpatch.engine.untouched import Untouched
from causalpatch.engine.values import Known
from causalpatch.models import Model, Port
from causalpatch.pairs import Batch
from causalpatch.pairs.role import Role
from causalpatch.sites import Site

Rule = Literal["midpoint", "eap-ig"]
ROUNDING = 1e-6
"""Of the gap: what a metric's slope gives that is 0 but for rounding is smaller."""


@dataclass(frozen=True)
class Points:
    """Where slopes are taken on the way from the base (0) to the source (1).

    Args:
        shares: The share of the way of each point.
        rule: How they were chosen, in words.
    """

    shares: tuple[float, ...]
    rule: str

    @classmethod
    def base(cls) -> "Points":
        """Return the base run alone."""
        return cls((0.0,), "the base run")

    @classmethod
    def ends(cls) -> "Points":
        """Return the base and the source run."""
        return cls((0.0, 1.0), "the clean and the corrupted run")

    @classmethod
    def along(cls, steps: int, rule: str, base: str) -> "Points":
        """Return the points of integrated gradients.

        Args:
            steps: How many.
            rule: ``"midpoint"``: (k - 1/2) / steps, k from 1. ``"eap-ig"``: k / steps of the way from the corrupted to
                the clean run, k from 0, as in the code of Hanna et al.
            base: Which side the base run is.

        Raises:
            SettingError: There are no steps, or no such rule.

        References:
            Sundararajan et al. 2017, 1703.01365; Hanna et al. 2024, 2403.17806.
        """
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise SettingError(f"gradients cannot be integrated in {steps!r} steps", fix="steps=5")
        if rule == "midpoint":
            return cls(tuple((k - 0.5) / steps for k in range(1, steps + 1)), f"{steps} midpoints")
        if rule != "eap-ig":
            raise SettingError(f"unknown rule {rule!r}", facts=[("known", "midpoint, eap-ig")], fix='rule="midpoint"')
        shares = [k / steps for k in range(steps)]
        shares = shares if base == "corrupt" else [1 - share for share in shares]
        return cls(tuple(shares), f"{steps} points from the corrupted end")


def require_slope(job: Job, gauge: Gauge, points: Points, along: str = "ig") -> None:
    """Make sure that the metric can have a slope at some points.

    Args:
        job: The job.
        gauge: The metric.
        points: Where slopes are taken.
        along: The method that takes slopes along the way, for the message.

    Raises:
        SettingError: Gradients are off for good, or the metric spells out answers or reads what the model writes.
        NoGradient: The metric is smallest just there.
    """
    metric = gauge.metrics[0]
    if torch.is_inference_mode_enabled():
        raise SettingError(
            "scores cannot be computed inside torch.inference_mode(), where nothing has a gradient",
            fix="leave it for this call; inside torch.no_grad() they can be computed",
        )
    if gauge.forks or gauge.steps:
        does = "spells out answers of several tokens" if gauge.forks else "reads what the model writes on"
        raise MetricError(
            f"no scores can be computed of '{metric.name}', which {does}",
            facts=[("pairs", f"'{job.pairs.name}'")],
            fix='measure the first token: load_pairs(…, first_token=True), or metric="kl_divergence"',
        )
    if "base" in metric.compares and not any(points.shares):
        raise no_gradient(
            metric.name, "it compares with the base run, where its slope is taken: it is smallest there", along
        )


def measured_in_batches(
    job: Job, batches: Iterator[np.ndarray], measure: Callable[[np.ndarray], tuple[Untouched, float]]
) -> tuple[dict[str, Float[np.ndarray, " pair"]], float]:
    """Score pairs batch by batch; return the metric of each pair's base and source run, and the largest slope.

    Args:
        job: The job.
        batches: Numbers of the pairs that go together.
        measure: Scores some pairs; gives their untouched runs and the largest slope.
    """
    found = {name: np.zeros(len(job.pairs)) for name in ("base", "source")}
    steepest = 0.0
    for batch, slope in in_batches(job, batches, measure):
        steepest = max(steepest, slope)
        for name, values in found.items():
            values[batch.indices] = batch.values[name][0]
    return found, steepest


def require_steep(steepest: float, metric: str, where: str, along: str = "ig") -> None:
    """Make sure that a metric has a slope somewhere.

    Args:
        steepest: The largest slope.
        metric: What the metric is called.
        where: Where slopes were taken, for the message.
        along: The method that takes slopes along the way, likewise.

    Raises:
        NoGradient: The slope is 0 everywhere.
    """
    if steepest == 0:
        raise no_gradient(metric, f"its gradient is 0 at every {where}", along)


def is_rounding(largest: float, gap: float) -> bool:
    """Say whether the largest of all scores is but rounding beside the gap between source and base.

    Args:
        largest: Its size.
        gap: The difference of the metric's means.
    """
    return largest < ROUNDING * abs(gap)


def no_gradient(name: str, why: str, along: str = "ig") -> NoGradient:
    """Return the error for a metric whose slope is 0 everywhere."""
    other = "log_probability" if name == "logit_difference" else "logit_difference"
    return NoGradient(
        f"the metric '{name}' has no slope at the base run, so that all scores would be 0",
        facts=[("why", why)],
        fix=f'take a metric that changes there: metric="{other}", or method="{along}"',
    )


def run_ends(
    job: Job,
    gauge: Gauge,
    cost: Cost,
    indices: Int[np.ndarray, " pair"],
    sites: Sequence[Site],
    *,
    probes: Probes | None = None,
    few: Few = WHOLE,
) -> Untouched:
    """Make the base and the source runs of some pairs, and keep there what stands at sites.

    Args:
        job: The job; both runs are made by its one model, and the metric reads one forward.
        gauge: The metric.
        cost: Counts what is spent.
        indices: The pairs.
        sites: The sites.
        probes: Filled with values and slopes of the base run, which is then followed by its backward.
        few: Which logits are computed.

    Raises:
        MetricError: Slopes are asked for, and the metric has no gradient.
        NotFinite: A run gives NaN or infinity.
    """
    roles: tuple[tuple[str, Role], ...] = (("source", job.source), ("base", job.base))
    kept: dict[str, Captured] = {}
    runs: dict[str, Run] = {}
    local = torch.arange(len(indices), device=job.model.device)
    for name, role in roles:
        inputs = job.pairs.batch(role, indices, padding_side=job.padding_side)
        cost.forwards, cost.rows = cost.forwards + 1, cost.rows + len(indices)
        if name == "base" and probes is not None:
            with differentiable(job.model):
                run, tensors = _run_with(job, gauge, (indices, inputs), probes, few, keep=sites)
                kept[name] = Captured(job.model, inputs, None, tensors)
                runs[name] = replace(run, logits=run.logits.detach())
                metric = gauge.tensors(run, runs, local)[0]
                require_graph(metric, gauge)
                torch.autograd.backward(metric.sum())
        else:
            with quiet(job.model), fused(job.model), few.cut():
                found = capture(job.model, inputs, sites, columns=few.columns(gauge, inputs))
            kept[name] = replace(found, output=None)
            runs[name] = _as_run(job, gauge, found.output, (indices, inputs), few)
    values = {name: gauge.values(run, runs, local) for name, run in runs.items()}
    # A run with a gradient may round otherwise: of a pair that does not differ there is to be no gap.
    alike = [len(set(job.pairs[number].digests)) == 1 for number in indices.tolist()]
    values["source"][:, alike] = values["base"][:, alike]
    for name, value in values.items():
        check_finite(job, gauge, name, indices, value)
    if probes is not None:
        check_slopes(job, gauge, probes)
    return Untouched(indices, Known(kept["source"], kept["base"], Means()), runs, values)


def take_slopes(
    job: Job,
    gauge: Gauge,
    batch: Untouched,
    probes: Probes,
    *,
    opens: bool = False,
    keeps_graph: bool = False,
    few: Few = WHOLE,
) -> Tensor | None:
    """Run the base prompts of a batch with probes, and the backward of their metrics.

    Args:
        job: The job.
        gauge: The metrics.
        batch: The pairs with their untouched runs.
        probes: Filled with values and slopes.
        opens: Whether attention is computed step by step.
        keeps_graph: Whether further backwards will follow.
        few: Which logits are computed.

    Returns:
        What the metrics of all pairs sum to with its graph, where it is kept.

    Raises:
        MetricError: The metric has no gradient.
        NotFinite: A slope is NaN or infinite.
    """
    with differentiable(job.model):
        total = forward_with(job, gauge, batch, probes, opens=opens, few=few).sum()
        torch.autograd.backward(total, retain_graph=keeps_graph)
    check_slopes(job, gauge, probes)
    return total if keeps_graph else None


def forward_with(
    job: Job, gauge: Gauge, batch: Untouched, probes: Probes, *, opens: bool = False, few: Few = WHOLE
) -> Float[Tensor, " pair"]:
    """Return the metric of each run of each pair with probes; to be called inside ``differentiable``.

    Raises:
        MetricError: The metric has no gradient.
    """
    indices, device = np.tile(batch.indices, probes.copies), job.model.device
    inputs = job.pairs.batch(job.base, indices, padding_side=job.padding_side)
    run, _ = _run_with(job, gauge, (indices, inputs), probes, few, opens=opens)
    local = torch.arange(len(batch.indices), device=device).repeat(probes.copies)
    values = gauge.tensors(run, batch.runs, local)[0]
    require_graph(values, gauge)
    return values


def _run_with(
    job: Job,
    gauge: Gauge,
    prompts: tuple[np.ndarray, Batch],
    probes: Probes,
    few: Few,
    *,
    opens: bool = False,
    keep: Sequence[Site] = (),
) -> tuple[Run, dict[Port, Tensor]]:
    """Run the base prompts of some pairs with probes; return the run, and what stands at sites."""
    model, (indices, inputs) = job.model, prompts
    call, writes = inputs_of(model, inputs, few.columns(gauge, inputs)), probes.writes(len(indices), model.device)
    with few.cut():
        output, kept = run_with_hooks(
            model, call, writes, ports_of(model, keep), opens_attention=opens, with_gradient=True
        )
    return _as_run(job, gauge, output, prompts, few), {port: tensor.detach() for port, tensor in kept.items()}


def _as_run(job: Job, gauge: Gauge, output: Any, prompts: tuple[np.ndarray, Batch], few: Few) -> Run:
    pair, tokens = torch.as_tensor(prompts[0], device=job.model.device), few.columns(gauge, prompts[1])
    return Run(job.model.logits(output), prompts[1], pair, tokens=tokens_at(tokens, prompts[1]), vocab=few.vocab)


def require_graph(values: Tensor, gauge: Gauge) -> None:
    """Make sure that a metric can be differentiated.

    Raises:
        MetricError: It has no gradient.
    """
    if not values.requires_grad:
        metric = gauge.metrics[0]
        raise MetricError(
            f"no scores can be computed of '{metric.name}': it has no gradient",
            facts=[("such are", "rank, top1, and functions that count, compare or detach")],
            fix=f"metric=\"logit_difference\", or patch: sweep(experiment, …) measures '{metric.name}'",
        )


def check_slopes(job: Job, gauge: Gauge, probes: Probes) -> None:
    """Make sure that slopes are numbers, and note the steepest.

    Raises:
        NotFinite: One is NaN or infinite.
    """
    for port, slope in probes.slopes.items():
        low, high = (float(end) for end in torch.aminmax(slope))  # NaN where there is one
        if not (math.isfinite(low) and math.isfinite(high)):
            raise NotFinite(
                f"the slope of '{gauge.metrics[0].name}' is not a number at the {port.side} of '{port.path}'",
                facts=[("model", f"'{job.model.name}' in {job.model.dtype}")],
                fix="open the model in float32",
            )
        probes.steepest = max(probes.steepest, -low, high)


def input_port(model: Model) -> Port:
    """Return where inputs are moved on their way from the base run's to the source run's.

    Raises:
        ModelUnsupported: Tokens go into a model whose stream is not known.
    """
    require_one_stream(model, "gradients cannot be integrated from input to input", 'method="ig-activations"')
    if model.family is not None and "resid_pre" not in model.shape.refused:
        return model.tap(Site("resid_pre", 0)).port
    if model.kind == "arrays":
        return Port("", "input")
    raise ModelUnsupported(
        f"gradients of '{model.name}' cannot be integrated from input to input",
        facts=[("why", "tokens have no values in between, and the stream behind their embedding is not known by name")],
        fix='method="ig-activations" (each site by itself), or method="atp"',
    )


def require_one_stream(model: Model, what: str, fix: str) -> None:
    """Make sure that a model is not made of an encoder and a decoder.

    Args:
        model: The model.
        what: What cannot be done with such.
        fix: What to type instead.

    Raises:
        ModelUnsupported: It is.
    """
    if model.streams is not None:
        raise ModelUnsupported(
            f"{what} in '{model.name}'",
            facts=[("why", "it has an encoder and a decoder, each with a stream of its own")],
            fix=fix,
        )


def moved_to(share: float, port: Port, difference: Tensor) -> Mapping[Port, Tensor]:
    """Return how far inputs are moved at a point; not at all at the base."""
    return {port: share * difference} if share else {}
