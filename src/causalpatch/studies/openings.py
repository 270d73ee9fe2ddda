"""The ledger of a store: which held-out pairs have shown their effects in it, to whom, in which model.

A step that confirms is one claim: where the study is stopped between the opening and the claim, and run again, the same
step of the same run goes on with it. Any other claim on these pairs is one on pairs that were opened.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from causalpatch.base.errors import StoreCorrupt
from causalpatch.base.spec import content_hash
from causalpatch.studies.sealed import seal, unseal
from causalpatch.studies.store import Run
from causalpatch.validation.ledger import FORMAT, Ledger

_FOLDER = "openings"


class StoreLedger(Ledger):
    """The openings in a store, as one step of one run sees them.

    Args:
        run: The run.
        step: The step that confirms.
    """

    def __init__(self, run: Run, step: str) -> None:
        self._objects = run.objects
        self._by = {"run": run.hash, "step": step}
        self.place = f"{run.store.address}/{_FOLDER}"

    def _append(self, record: Mapping[str, Any]) -> None:
        held = {name: value for name, value in record.items() if name not in ("format", "opened")}
        name = f"{_FOLDER}/{content_hash({**held, **self._by})}.json"
        self._objects.put_new(name, seal(FORMAT, {**record, **self._by}))

    def _records(self) -> Iterator[Mapping[str, Any]]:
        for name in self._objects.names(_FOLDER):
            record = unseal(FORMAT, self._objects.get(f"{_FOLDER}/{name}"))
            if record is None:
                raise StoreCorrupt(
                    f"an opening of held-out pairs cannot be read: '{self.place}/{name}'",
                    facts=[("needed", f"JSON with the seal of a {FORMAT}")],
                    fix="bring it back from a copy: without the ledger nothing can be confirmed",
                )
            if {key: record.get(key) for key in self._by} != self._by:
                yield record


def openings(run: Run) -> list[dict[str, Any]]:
    """Return the openings that a run made, oldest first."""
    found = (unseal(FORMAT, run.objects.get(f"{_FOLDER}/{name}")) for name in run.objects.names(_FOLDER))
    mine = [each for each in found if each is not None and each.get("run") == run.hash]
    return sorted(mine, key=lambda each: json.dumps([each["opened"], each["step"]]))
