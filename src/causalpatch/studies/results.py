"""What steps found, in the store: files with checksums, or for sweeps the shards themselves, labelled.

A step is finished when its record is there. The record names the files, with checksums, and the calls whose shards the
step was made of; where one of these is damaged, the step is made again, and measures what is missing alone.
"""

import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np

from causalpatch.base.errors import ResultsNotFound, SettingError, StoreCorrupt
from causalpatch.circuits.circuit import Circuit
from causalpatch.experiment.measured import Measured, Work
from causalpatch.results.claim import Claim
from causalpatch.results.edge_scores import EdgeScores
from causalpatch.results.effects import Effects
from causalpatch.results.evaluation import Evaluation
from causalpatch.results.layout import Parts, assemble, take_apart
from causalpatch.results.localization import Localization
from causalpatch.results.scores import Scores
from causalpatch.results.tuning import TuningReport
from causalpatch.studies.calls import Calls
from causalpatch.studies.cutting import Piece, join
from causalpatch.studies.sealed import checksum, seal, unseal
from causalpatch.studies.shards import decode
from causalpatch.studies.store import Run

RESULT: Final = "causalpatch result"
Result: TypeAlias = Effects | Localization | Scores | EdgeScores | Circuit | Evaluation | Claim | TuningReport
_SHARDED: Final = "sharded"
_FILES: Final[Mapping[str, tuple[Any, str]]] = {
    "effects": (Effects, ""),
    "localization": (Localization, ".npz"),
    "scores": (Scores, ".npz"),
    "edge scores": (EdgeScores, ".npz"),
    "circuit": (Circuit, ".npz"),
    "evaluation": (Evaluation, ".npz"),
    "claim": (Claim, ".json"),
    "tuning": (TuningReport, ".json"),
}


