"""A screen: all interventions in few bits, and those that a decision hangs on once more in float32.

1. The controls run in float32, and with them the untouched runs that all effects are taken against.
2. All interventions run with delta linears (``few_bits``). Their cells are *screened*.
3. A random sample of them, and the largest, run in float32. What the sample differs by is the noise (``recheck``).
4. What may within that noise be among the k largest runs in float32 too. So the k largest are those of float32.

Each pass makes the untouched runs again; what it measures is taken against its own, so that rounding between passes
does not enter effects.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from causalpatch.base.errors import SettingError
from causalpatch.engine import wavefront
from causalpatch.engine.delta import MIN_WEIGHTS
from causalpatch.engine.delta_gain import fastest_product
from causalpatch.engine.few_bits import FewBits, large_weights
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import BASE, Block, Cost, Job, batches_of_pairs
from causalpatch.engine.means import Means
from causalpatch.engine.plan import Plan
from causalpatch.engine.planning import numbers_of, plan_job
from causalpatch.engine.products import CAST_BYTES, Product
from causalpatch.engine.recheck import ScreenNoise, estimate_noise, needs_float32, sample_cells
from causalpatch.engine.screen_cost import Choice, screen_cost
from causalpatch.engine.selfcheck import why_drifts
from causalpatch.engine.shares import captured_bytes
from causalpatch.engine.tiers import Route, measure
from causalpatch.results.status import Status, has_number

Precision = Literal["float32", "screen"]
# Fewest token rows through layers that say how fast they are: those of ten full calls.
TIMED_ROWS = 20_480
FIX = 'measure in float32: leave out precision="screen"'


@dataclass
class Screen:
    """How to screen, and what came of it.

    Args:
        top_k: How many of the largest mean effects must be those of float32.
        seed: Seed of the sample.
        n_sample: How many interventions are measured both ways to learn the noise.
        min_weights: Fewest weights of a linear map that is multiplied in few bits.
        product: How, or None for the fastest here.
        gain: How many times as fast as in float32 a linear map is so, or None where that was not measured.
        reason: Why nothing was screened, or an empty text.
        noise: How far screened effects may be from those in float32, by metric.
        n_cells: How many interventions were asked for.
        n_screened: How many of them are known in few bits only.
        n_rechecked: How many were measured both ways.
        spent: Token rows that went through layers, and seconds, by whether it was in few bits.
    """

    top_k: int = 20
    seed: int = 0
    n_sample: int = 64
    min_weights: int = MIN_WEIGHTS
    product: Product | None = None
    gain: float | None = None
    reason: str = ""
    noise: dict[str, ScreenNoise] = field(default_factory=dict)
    n_cells: int = 0
    n_screened: int = 0
    n_rechecked: int = 0
    spent: dict[bool, np.ndarray] = field(default_factory=lambda: {True: np.zeros(2), False: np.zeros(2)})

    def describe(self) -> dict[str, Any]:
        """Return it as plain data."""
        if self.reason:
            return {"asked": "screen", "product": "float32", "reason": self.reason}
        return {
            "asked": "screen",
            "product": self.product,
            "noise": {name: _plain(noise) for name, noise in self.noise.items()},
            "n_screened": self.n_screened,
            "n_rechecked": self.n_rechecked,
            "top": self.top_k,
            "speed_up": self._speed_up(),
        }

    def _speed_up(self) -> float | None:
        """Return how many times as fast token rows went through layers in few bits, or None where too few are timed."""
        (rows, seconds), (plain_rows, plain_seconds) = self.spent[True], self.spent[False]
        known = min(rows, plain_rows) >= TIMED_ROWS and seconds and plain_seconds
        return round(float(rows / seconds * plain_seconds / plain_rows), 2) if known else None

    def notes(self) -> list[str]:
        """Return what must be said with the numbers."""
        if self.reason:
            return [f"measured in float32, not screened: {self.reason}"]
        if not self.n_screened:
            return []
        told = [f"{_typical(noise):.2g} in {name}" for name, noise in self.noise.items()]
        about = f"noise up to about {', '.join(told)}" if told else "noise not known: stopped before it was measured"
        said = f"{self.n_screened} of {self.n_cells} cells screened in {self.product}: {about}"
        return [f"{said}; the {self.top_k} largest are float32" if told and self.top_k else said]


def _typical(noise: ScreenNoise) -> float:
    """Return the noise of an effect of the sample's median size."""
    return float(noise.of(np.array([noise.scale]))[0])


def _plain(noise: ScreenNoise) -> dict[str, Any]:
    """Return a noise as plain data, its typical size beside it; None stands for what has no bound."""
    found = {**vars(noise), "typical": _typical(noise)}
    return {name: value if np.isfinite(value) else None for name, value in found.items()}


