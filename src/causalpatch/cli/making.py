"""The command that makes pairs of failing prompts."""

from pathlib import Path
from typing import Annotated

import typer

import causalpatch as cp
from causalpatch.cli import show as view
from causalpatch.cli.options import Device, Dtype, Json, ModelName


def pairs(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    failures: Annotated[
        Path | None,
        typer.Argument(help="A .jsonl, .csv or .parquet file: prompt, answer, perhaps wrong_answer, works."),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="File for the pairs.")] = Path("pairs.jsonl"),
    works: Annotated[Path | None, typer.Option("--works", help="File of prompts that work: prompt, answer.")] = None,
    templates: Annotated[
        Path | None,
        typer.Option("--templates", help="File of templates: prompt, fillers, answer. Enough without failing prompts."),
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option("--vocabulary", help="Text file of words for replacements of as many tokens.")
    ] = None,
    way: Annotated[
        list[str] | None,
        typer.Option("--way", help="works, substitution, template or length; may be repeated."),
    ] = None,
    tries: Annotated[int, typer.Option("--tries", min=1, help="Most partners of each way for a failing prompt.")] = 16,
    entity_disjoint: Annotated[
        bool, typer.Option("--entity-disjoint", help="Keep pairs that share no prompt and no changed word.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Answers must be the first choices of all.")] = False,
    first_token: Annotated[bool, typer.Option("--first-token", help="Cut answers to their first token.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw among more partners than tries.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Make pairs of failing prompts and partners that work, and say what was dropped and why."""
    made = cp.make_pairs(
        None if failures is None else failures,
        cp.open_model(model, dtype=dtype, device=device),
        works=works or (),
        templates=templates or (),
        vocabulary=vocabulary.read_text(encoding="utf-8").split() if vocabulary else None,
        ways=way,
        tries=tries,
        entity_disjoint=entity_disjoint,
        strict=strict,
        first_token=first_token,
        seed=seed,
    )
    written = made.save(out)
    if as_json:
        counts = {"given": made.n_given, "failing": len(made.failing), "tried": made.tried, "kept": len(made.pairs)}
        more = {"components": made.n_components, "alone": made.alone, "dropped": made.reasons, "untried": made.untried}
        view.json_object({**counts, **more, "file": str(written)})
        return
    view.text(str(made))
    view.text(f"\nwrote {len(made.pairs)} pairs into {written}\n  next: causalpatch sweep {model} {written} --site z")