@dataclass(frozen=True)
class Results:
    """The results of a run.

    Args:
        run: The run.
    """

    run: Run

    @property
    def calls(self) -> Calls:
        """What its steps asked for."""
        return Calls(self.run)

    def names(self) -> list[str]:
        """Return the names of the steps that are finished, or were."""
        found = self.run.objects.names(self.run.name("results"))
        return [name.removesuffix(".json") for name in found if name.endswith(".json")]

    def record(self, name: str) -> dict[str, Any] | None:
        """Return the record of a step; None where it is not finished, or its record damaged."""
        return unseal(RESULT, self.run.objects.get(self.run.name("results", f"{name}.json")))

    def is_whole(self, name: str) -> bool:
        """Say whether a step is finished and all that it is made of is as it was written."""
        record = self.record(name)
        if record is None:
            return False
        files = (self._file(name, file, digest) is not None for file, digest in record["files"].items())
        return all(files) and all(self._is_call_whole(call) for call in record["calls"])

    def write(self, name: str, found: Result, calls: Iterable[str], about: Mapping[str, Any]) -> None:
        """Keep what a step found.

        Args:
            name: Name of the step, with its seed where there are several.
            found: What it found.
            calls: What was asked for while it was made.
            about: What else is to be known of it, as plain data.
        """
        asked = list(dict.fromkeys(calls))
        record: dict[str, Any] = {"calls": asked, "files": {}, "about": dict(about), "kind": _kind_of(found)}
        if isinstance(found, Effects) and len(asked) == 1:
            record |= {"kind": _SHARDED, "layout": _layout(found)}
        else:
            with tempfile.TemporaryDirectory() as folder:
                for path in _save(found, record["kind"], Path(folder)):
                    data, place = path.read_bytes(), path.relative_to(folder).as_posix()
                    self.run.objects.put(self.run.name("results", name, place), data)
                    record["files"][place] = checksum(data)
        self.run.objects.put(self.run.name("results", f"{name}.json"), seal(RESULT, record))

    def load(self, name: str) -> Result:
        """Return what a step found.

        Raises:
            ResultsNotFound: The step is not finished, or there is none of this name.
            StoreCorrupt: Something that it is made of was changed or is missing.
        """
        record = self._record(name)
        if record["kind"] == _SHARDED:
            return self._effects(record)
        kind, ending = _FILES[record["kind"]]
        with tempfile.TemporaryDirectory() as folder:
            for file, digest in record["files"].items():
                data = self._file(name, file, digest)
                if data is None:
                    raise _damaged(f"{name}/{file}")
                path = Path(folder) / file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            loaded: Result = kind.load(Path(folder) / f"found{ending}")
            return loaded

    def call(self, name: str) -> dict[str, Any]:
        """Return what was asked for in a call.

        Raises:
            StoreCorrupt: Its record is missing, or was changed.
        """
        said = self.calls.read(name)
        if said is None:
            raise _damaged(f"calls/{name}.json")
        return said

    def sharded(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the call of a sweep whose numbers are its shards, and how they are labelled.

        Args:
            name: The sweep's.

        Raises:
            ResultsNotFound: The step is not finished.
            SettingError: It is no such sweep.
        """
        record = self._record(name)
        if record["kind"] != _SHARDED:
            raise SettingError(
                f"'{name}' is no sweep whose cells can be read one by one",
                facts=[("kind", record["kind"]), ("such are", "sweeps of one value, without draws")],
                fix="leave --cells out",
            )
        return self.call(record["calls"][0]), dict(record["layout"])

    def numbers(self, name: str) -> Measured:
        """Return the numbers of a call out of its shards.

        Raises:
            StoreCorrupt: A shard was changed or is missing.
        """
        pieces, found = [], []
        for shard in self.call(name)["shards"]:
            held = self.run.read(shard["key"])
            if held is None:
                raise _damaged(f"shard {shard['key']}: {self.run.damage.get(shard['key'], 'its entry is missing')}")
            pieces.append(Piece(tuple(shard["cells"]), tuple(shard["pairs"])))
            found.append(decode(shard["key"], *held))
        return join(pieces, found)

    def work(self, name: str, call: Mapping[str, Any]) -> Work:
        """Return what a call was of.

        Args:
            name: Its name.
            call: What ``call`` returned.

        Raises:
            StoreCorrupt: Its arrays are missing, or were changed.
        """
        found = self.calls.work(name, call)
        if found is None:
            raise _damaged(f"calls/{name}.npz")
        return found

    def _record(self, name: str) -> dict[str, Any]:
        record = self.record(name)
        if record is None:
            raise ResultsNotFound(
                f"no results '{name}' in run {self.run.hash}",
                facts=[("finished", ", ".join(self.names()) or "none")],
                fix="causalpatch run goes on where it was stopped",
            )
        return record

    def _effects(self, record: Mapping[str, Any]) -> Effects:
        whole, layout = self.numbers(record["calls"][0]), record["layout"]
        shape = [len(values) for values in layout["axes"].values()]
        positions = layout["positions"]
        parts = Parts(
            **{
                **layout,
                "groups": np.array(layout["groups"]),
                "positions": None if positions is None else np.array(positions, dtype=np.int64),
            },
            values=whole.values.reshape(len(whole.values), *shape, -1),
            status=whole.status.reshape(*shape, -1),
            baselines=whole.baselines,
        )
        return Effects(*assemble(parts))

    def _file(self, name: str, file: str, digest: str) -> bytes | None:
        data = self.run.objects.get(self.run.name("results", name, file))
        return data if data is not None and checksum(data) == digest else None

    def _is_call_whole(self, name: str) -> bool:
        if self.calls.problems(name):
            return False
        return all(self.run.read(shard["key"]) is not None for shard in self.call(name)["shards"])


def _kind_of(found: Result) -> str:
    return next(name for name, (kind, _) in _FILES.items() if isinstance(found, kind))


def _save(found: Result, kind: str, folder: Path) -> list[Path]:
    """Write what a step found into a folder; return its files."""
    found.save(folder / f"found{_FILES[kind][1]}")
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _layout(effects: Effects) -> dict[str, Any]:
    """Return all of some effects but the numbers that shards hold, as plain data."""
    parts = take_apart(effects.to_xarray(), effects.provenance)
    return {
        "axes": {axis: list(values) for axis, values in parts.axes.items()},
        "labels": {axis: list(texts) for axis, texts in parts.labels.items()},
        "pair_ids": list(parts.pair_ids),
        "groups": parts.groups.tolist(),
        "metrics": list(parts.metrics),
        "positions": None if parts.positions is None else parts.positions.tolist(),
        "provenance": dict(parts.provenance),
    }


def _damaged(what: str) -> StoreCorrupt:
    return StoreCorrupt(
        f"the results cannot be trusted: {what}",
        facts=[("found", "missing, torn, or changed after it was written")],
        fix="causalpatch run measures again what is damaged, and that alone",
    )
