"""What an experiment is asked for, brought to one form and checked before anything runs."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from causalpatch.base.axes import AXES
from causalpatch.base.errors import CausalPatchWarning, MetricError, PairError, PatchError, SettingError
from causalpatch.base.suggest import closest
from causalpatch.engine import EngineName, Role, Target, crosses_positions
from causalpatch.metrics import METRICS, Metric, named_metric
from causalpatch.models import PIXELS, Model
from causalpatch.pairs import Pairs
from causalpatch.patches import Intervention, Patch
from causalpatch.sites import Site, SiteSet

Request = Intervention | Patch | Site | SiteSet | str | Sequence[Patch | Site | SiteSet | str]


def as_metrics(asked: Metric | str | Sequence[Metric | str]) -> tuple[Metric, ...]:
    """Return metrics from metrics or their names."""
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


def as_interventions(requests: Iterable[Request] | Request) -> list[Intervention]:
    """Return interventions from whatever names them."""
    if isinstance(requests, str | Patch | Site | SiteSet | Intervention) or not isinstance(requests, Iterable):
        requests = [requests]
    made = [Intervention.of(request) for request in requests]
    if not made:
        raise PatchError("there is nothing to run", fix="name at least one site, such as 'resid_pre.0'")
    return made


def check_grid(axes: Mapping[str, Sequence[Any]], n_interventions: int) -> None:
    """Make sure that interventions fill axes that results may have."""
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


def meet(model: Model, pairs: Pairs) -> tuple[Model, Pairs]:
    """Return the model as it answers pairs of their kind, and the pairs with the tokens that it makes of pictures.

    Raises:
        PairError: There are no pairs, they are not of the model's kind, or have arguments that it does not take.
    """
    model = model.reading(pairs.kind)
    check_kinds(model, pairs)
    shown = pairs[0].clean if pairs.kind == "arrays" else pairs[0].beside.get(PIXELS, (np.zeros(0),))[0]
    is_one = model.picture is not None and shown.ndim == len(model.picture)
    return (model.seeing(shown.shape), pairs.seen_as(model.places(shown.shape))) if is_one else (model, pairs)


def check_kinds(model: Model, pairs: Pairs) -> None:
    """Make sure that there are pairs, of the model's kind, with arguments that it takes."""
    if not len(pairs):
        raise PairError(f"'{pairs.name}' holds no pairs", fix="give at least one")
    if (model.streams is None) != (pairs.encoder is None):
        whose = "has an encoder and a decoder" if model.streams else "takes one prompt"
        held = "one prompt" if pairs.encoder is None else "a prompt for an encoder and one for a decoder"
        raise PairError(
            f"'{pairs.name}' does not fit '{model.name}', which {whose}",
            facts=[("each pair holds", held)],
            fix="read the pairs for this model: load_pairs(…, model)",
        )
    if model.kind == "arrays" and pairs.kind == "tokens":
        raise PairError(
            f"'{pairs.name}' holds prompts, but '{model.name}' takes arrays",
            fix="make pairs of arrays: Pairs.from_arrays(clean, corrupt, answer=…)",
        )
    check_arguments(model, pairs)


def check_arguments(model: Model, pairs: Pairs) -> None:
    """Make sure that the model's forward takes what stands beside the inputs.

    Raises:
        PairError: It does not take one of these arguments.
    """
    given = [*pairs[0].beside, *pairs.common]
    for name in given:
        if name not in model.further:
            near = closest(name, model.further, 1)
            raise PairError(
                f"'{pairs.name}' gives '{model.name}' an argument '{name}' that its forward does not take",
                facts=[("takes", ", ".join(model.further) or "nothing beside the input")],
                fix=f"call it '{near[0]}'" if near else "leave it out",
            )


def reads_both_answers(metric: Metric, pairs: Pairs) -> bool:
    """Say whether a metric that compares single-token answers can read all pairs."""
    has_answers = all(pair.answer and pair.wrong_answer for pair in pairs)
    return has_answers and all(len(a) == 1 for pair in pairs for a in (*pair.answer, *pair.wrong_answer))


def one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    """Make sure that a setting is one of those there are."""
    if value not in known:
        near = closest(str(value), known, 1)
        raise SettingError(
            f"{name} cannot be {value!r}",
            facts=[("known", ", ".join(known))],
            fix=f'{name}="{near[0] if near else known[0]}"',
        )


def check_precision(precision: str | None, engine: EngineName, model: Model, recheck_top: int) -> None:
    """Make sure that a model can be measured in a precision.

    Raises:
        SettingError: It cannot; the message says why.
    """
    if precision is None:
        return
    one_of("precision", precision, ("float32", "screen"))
    if model.dtype != torch.float32:
        raise SettingError(
            f"precision={precision!r} needs a model in float32",
            facts=[("model", f"'{model.name}' in {str(model.dtype).removeprefix('torch.')}")],
            fix='open it so: open_model(…, dtype="float32"), or leave out precision=',
        )
    if precision == "screen" and model.weights is not None:
        raise SettingError(
            'precision="screen" needs all weights in memory',
            facts=[("model", f"'{model.name}' fetches its weights from {model.weights.store.place}, layer by layer")],
            fix="leave out precision=, or open the model without weights= and memory_gib=",
        )
    if precision == "screen" and engine not in ("auto", "wavefront"):
        raise SettingError(
            'precision="screen" needs the wavefront engine', facts=[("engine", engine)], fix='engine="auto"'
        )
    if recheck_top < 0:
        raise SettingError(f"recheck_top={recheck_top} is not a number of effects", fix="recheck_top=20")


def warn_of(model: Model, pairs: Pairs, base: Role, targets: Sequence[tuple[Target, ...]]) -> list[str]:
    """Warn of what the reader should know before anything is measured; return it for the record."""
    crossing = crosses_positions(model, pairs, base, targets)
    if crossing is None:
        return []
    message = f"'{crossing}' takes values from tokens at other places, whose rotation they keep"
    warnings.warn(CausalPatchWarning(message), stacklevel=5)
    return [message]
