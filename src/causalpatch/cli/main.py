"""The program ``causalpatch``: commands, their options, and how errors leave it.

Commands only read options, call the public face and show what came back. Everything heavy is imported when a command
runs, so that help and mistakes in typing answer at once.

Exit codes: 0 done; 2 the request cannot be understood; 3 this model or machine cannot do it; 4 the answer would be
wrong, so none is given; 130 stopped by the user.
"""

import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import causalpatch as cp
from causalpatch.base.errors import CausalPatchError, SettingError
from causalpatch.base.extras import lazy
from causalpatch.cli import show as view
from causalpatch.cli.requests import (
    finish,
    joined_by_plus,
    metric_of_task,
    run_until_stopped,
    selected,
    show_plans,
    with_dictionaries,
)

engine = lazy("causalpatch.engine")
tasks_room = lazy("causalpatch.pairs.tasks")
values = lazy("causalpatch.patches.value")

app = typer.Typer(
    name="causalpatch",
    help="Activation patching: find which layers, positions, heads and neurons of a model cause a behaviour.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ModelName = Annotated[str, typer.Argument(help="zoo:NAME, a folder, or a name on the hub.")]
PairsName = Annotated[str, typer.Argument(help="A task's name, or a .jsonl, .csv or .parquet file.")]
Where = Annotated[list[str] | None, typer.Option("--where", help="Keep pairs with COLUMN=VALUE.")]
First = Annotated[int | None, typer.Option("--first", min=1, help="Use the first N pairs only.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; a GPU where there is one.")]
Metrics = Annotated[list[str] | None, typer.Option("--metric", help="What to measure; may be repeated.")]
OneMetric = Annotated[str | None, typer.Option("--metric", help="What to measure; by default the task's.")]
Direction = Annotated[
    Literal["denoise", "noise"],
    typer.Option("--direction", help="denoise: into the corrupted run; noise: into the clean one."),
]
Align = Annotated[
    Literal["position", "difference", "spans"] | None,
    typer.Option("--align", help="How prompts of different lengths meet."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object, and nothing else, on standard output.")]
Out = Annotated[Path | None, typer.Option("--out", help="Folder for the numbers and pictures; made where missing.")]
Dictionary = Annotated[
    list[str] | None,
    typer.Option("--dictionary", help="NAME=FOLDER of an SAE or transcoder, or NAME:SITE=FOLDER; may be repeated."),
]
Top = Annotated[int, typer.Option("--top", min=1, help="How many of the largest cells to print.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the program.

    Args:
        arguments: Words after the program's name; those of the process by default.
    """
    words = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = view.warning
    try:
        # Without standalone mode a command's exit code is what the call returns.
        sys.exit(app(words, standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        view.problem("stopped")
        sys.exit(130)
    except CausalPatchError as error:
        view.error(error, as_json="--json" in words)
        sys.exit(error.exit_code)
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        view.problem(f"{error.format_message()}\n  fix: causalpatch --help")
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        view.text(f"causalpatch {cp.__version__}")
        raise typer.Exit
    del ctx


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", help="Folder for the numbers and pictures.")] = Path("demo-output"),
    top: Top = 5,
    as_json: Json = False,
) -> None:
    """Find what causes indirect object identification in the embedded model."""
    model = cp.open_model("zoo:stories")
    # Positions mean the same in every pair of one template; heads are measured over all templates.
    alike = cp.load_pairs(tasks_room.generate("ioi", n=40, templates=["when-went"]), model, name="ioi, one template")
    varied = cp.load_pairs("ioi", model)
    of_alike, of_varied = (cp.Experiment(model, pairs, metric=cp.logit_difference) for pairs in (alike, varied))
    if not as_json:
        view.heading("Which parts of the embedded model find out who receives the gift?")
        view.facts({"clean": repr(varied[0].clean_text), "corrupted": repr(varied[0].corrupt_text)})
        view.text("The clean prompt is answered by the other name than the corrupted one.")
        view.text(f"{of_varied.baseline}\n{varied.check()}")
    found = run_until_stopped(
        {
            "layers-positions": partial(cp.sweep, of_alike, "resid_pre"),
            "attention-positions": partial(cp.sweep, of_alike, "attn_out"),
            "heads": partial(cp.sweep, of_varied, "z"),
            "heads-last-token": partial(cp.sweep, of_varied, "z@-1"),
        }
    )
    finish(found, out, top, as_json)
    if not as_json:
        view.conclusion(found)


@app.command()
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
    align: Align = None,
    where: Where = None,
    first: First = None,
    first_token: Annotated[
        bool, typer.Option("--first-token", help="Cut longer answers to their first token.")
    ] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, …; the checkpoint's own.")] = None,
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
    opened = with_dictionaries(cp.open_model(model, dtype=dtype, device=device), dictionary)
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
        source_model=None if source_model is None else cp.open_model(source_model, dtype=dtype, device=device),
        engine=engine,
        precision=precision,
        budget_gib=budget_gib,
    )
    sites = site or ["resid_pre"]
    axes = over.split(",") if over else None
    if plan:
        plans = {name: cp.plan_sweep(experiment, name, axes, value=wanted, window=window) for name in sites}
        show_plans(plans, as_json)
        return
    asked = {"value": wanted, "budget": budget, "draws": draws, "window": window}
    found = run_until_stopped({name: partial(cp.sweep, experiment, name, axes, **asked) for name in sites})
    if not as_json:
        view.text(str(experiment.baseline))
    finish(found, out, top, as_json)


@app.command()
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
    opened = cp.open_model(model, device=device)
    loaded = selected(cp.load_pairs(pairs, opened), where, first)
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


@app.command()
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
    direction: Annotated[
        Literal["denoise", "noise"],
        typer.Option("--direction", help="denoise: into the corrupted run; noise: into the clean one."),
    ] = "denoise",
    align: Align = None,
    where: Where = None,
    first: First = None,
    device: Device = None,
    out: Out = None,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Patch paths: what one component sends to another one, all else frozen, and what that does."""
    opened = cp.open_model(model, device=device)
    loaded = selected(cp.load_pairs(pairs, opened), where, first)
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


@app.command()
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


@app.command()
def doctor(
    model: ModelName,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, …; the checkpoint's own.")] = None,
    device: Device = None,
    dictionary: Dictionary = None,
    as_json: Json = False,
) -> None:
    """List a model's sites with their shapes, and prove that each means what it says."""
    opened = with_dictionaries(cp.open_model(model, dtype=dtype, device=device), dictionary)
    rows = []
    for row in opened.site_rows():
        proof = None if row.refused or row.name.startswith("module") else engine.prove(opened, row.name)
        refused = row.refused or (proof.failure if proof else None)
        passed = list(proof.passed) if proof else []
        rows.append({"site": row.name, "axes": row.axes, "shape": row.shape, "passed": passed, "refused": refused})
    family = opened.family.name if opened.family else "generic"
    if opened.is_assumed:
        family += " (assumed: all names match, and the proofs below are what it rests on)"
    facts = {"model": opened.name, "family": family, "dtype": str(opened.dtype), "device": str(opened.device)}
    facts |= {"attention": opened.attention}
    if as_json:
        view.json_object({**facts, "sites": rows})
        return
    view.facts(facts)
    view.doctor_table(rows)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show pairs of this task.")] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many pairs to show.")] = 3,
    as_json: Json = False,
) -> None:
    """List the built-in tasks, or show pairs of one."""
    if name is None:
        listed = [
            {"task": t.name, "asks": t.summary, "metric": t.metric, "templates": len(t.templates), "pairs": t.capacity}
            for t in tasks_room.TASKS.values()
        ]
        if as_json:
            view.json_object({"tasks": listed})
        else:
            view.table(listed, note="pairs: the most that share no entity, and so are independent")
        return
    rows = tasks_room.generate(name, n=count)
    if as_json:
        view.json_object({"task": name, "pairs": rows})
    else:
        view.records(rows)


@app.command()
def show(
    folder: Annotated[Path, typer.Argument(help="A folder that a sweep wrote.")],
    metric: Annotated[str | None, typer.Option("--metric", help="Which metric, where there are several.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every cell, not the largest alone.")] = False,
    top: Top = 10,
    as_json: Json = False,
) -> None:
    """Print saved effects."""
    effects = cp.Effects.load(folder)
    effects = effects.metric(metric) if metric else effects
    if as_json:
        view.json_object(view.effects_object(effects, top, everything=everything))
        return
    view.text(repr(effects))
    view.text("")
    view.summary(effects) if everything else view.top_table(effects.over_draws().top(top))
