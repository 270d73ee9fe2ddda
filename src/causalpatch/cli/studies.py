"""Commands on studies: write a file, check it, run it from wherever it was stopped, see how it stands, take it out."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

import causalpatch as cp
from causalpatch.base.errors import SettingError, StoreCorrupt
from causalpatch.base.extras import lazy
from causalpatch.cli import show as view
from causalpatch.cli.found import run_of, steps_of, with_changes
from causalpatch.cli.options import Json, Set

if TYPE_CHECKING:
    from causalpatch.studies import checking, exporting, opened, pace, results, standing, store, template, verifying
else:
    checking = lazy("causalpatch.studies.checking")
    exporting = lazy("causalpatch.studies.exporting")
    opened = lazy("causalpatch.studies.opened")
    pace = lazy("causalpatch.studies.pace")
    results = lazy("causalpatch.studies.results")
    standing = lazy("causalpatch.studies.standing")
    store = lazy("causalpatch.studies.store")
    template = lazy("causalpatch.studies.template")
    verifying = lazy("causalpatch.studies.verifying")

StudyFile = Annotated[Path, typer.Argument(help="The study file.")]
_EVERY_S = 5.0  # between two lines of progress, of one step
_SHOWN = 5  # cells of each sweep that are printed at the end


def init(
    file: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("study.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a study file in which every key is explained, and which runs as it is."""
    if file.exists() and not force:
        raise SettingError(f"'{file}' is there already", fix=f"causalpatch init {file} --force, or another name")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(template.TEMPLATE, encoding="utf-8")
    view.text(f"wrote {file}\n  next: causalpatch check {file}, then causalpatch run {file}")


def schema() -> None:
    """Print the JSON schema of study files: every key, its type and what it is for."""
    view.text(json.dumps(cp.Study.model_json_schema(), indent=1))


def check(file: StudyFile, changes: Set = None, as_json: Json = False) -> None:
    """Check all that can be known before a run: store, sites, pairs, memory, cost. Nothing is run or written."""
    made = checking.check(opened.Opened(cp.read_study(file, changes or ()), file.parent))
    if as_json:
        steps = [vars(step) for step in made.steps]
        view.json_object({"run": made.hash, "runs": made.runs, "steps": steps, "about": list(made.lines)})
        return
    view.text(str(made))


def run(
    file: StudyFile,
    changes: Set = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print every event as JSON on the error stream.")] = False,
    as_json: Json = False,
) -> None:
    """Run a study, or go on with it where it was stopped; what was measured before is not measured again."""
    study = cp.read_study(file, changes or ())
    with _Progress(is_verbose=verbose) as progress:
        finished = cp.run_study(study, file.parent, listeners=(progress,))
    if as_json:
        view.json_object({"run": finished.run.hash, "results": list(finished.results), "made": progress.made})
        return
    for name, one in finished.results.items():
        view.heading(name)
        view.text(str(one.over_draws().top(_SHOWN)) if isinstance(one, cp.Effects) else str(one))
    view.text(f"\nrun {finished.run.hash} in {finished.run.store.address}: {progress.made:,} runs were made just now")
    shown = f"{with_changes(file, changes)} --step {next(iter(finished.results))}"
    view.text(f"  next: causalpatch show {shown}, or export, or verify")


def status(file: StudyFile, changes: Set = None, as_json: Json = False) -> None:
    """Say how a study stands: which steps are finished, which is being made, what happened last."""
    found = standing.standing(*reversed(run_of(file, changes)))
    if as_json:
        view.json_object({**vars(found), "is_finished": found.is_finished})
        return
    said = "finished" if found.is_finished else "not finished"
    view.text(f"run {found.hash} of '{found.name}': {said}, {found.n_shards:,} shards, {found.sessions} sessions")
    view.table(found.steps)
    if found.n_openings:
        view.text(f"held-out pairs were opened by {found.n_openings} step{'s' * (found.n_openings > 1)}")
    if found.last:
        more = f": {found.last['what']}" if "what" in found.last else ""
        view.text(f"last: {found.last['event']} at {found.last['at']}{more}")


