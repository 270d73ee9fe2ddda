"""The command that searches: from the whole model down to heads and neurons, within a budget."""

from typing import Annotated, Any, Literal

import typer

import causalpatch as cp
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
    ModelName,
    OneMetric,
    Out,
    PairsName,
    Where,
)
from causalpatch.cli.requests import metric_of_task, prepared, with_dictionaries

selection = lazy("causalpatch.results.selection")


def localize(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    budget: Annotated[
        str, typer.Option("--budget", help="What may be spent: runs of the model, such as 2000; 5 min; 3 TFLOP.")
    ] = "5 min",
    positions: Annotated[
        list[str] | None,
        typer.Option("--position", help="What is told apart: each, all, or -1, a span; repeat. By default what fits."),
    ] = None,
    units: Annotated[
        Literal["heads", "neurons", "all", "none"], typer.Option("--units", help="Which units are looked at.")
    ] = "all",
    features: Annotated[
        str | None, typer.Option("--features", help="A dictionary whose features are looked at as units.")
    ] = None,
    value: Annotated[
        str | None,
        typer.Option("--value", help="What is put in: source, or with --direction noise zero, mean, resample, noise."),
    ] = None,
    edges: Annotated[bool, typer.Option("--edges", help="Measure edges between what is found, too.")] = False,
    delta: Annotated[
        float | None, typer.Option("--delta", help="Which |effect| matters, as a share of the gap.")
    ] = None,
    metric: OneMetric = None,
    direction: Direction = "denoise",
    align: Align = None,
    where: Where = None,
    first: First = None,
    all_pairs: Annotated[
        bool, typer.Option("--all-pairs", help="Search on all pairs; otherwise on a half, the other one is held out.")
    ] = False,
    dictionary: Dictionary = None,
    dtype: Dtype = None,
    device: Device = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done, and stop.")] = False,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Find the parts that move the metric, coarse to fine, by exact patching within a budget; claims nothing."""
    opened, loaded = prepared(model, pairs, where, first, dtype=dtype, device=device)
    opened = with_dictionaries(opened, dictionary)
    loaded = loaded.align(align) if align else loaded
    half = loaded if all_pairs else loaded.split()[0]
    experiment = cp.Experiment(opened, half, metric=metric or metric_of_task(pairs), direction=direction)
    asked: dict[str, Any] = {"positions": positions, "units": units, "features": features}
    planned = cp.plan_localize(experiment, budget, **asked)
    if plan:
        _show_plan(planned, as_json)
        return
    if not as_json:
        view.text(f"{planned}\n")
    found = cp.localize(experiment, budget, **asked, value=value, edges=edges, delta=delta)
    files = []
    stable = cp.selection_stability(found) if len(set(half.components.tolist())) >= selection.FEWEST else None
    if out:
        out.mkdir(parents=True, exist_ok=True)
        files = [found.save(out / "localization.npz")]
        files += [found.plot(stable).save(out / f"localization.{ending}") for ending in ("svg", "png", "csv")]
    if as_json:
        said: dict[str, Any] = {
            "components": found.summary().to_dict("records"),
            "unopened": found.unopened.to_dict("records"),
        }
        often = [] if stable is None else stable.to_dataframe().to_dict("records")
        said |= {"selected_again": often}
        more = {"pending": found.pending, "spent": found.spent, "edges": found.edges, "plan": str(planned)}
        view.json_object({**said, **more, "n_pairs": len(half), "files": list(map(str, files))})
        return
    view.text(str(found) if stable is None else f"{found}\n\n{stable}")
    if not all_pairs:
        view.text(f"  searched on {len(half)} of {len(loaded)} pairs: the others, by the same split, were not seen")
    if files:
        view.text(f"\nwrote {', '.join(path.name for path in files)} into {out}/")


def _show_plan(planned: Any, as_json: bool) -> None:
    if as_json:
        steps = [{"step": name, "runs": runs} for name, runs in planned.steps]
        view.json_object({"steps": steps, "budget": str(planned.budget), "grid": planned.grid})
        return
    view.text(str(planned))
