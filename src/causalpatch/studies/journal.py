"""What happened in a run, a JSON object a line: for programs to read, and for a person with ``--verbose``.

A line has ``event``, ``at`` (UTC; no decision ever reads it), ``after_s`` by a steady clock, and what belongs to the
event. In a folder lines are added as they come; in an object store, which has no adding, they are written again as a
whole now and then, and at the end.
"""

import json
import os
import platform
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from causalpatch.base.errors import StoreFull, StoreUnreachable
from causalpatch.base.spec import to_plain
from causalpatch.results.provenance import describe_program
from causalpatch.studies.sealed import seal
from causalpatch.studies.store import SESSION, Run

_EVERY_S: Final = 15.0  # between two writings of the whole log into an object store
_KEPT: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "PYTORCH_CUDA_ALLOC_CONF")

Listener = Callable[[Mapping[str, Any]], None]


@dataclass
class Journal:
    """The log of one session of a run.

    Args:
        run: The run.
        listeners: Who else is told, such as what shows progress.
    """

    run: Run
    listeners: tuple[Listener, ...] = ()

    def __post_init__(self) -> None:
        before = [name.partition("-")[0] for name in self.run.sessions()]
        number = 1 + max((int(each) for each in before if each.isdigit()), default=0)
        self.session = f"{number:05d}-{uuid.uuid4().hex[:8]}"
        self._started = self._written = time.monotonic()
        self._lines: list[str] = []

    @property
    def name(self) -> str:
        """Name of the log in the store."""
        return self.run.name("logs", f"{self.session}.jsonl")

    def open(self, environment: Mapping[str, Any]) -> None:
        """Note where and with what the session runs.

        Args:
            environment: Device, workers and threads.
        """
        where = describe_environment() | dict(environment)
        self.run.objects.put(self.run.name("sessions", f"{self.session}.json"), seal(SESSION, where))
        self.tell("session", **where)

    def tell(self, event: str, **facts: Any) -> None:
        """Write a line.

        Args:
            event: What happened.
            facts: What belongs to it, as plain data.
        """
        after = round(time.monotonic() - self._started, 3)
        line = {"event": event, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), "after_s": after}
        line |= to_plain(facts)
        self._lines.append(json.dumps(line, ensure_ascii=False))
        path = self.run.objects.path(self.name)
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                with path.open("a", encoding="utf-8") as file:
                    file.write(self._lines[-1] + "\n")
            except OSError:
                pass  # a log that cannot be written stops no run; a shard that cannot will
        elif time.monotonic() - self._written > _EVERY_S:
            self._write()
        for listener in self.listeners:
            listener(line)

    def close(self) -> None:
        """Write what is not written yet."""
        if self.run.objects.path(self.name) is None:
            try:
                self._write()
            except (StoreFull, StoreUnreachable):
                return  # the run itself has said so

    def _write(self) -> None:
        self._written = time.monotonic()
        self.run.objects.put(self.name, ("\n".join(self._lines) + "\n").encode())


def describe_environment() -> dict[str, Any]:
    """Return the machine, its settings and the versions of what computes, as plain data."""
    return {
        "program": describe_program(),
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "process": os.getpid(),
        },
        "variables": {name: os.environ[name] for name in _KEPT if name in os.environ},
    }
