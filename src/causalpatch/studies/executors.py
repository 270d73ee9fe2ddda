"""Who measures shards: the seam between what a study asks for and the machines that do it.

An executor takes shards when it has hands free, so that few are waiting (back-pressure), and gives each back when it is
stored. Whoever measured it has stored it himself: what comes back is small, and nothing is lost where the one that
asked is gone by then.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from causalpatch.engine import Remembered
from causalpatch.models import Model
from causalpatch.studies.opened import open_models
from causalpatch.studies.shards import Request, encode
from causalpatch.studies.store import Run, Store
from causalpatch.studies.study import ModelPart


@runtime_checkable
class Asked(Protocol):
    """What those who give shards out have to know of one; a ``Request`` is one."""

    @property
    def key(self) -> str:
        """What names it."""

    @property
    def group(self) -> str:
        """What shards have in common whose untouched runs are the same."""

    @property
    def n_runs(self) -> int:
        """Patched runs."""

    @property
    def words(self) -> str:
        """How large it is, in words."""


@dataclass(frozen=True)
class Done:
    """A shard that was measured and stored.

    Args:
        request: What it is of.
        entry: What the store keeps of it.
    """

    request: Asked
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


@dataclass(frozen=True)
class Post:
    """What a worker needs to know before its first shard.

    Args:
        address: The store.
        run: Hash of the run.
        model: The model.
        folder: The study's folder, for paths.
        device: Where it measures.
        threads: CPU threads.
        device_map: How a model is spread over several devices; None has it on one.
    """

    address: str
    run: str
    model: ModelPart
    folder: str
    device: str
    threads: int
    device_map: str | None = None


@dataclass
class Bench:
    """Where shards are measured: a model that was opened once, and the untouched runs of the pairs that came last.

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
    _remembered: Remembered = field(default_factory=Remembered)

    @classmethod
    def open(cls, post: Post) -> "Bench":
        """Open what a worker needs."""
        models = open_models(post.model, post.device, post.folder, post.device_map)
        return cls(Store(post.address).run_of_hash(post.run), *models, post.threads)

    def measure_and_store(self, request: Request) -> dict[str, Any]:
        """Measure a shard, store it, and return its entry; one that is stored by then stays as it is.

        Args:
            request: What it is of.

        Raises:
            StoreFull: There is no room for it.
        """
        found = request.measure(self.model, self.source_model, self._remembered)
        there = self.run.read(request.key)  # another worker may have been given it, too, and was first
        if there is not None:
            return there[1]
        record = {**found.record, "device": str(self.model.device), "threads": self.threads}
        data = encode(request.key, found, request.setting.metrics)
        return self.run.write(request.key, data, {"record": record, "runs": request.n_runs})


class Local:
    """Measures in this process, one shard after the other.

    Args:
        bench: Where it does.
    """

    n_workers = 1

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def measure(self, requests: Iterable[Request]) -> Iterator[Done]:
        """Measure shards, and yield each when it is stored."""
        for request in requests:
            yield Done(request, self.bench.measure_and_store(request))

    def close(self) -> None:
        """Nothing has to be let go."""