def measure_screened(
    job: Job, gauge: Gauge, means: Means, cost: Cost, *, route: Route, screen: Screen
) -> Iterator[Block]:
    """Measure every intervention on every pair, most of them in few bits only.

    Args:
        job: What is to be measured.
        gauge: The metrics.
        means: Means of the sites that are replaced by one.
        cost: Counts what is spent.
        route: Filled with the engine that was used.
        screen: How; filled with what came of it.

    Yields:
        Blocks of cells as ``measure`` does, ``SCREENED`` or not; those that were measured again come again.

    Raises:
        SettingError: The wavefront cannot make the runs; the message says why.
        ModelUnsupported: A layer's linear maps cannot be replayed on rows.
    """
    require_screen(job, gauge)
    screen.reason = _choose(job, screen)
    if screen.reason or screen.product is None:
        yield from measure(job, gauge, means, cost, route=route)
        return
    route.made["wavefront"] = screen.n_cells = job.n_asked
    passes = _Passes(job, gauge, means, cost, screen)
    yield from passes.float32(range(job.n_asked, len(job.interventions)))
    yield from passes.few_bits(FewBits(screen.product, screen.min_weights))
    screened = np.flatnonzero(passes.is_screened)
    if not len(screened):
        return
    sample = screened[sample_cells(len(screened), n_sample=screen.n_sample, seed=screen.seed)]
    before = passes.mean_effects()
    # The largest are wanted in float32 whatever the noise is, so they run together with the sample.
    largest = _largest(np.where(passes.is_screened, before, np.nan), screen.top_k)
    yield from passes.float32(np.union1d(sample, largest))
    after = passes.mean_effects()
    for metric, old, new, floor in zip(gauge.metrics, before, after, passes.floor, strict=True):
        screen.noise[metric.name] = estimate_noise(old[sample], new[sample], floor=float(floor))
    yield from passes.float32(_still_open(passes, gauge, screen))


def plan_screen(job: Job, gauge: Gauge, screen: Screen, *, rate: float | None = None) -> Plan:
    """Count what a screen of a job would cost; the model does not run.

    Args:
        job: What is to be measured.
        gauge: The metrics.
        screen: How; filled with the product and its gain, or with the reason why all would be float32.
        rate: Floating-point operations per second that the device reaches; by default what was found earlier, if
            anything.

    Raises:
        SettingError: The wavefront cannot make the runs; the message says why.

    Cost:
        Once per device and width about 0.2 s, in which products in few bits are timed.
    """
    _refuse(job, _why_not(job, gauge))
    screen.reason = _choose(job, screen)
    plan = plan_job(job, len(gauge.forks), gauge=gauge, tier="wavefront", rate=rate)
    numbers = numbers_of(job.model)
    if screen.reason or screen.product is None or plan.one_pass is None or numbers is None:
        return replace(plan, not_screened=screen.reason)
    weights = sum(weight.numel() for weight in large_weights(job.model, screen.min_weights))
    # Exact where what leads to nothing does so in every pair.
    n_leading = job.n_asked - plan.n_derived / len(job.pairs)
    cost = screen_cost(
        plan.one_pass,
        plan.flops_of["wavefront"],
        min(1.0, weights / (numbers.n_layers * numbers.layer)),
        choice=Choice(job.n_asked, n_leading, screen.n_sample, screen.top_k),
        product=(screen.product, screen.gain),
        n_bytes=(_record_bytes(job, screen), weights * CAST_BYTES[screen.product]),
    )
    return replace(plan, screen=cost)


def _record_bytes(job: Job, screen: Screen) -> int:
    """Return the bytes that are kept of the untouched runs of the largest batch, of both prompts."""
    if screen.product is None:
        return 0
    lengths = job.pairs.lengths("clean") + job.pairs.lengths("corrupt")
    tokens = max(int(lengths[batch].sum()) for batch in batches_of_pairs(job))
    per_token = 4 * FewBits(screen.product, screen.min_weights).numbers_per_token(job.model)
    return min(tokens * per_token, captured_bytes(job))


def require_screen(job: Job, gauge: Gauge) -> None:
    """Make sure that the wavefront can make a job, in float32.

    Raises:
        SettingError: It cannot; the message says why.
    """
    _refuse(job, _why_not(job, gauge) or why_drifts("wavefront", wavefront.measure, job) or "")


def _why_not(job: Job, gauge: Gauge) -> str:
    """Say why a job cannot be screened, so far as can be said before anything runs, or return an empty text."""
    if job.model.dtype != torch.float32:
        return f"it is in {str(job.model.dtype).removeprefix('torch.')}"
    reasons = (wavefront.why_not_targets(job.model, targets) for targets in job.interventions)
    return wavefront.why_not(job, gauge) or next((reason for reason in reasons if reason is not None), "")


def _refuse(job: Job, why: str) -> None:
    """Raise an error where there is a reason to."""
    if why:
        raise SettingError(
            f"'{job.model.name}' cannot be screened here",
            facts=[("why", why), ("needed", "a causal decoder in float32, patched inside its layers")],
            fix=FIX,
        )


def _choose(job: Job, screen: Screen) -> str:
    """Choose the product; return why float32 is better, or an empty text."""
    if not large_weights(job.model, screen.min_weights):
        return f"no linear map of the layers has {screen.min_weights:,} weights, and smaller ones gain nothing"
    if job.n_asked <= screen.n_sample + screen.top_k:
        return f"{job.n_asked} interventions are no more than would be measured again"
    if screen.product is None:
        screen.product, gains = fastest_product(job.model.device, job.model.width)
        rates = ", ".join(f"{name} {rate:g}" for name, rate in gains.items())
        screen.gain = gains[screen.product] if screen.product else None
        if screen.product is None:
            return f"no product in few bits is faster on this machine (in float32's rate: {rates})"
    return ""


