"""What the commands on studies share: the run that a file names, and what its steps found."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import causalpatch as cp
from causalpatch.base.errors import ResultsNotFound
from causalpatch.base.extras import lazy
from causalpatch.cli import show as view

if TYPE_CHECKING:
    from causalpatch.studies import exporting, results, store
else:
    exporting = lazy("causalpatch.studies.exporting")
    results = lazy("causalpatch.studies.results")
    store = lazy("causalpatch.studies.store")

STUDY_ENDINGS: Final = (".yaml", ".yml")


def run_of(file: Path, changes: Sequence[str] | None = None) -> tuple[Any, Any]:
    """Return a study and its run, which must be in the store.

    Args:
        file: The study file.
        changes: What ``--set`` gave.
    """
    study = cp.read_study(file, changes or ())
    return study, store.Store(store.store_address(study, file.parent)).require(study)


def steps_of(run: Any, asked: str | None) -> list[str]:
    """Return the names of the results that are asked for, by default all that are there.

    Raises:
        ResultsNotFound: No step is finished yet.
    """
    names: list[str] = [asked] if asked else results.Results(run).names()
    if not names:
        raise ResultsNotFound(
            f"no step of run {run.hash} is finished", fix="causalpatch run goes on where it was stopped"
        )
    return names


def with_changes(file: Path, changes: Sequence[str] | None) -> str:
    """Return the words of a command that name this run: the file, and all that ``--set`` gave."""
    return " ".join([shlex.quote(str(file)), *(f"--set {shlex.quote(change)}" for change in changes or ())])


def show_study(file: Path, changes: Sequence[str] | None, step: str | None, top: int, as_json: bool) -> None:
    """Print what the steps of a study found."""
    _, run = run_of(file, changes)
    found = {name: results.Results(run).load(name) for name in steps_of(run, step)}
    if as_json:
        view.json_object({"run": run.hash, "results": {name: _plain(one, top) for name, one in found.items()}})
        return
    for name, one in found.items():
        view.heading(name)
        view.text(str(one.over_draws().top(top)) if isinstance(one, cp.Effects) else str(one))


def _plain(found: Any, top: int) -> Any:
    if isinstance(found, cp.Effects):
        return view.effects_object(found, top)
    return {"kind": type(found).__name__, "rows": exporting.table_of(found).head(top).to_dict("records")}
