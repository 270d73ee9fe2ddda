"""Measuring on a Ray cluster, or by Ray's workers on this machine: an actor per worker, each with a model of its own.

1. Ray is started here (``local``) or joined (``auto``, ``HOST:PORT``, ``ray://…``); a connection that this process has
   already is used and left as it is.
2. Each worker is an actor with the CPUs and GPUs that the study says. It opens the model once, measures one shard after
   the other, and stores them itself: what travels is a request there and a small entry back.
3. Who measures what is said by ``scheduling``. Ray restarts no actor and repeats no call: a worker that dies is news.

The store must be one that every machine reaches, and the study's files must be on each of them.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from causalpatch.base.errors import CausalPatchError, ClusterUnreachable
from causalpatch.base.extras import lazy, require
from causalpatch.studies.executors import Bench, Post
from causalpatch.studies.opened import n_cores, using_threads
from causalpatch.studies.scheduling import Gone, News, Ready, Refused, Stored
from causalpatch.studies.shards import Request
from causalpatch.studies.study import ExecutorPart

if TYPE_CHECKING:
    import ray
else:
    ray = lazy("ray")

_CALLED: Final = 120  # letters of what Ray says that are shown


class Worker:
    """What an actor does."""

    def __init__(self) -> None:
        self._bench: Bench | None = None
        self._threads = 1

    def open(self, post: Post) -> int | CausalPatchError:
        """Open the model; return the number of the actor's process, or what stands against it."""
        self._threads = post.threads
        try:
            with using_threads(self._threads):
                self._bench = Bench.open(post)
        except CausalPatchError as error:
            return error
        return os.getpid()

    def measure(self, request: Request) -> dict[str, Any] | CausalPatchError:
        """Measure a shard and store it; return its entry, or what stands against it."""
        try:
            with using_threads(self._threads):
                return self._bench.measure_and_store(request) if self._bench else {}
        except CausalPatchError as error:
            return error


@dataclass
class _Actor:
    """A worker's actor, what it was asked for, and its process once it has said so."""

    handle: Any
    asked: Any
    pid: int | None = None


@dataclass
class Cluster:
    """A crew of Ray's actors.

    Args:
        part: What the study says of them.
        post: What each needs to know; device and device map are filled in.

    Raises:
        MissingExtra: Ray is not installed.
        ClusterUnreachable: The cluster does not answer, or has no room for one worker.
    """

    part: ExecutorPart
    post: Post
    _actors: dict[int, _Actor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require("ray")
        self._is_own = not ray.is_initialized()
        if self._is_own:
            _join(self.part)
        try:
            there = ray.cluster_resources()
            self._cpus, self._gpus = self.part.cpus_per_worker, self._gpus_of(there)
            fitting = [int(there.get("CPU", 0) / self._cpus)]
            fitting += [int(there.get("GPU", 0) / self._gpus)] if self._gpus else []
            self.n_workers = self.part.workers or max(1, min(fitting))
            if self.part.address == "local" and not min(fitting):
                raise _no_room(self._cpus, self._gpus, there)
        except BaseException:
            self.close()
            raise
        spread = self.part.device_map
        self._post = replace(self.post, device="cuda", device_map=spread) if self._gpus else self.post
        self._kind = ray.remote(num_cpus=self._cpus, num_gpus=self._gpus, max_restarts=0, max_task_retries=0)(Worker)

    @property
    def pids(self) -> list[int]:
        """Numbers of the workers' processes, each on its own machine, of those that are ready."""
        return [actor.pid for actor in self._actors.values() if actor.pid is not None]

    def start(self, worker: int) -> None:
        """Start a worker, as soon as the cluster has room for it."""
        handle = self._kind.remote()
        self._actors[worker] = _Actor(handle, handle.open.remote(self._post))

    def hand(self, worker: int, request: Request) -> None:
        """Give a shard to a worker."""
        actor = self._actors[worker]
        actor.asked = actor.handle.measure.remote(request)

    def news(self, timeout_s: float | None) -> list[News]:
        """Return what workers answered, and which of them died."""
        number_of = {actor.asked: number for number, actor in self._actors.items() if actor.asked is not None}
        if not number_of:
            return []
        waiting = list(number_of)
        found, rest = ray.wait(waiting, num_returns=1, timeout=timeout_s)
        if found and rest:
            found += ray.wait(rest, num_returns=len(rest), timeout=0)[0]
        return [self._hear(number_of[each]) for each in found]

    def end(self, worker: int) -> None:
        """End a worker."""
        handle = self._actors.pop(worker).handle
        if ray.is_initialized():  # else it has ended with the cluster, and asking would start another one
            ray.kill(handle)

    def close(self) -> None:
        """End all workers, and leave the cluster, or stop what was started here."""
        for worker in list(self._actors):
            self.end(worker)
        if self._is_own and ray.is_initialized():
            ray.shutdown()

    def _gpus_of(self, there: dict[str, float]) -> float:
        """Return how many GPUs a worker has."""
        if self.part.device == "cpu":
            return 0
        if self.part.gpus_per_worker is not None:
            return self.part.gpus_per_worker
        return float(there.get("GPU", 0) > 0)

    def _hear(self, number: int) -> News:
        """Return what a worker answered; one that is dead, or met with what it should not, is cleared away."""
        actor = self._actors[number]
        asked, actor.asked = actor.asked, None
        try:
            said = ray.get(asked)
        except (ray.exceptions.RayError, OSError) as error:
            # A worker that failed in an unforeseen way is taken for dead, as a process is that ends with a traceback.
            self.end(number)
            return Gone(number, _short(error))
        if isinstance(said, int):
            actor.pid = said
            return Ready(number)
        if isinstance(said, dict):
            return Stored(number, said)
        self.end(number)
        return Refused(number, said)


def _join(part: ExecutorPart) -> None:
    """Start Ray on this machine, or join a cluster.

    Raises:
        ClusterUnreachable: It does not answer.
    """
    how: dict[str, Any] = {"address": part.address, "log_to_driver": False, "logging_level": "error"}
    if part.address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone of what is run here
        how |= {"include_dashboard": False, "num_cpus": max(n_cores(), int((part.workers or 1) * part.cpus_per_worker))}
    try:
        with _own_signals():
            ray.init(**how)
    except (OSError, RuntimeError, ValueError, ImportError) as error:
        is_here = part.address == "local"
        raise ClusterUnreachable(
            "Ray does not start on this machine" if is_here else f"no Ray cluster answers at '{part.address}'",
            facts=[("error", f"{type(error).__name__}: {_short(error)}")],
            fix="--set executor.kind=processes"
            if is_here
            else "ray start --head there, or --set executor.address=local",
        ) from error


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep what this process does when it is told to end: ``ray.init`` puts its own in place of it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _no_room(cpus: float, gpus: float, there: dict[str, float]) -> ClusterUnreachable:
    return ClusterUnreachable(
        "this machine has no room for a worker",
        facts=[
            ("a worker", f"{cpus:g} CPUs, {gpus:g} GPUs"),
            ("there are", f"{there.get('CPU', 0):g} CPUs, {there.get('GPU', 0):g} GPUs"),
        ],
        fix="ask for less: --set executor.gpus_per_worker=0, or --set executor.cpus_per_worker=1",
    )


def _short(error: BaseException) -> str:
    said = " ".join(str(error).split())
    return said if len(said) <= _CALLED else f"{said[:_CALLED]}…"