def _largest(effects: Float[np.ndarray, "metric cell"], top_k: int) -> np.ndarray:
    """Return the cells that are among the k largest by a metric."""
    size = np.where(np.isnan(effects), -1.0, np.abs(effects))
    order = np.argsort(-size, axis=1, kind="stable")[:, :top_k]
    found: np.ndarray = np.unique(order[np.take_along_axis(size, order, 1) >= 0])
    return found


def _still_open(passes: "_Passes", gauge: Gauge, screen: Screen) -> np.ndarray:
    """Return the cells that may be among the k largest by a metric, within the noise, and are not float32 yet."""
    is_open = np.zeros(screen.n_cells, dtype=bool)
    for metric, effects in zip(gauge.metrics, passes.mean_effects(), strict=True):
        noise = np.where(passes.is_screened, screen.noise[metric.name].of(np.nan_to_num(effects)), 0.0)
        if screen.top_k:
            is_open |= needs_float32(effects, noise, top_k=screen.top_k, chosen_too=True)
    return np.flatnonzero(is_open)


class _Passes:
    """The passes of a screen, and what is known so far.

    Args:
        job: What is measured.
        gauge: The metrics.
        means: Fitted means.
        cost: Counts what is spent.
        screen: Filled with what comes of it.
    """

    def __init__(self, job: Job, gauge: Gauge, means: Means, cost: Cost, screen: Screen) -> None:
        self.job, self.gauge, self.means, self.cost, self.screen = job, gauge, means, cost, screen
        shape = (len(job.interventions), len(job.pairs))
        self.base = np.full((len(gauge.metrics), shape[1]), np.nan)
        self.effects = np.full((len(gauge.metrics), *shape), np.nan)
        self.status = np.full(shape, Status.SKIPPED, dtype=np.uint8)
        # Which of the interventions asked for are known in few bits only.
        self.is_screened = np.zeros(job.n_asked, dtype=bool)

    @property
    def floor(self) -> Float[np.ndarray, " metric"]:
        """Return the largest effect of the control that changes nothing."""
        if not self.job.n_controls:
            return np.zeros(len(self.gauge.metrics))
        largest: np.ndarray = np.nanmax(np.abs(self.effects[:, -1]), axis=1, initial=0.0)
        return largest

    def mean_effects(self) -> Float[np.ndarray, "metric cell"]:
        """Return mean effects over the pairs that have a number; NaN where none has."""
        n_asked = self.job.n_asked
        is_there = has_number(self.status[:n_asked])
        total = np.where(is_there, self.effects[:, :n_asked], 0.0).sum(-1)
        mean: np.ndarray = total / np.where(is_there.any(1), is_there.sum(1), np.nan)
        return mean

    def few_bits(self, few_bits: FewBits) -> Iterator[Block]:
        """Screen everything that was asked for."""
        yield from self._make(range(self.job.n_asked), few_bits)

    def float32(self, cells: Sequence[int] | np.ndarray) -> Iterator[Block]:
        """Measure some interventions, or controls, in float32."""
        is_again = self.is_screened.copy()
        yield from self._make([int(cell) for cell in cells], None)
        self.screen.n_rechecked += int((is_again & ~self.is_screened).sum())

    def _make(self, numbers: Sequence[int], few_bits: FewBits | None) -> Iterator[Block]:
        is_first = np.isnan(self.base).all()
        if not len(numbers) and not is_first:
            return
        job = replace(self.job.part(numbers), few_bits=few_bits)
        own = np.full_like(self.base, np.nan)
        # The controls are left out of the comparison: where they are alone, calls hold few rows.
        spent = self.screen.spent[few_bits is not None] if job.n_asked else np.zeros(2)
        rows, clock = self.cost.token_layers, time.perf_counter()
        for block in measure(job, self.gauge, self.means, self.cost, route=Route("wavefront")):
            if block.interventions[0] >= 0:
                spent += (self.cost.token_layers - rows, time.perf_counter() - clock)
                yield self._take(block.renumbered(numbers), own)
            else:
                if block.interventions[0] == BASE:
                    own[:, block.pairs] = block.values
                    if is_first:
                        self.base[:, block.pairs] = block.values
                if is_first:
                    yield block
            rows, clock = self.cost.token_layers, time.perf_counter()

    def _take(self, block: Block, own: np.ndarray) -> Block:
        """Take in the numbers of a pass; return them against the base runs of the first."""
        effects = block.values - own[:, block.pairs]
        self.effects[:, block.interventions, block.pairs] = effects
        self.status[block.interventions, block.pairs] = block.status
        cells = np.unique(block.interventions[block.interventions < self.job.n_asked])
        self.is_screened[cells] = (self.status[cells] == Status.SCREENED).any(1)
        self.screen.n_screened = int(self.is_screened.sum())
        return replace(block, values=self.base[:, block.pairs] + effects)
