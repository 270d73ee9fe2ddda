"""Commands on claims: confirm components on held-out pairs, hold another checkpoint to a claim, plan for more pairs."""

from pathlib import Path
from typing import Annotated, Any

import typer

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.cli import show as view
from causalpatch.cli.options import Device, Direction, Dtype, First, Json, ModelName, OneMetric, Out, PairsName, Where
from causalpatch.cli.requests import metric_of_task, prepared, selected

ClaimFile = Annotated[Path, typer.Argument(help="What confirm wrote: claim.json.")]
Delta = Annotated[
    float | None,
    typer.Option("--delta", help="Share of the gap that does not count: .1; of neurons, features and edges .02."),
]


def confirm(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    pairs: PairsName,
    component: Annotated[
        list[str] | None, typer.Option("--component", help="A site such as z.4.4@-1, or an edge; may be repeated.")
    ] = None,
    search: Annotated[
        str | None, typer.Option("--sweep", help="Instead: sweep this site on the discovery half, such as z@-1.")
    ] = None,
    top: Annotated[int, typer.Option("--top", min=1, help="Of the sweep, how many of the largest.")] = 3,
    found_on: Annotated[
        str | None,
        typer.Option("--found-on", help="Discovery pairs; then all PAIRS are held out, otherwise half of them."),
    ] = None,
    value: Annotated[
        str | None,
        typer.Option("--value", help="What is put in: source, or with --direction noise zero, mean, resample, noise."),
    ] = None,
    unrelated: Annotated[
        list[str] | None, typer.Option("--unrelated", help="Pairs of a behaviour that should not be touched; repeat.")
    ] = None,
    delta: Delta = None,
    alpha: Annotated[float, typer.Option("--alpha", help="Probability of even one wrong claim.")] = 0.05,
    few_checks: Annotated[bool, typer.Option("--few-checks", help="Leave out the controls that cost runs.")] = False,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="File of the openings of held-out pairs; the user's own by default.")
    ] = None,
    metric: OneMetric = None,
    direction: Direction = "denoise",
    where: Where = None,
    first: First = None,
    dtype: Dtype = None,
    device: Device = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Confirm components on held-out pairs, once: supported, absent up to delta, or inconclusive, with the controls."""
    if bool(component) == bool(search):
        raise SettingError(
            "confirm takes components, or a sweep that finds them on the discovery pairs",
            facts=[("given", "both" if component else "neither")],
            fix="--component z.4.4@-1, or --sweep z@-1 --top 3",
        )
    opened, loaded = prepared(model, pairs, where, first, dtype=dtype, device=device)
    discovery, held_out = (
        (selected(cp.load_pairs(found_on, opened), where, None), loaded) if found_on else loaded.split()
    )
    chosen = metric or metric_of_task(pairs)
    asked: Any = component
    if search:
        asked = cp.sweep(cp.Experiment(opened, discovery, metric=chosen, direction=direction), search).top(top)
    others = [
        cp.Experiment(opened, cp.load_pairs(name, opened), metric=metric_of_task(name), direction=direction)
        for name in unrelated or []
    ]
    claim = cp.confirm(
        cp.Experiment(opened, held_out, metric=chosen, direction=direction),
        asked,
        delta=delta,
        alpha=alpha,
        found_on=discovery,
        unrelated=others,
        value=value,
        checks=cp.Checks.none() if few_checks else None,
        ledger=ledger,
    )
    files = []
    if out:
        files = [claim.save(out / "claim.json")]
        files += [
            claim.plot(kind).save(out / f"{kind}.{ending}")
            for kind in ("effects", "pairs")
            for ending in ("svg", "png")
        ]
        files.append(claim.plot().save(out / "effects.csv"))
    if as_json:
        rows = claim.to_dataframe().to_dict("records")
        said: dict[str, Any] = {"verdict": claim.verdict, "statement": claim.statement, "reasons": claim.reasons}
        checks = {one.name: {"rows": one.rows, "about": one.about, "skipped": one.skipped} for one in claim.checks}
        view.json_object(
            {
                **said,
                "findings": rows,
                "checks": checks,
                "limits": claim.limits,
                "spec": claim.spec,
                "next": claim.next_step,
                "files": list(map(str, files)),
            }
        )
        return
    view.text(str(claim))
    if files:
        view.text(f"\nwrote {', '.join(path.name for path in files)} into {out}/")


def recheck(
    claim: ClaimFile,
    model: Annotated[str, typer.Option("--model", help="The other checkpoint: zoo:NAME, a folder, a name on the hub.")],
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Hold another checkpoint to a claim, on the claim's own pairs: exit code 0 where it holds, 1 where it does not."""
    kept = cp.Claim.load(claim)
    found = cp.recheck(kept, cp.open_model(model, dtype=dtype, device=device))
    if as_json:
        view.json_object(
            {"holds": found.holds, "reasons": found.reasons, "components": found.rows, "model": dict(found.model)}
        )
    else:
        view.text(str(found))
    if not found.holds:
        raise typer.Exit(1)


def power(
    pilot: Annotated[Path, typer.Argument(help="A claim.json, or the folder of a sweep that --out wrote.")],
    effect: Annotated[
        float | None, typer.Option("--effect", help="The share to be found; twice delta by default.")
    ] = None,
    delta: Delta = None,
    n_components: Annotated[
        int | None, typer.Option("--components", min=1, help="Of a sweep, how many will be confirmed; 5 by default.")
    ] = None,
    alpha: Annotated[float, typer.Option("--alpha", help="Probability of even one wrong claim.")] = 0.05,
    target: Annotated[float, typer.Option("--power", help="Probability of finding it.")] = 0.8,
    as_json: Json = False,
) -> None:
    """Say how many new independent pairs a claim needs, from how far shares spread in a pilot."""
    held: Any = cp.Claim.load(pilot) if pilot.suffix == ".json" else cp.Effects.load(pilot)
    plan = cp.power(held, effect=effect, delta=delta, alpha=alpha, n_components=n_components, target=target)
    if as_json:
        view.json_object({"needed": plan.needed, "needed_at_most": plan.needed_at_most, **vars(plan)})
        return
    view.text(str(plan))
    view.text("next: gather that many pairs that share no prompt, entity or group, and confirm on them once")
