"""A store of studies: finished shards, and what says which they are, whole or not there.

    store.json                              that this is a store, of which version
    openings/…                              which held-out pairs have shown their effects
    runs/HASH/manifest.json                 the study, as plain data
    runs/HASH/sessions/…                    each time that it was run: where, with what
    runs/HASH/shards/KEY-SHA.parquet        numbers, under a name that their content gives
    runs/HASH/entries/KEY.json              that a shard is finished: its file and checksum, how it came to be
    runs/HASH/calls/…                       which shards belong together, and what their cells are, with checksums
    runs/HASH/pairs/…                       the pairs themselves, with checksums
    runs/HASH/states/…                      how far something came that is no shard, with checksums
    runs/HASH/results/STEP-SEED/…           what steps found, with checksums
    runs/HASH/logs/…  leases/…

1. A shard is written first, then its entry: a file without an entry is not part of the run. Both appear whole.
2. Whoever reads a shard checks its checksum. What is torn, changed, missing or stands under the name of another one is
   not finished: it is measured again, and the entry written anew.
3. Names come from what is measured. Two runs of one study write the same objects; nothing can be mixed up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from causalpatch.base.errors import ResultsNotFound, StoreCorrupt, UnsupportedError
from causalpatch.base.suggest import closest
from causalpatch.studies.leases import TIME_S, Leases
from causalpatch.studies.objects import Objects, open_objects
from causalpatch.studies.sealed import checksum, seal, unseal
from causalpatch.studies.study import Study

SCHEMA: Final = 1
ENTRY: Final = "causalpatch shard"
STATE: Final = "causalpatch state"
MANIFEST: Final = "causalpatch run"
SESSION: Final = "causalpatch session"
_STORE: Final = "causalpatch store"
_MARK: Final = "store.json"


def store_address(study: Study, folder: Path) -> str:
    """Return the address of a study's store: a folder is seen from the study's own.

    Args:
        study: The study.
        folder: The study's folder.
    """
    return study.store if "://" in study.store else str(folder / study.store)


class Store:
    """A store.

    Args:
        address: A folder, or an address such as ``s3://bucket/place``.

    Raises:
        StoreUnreachable: It does not answer.
        UnsupportedError: A later version wrote it.
        StoreCorrupt: Something else is there.
    """

    def __init__(self, address: str) -> None:
        self.objects: Objects = open_objects(address)
        self.address = self.objects.address
        self._check()

    def create(self) -> None:
        """Make the store where there is none."""
        self.objects.tidy("", deeply=False)
        self.objects.put_new(_MARK, seal(_STORE, {"schema": SCHEMA}))
        self._check()

    def hashes(self) -> list[str]:
        """Return the names of the runs in it."""
        return self.objects.names("runs")

    def run(self, name: str) -> "Run":
        """Return the run of a study that is there.

        Args:
            name: Its hash, or the beginning of it.

        Raises:
            ResultsNotFound: There is none, or several.
        """
        found = [each for each in self.hashes() if each.startswith(name)]
        if len(found) == 1:
            return Run(self, found[0])
        held = ", ".join(found or self.hashes()[:6]) or "none"
        near = closest(name, self.hashes(), 1)
        raise ResultsNotFound(
            f"{'no run' if not found else 'more than one run'} '{name}' in the store '{self.address}'",
            facts=[("runs", held)],
            fix=f"did you mean {near[0]}?" if near else "causalpatch ls STORE lists them",
        )

    def run_of(self, study: Study) -> "Run":
        """Return the run of a study, which need not be there yet."""
        return Run(self, study.hash)

    def run_of_hash(self, name: str) -> "Run":
        """Return the run of a whole hash, which need not be there yet."""
        return Run(self, name)

    def require(self, study: Study) -> "Run":
        """Return the run of a study, which must be there.

        Raises:
            ResultsNotFound: The store holds other studies only; the message says in what the nearest one differs.
        """
        run = self.run_of(study)
        if run.manifest() is not None:
            return run
        others = [Run(self, each) for each in self.hashes()]
        differing = [(each, _differing(study.content(), each.content())) for each in others]
        facts: list[tuple[str, object]] = [("study", f"'{study.name}', {study.hash}")]
        if differing:
            nearest, keys = min(differing, key=lambda each: len(each[1]))
            facts.append(("there", f"{len(others)}, the nearest {nearest.hash}, with another {', '.join(keys)}"))
        else:
            facts.append(("there", "no run at all"))
        raise ResultsNotFound(
            f"the store '{self.address}' holds no run of this study",
            facts=facts,
            fix="causalpatch run makes it, or undo the change to the study",
        )

    def _check(self) -> None:
        data = self.objects.get(_MARK)
        if data is None:
            foreign = [name for name in self.objects.names("") if name not in ("runs", "openings")]
            if foreign:
                raise StoreCorrupt(
                    f"'{self.address}' is no store of studies",
                    facts=[("holds", ", ".join(foreign[:4])), ("lacks", _MARK)],
                    fix="name a folder that is empty, or not there yet: --set store=FOLDER",
                )
            return
        said = unseal(_STORE, data)
        if said is None:
            raise StoreCorrupt(
                f"'{self.address}/{_MARK}' was changed or is torn",
                facts=[("needed", f"the seal of a {_STORE}")],
                fix=f"take {_MARK} away: it is written again, and every shard has a checksum of its own",
            )
        if said["schema"] > SCHEMA:
            raise UnsupportedError(
                f"the store '{self.address}' was written by a later version",
                facts=[("schema", said["schema"]), ("this version reads", SCHEMA)],
                fix="pip install --upgrade causalpatch",
            )


@dataclass
class Run:
    """One run of a study in a store.

    Args:
        store: The store.
        hash: Hash of the study's content.
        damage: What was found torn, changed or missing, by the shard's key.
    """

    store: Store
    hash: str
    damage: dict[str, str] = field(default_factory=dict)

    @property
    def objects(self) -> Objects:
        """Where everything is kept."""
        return self.store.objects

    def name(self, *parts: str) -> str:
        """Return the name of an object of the run."""
        return "/".join(("runs", self.hash, *parts))

    def begin(
        self, study: Study, facts: Mapping[str, Any], environment: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the manifest where there is none, and return the one that is there.

        Args:
            study: The study.
            facts: What the numbers depend on beside the study's text: hashes of the model and of the pairs.
            environment: The machine and the versions that it is begun with; each session keeps its own.

        Raises:
            StoreCorrupt: The run was begun with another model, or other pairs, of the same names.
        """
        self.store.create()
        self.objects.tidy(self.name())
        content = {"schema": SCHEMA, "study": study.content(), "name": study.name, "facts": dict(facts)}
        content["environment"] = dict(environment or {})
        held = self.manifest()
        if held is None:
            # There is none, or it is damaged: sessions, if there were some, know what the run was begun with, too.
            said = [
                each["facts"] for each in map(self.session, self.sessions()) if each is not None and "facts" in each
            ]
            made: dict[str, Any] = content | {"facts": dict(said[0] if said else facts)}
            place, data = self.name("manifest.json"), seal(MANIFEST, made)
            if not self.objects.put_new(place, data) and self.manifest() is None:
                self.objects.put(place, data)
            held = self.manifest() or made
        changed = [name for name in facts if held["facts"].get(name) != facts[name]]
        if changed:
            raise StoreCorrupt(
                f"run {self.hash} was begun with other {' and '.join(changed)} of the same name",
                facts=[(name, f"then {held['facts'].get(name)}, now {facts[name]}") for name in changed],
                fix="bring them back, or name another store: --set store=FOLDER",
            )
        return held

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest; None where there is none, or it was changed."""
        return unseal(MANIFEST, self.objects.get(self.name("manifest.json")))

    def sessions(self) -> list[str]:
        """Return the names of the records of sessions, in order."""
        return self.objects.names(self.name("sessions"))

    def session(self, name: str) -> dict[str, Any] | None:
        """Return the record of a session; None where it is torn or changed."""
        return unseal(SESSION, self.objects.get(self.name("sessions", name)))

    def damaged_records(self) -> Iterator[tuple[str, str]]:
        """Yield what is wrong with the manifest, or with a session's record."""
        if self.manifest() is None:
            yield "manifest.json", "missing, torn or changed: the next run writes it anew"
        for name in self.sessions():
            if self.session(name) is None:
                yield f"sessions/{name}", "torn or changed: what it told is lost; take it away"

    def content(self) -> dict[str, Any]:
        """Return the content of the study."""
        return dict((self.manifest() or {}).get("study", {}))

    def leases(self, time_s: float = TIME_S) -> Leases:
        """Return the leases on its shards."""
        return Leases(self.objects, self.name("leases"), time_s)

    def entry(self, key: str) -> dict[str, Any] | None:
        """Return what is known of a finished shard; None where there is no entry, or none that can be believed."""
        data = self.objects.get(self.name("entries", f"{key}.json"))
        said = unseal(ENTRY, data)
        if said is None or said.get("key") != key:
            if data is not None:
                self.damage[key] = "its entry is torn or changed" if said is None else "its entry is that of another"
            return None
        return said

    def read(self, key: str) -> tuple[bytes, dict[str, Any]] | None:
        """Return the bytes of a finished shard with its entry; None where it has to be measured, again or at all."""
        said = self.entry(key)
        if said is None:
            return None
        data = self.objects.get(self.name("shards", said["file"]))
        if data is None:
            self.damage[key] = "its file is missing"
        elif len(data) != said["bytes"]:
            self.damage[key] = f"its file has {len(data)} bytes instead of {said['bytes']}"
        elif checksum(data) != said["sha256"]:
            self.damage[key] = "its file was changed"
        else:
            return data, said
        return None

    def write(self, key: str, data: bytes, about: Mapping[str, Any]) -> dict[str, Any]:
        """Keep a finished shard: first its numbers, then that it is finished.

        Args:
            key: What names it.
            data: Its bytes.
            about: How it came to be, as plain data.
        """
        found = checksum(data)
        file = f"{key}-{found[:16]}.parquet"
        said = {"key": key, "file": file, "sha256": found, "bytes": len(data), "about": dict(about)}
        self.objects.put(self.name("shards", file), data)
        self.objects.put(self.name("entries", f"{key}.json"), seal(ENTRY, said))
        self.damage.pop(key, None)
        return said

    def keep(self, key: str, data: bytes, ending: str = "npz") -> None:
        """Keep how far something has come, in place of what was kept under its name before.

        Args:
            key: What names it.
            data: Its bytes.
            ending: Of the file that they go into.
        """
        before, found = self._state(key), checksum(data)
        file = f"{key}-{found[:16]}.{ending}"
        self.objects.put(self.name("states", file), data)
        self.objects.put(self.name("states", f"{key}.json"), seal(STATE, {"key": key, "file": file, "sha256": found}))
        if before is not None and before["file"] != file:
            self.objects.delete(self.name("states", before["file"]))

    def recall(self, key: str) -> bytes | None:
        """Return what was kept under a name; None where nothing was, or it is torn, changed or missing."""
        said = self._state(key)
        data = None if said is None else self.objects.get(self.name("states", said["file"]))
        return data if said is not None and data is not None and checksum(data) == said["sha256"] else None

    def states(self) -> list[str]:
        """Return the names under which something is kept."""
        names = self.objects.names(self.name("states"))
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def _state(self, key: str) -> dict[str, Any] | None:
        said = unseal(STATE, self.objects.get(self.name("states", f"{key}.json")))
        return said if said is not None and said["key"] == key else None

    def keys(self) -> list[str]:
        """Return the keys of all shards that have an entry."""
        names = self.objects.names(self.name("entries"))
        return [name.removesuffix(".json") for name in names if name.endswith(".json")]

    def unclaimed(self) -> list[str]:
        """Return the files of shards that no entry names: copies, and what was written but never finished."""
        claimed = {said["file"] for said in map(self.entry, self.keys()) if said is not None}
        return [name for name in self.objects.names(self.name("shards")) if name not in claimed]

    def damaged(self) -> Iterator[tuple[str, str]]:
        """Read every shard, and yield those that are not as they were written, each with what is wrong."""
        for key in self.keys():
            self.damage.pop(key, None)
            if self.read(key) is None:
                yield key, self.damage.get(key, "its entry is gone")


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the keys in which two studies differ; those of steps by number."""
    keys = [key for key in one if key != "steps" and one[key] != other.get(key)]
    first, second = one["steps"], other.get("steps", [])
    keys += [f"steps.{n}" for n in range(max(len(first), len(second))) if first[n : n + 1] != second[n : n + 1]]
    return keys
