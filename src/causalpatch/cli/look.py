"""Commands that show what there is: the demonstration, a model's sites, the tasks, saved effects."""

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import causalpatch as cp
from causalpatch.base.extras import lazy
from causalpatch.cli import show as view
from causalpatch.cli.found import STUDY_ENDINGS, show_study
from causalpatch.cli.options import Device, Dictionary, Dtype, Json, ModelName, Set, Top
from causalpatch.cli.requests import finish, run_until_stopped, with_dictionaries

engine = lazy("causalpatch.engine")
tasks_room = lazy("causalpatch.pairs.tasks")


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


def doctor(
    model: ModelName,
    dtype: Dtype = None,
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


def show(
    folder: Annotated[Path, typer.Argument(help="A folder that a sweep wrote, or a study file.")],
    step: Annotated[str | None, typer.Option("--step", help="Of a study, which step; by default all.")] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Which metric, where there are several.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Print every cell, not the largest alone.")] = False,
    top: Top = 10,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Print saved effects, or what the steps of a study found."""
    if folder.suffix in STUDY_ENDINGS:
        show_study(folder, changes, step, top, as_json)
        return
    effects = cp.Effects.load(folder)
    effects = effects.metric(metric) if metric else effects
    if as_json:
        view.json_object(view.effects_object(effects, top, everything=everything))
        return
    view.text(repr(effects))
    view.text("")
    view.summary(effects) if everything else view.top_table(effects.over_draws().top(top))
