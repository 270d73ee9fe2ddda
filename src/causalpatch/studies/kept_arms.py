"""Finished arms of a comparison in the store, so that a tuning that was stopped does not train them again."""

import json
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from causalpatch.studies.journal import Journal
from causalpatch.studies.store import Run


@dataclass(frozen=True)
class KeptArms(MutableMapping[str, Any]):
    """Plain data by names that say all that it depends on, as ``compare_tuning`` keeps it.

    Args:
        run: Where it is kept.
        journal: What is told.
    """

    run: Run
    journal: Journal

    def __getitem__(self, key: str) -> Any:
        data = self.run.recall(key)
        if data is None:
            raise KeyError(key)
        self.journal.tell("recalled", what=key)
        return json.loads(data)

    def __setitem__(self, key: str, value: Any) -> None:
        self.run.keep(key, json.dumps(value).encode(), "txt")
        self.journal.tell("kept", what=key)

    def __delitem__(self, key: str) -> None:
        raise KeyError(key)  # what is finished stays

    def __iter__(self) -> Iterator[str]:
        return iter(self.run.states())

    def __len__(self) -> int:
        return len(self.run.states())
