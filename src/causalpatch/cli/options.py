"""Options that several commands take, each spelt once."""

from pathlib import Path
from typing import Annotated, Literal

import typer

ModelName = Annotated[str, typer.Argument(help="zoo:NAME, a folder, or a name on the hub.")]
PairsName = Annotated[str, typer.Argument(help="A task's name, or a .jsonl, .csv or .parquet file.")]
Where = Annotated[list[str] | None, typer.Option("--where", help="Keep pairs with COLUMN=VALUE.")]
First = Annotated[int | None, typer.Option("--first", min=1, help="Use the first N pairs only.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; a GPU where there is one.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16, …; the checkpoint's own.")]
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
Set = Annotated[
    list[str] | None, typer.Option("--set", help="A value in place of the file's, such as steps.heads.site=z; repeat.")
]
Top = Annotated[int, typer.Option("--top", min=1, help="How many of the largest cells to print.")]
