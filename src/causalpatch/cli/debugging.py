"""The command that goes from failing prompts to a claim."""

from pathlib import Path
from typing import Annotated, Literal

import typer

import causalpatch as cp
from causalpatch.cli import show as view
from causalpatch.cli.options import Device, Dtype, Json, ModelName


def debug(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    failures: Annotated[
        Path, typer.Argument(help="A .jsonl, .csv or .parquet file: prompt, answer, perhaps wrong_answer, entities.")
    ],
    works: Annotated[Path | None, typer.Option("--works", help="File of prompts that work: prompt, answer.")] = None,
    templates: Annotated[
        Path | None, typer.Option("--templates", help="File of templates that failing prompts fit: prompt, fillers.")
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", help="Text file of words for partners that differ in one word.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", help="A checkpoint of the same shape that answers these prompts right."),
    ] = None,
    budget: Annotated[
        str, typer.Option("--budget", help="What the search may spend: runs, such as 2000; 5 min; 3 TFLOP.")
    ] = "5 min",
    level: Annotated[
        Literal["layers", "heads", "neurons"], typer.Option("--level", help="How far down to look.")
    ] = "heads",
    position: Annotated[
        list[str] | None,
        typer.Option("--position", help="What is told apart: each, all, or -1, a span; repeat. By default what fits."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="What to measure; by default right against wrong answer.")
    ] = None,
    delta: Annotated[
        float | None, typer.Option("--delta", help="Share of the gap that does not count: .1; of neurons .02.")
    ] = None,
    most: Annotated[int, typer.Option("--most", min=1, help="Components to confirm, at most.")] = 5,
    first_token: Annotated[bool, typer.Option("--first-token", help="Cut answers to their first token.")] = False,
    few_checks: Annotated[bool, typer.Option("--few-checks", help="Leave out the controls that cost runs.")] = False,
    ledger: Annotated[
        Path | None, typer.Option("--ledger", help="File of the openings of held-out pairs; the user's own by default.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws of partners and of the split.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the report and what each stage found; made where missing.")
    ] = Path("debugging"),
    as_json: Json = False,
) -> None:
    """Find which components make prompts fail: pairs, a search on half of them, a claim on the others.

    Exit code 0 where a component is confirmed; 1 where none is, or where nothing can be confirmed; 2 where no prompt
    fails or no partner works; 4 where the pairs leave no gap. The folder holds what was found until then.
    """
    found = cp.debug(
        cp.open_model(model, dtype=dtype, device=device),
        failures,
        works=works or (),
        templates=templates or (),
        vocabulary=vocabulary.read_text(encoding="utf-8").split() if vocabulary else None,
        against=None if against is None else cp.open_model(against, dtype=dtype, device=device),
        budget=budget,
        level=level,
        positions=position,
        metric=metric,
        delta=delta,
        most=most,
        first_token=first_token,
        checks=cp.Checks.none() if few_checks else None,
        ledger=ledger,
        seed=seed,
        out=out,
    )
    if as_json:
        view.json_object({**found.to_plain(), "files": sorted(str(path) for path in out.iterdir())})
    else:
        view.text(str(found))
        view.text(f"\nwrote {', '.join(sorted(path.name for path in out.iterdir()))} into {out}/")
    if found.exit_code:
        raise typer.Exit(found.exit_code)
