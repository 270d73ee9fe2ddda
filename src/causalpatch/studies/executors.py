"""Who measures shards: the seam between what a study asks for and the machines that do it.

An executor takes shards when it has hands free, so that no more are waiting than there are hands (back-pressure), and
gives each back when it is stored. Whoever measured it has stored it himself: what comes back is small, and nothing is
lost where the one that asked is gone by then.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from causalpatch.models import Model
from causalpatch.studies.shards import Request, encode
from causalpatch.studies.store import Run


@dataclass(frozen=True)
class Done:
    """A shard that was measured and stored.

    Args:
        request: What it is of.
        entry: What the store keeps of it.
    """

    request: Request
    entry: dict[str, Any]


@runtime_checkable
class Executor(Protocol):
    """Measures shards and stores them."""

    n_workers: int
    """How many shards are measured at once."""

    def measure(self, requests: Iterable[Request]) -> Iterator[Done]:
        """Measure shards, and yield each when it is stored, in whatever order.

        Args:
            requests: Taken one by one, each when there is someone to measure it.
        """

    def close(self) -> None:
        """Let the workers go."""


@dataclass
class Local:
    """Measures in this process, one shard after the other.

    Args:
        run: Where shards are stored.
        model: The model.
        source_model: The one of the source runs, where this is another.
        threads: CPU threads, for the record.
    """

    run: Run
    model: Model
    source_model: Model | None
    threads: int

    n_workers = 1

    def measure(self, requests: Iterable[Request]) -> Iterator[Done]:
        """Measure shards, and yield each when it is stored."""
        for request in requests:
            yield Done(request, measure_and_store(self.run, request, self.model, self.source_model, self.threads))

    def close(self) -> None:
        """Nothing has to be let go."""


def measure_and_store(
    run: Run, request: Request, model: Model, source_model: Model | None, threads: int
) -> dict[str, Any]:
    """Measure a shard, store it, and return its entry.

    Args:
        run: Where it is stored.
        request: What it is of.
        model: The model.
        source_model: The one of the source runs, where this is another.
        threads: CPU threads that measure.

    Raises:
        StoreFull: There is no room for it.
    """
    found = request.measure(model, source_model)
    record = {**found.record, "device": str(model.device), "threads": threads}
    data = encode(request.key, found, request.setting.metrics)
    return run.write(request.key, data, {"record": record, "runs": request.n_runs})
