"""What commands share: pairs and dictionaries that options name, sweeps that can be stopped, what is shown of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.base.extras import lazy
from causalpatch.cli import show as view

tasks_room = lazy("causalpatch.pairs.tasks")


def joined_by_plus(text: str) -> str | list[str]:
    """Return what stands between pluses as a list, to be patched in one run."""
    parts = [part.strip() for part in text.split("+")]
    return parts if len(parts) > 1 else text


def finish(
    found: dict[str, Any], out: Path | None, top: int, as_json: bool, more: Mapping[str, Any] | None = None
) -> None:
    """Save and show the effects of a command, in JSON with what else was found; stop with 130 where they were cut."""
    files = {name: view.save(effects, out, name, alone=len(found) == 1) for name, effects in found.items() if out}
    if as_json:
        objects = {
            name: {**view.effects_object(effects, top), "files": files.get(name, [])} for name, effects in found.items()
        }
        view.json_object({**(more or {}), "sweeps": objects})
    else:
        for name, effects in found.items():
            for metric in effects.metrics:
                view.heading(name if len(effects.metrics) == 1 else f"{name}, {metric}")
                view.engine(effects)
                view.top_table(effects.over_draws().top(top, metric))
        if out:
            n_files = sum(map(len, files.values()))
            view.text(f"\nwrote {n_files} files (numbers, tables, pictures) into {out}/:")
            for name, written in files.items():
                view.text(f"  {name}: {', '.join(Path(path).name for path in written)}")
    if not all(effects.is_complete for effects in found.values()):
        raise typer.Exit(130)


def run_until_stopped(sweeps: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    """Run sweeps in turn; one that the user stops is kept, and is the last."""
    found = {}
    for name, run in sweeps.items():
        found[name] = run()
        if not found[name].is_complete:
            break
    return found


def show_plans(plans: dict[str, Any], as_json: bool) -> None:
    """Show what sweeps would cost."""
    if as_json:
        view.json_object({"plans": {name: vars(plan) for name, plan in plans.items()}})
        return
    for name, plan in plans.items():
        view.heading(name)
        view.text(str(plan))


def prepared(model: str, pairs: str, where: list[str] | None, first: int | None, **how: Any) -> tuple[Any, Any]:
    """Return the model that a name opens, and of the pairs those that are asked for."""
    opened = cp.open_model(model, **how)
    return opened, selected(cp.load_pairs(pairs, opened), where, first)


def selected(pairs: Any, where: list[str] | None, first: int | None) -> Any:
    """Return the pairs that conditions hold for, or the first of them."""
    for condition in where or []:
        column, equals, wanted = condition.partition("=")
        if not equals:
            raise SettingError(f"--where {condition!r} is not COLUMN=VALUE", fix="--where behaviour=pronoun")
        pairs = pairs.where(**{column: wanted})
    return pairs.take(range(min(first, len(pairs)))) if first else pairs


def with_dictionaries(model: Any, named: list[str] | None) -> Any:
    """Return a model with the dictionaries that options name."""
    for text in named or []:
        name, equals, place = text.partition("=")
        name, _, site = name.partition(":")
        if not equals or not name:
            raise SettingError(f"--dictionary {text!r} is not NAME=FOLDER", fix="--dictionary sae=FOLDER")
        model.add_dictionary(name, place, site or None)
    return model


def metric_of_task(pairs: str) -> str:
    """Return the metric of a task, by the pairs' name; of pairs from a file the logit difference."""
    task = tasks_room.TASKS.get(pairs)
    return task.metric if task else "logit_difference"
