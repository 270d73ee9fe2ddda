"""The check of an engine before it is trusted: large random changes in every type of layer, against single forwards.

An engine that leaves work out assumes something about the model. So on the shortest and the longest prompts of a job,
side by side so that one of them is padded, the stream and the inside of each type of layer are changed at the first,
a middle and the last token, and what comes out at such tokens must be what plain forwards give, one run in each. An
identity patch and the untouched runs are among them. Full forwards of several runs leave nothing out, but a model may
treat a prompt otherwise beside a longer one (rotary tables that grow with the longest): the untouched runs show that.
The result is kept until the model changes.

In half precision rounding is as large as a small mistake. How large it is in this model is measured: all runs are made
once more with the stream into every layer moved by a unit in the last place, here and there. An engine may be off by a
few times what that does, run by run and in all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from causalpatch.base.errors import CausalPatchError, MemoryExhausted, ModelUnsupported, NotFinite, RequestError
from causalpatch.base.seeds import generator
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import BASE, SOURCE, Block, Cost, Job
from causalpatch.engine.layers import streams_into_layers
from causalpatch.engine.means import Means
from causalpatch.engine.memory import is_out_of_memory
from causalpatch.engine.reference import measure_reference, measure_rows
from causalpatch.engine.resolve import Target
from causalpatch.engine.structure import Findings
from causalpatch.metrics import Metric, Outputs
from causalpatch.models import Model
from causalpatch.pairs import Pairs
from causalpatch.patches import Function, Identity
from causalpatch.sites import Site
from causalpatch.sites.select import part_of

Measure = Callable[[Job, Gauge, Means, Cost], Iterator[Block]]
# Tokens of all check runs together: the check must stay small beside the sweep.
MOST_TOKENS = 16_384
# By how much an engine may be off: of the largest output, or in half precision times what rounding does.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 5e-4}
# Engines that are right were seen to reach 1.4 in a run and 0.8 in all together, on eight families in both dtypes.
TIMES_ROUNDING, TIMES_IN_ALL = 2.0, 1.25
_KNOWN: Findings[str | None] = Findings()


def why_drifts(name: str, measure: Measure, job: Job, *, anew: bool = False) -> str | None:
    """Compare an engine with single forwards on a model; return how it fails, or None where it does not.

    Args:
        name: The engine's name.
        measure: Its function, which runs prompts of several lengths together.
        job: The job, for its model, pairs and padding.
        anew: Look again though the model seems to be the same.
    """
    why = why_batches_differ("rows", measure_rows, replace(job, max_rows=None), anew=anew)
    if why is not None:
        return why
    clean, corrupt = job.pairs.sizes("clean"), job.pairs.sizes("corrupt")
    longest = np.maximum(clean, corrupt)
    is_uneven = len({*clean.tolist(), *corrupt.tolist()}) > 1
    key = (name, job.padding_side, int(longest.max()).bit_length(), is_uneven)
    chosen = list(dict.fromkeys((int(np.minimum(clean, corrupt).argmin()), int(longest.argmax()))))
    return _KNOWN.of(job.model, key, partial(_compare, measure, job, chosen), anew=anew)


def why_batches_differ(name: str, measure: Measure, job: Job, *, anew: bool = False) -> str | None:
    """Say how runs come out otherwise beside longer ones, or None; prompts of one length are not looked at.

    Args:
        name: The engine's name.
        measure: Its function, which stacks whole prompts.
        job: The job, for its model, pairs and padding.
        anew: Look again though the model seems to be the same.

    Cost:
        The untouched runs of two pairs, or of up to four where prompts of a pair differ in length, together and one
        by one; once for all jobs with the same shortest and longest prompts.
    """
    lengths = [job.pairs.sizes(role) for role in (job.base, job.source)]
    ends = tuple((int(some.min()), int(some.max())) for some in lengths)
    if job.pairs.kind != "tokens" or job.max_rows == 1 or all(shortest == longest for shortest, longest in ends):
        return None
    chosen = list(dict.fromkeys(int(place) for some in lengths for place in (some.argmin(), some.argmax())))
    key = (name, job.padding_side, ends)
    why = _KNOWN.of(job.model, key, partial(_compare, measure, job, chosen, with_patches=False), anew=anew)
    return why and f"a prompt has other numbers beside longer ones: {why}"


def _compare(measure: Measure, job: Job, chosen: Sequence[int], *, with_patches: bool = True) -> str | None:
    pairs = job.pairs.take(list(chosen))
    runs = _runs(job, pairs) if with_patches else []
    check = replace(
        job,
        pairs=pairs,
        interventions=runs,
        reference=None,
        n_controls=len(runs[-1:]),
        max_rows=None,
        few_bits=None,
        source_model=None,
    )
    gauge = Gauge(_metrics(check), check.pairs, job.model, keeps_nothing=True)
    # Where each forward fetches all weights anew, the plain forwards are stacked; that this changes nothing is checked
    # by single ones (``why_batches_differ``).
    plainly = measure_rows if with_patches and job.model.weights is not None else measure_reference
    try:
        wanted = _numbers(plainly, check, gauge)
        noise = _rounding(check, gauge, wanted)
    except NotFinite as error:
        return error.what
    try:
        got = _numbers(measure, check, gauge)
    except ModelUnsupported as error:
        # A model that takes no padding at all says so itself when it is run.
        return _said(error) if with_patches else None
    except Exception as error:
        if is_out_of_memory(error) or isinstance(error, RequestError | MemoryExhausted):
            raise
        return _said(error)
    return _why_off(check, got, wanted, noise)


def _said(error: Exception) -> str:
    """Say in a line why an engine stopped."""
    if isinstance(error, CausalPatchError):
        return error.what.partition(": ")[2] or error.what
    first = next(iter(str(error).strip().splitlines()), "")[:120]
    return f"a check run stopped with {type(error).__name__}: {first}"


def _why_off(
    check: Job,
    got: Float[np.ndarray, "metric run pair"],
    wanted: Float[np.ndarray, "metric run pair"],
    noise: Float[np.ndarray, "metric run pair"] | None,
) -> str | None:
    """Say which run is off by how much, or None where none is."""
    scale = max(float(np.nanmax(np.abs(wanted))), float(np.nanmax(np.abs(wanted - wanted[:, :1]))), 1e-30)
    drift = np.abs(got - wanted) / scale
    if noise is None:
        excess = np.nanmax(drift, (0, 2)) / TOLERANCE[_precision(check.model)]
    else:
        # Of few numbers: a run's own rounding may come out small by chance, that of all runs does not.
        usual = np.sqrt(np.nanmean(noise**2)) / scale
        own = np.sqrt(np.nanmean(noise**2, (0, 2))) / scale
        least = torch.finfo(_precision(check.model)).eps / 16
        excess = np.sqrt(np.nanmean(drift**2, (0, 2))) / (TIMES_ROUNDING * np.maximum(np.maximum(usual, own), least))
        in_all = np.sqrt(np.nanmean(drift**2)) / (TIMES_IN_ALL * max(usual, least))
        excess = np.where(excess == excess.max(), np.maximum(excess, in_all), excess)
    if np.nanmax(excess) <= 1 and (np.isnan(got) == np.isnan(wanted)).all():
        return None
    run = int(np.nanargmax(excess)) - 2
    what = "the untouched run" if run < 0 else str(check.interventions[run][0].site)
    than = "" if noise is None else f", {np.nanmax(excess):.1f} times what rounding may do"
    return f"a check run ({what}) is off by {np.nanmax(drift[:, run + 2]):.1e} of the largest output{than}"


def _rounding(
    check: Job, gauge: Gauge, wanted: Float[np.ndarray, "metric run pair"]
) -> Float[np.ndarray, "metric run pair"] | None:
    """Return what rounding does to the runs of a check; None in full precision."""
    model, precision = check.model, _precision(check.model)
    if precision in TOLERANCE:
        return None
    eps = torch.finfo(precision).eps
    if "resid_pre" in model.shape.refused:
        return np.full_like(wanted, eps * np.nanmax(np.abs(wanted)))
    moved = tuple(
        Target(site, None, None, _moved(str(site), eps), None, has_position=True, stream=model.stream_of(site))
        for site in streams_into_layers(model)
    )
    runs = [(*moved, *targets) for targets in (moved[:0], *check.interventions)]
    numbers = _numbers(measure_rows, replace(check, interventions=runs, n_controls=0), gauge)
    # The base run with its stream moved stands for both untouched runs.
    noise: np.ndarray = np.abs(numbers[:, [2, *range(2, 2 + len(runs))]] - wanted[:, [0, 0, *range(2, 1 + len(runs))]])
    return noise


def _precision(model: Model) -> torch.dtype:
    """Return the dtype in which a model multiplies."""
    device = model.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else model.dtype


def _moved(site: str, eps: float) -> Function:
    """Return a change by a unit in the last place, up, down or none."""
    draw = generator(0, "rounding", site)  # goes on from call to call, as what is random does

    def move(current: Tensor, source: Tensor) -> Tensor:
        del source
        steps = draw.integers(-1, 2, size=tuple(current.shape))
        return current * (1 + eps * torch.as_tensor(steps).to(current))

    return Function(move, "rounding", needs_source=False)


def _numbers(measure: Measure, job: Job, gauge: Gauge) -> np.ndarray:
    """Return the metrics of all runs, the untouched ones first; ``(metric, run, pair)``."""
    values = np.full((len(gauge.metrics), 2 + len(job.interventions), len(job.pairs)), np.nan)
    place = {BASE: 0, SOURCE: 1}
    for block in measure(job, gauge, Means(), Cost()):
        runs = np.array([place.get(number, number + 2) for number in block.interventions.tolist()])
        values[:, runs, block.pairs] = block.values
    return values


def _runs(job: Job, pairs: Pairs) -> list[tuple[Target, ...]]:
    """Return a large change at every place in turn, and an identity patch."""
    longest = int(max(max(pairs.sizes("clean")), max(pairs.sizes("corrupt"))))
    layers = _layers(job)
    whole = [replace(site, name=name) for site in layers for name in ("resid_pre", "attn_out", "mlp_out")]
    inside = [replace(site, name=name, unit=0) for site in layers for name in ("z", "mlp_post")]
    cross = [Site("cross_z", site.layer, 0) for site in layers if site.stream == "decoder"]
    usable = [site for site in (*whole, *inside) if site.name not in part_of(site, job.model.shape).refused]
    runs: list[tuple[Target, ...]] = []
    for site in (*usable, *cross):
        stream = job.model.stream_of(site)
        shortest = int(min(pairs.of(stream).lengths(job.base)))
        places = sorted({0, shortest // 2, shortest - 1})
        for place in places if site.name == "resid_pre" else places[1:2] or places:
            shaken = _shaken(str(site), place)
            runs.append((Target(site, place, None, shaken, None, has_position=True, stream=stream),))
    most = max(4, MOST_TOKENS // (longest * len(pairs)))
    step = max(1, -(-len(runs) // most))
    first = Target(Site("resid_pre", 0, stream=job.model.main_stream), 0, None, Identity(), None, has_position=True)
    return [*runs[::step], (first,)]


def _layers(job: Job) -> list[Site]:
    """Return the stream into the first layer of every type, and into the last."""
    model = job.model
    types: dict[tuple[Any, ...], Site] = {}
    every = streams_into_layers(model)
    for site in every:
        part = model.module.get_submodule(model.tap(site).port.path)
        marks = [
            (name, getattr(inner, name))
            for inner in part.modules()
            for name in ("layer_type", "attention_type", "sliding_window", "is_sliding")
            if isinstance(getattr(inner, name, None), str | int | bool)
        ]
        shapes = [(name, tuple(p.shape)) for name, p in part.named_parameters()]
        types.setdefault((type(part).__name__, *marks, *shapes), site)
    return list(dict.fromkeys([*types.values(), *every[-1:]]))


def _shaken(site: str, place: int) -> Function:
    """Return a large random change, the same for every row."""

    def shake(current: Tensor, source: Tensor) -> Tensor:
        del source
        noise = generator(0, "selfcheck", site, place).normal(size=tuple(current.shape[1:]))
        size = current.abs().reshape(len(current), -1).amax(1).reshape(-1, *(1 for _ in current.shape[1:]))
        return current + 3.0 * size * torch.as_tensor(noise, dtype=current.dtype, device=current.device)

    return Function(shake, "check", needs_source=False)


def _metrics(job: Job) -> Sequence[Metric]:
    """Return random projections of the logits at the first, a middle and the last token."""
    shortest = int(min(min(job.pairs.lengths("clean")), min(job.pairs.lengths("corrupt"))))

    def projection(number: int) -> Callable[[Outputs, Pairs], Tensor]:
        def project(outputs: Outputs, pairs: Pairs) -> Tensor:
            logits = outputs.distribution
            size = logits.shape[-1]
            vector = generator(number, "selfcheck").normal(size=size) / size**0.5
            return logits @ torch.as_tensor(vector).to(logits)

        return project

    # What a module of unknown kind answers may have no positions.
    places = dict.fromkeys((0, shortest // 2, -1) if job.model.family else (-1,))
    return [Metric(f"check{n}", projection(n), position=place, columns="all") for n, place in enumerate(places)]
