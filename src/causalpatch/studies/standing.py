"""How a run stands, read from its store alone: no model is opened, and nothing is measured."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from causalpatch.studies.calls import Calls
from causalpatch.studies.openings import openings
from causalpatch.studies.pace import Pace
from causalpatch.studies.results import Results
from causalpatch.studies.running import names_of_results
from causalpatch.studies.store import Run, Store
from causalpatch.studies.study import Study


@dataclass(frozen=True)
class Standing:
    """How a run stands.

    Args:
        hash: Name of the run.
        name: What its study is called.
        steps: A row per result: ``step``, ``kind``, ``state``, ``shards``, ``runs``.
        n_shards: Finished shards.
        sessions: How often it was run.
        last: The last line of its journal.
        n_openings: How many of its steps opened held-out pairs.
    """

    hash: str
    name: str
    steps: tuple[dict[str, Any], ...]
    n_shards: int
    sessions: int
    last: Mapping[str, Any]
    n_openings: int

    @property
    def is_finished(self) -> bool:
        """Whether every step is."""
        return all(step["state"] == "finished" for step in self.steps)


def standing(run: Run, study: Study) -> Standing:
    """Return how a run stands.

    Args:
        run: The run.
        study: Its study.
    """
    results, lines = Results(run), last_journal(run)
    pace = Pace()
    for line in lines:
        pace.tell(line)
    rows = []
    for name, _, step in names_of_results(study):
        record = results.record(name)
        is_next = record is None and name == pace.name
        row = {"step": name, "kind": step.kind, "state": "finished" if record else "begun" if is_next else "to come"}
        shards, runs = (0, 0)
        if record:
            shards, runs = _counted(run, record["calls"])
        elif is_next:
            shards, runs = _shards_there(lines), pace.done
        rows.append({**row, "shards": shards, "runs": runs})
    sessions = len(run.sessions())
    last = lines[-1] if lines else {}
    return Standing(
        run.hash,
        study.name,
        tuple(rows),
        len(run.keys()),
        sessions,
        last,
        len({each["step"] for each in openings(run)}),
    )


def listed(store: Store) -> list[dict[str, Any]]:
    """Return a row per run of a store, in the order of their last sessions."""
    rows = []
    for name in store.hashes():
        run = Run(store, name)
        manifest = run.manifest()
        sessions = run.sessions()
        rows.append(
            {
                "run": name,
                "study": manifest["name"] if manifest else "(manifest damaged)",
                "model": manifest["study"]["model"]["name"] if manifest else "",
                "pairs": manifest["study"]["pairs"]["name"] if manifest else "",
                "finished": len(Results(run).names()),
                "shards": len(run.keys()),
                "sessions": len(sessions),
                "last": _begun(run, sessions[-1]) if sessions else "",
            }
        )
    return sorted(rows, key=lambda row: row["last"])


def last_journal(run: Run) -> list[dict[str, Any]]:
    """Return the lines of the latest session's journal; a torn last one, of a run that was killed, is left out."""
    logs = run.objects.names(run.name("logs"))
    data = run.objects.get(run.name("logs", logs[-1])) if logs else None
    lines = []
    for text in (data or b"").decode("utf-8", "replace").splitlines():
        try:
            lines.append(dict(json.loads(text)))
        except ValueError:
            continue
    return lines


def _shards_there(lines: list[dict[str, Any]]) -> int:
    """Return how many shards, counted for each request, of the step that a journal ends in are there."""
    there = 0
    for line in lines:
        if line["event"] == "step":
            there = 0
        elif line["event"] == "call":
            there += int(line["shards"]) - int(line["missing"])
        elif line["event"] == "shard":
            there += 1
    return there


def _begun(run: Run, session: str) -> str:
    """Return when a session was begun, by its machine's clock."""
    said = run.session(session)
    return str(said["program"]["created"]) if said else "(damaged)"


def _counted(run: Run, calls: list[str]) -> tuple[int, int]:
    """Return how many shards and patched runs some calls have."""
    shards = runs = 0
    for name in calls:
        said = Calls(run).read(name) or {"shards": []}
        shards += len(said["shards"])
        runs += sum(shard["runs"] for shard in said["shards"])
    return shards, runs
