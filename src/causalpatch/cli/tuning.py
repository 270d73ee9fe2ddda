"""The command that changes what was located, and shows what else changed."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.cli import show as view
from causalpatch.cli.options import Device, Dtype, Json, ModelName
from causalpatch.cli.requests import metric_of_task

study_room = lazy("causalpatch.studies.study")


def tune(  # noqa: PLR0913 - each argument is an option that a person types
    model: ModelName,
    target: Annotated[
        str,
        typer.Argument(help="What shall change, a .jsonl, .csv or .parquet file: prompt, wanted, unwanted, entities."),
    ],
    retain: Annotated[
        Path, typer.Option("--retain", help="Text file of what must stay: documents between empty lines.")
    ],
    component: Annotated[
        list[str] | None, typer.Option("--component", help="A site such as z.4.4 or mlp_post.3.17; may be repeated.")
    ] = None,
    claim: Annotated[Path | None, typer.Option("--claim", help="Instead: the claim.json that confirm wrote.")] = None,
    way: Annotated[
        Literal["slice", "offset", "lora"],
        typer.Option("--way", help="slice: its own rows and columns; offset: a vector behind it; lora: adapters."),
    ] = "slice",
    rank: Annotated[int, typer.Option("--rank", min=1, help="Of lora: rank of the adapters.")] = 4,
    shared: Annotated[
        Literal["leave", "take"],
        typer.Option("--shared", help="Whether keys and values are changed that other heads use too."),
    ] = "leave",
    margin: Annotated[
        list[str] | None,
        typer.Option("--margin", help="Of the comparison, NAME=MOST that may change, such as kl_mean=0.01; repeat."),
    ] = None,
    objective: Annotated[
        Literal["cross_entropy", "margin"], typer.Option("--objective", help="margin: wanted over unwanted.")
    ] = "cross_entropy",
    keep: Annotated[float, typer.Option("--keep", min=0, help="Weight of the retain set.")] = 1.0,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Most steps of a training.")] = 200,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Target pairs in a step.")] = 16,
    ahead: Annotated[
        float,
        typer.Option("--ahead", min=0, help="Nats by which the wanted answer must lead where validation succeeds."),
    ] = 0.0,
    rate: Annotated[
        list[float] | None, typer.Option("--rate", help="A share of a weight's usual size for each step; repeat.")
    ] = None,
    neighbours: Annotated[
        Path | None, typer.Option("--neighbours", help="Prompts near the target that must keep their answers.")
    ] = None,
    other: Annotated[
        list[Path] | None, typer.Option("--other", help="Prompts of another behaviour, with its answers; repeat.")
    ] = None,
    paraphrases: Annotated[
        Path | None, typer.Option("--paraphrases", help="The target behaviour in other words; only tested.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option("--lm-eval", help="Of the comparison, a task of lm-eval that must stay; repeat.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            "--compare", help="Pairs to measure effects on: train random components of the same size beside it."
        ),
    ] = None,
    arm: Annotated[
        list[str] | None, typer.Option("--arm", help="Of the comparison, arms to make; repeat. All by default.")
    ] = None,
    seeds: Annotated[
        int | None, typer.Option("--seeds", min=1, help="Of the comparison, seeds of each arm; 3 by default.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option("--draws", min=19, help="Of the comparison, random components of the same size; 19 by default."),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Count the trainings of the comparison, and stop.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the split and the batches.")] = 0,
    dtype: Dtype = None,
    device: Device = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder for the checkpoint, the change and the report; made where missing.")
    ] = Path("tuned"),
    as_json: Json = False,
) -> None:
    """Train located components, and nothing else; with --compare, say whether locating them helped.

    Exit code 0 where the change was made; 130 where it was stopped, with the best checkpoint until then kept.
    """
    if bool(component) == bool(claim):
        raise SettingError(
            "tune takes components, or a claim",
            facts=[("given", "both" if component else "neither")],
            fix="--component z.4.4, or --claim claim.json",
        )
    opened = cp.open_model(model, dtype=dtype, device=device)
    located: Any = component or cp.Claim.load(claim or "")
    data = cp.TuningData.of(
        opened,
        target,
        retain,
        neighbours=neighbours,
        others={path.stem: path for path in other or []},
        paraphrases=paraphrases,
        evaluate={name: cp.lm_eval_task(name) for name in task or []},
        seed=seed,
    )
    rates: dict[str, Any] = {"rates": tuple(rate)} if rate else {}
    schedule = cp.Schedule(objective=objective, keep=keep, steps=steps, batch=batch, ahead=ahead, **rates)
    if against is None:
        if arm or plan or task or margin or seeds or draws:
            named = "--arm, --draws, --lm-eval, --margin, --plan and --seeds"
            raise SettingError(f"{named} are of a comparison", fix="--compare PAIRS")
        how = {"way": way, "rank": rank, "shared": shared, "seed": seed}
        _alone(opened, located, data, schedule, out=out, as_json=as_json, **how)
        return
    arms: dict[str, Any] = {"arms": tuple(arm)} if arm else {}
    comparison = cp.Comparison(
        way=way,
        schedule=schedule,
        n_random=draws or 19,
        n_seeds=seeds or 3,
        rank=rank,
        shared=shared,
        margins=_margins(margin),
        **arms,
    )
    experiment = cp.Experiment(opened, cp.load_pairs(against, opened), metric=metric_of_task(against))
    planned = cp.plan_tuning(experiment, located, data, comparison)
    if plan:
        if as_json:
            view.json_object({"plan": vars(planned), "n_trainings": planned.n_trainings})
        else:
            view.text(str(planned))
        return
    if not as_json:
        view.text(f"{planned}\n")
    report = cp.compare_tuning(experiment, located, data, comparison, seed=seed)
    files = [report.save(out / "report.json")]
    files += [report.plot().save(out / f"arms.{ending}") for ending in ("svg", "png", "csv")]
    if as_json:
        plain = json.loads(files[0].read_text(encoding="utf-8"))["report"]
        view.json_object({**plain, "files": list(map(str, files))})
    else:
        view.text(str(report))
        view.text(f"\nwrote {', '.join(path.name for path in files)} into {out}/")
    if not report.is_complete:
        raise typer.Exit(130)


def _margins(named: list[str] | None) -> Any:
    """Return the margins that options name, the others as they are by default."""
    found: dict[str, float] = {}
    for text in named or []:
        name, equals, most = text.partition("=")
        try:
            found[name] = float(most)
        except ValueError:
            equals = ""
        if not equals or name not in study_room.MARGINS:
            raise SettingError(
                f"--margin {text!r} is not NAME=MOST",
                facts=[("names", ", ".join(study_room.MARGINS))],
                fix="--margin kl_mean=0.01",
            )
    return cp.Margins(**found)


def _alone(model: Any, located: Any, data: Any, schedule: Any, *, out: Path, as_json: bool, **how: Any) -> None:
    """Tune, and write the checkpoint, or where weights cannot hold the change, the change."""
    tuned = cp.tune(model, located, data, schedule=schedule, **how)
    folders = []
    try:
        folders.append(tuned.save(out / "checkpoint"))
    except cp.UnsupportedError as error:
        view.problem(f"no checkpoint: {error}")
    if how["way"] == "lora":
        folders.append(tuned.save_adapter(out / "adapter"))
    else:
        folders.append(tuned.save_change(out / "change"))
    if as_json:
        said = {"training": tuned.training.to_plain(), "n_trained": tuned.way.n_trained, "notes": tuned.way.parts.notes}
        view.json_object({**said, "folders": list(map(str, folders))})
    else:
        view.text(str(tuned))
        view.text(f"\nwrote {', '.join(path.name for path in folders)} into {out}/")
    if not tuned.is_whole and any("by the user" in each.ended for each in tuned.searched):
        raise typer.Exit(130)
