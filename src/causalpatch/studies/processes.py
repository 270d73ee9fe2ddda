"""Measuring in processes of this machine: one per GPU, or several that share the CPU's cores.

1. Each worker opens the model once, says so, then measures one shard after the other and stores them itself.
2. Who measures what is said by ``scheduling``; here are the processes and the pipes to them.
3. A worker whose study is gone ends when it has stored its shard.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from causalpatch.base.errors import CausalPatchError
from causalpatch.studies.executors import Bench, Post
from causalpatch.studies.opened import using_threads
from causalpatch.studies.scheduling import Gone, News, Ready, Refused, Stored
from causalpatch.studies.shards import Request

_THREADS: Final = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_READY: Final = "ready"


@dataclass(frozen=True)
class _Worker:
    """A process, and the way to it."""

    process: Any
    way: Connection


@dataclass
class Processes:
    """A crew of processes.

    Args:
        posts: What each worker needs to know.
    """

    posts: list[Post]
    _workers: dict[int, _Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_workers = len(self.posts)
        self._context = multiprocessing.get_context("spawn")

    @property
    def pids(self) -> list[int]:
        """Numbers of the processes that run."""
        return [worker.process.pid for worker in self._workers.values()]

    def start(self, worker: int) -> None:
        """Start a worker."""
        post = self.posts[worker]
        here, there = self._context.Pipe()
        process = self._context.Process(target=work, args=(post, there), name=f"worker {worker}", daemon=True)
        with _threads(post.threads):
            process.start()
        there.close()
        self._workers[worker] = _Worker(process, here)

    def hand(self, worker: int, request: Request) -> None:
        """Give a shard to a worker."""
        try:
            self._workers[worker].way.send(request)
        except OSError:
            # It died between two shards: the way is closed, and the next look at it says so.
            return

    def news(self, timeout_s: float | None) -> list[News]:
        """Return what workers said, and which of them died."""
        number_of: dict[Any, int] = {worker.way: number for number, worker in self._workers.items()}
        return [self._hear(number_of[way]) for way in wait(list(number_of), timeout_s)]

    def end(self, worker: int) -> None:
        """End a worker."""
        ended = self._workers.pop(worker)
        ended.way.close()
        ended.process.kill()
        ended.process.join()

    def close(self) -> None:
        """End all workers; what they are measuring is not waited for."""
        for worker in self._workers.values():
            worker.way.close()
            worker.process.terminate()
        for worker in self._workers.values():
            worker.process.join()
        self._workers = {}

    def _hear(self, number: int) -> News:
        """Return what a worker said; one that is dead is cleared away."""
        worker = self._workers[number]
        try:
            said = worker.way.recv()
        except (EOFError, OSError):
            said = None
        if said == _READY:
            return Ready(number)
        if isinstance(said, dict):
            return Stored(number, said)
        del self._workers[number]
        worker.way.close()
        worker.process.join()
        return Refused(number, said) if said is not None else Gone(number, _exit_words(worker.process.exitcode))


def work(post: Post, way: Connection) -> None:
    """Be a worker: open the model, then measure shards until nobody asks for more.

    Args:
        post: What to know.
        way: Shards come by it, and entries go.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; the study decides
    try:
        with using_threads(post.threads):
            bench = Bench.open(post)
            way.send(_READY)
            while True:
                way.send(bench.measure_and_store(way.recv()))
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
