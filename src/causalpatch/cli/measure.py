"""Commands that patch: sweeps, traces, paths, features, and what untouched runs say beside a sweep."""

from functools import partial
from typing import Annotated, Any, Literal

import typer

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.cli import show as view
from causalpatch.cli.options import (
    Align,
    Device,
    Dictionary,
    Direction,
    Dtype,
    First,
    Json,
    Metrics,
    ModelName,
    OneMetric,
    Out,
    PairsName,
    Top,
    Where,
)
from causalpatch.cli.requests import (
    finish,
    joined_by_plus,
    metric_of_task,
    prepared,
    run_until_stopped,
    selected,
    show_plans,
    with_dictionaries,
)

values = lazy("causalpatch.patches.value")


def sweep(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    site: Annotated[list[str] | None, typer.Option("--site", help="What to patch, such as z or resid_pre@-1.")] = None,
    over: Annotated[str | None, typer.Option("--over", help="Axes of the grid, such as layer,head.")] = None,
    metric: Metrics = None,
    direction: Annotated[
        Literal["denoise", "noise"] | None,
        typer.Option(
            "--direction", help="denoise: into the corrupted run; noise: into the clean one. Ablations noise."
        ),
    ] = None,
    value: Annotated[
        str,
        typer.Option(
            "--value",
            help="source, identity, interpolate(0.5), zero, mean, mean(positions), resample, noise, optimal, a number, "
            "from(resid_post.5@-1), constant(FILE.npz:NAME), steer(FILE.npz:NAME, 2) or project_out(FILE.npz:NAME).",
        ),
    ] = "source",
    draws: Annotated[int | None, typer.Option("--draws", min=1, help="Draws of noise or resampled values.")] = None,
    window: Annotated[int | None, typer.Option("--window", min=1, help="Patch windows of N layers together.")] = None,
    frozen: Annotated[
        list[str] | None,
        typer.Option("--frozen", help="A site that keeps the base run's values in all runs, such as router; repeat."),
    ] = None,
    align: Align = None,
    where: Where = None,
    first: First = None,
    first_token: Annotated[
        bool, typer.Option("--first-token", help="Cut longer answers to their first token.")
    ] = False,
    dtype: Dtype = None,
    device: Device = None,
    engine: Annotated[
        Literal["auto", "wavefront", "restart", "graph", "rows", "reference"],
        typer.Option("--engine", help="How runs are made; auto takes the fastest that the model allows."),
    ] = "auto",
    precision: Annotated[
        Literal["float32", "screen"] | None,
        typer.Option("--precision", help="screen: few bits first, float32 for what counts; by default the model's."),
    ] = None,
    budget_gib: Annotated[
        float | None, typer.Option("--budget-gib", min=0.0, help="Memory for activations in GiB.")
    ] = None,
    weights: Annotated[
        Literal["host", "disk"] | None,
        typer.Option("--weights", help="Fetch weights layer by layer: from CPU memory (host) or safetensors (disk)."),
    ] = None,
    memory_gib: Annotated[
        float | None, typer.Option("--memory-gib", min=0.0, help="Memory for weights and activations together, in GiB.")
    ] = None,
    budget: Annotated[int | None, typer.Option("--budget", min=1, help="Refuse more than N runs of the model.")] = None,
    dictionary: Dictionary = None,
    source_model: Annotated[
        str | None, typer.Option("--source-model", help="Another checkpoint of the same shape, for the source runs.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what it would cost, and stop.")] = False,
    out: Out = None,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Patch every cell of a grid and measure what changes."""
    how: dict[str, Any] = {"dtype": dtype, "device": device, "weights": weights, "memory_gib": memory_gib}
    opened = with_dictionaries(cp.open_model(model, **how), dictionary)
    loaded = cp.load_pairs(pairs, opened, first_token=first_token)
    loaded = selected(loaded, where, first)
    loaded = loaded.align(align) if align else loaded
    metrics = metric or [metric_of_task(pairs)]
    wanted = values.as_value(value)
    put = wanted.of if isinstance(wanted, cp.Subspace) else wanted
    moves = isinstance(put, cp.Source | cp.Identity | cp.Interpolate | cp.From)
    experiment = cp.Experiment(
        opened,
        loaded,
        metric=metrics,
        direction=direction or ("denoise" if moves else "noise"),
        source_model=None if source_model is None else cp.open_model(source_model, **how),
        engine=engine,
        precision=precision,
        budget_gib=budget_gib,
    )
    sites = site or ["resid_pre"]
    axes = over.split(",") if over else None
    kept: dict[str, Any] = {"value": wanted, "window": window, "frozen": frozen or ()}
    if plan:
        plans = {name: cp.plan_sweep(experiment, name, axes, **kept) for name in sites}
        show_plans(plans, as_json)
        return
    asked = {**kept, "budget": budget, "draws": draws}
    found = run_until_stopped({name: partial(cp.sweep, experiment, name, axes, **asked) for name in sites})
    if not as_json:
        view.text(str(experiment.baseline))
    finish(found, out, top, as_json)


def trace(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    span: Annotated[str, typer.Option("--span", help="The span of every pair that noise is put on.")] = "subject",
    window: Annotated[int, typer.Option("--window", min=1, help="Layers of attn and mlp restored together.")] = 10,
    by: Annotated[list[str] | None, typer.Option("--by", help="noise or pairs; both by default.")] = None,
    kind: Annotated[list[str] | None, typer.Option("--kind", help="resid, attn or mlp; all by default.")] = None,
    draws: Annotated[int, typer.Option("--draws", min=1, help="Draws of noise per pair.")] = 10,
    metric: OneMetric = None,
    where: Where = None,
    first: First = None,
    device: Device = None,
    out: Out = None,
    top: Top = 5,
    as_json: Json = False,
) -> None:
    """Trace causally, as in ROME: noise the subject, or use the pairs, and restore clean states one by one."""
    opened, loaded = prepared(model, pairs, where, first, device=device)
    experiment = cp.Experiment(opened, loaded, metric=metric or metric_of_task(pairs))
    asked: dict[str, Any] = {**({"by": by} if by else {}), **({"kind": kind} if kind else {})}
    found = cp.trace(experiment, span, window, draws=draws, **asked)
    named = {f"{by}-{kind}": effects for (by, kind), effects in found.effects.items()}
    if out:
        path = found.plot().save(out / "trace.svg")
        found.plot().save(out / "trace.png")
    if not as_json:
        view.text(repr(found))
    finish(named, out, top, as_json)
    if out and not as_json:
        view.text(f"  all in one figure: {path}")


def paths(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    senders: Annotated[
        list[str] | None, typer.Option("--senders", help="What sends, such as head_out or mlp_out.2; may be repeated.")
    ] = None,
    receivers: Annotated[
        list[str] | None,
        typer.Option("--receivers", help="What receives, such as q.3.1, k, mlp_in, logits; with + in one run."),
    ] = None,
    path: Annotated[
        list[str] | None,
        typer.Option("--path", help="A path instead, such as 'embed -> q.1.0 -> logits'; with + in one run."),
    ] = None,
    recompute_mlps: Annotated[
        bool, typer.Option("--recompute-mlps", help="Let MLPs in between see the change; frozen by default.")
    ] = False,
    each_position: Annotated[bool, typer.Option("--each-position", help="Token by token, along an axis.")] = False,
    metric: Metrics = None,
    direction: Direction = "denoise",
    align: Align = None,
    where: Where = None,
    first: First = None,
    device: Device = None,
    out: Out = None,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Patch paths: what one component sends to another one, all else frozen, and what that does."""
    opened, loaded = prepared(model, pairs, where, first, device=device)
    loaded = loaded.align(align) if align else loaded
    experiment = cp.Experiment(opened, loaded, metric=metric or [metric_of_task(pairs)], direction=direction)
    asked: dict[str, Any] = {"recompute_mlps": recompute_mlps}
    if each_position:
        asked["positions"] = "each"
    if path:
        asked["paths"] = [joined_by_plus(text) for text in path]
    if senders or receivers or not path:
        asked |= {
            "senders": senders or ["head_out"],
            "receivers": [joined_by_plus(t) for t in receivers or ["logits"]],
        }
    found = run_until_stopped({"paths": partial(cp.path_patch, experiment, **asked)})
    if not as_json:
        view.text(str(experiment.baseline))
    finish(found, out, top, as_json)


def features(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    dictionary: Dictionary = None,
    layer: Annotated[list[int] | None, typer.Option("--layer", min=0, help="Which layers; all by default.")] = None,
    position: Annotated[str | None, typer.Option("--position", help="Such as -1 or subject; all by default.")] = None,
    metric: OneMetric = None,
    value: Annotated[Literal["source", "zero"], typer.Option("--value", help="The features' new value.")] = "source",
    where: Where = None,
    first: First = None,
    device: Device = None,
    budget: Annotated[int | None, typer.Option("--budget", min=1, help="Refuse more than N runs of the model.")] = None,
    out: Out = None,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Find the features of a dictionary with the largest effects: zeroed in the clean run, or taken from it."""
    opened = with_dictionaries(cp.open_model(model, device=device), dictionary)
    loaded = selected(cp.load_pairs(pairs, opened), where, first)
    experiment = cp.Experiment(opened, loaded, metric=metric or metric_of_task(pairs))
    experiment = experiment if value == "source" else experiment.turned("noise")
    names = list(opened.shape.dictionaries)
    if not names:
        raise SettingError("no dictionary was named, whose features could be patched", fix="--dictionary NAME=FOLDER")
    asked: dict[str, Any] = {"position": position, "k": top, "value": value, "budget": budget}
    found = {name: cp.top_features(experiment, name, layer, **asked) for name in names}
    named = {f"{name}-{n}": each for name, one in found.items() for n, each in one.effects.items()}
    files = {name: view.save(each, out, name, alone=len(named) == 1) for name, each in named.items() if out}
    if as_json:
        view.json_object({"features": {name: view.features_object(one) for name, one in found.items()}, "files": files})
        return
    for one in found.values():
        view.text(repr(one))


def lens(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    site: Annotated[str, typer.Option("--site", help="What is patched beside it, over two axes.")] = "z@-1",
    by: Annotated[
        Literal["head", "layer", "none"],
        typer.Option("--by", help="How the logit difference is divided; none leaves attribution out."),
    ] = "head",
    side: Annotated[
        Literal["clean", "corrupt"], typer.Option("--side", help="Whose runs attribution reads.")
    ] = "clean",
    metric: OneMetric = None,
    direction: Direction = "denoise",
    where: Where = None,
    first: First = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = None,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Read the answer layer by layer and who wrote it (logit lens, direct logit attribution), beside a sweep."""
    opened, loaded = prepared(model, pairs, where, first, dtype=dtype, device=device)
    experiment = cp.Experiment(opened, loaded, metric=metric or metric_of_task(pairs), direction=direction)
    read = cp.logit_lens(experiment)
    parts = None if by == "none" else cp.direct_logit_attribution(experiment, by, side=side)
    found = run_until_stopped({site: partial(cp.sweep, experiment, site)})
    rows = {"lens": view.lens_rows(read), "attribution": [] if parts is None else view.sender_rows(parts)}
    if out:
        picture = cp.beside(found[site], attribution=parts, lens=read)
        files = [str(picture.save(out / f"beside.{ending}")) for ending in ("svg", "png", "csv")]
    if as_json:
        finish(found, out, top, as_json, more={**rows, "side": side, "figure": files if out else []})
        return
    view.text(str(experiment.baseline))
    view.heading(f"logit lens, {experiment.metrics[0].name} behind each layer: no causal evidence")
    view.table([{name: round(value, 4) for name, value in row.items()} for row in rows["lens"]])
    if parts is not None:
        view.heading(f"who wrote the logit difference of {side} runs, by {by}: no causal evidence")
        whole = float(parts.sum("sender").mean())
        largest = sorted(rows["attribution"], key=lambda row: -abs(row["logits"]))[:top]
        view.table(
            [{"sender": row["sender"], "logits": round(row["logits"], 4)} for row in largest],
            note=f"means over pairs; all {len(parts['sender'])} senders add up to {whole:.4f}",
        )
    finish(found, out, top, as_json)
    if out:
        view.text(f"  all in one figure: {files[0]}")
