"""Measuring in processes of this machine: one per GPU, or several that share the CPU's cores.

1. Each worker opens the model once, then measures one shard after the other and stores them itself.
2. A worker has one shard at a time and gets the next when it has stored that, so none waits with it.
3. A worker that dies is replaced, and its shard goes to whoever is free next. A shard that ends three workers is an
   error: the fourth would not fare better.
4. A worker whose study is gone ends when it has stored its shard.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from causalpatch.base.errors import CausalPatchError, WorkerLost
from causalpatch.studies.executors import Done, measure_and_store
from causalpatch.studies.opened import open_models, using_threads
from causalpatch.studies.shards import Request
from causalpatch.studies.store import Store
from causalpatch.studies.study import ModelPart

MOST_DEATHS: Final = 3
_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


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
    """

    address: str
    run: str
    model: ModelPart
    folder: str
    device: str
    threads: int


@dataclass
class _Worker:
    """A process, the way to it, and what it is measuring."""

    process: Any
    way: Connection
    request: Request | None = None


@dataclass
class Processes:
    """Measures in processes.

    Args:
        posts: What each worker needs to know.
    """

    posts: list[Post]
    _deaths: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_workers = len(self.posts)
        self._context = multiprocessing.get_context("spawn")
        self._workers: list[_Worker | None] = [None] * len(self.posts)

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes that run."""
        return [worker.process.pid for worker in self._workers if worker is not None]

    def measure(self, requests: Iterable[Request]) -> Iterator[Done]:
        """Measure shards, and yield each when it is stored, in whatever order.

        Raises:
            WorkerLost: A shard ended three workers.
            CausalPatchError: What a worker met with.
        """
        coming, again = iter(requests), deque[Request]()
        is_over = False
        while True:
            for number in range(self.n_workers):
                if self._is_busy(number):
                    continue
                request = again.popleft() if again else None if is_over else next(coming, None)
                if request is None:
                    is_over = True
                    break
                self._hand(number, request)
            busy = [worker for worker in self._workers if worker is not None and worker.request is not None]
            if not busy:
                return
            for worker in self._that_answered(busy):
                answer, request = self._answer(worker), worker.request
                if request is None:
                    continue
                worker.request = None
                if answer is None:
                    again.append(self._buried(worker, request))
                elif isinstance(answer, BaseException):
                    raise answer
                else:
                    yield Done(request, answer)

    def close(self) -> None:
        """Let the workers go; what they are measuring is not waited for."""
        for worker in filter(None, self._workers):
            worker.way.close()
            worker.process.terminate()
        for worker in filter(None, self._workers):
            worker.process.join()
        self._workers = [None] * len(self.posts)

    def _is_busy(self, number: int) -> bool:
        worker = self._workers[number]
        return worker is not None and worker.request is not None

    def _hand(self, number: int, request: Request) -> None:
        """Give a shard to a worker, to a new one where the old one is dead."""
        worker = self._workers[number]
        if worker is None or not worker.process.is_alive():
            worker = self._start(number)
        worker.request = request
        try:
            worker.way.send(request)
        except OSError:
            # It died between two shards: the way is closed, and the next look at it says so.
            return

    def _start(self, number: int) -> _Worker:
        post = self.posts[number]
        here, there = self._context.Pipe()
        process = self._context.Process(target=work, args=(post, there), name=f"worker {number}", daemon=True)
        with _threads(post.threads):
            process.start()
        there.close()
        made = _Worker(process, here)
        self._workers[number] = made
        return made

    @staticmethod
    def _that_answered(busy: list[_Worker]) -> list[_Worker]:
        of_way: dict[Any, _Worker] = {worker.way: worker for worker in busy}
        return [of_way[way] for way in wait(list(of_way))]

    @staticmethod
    def _answer(worker: _Worker) -> Any:
        """Return the entry of a shard, or what the worker met with; None where it is dead."""
        try:
            return worker.way.recv()
        except (EOFError, OSError):
            return None

    def _buried(self, worker: _Worker, request: Request) -> Request:
        """Clear away a dead worker, and return its shard for another one.

        Raises:
            WorkerLost: It was the third that died of it.
        """
        worker.way.close()
        worker.process.join()
        self._workers[self._workers.index(worker)] = None
        deaths = self._deaths[request.key] = self._deaths.get(request.key, 0) + 1
        if deaths >= MOST_DEATHS:
            raise WorkerLost(
                f"shard {request.key} ended {deaths} workers, one after the other",
                facts=[
                    ("shard", f"{request.work.n_cells:,} cells on {len(request.pairs):,} pairs"),
                    ("last exit", _exit_words(worker.process.exitcode)),
                ],
                fix="measure less at once: --set shards.runs=1000, or --set budget.gib=1",
            )
        return request


def work(post: Post, way: Connection) -> None:
    """Be a worker: open the model, then measure shards until nobody asks for more.

    Args:
        post: What to know.
        way: Shards come by it, and entries go.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the study decides
    try:
        with using_threads(post.threads):
            model, source_model = open_models(post.model, post.device, post.folder)
            run = Store(post.address).run_of_hash(post.run)
            while True:
                request = way.recv()
                way.send(measure_and_store(run, request, model, source_model, post.threads))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return
    except CausalPatchError as error:
        way.send(error)


@contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    """Let a process that is started now have so many threads, before its libraries make their own."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, str(n_threads)))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _exit_words(code: int | None) -> str:
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}" + (" (memory?)" if code == -signal.SIGKILL else "")
    return str(code)
