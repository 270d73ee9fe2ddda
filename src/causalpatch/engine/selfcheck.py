"""The check of an engine before it is trusted: large random changes in every type of layer, against full forwards.

An engine that leaves work out assumes something about the model. So on the shortest and the longest prompts of a job,
side by side so that one of them is padded, the stream and the inside of each type of layer are changed at the first,
a middle and the last token, and what comes out at such tokens must be what plain full forwards give. An identity patch
and the untouched runs are among them. The result is kept until the model changes.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from causalpatch.base.errors import ModelUnsupported, NotFinite
from causalpatch.base.seeds import generator
from causalpatch.engine.gauge import Gauge
from causalpatch.engine.job import BASE, SOURCE, Block, Cost, Job
from causalpatch.engine.means import Means
from causalpatch.engine.reference import measure_rows
from causalpatch.engine.resolve import Target
from causalpatch.engine.structure import structure_of
from causalpatch.metrics import Metric, Outputs
from causalpatch.pairs import Pairs
from causalpatch.patches import Function, Identity
from causalpatch.sites import Site

Measure = Callable[[Job, Gauge, Means, Cost], Iterator[Block]]
# Tokens of all check runs together: the check must stay small beside the sweep.
MOST_TOKENS = 16_384
_KNOWN: "weakref.WeakKeyDictionary[nn.Module, dict[tuple[object, ...], str | None]]" = weakref.WeakKeyDictionary()


def why_drifts(name: str, measure: Measure, job: Job) -> str | None:
    """Compare an engine with full forwards on a model; return how it fails, or None where it does not.

    Args:
        name: The engine's name.
        measure: Its function.
        job: The job, for its model, pairs and padding.
    """
    lengths = np.maximum(job.pairs.lengths("clean"), job.pairs.lengths("corrupt"))
    model = job.model
    known = _KNOWN.setdefault(model.module, {})
    is_uneven = len(set(lengths.tolist())) > 1
    key = (name, job.padding_side, int(lengths.max()).bit_length(), is_uneven, structure_of(model))
    if key not in known:
        known[key] = _compare(measure, job, lengths)
    return known[key]


def _compare(measure: Measure, job: Job, lengths: np.ndarray) -> str | None:
    chosen = list(dict.fromkeys((int(lengths.argmin()), int(lengths.argmax()))))
    check = _job(job, job.pairs.take(chosen))
    gauge = Gauge(_metrics(check), check.pairs, job.model)
    try:
        got, wanted = (_numbers(some, check, gauge) for some in (measure, measure_rows))
    except (ModelUnsupported, NotFinite) as error:
        return error.what.partition(": ")[2] or error.what
    eps = torch.finfo(job.model.dtype).eps
    tolerance = {torch.float64: 1e-10, torch.float32: 5e-4}.get(job.model.dtype, 16 * eps)
    scale = max(float(np.nanmax(np.abs(wanted))), float(np.nanmax(np.abs(wanted - wanted[:, :1]))), 1e-30)
    drift = np.abs(got - wanted) / scale
    if not np.nanmax(drift) <= tolerance or (np.isnan(got) != np.isnan(wanted)).any():
        run = int(np.argmax(np.nanmax(drift, (0, 2)))) - 2
        what = "the untouched run" if run < 0 else str(check.interventions[run][0].site)
        return f"a check run ({what}) is off by {np.nanmax(drift):.1e} of the largest output"
    return None


def _numbers(measure: Measure, job: Job, gauge: Gauge) -> np.ndarray:
    """Return the metrics of all runs, the untouched ones first; ``(metric, run, pair)``."""
    values = np.full((len(gauge.metrics), 2 + len(job.interventions), len(job.pairs)), np.nan)
    place = {BASE: 0, SOURCE: 1}
    for block in measure(job, gauge, Means(), Cost()):
        runs = np.array([place.get(number, number + 2) for number in block.interventions.tolist()])
        values[:, runs, block.pairs] = block.values
    return values


def _job(job: Job, pairs: Pairs) -> Job:
    shortest = int(min(pairs.lengths(job.base)))
    longest = int(max(max(pairs.lengths("clean")), max(pairs.lengths("corrupt"))))
    places = sorted({0, shortest // 2, shortest - 1})
    sites = [Site(name, layer) for layer in _layers(job) for name in ("resid_pre", "attn_out", "mlp_out")]
    inside = [Site(name, layer, 0) for layer in _layers(job) for name in ("z", "mlp_post")]
    usable = [site for site in (*sites, *inside) if site.name not in job.model.shape.refused]
    runs: list[tuple[Target, ...]] = []
    for site in usable:
        for place in places if site.name == "resid_pre" else places[1:2] or places:
            runs.append((Target(site, place, None, _shaken(str(site), place), None, has_position=True),))
    most = max(4, MOST_TOKENS // (longest * len(pairs)))
    step = max(1, -(-len(runs) // most))
    first = Target(Site("resid_pre", 0), 0, None, Identity(), None, has_position=True)
    return replace(
        job,
        pairs=pairs,
        interventions=[*runs[::step], (first,)],
        reference=None,
        n_controls=1,
        max_rows=None,
        few_bits=None,
    )


def _layers(job: Job) -> list[int]:
    """Return the first layer of every type, and the last."""
    model = job.model
    types: dict[tuple[Any, ...], int] = {}
    for layer in range(model.shape.n_layers):
        part = model.module.get_submodule(model.tap(Site("resid_pre", layer)).port.path)
        marks = [
            (name, getattr(inner, name))
            for inner in part.modules()
            for name in ("layer_type", "attention_type", "sliding_window", "is_sliding")
            if isinstance(getattr(inner, name, None), str | int | bool)
        ]
        shapes = [(name, tuple(p.shape)) for name, p in part.named_parameters()]
        types.setdefault((type(part).__name__, *marks, *shapes), layer)
    return sorted({*types.values(), model.shape.n_layers - 1})


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
    size = job.model.vocab_size
    shortest = int(min(min(job.pairs.lengths("clean")), min(job.pairs.lengths("corrupt"))))

    def projection(number: int) -> Callable[[Outputs, Pairs], Tensor]:
        vector = generator(number, "selfcheck").normal(size=size) / size**0.5

        def project(outputs: Outputs, pairs: Pairs) -> Tensor:
            logits = outputs.distribution
            return logits @ torch.as_tensor(vector[: logits.shape[-1]], dtype=logits.dtype, device=logits.device)

        return project

    places = dict.fromkeys((0, shortest // 2, -1))
    return [Metric(f"check{n}", projection(n), position=place, columns="all") for n, place in enumerate(places)]