def ls(
    place: Annotated[str, typer.Argument(help="A store: a folder, or an address such as s3://bucket/place.")],
    as_json: Json = False,
) -> None:
    """List the runs in a store."""
    rows = standing.listed(store.Store(place))
    if as_json:
        view.json_object({"runs": rows})
    elif rows:
        view.table(rows)
    else:
        view.text(f"no runs in {place}")


def export(
    file: StudyFile,
    out: Annotated[Path, typer.Option("--out", help="A file that ends in .parquet, .csv or .nc (NetCDF).")],
    step: Annotated[str | None, typer.Option("--step", help="Which step; needed where there are several.")] = None,
    cells: Annotated[
        bool, typer.Option("--cells", help="Of a sweep of any size, a row per cell: mean, share, interval, p.")
    ] = False,
    changes: Set = None,
) -> None:
    """Write what a step found for other tools; in Python, effects.to_xarray() gives the labelled array."""
    _, made = run_of(file, changes)
    names = steps_of(made, step)
    if len(names) > 1:
        raise SettingError(
            "which step is to be exported?", facts=[("steps", ", ".join(names))], fix=f"--step {names[0]}"
        )
    kept = results.Results(made)
    wrote = exporting.export_cells(kept, names[0], out) if cells else exporting.export(kept.load(names[0]), out)
    view.text(f"wrote {wrote}")


def verify(
    file: StudyFile,
    cells: Annotated[int, typer.Option("--cells", min=0, help="How many cells are measured again.")] = 32,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draw of cells.")] = 0,
    changes: Set = None,
    as_json: Json = False,
) -> None:
    """Compute every checksum anew, and measure a random sample of cells again: exit code 4 where something is off."""
    study, made = run_of(file, changes)
    found = verifying.verify(made, opened.Opened(study, file.parent) if cells else None, cells, seed)
    if as_json:
        view.json_object({**vars(found), "is_sound": found.is_sound})
    else:
        damaged = f"{len(found.damaged)} shards, results or records damaged"
        view.text(f"{found.n_shards:,} shards read, {damaged}; {len(found.unclaimed)} files unclaimed")
        measured = f"{found.n_cells} cells measured again in {found.n_runs} runs"
        view.text(f"{measured}: largest difference {found.largest:.2g} of what rounding allows")
        if found.n_unknown:
            view.text(f"{found.n_unknown} requests are on pairs that a store cannot keep, and were not measured again")
    if not found.is_sound:
        wrong = [*found.damaged.items(), *(("measured", each) for each in found.off)]
        raise StoreCorrupt(
            f"run {made.hash} is not as it was written",
            facts=wrong[:4],
            fix=f"causalpatch run {with_changes(file, changes)} measures again what is damaged"
            if found.damaged
            else "compare the versions in its sessions/: the model gives other numbers now",
        )


class _Progress:
    """Shows how far a run is: one line that is written over at a terminal, else a line now and then."""

    def __init__(self, *, is_verbose: bool) -> None:
        self.made = 0
        self._is_verbose = is_verbose
        self._pace = pace.Pace()
        self._said_s = -_EVERY_S

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        view.end_of_progress()

    def __call__(self, line: Mapping[str, Any]) -> None:
        if line["event"] == "shard" and line["by"] == "this run":
            self.made += line["runs"]
        if self._is_verbose:
            view.problem(json.dumps(line, ensure_ascii=False))
            return
        if line["event"] == "damaged":
            view.end_of_progress()
            view.problem(f"note: {len(line['shards'])} damaged shards are measured again: {', '.join(line['shards'])}")
        is_new = line["event"] in ("step", "step was there")
        if not self._pace.tell(line):
            return
        if line["event"] == "step was there":
            view.progress(f"step {line['number']} of {line['of']}, {line['name']}: was there", is_last=True)
        elif is_new or view.is_watched() or time.monotonic() - self._said_s > _EVERY_S:
            self._said_s = time.monotonic()
            view.progress(str(self._pace), is_last=not view.is_watched())
