"""Which worker measures which shard: one set of rules for processes, for Ray, and for workers that are simulated.

1. Shards are taken from the study one by one. No more than two for each worker are taken and not stored yet
   (back-pressure); of these one waits, its lease taken, so that a worker that is free gets it at once.
2. A worker is started when a shard waits that nobody else will take, and gets one when it has opened the model. Of
   those that wait it gets one of the pairs that it had last, whose untouched runs it still holds; else one of pairs
   that nobody has; else the first.
3. Where nothing waits and a shard takes much longer than its like, a worker that is free measures it too (a straggler).
   The first to store it is taken; both store the same bytes under the same name. The other is ended when it takes twice
   as long as that and something waits.
4. A worker that dies is replaced, and its shard is next. A shard that ends three workers is an error: the fourth would
   not fare better. So is a worker that ends three times before it has opened the model.

The clock is handed in, so that a simulation goes by these very rules.
"""

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol, TypeAlias, runtime_checkable

from causalpatch.base.errors import WorkerLost
from causalpatch.studies.executors import Asked, Done

MOST_DEATHS: Final = 3
TAKEN: Final = 2
"""Shards that are taken and not stored yet, for each worker."""
LONG: Final = 3.0
"""How many times as long as its like a shard takes that is measured a second time: shards of early layers have up to
twice the work of the average one."""
LEAST_S: Final = 2.0
"""No shard is measured a second time before that."""
_LIKE: Final = 999  # of how many shards, the last ones, the time of the like is taken


@dataclass(frozen=True)
class Ready:
    """A worker has opened the model.

    Args:
        worker: Its number.
    """

    worker: int


@dataclass(frozen=True)
class Stored:
    """A worker has stored its shard.

    Args:
        worker: Its number.
        entry: What the store keeps of it.
    """

    worker: int
    entry: dict[str, Any]


@dataclass(frozen=True)
class Refused:
    """A worker met with something that the study has to know, and has ended.

    Args:
        worker: Its number.
        error: What it met with.
    """

    worker: int
    error: BaseException


@dataclass(frozen=True)
class Gone:
    """A worker died.

    Args:
        worker: Its number.
        words: How, as far as that is known.
    """

    worker: int
    words: str


News: TypeAlias = Ready | Stored | Refused | Gone


@runtime_checkable
class Crew(Protocol):
    """Workers, by number, and the ways to them."""

    n_workers: int
    """How many there may be."""

    def start(self, worker: int) -> None:
        """Start a worker that is not there; news of it comes when it has opened the model."""

    def hand(self, worker: int, request: Any) -> None:
        """Give a shard to a worker that is free."""

    def news(self, timeout_s: float | None) -> Sequence[News]:
        """Return what happened, waiting for it so long at most; None waits for as long as it takes."""

    def end(self, worker: int) -> None:
        """End a worker, whatever it does; no news of it comes any more."""

    def close(self) -> None:
        """End all workers, and leave what was joined."""


@dataclass(eq=False)
class _Task:
    """A shard that was taken.

    Args:
        request: What it is of.
        since: When each worker that measures it began.
        deaths: How many workers it has ended.
        is_open: Nobody has stored it yet.
        limit_s: After how long it was given to a second worker.
    """

    request: Asked
    since: dict[int, float] = field(default_factory=dict)
    deaths: int = 0
    is_open: bool = True
    limit_s: float = float("inf")


@dataclass
class _Worker:
    """What is known of a worker."""

    state: Literal["away", "starting", "free", "busy"] = "away"
    task: _Task | None = None
    group: str = ""
    failures: int = 0


class Crewed:
    """Lets a crew measure.

    Args:
        crew: The workers.
        clock: A steady clock, in seconds.
    """

    def __init__(self, crew: Crew, clock: Callable[[], float] = time.monotonic) -> None:
        self.crew, self.clock = crew, clock
        self.n_workers = crew.n_workers
        self._workers = [_Worker() for _ in range(crew.n_workers)]
        self._free: dict[int, None] = {}  # in the order in which they became so
        self._away: dict[int, None] = dict.fromkeys(range(crew.n_workers))
        self._n_starting = 0
        self._behind: dict[int, _Task] = {}  # workers with shards that another one has stored
        self._holders: Counter[str] = Counter()  # how many workers hold the untouched runs of which pairs
        self._taken: dict[_Task, None] = {}
        self._waiting: dict[str, deque[_Task]] = {}  # by their pairs, those that are next first
        self._n_waiting = 0
        self._pace: deque[float] = deque(maxlen=_LIKE)  # seconds a run, of the shards of this call
        self.n_second = 0
        """How many shards were given to a second worker."""

    def measure(self, requests: Iterable[Asked]) -> Iterator[Done]:
        """Measure shards, and yield each when it is stored, in whatever order.

        Raises:
            WorkerLost: A shard ended three workers, or a worker ends before it has opened the model.
            CausalPatchError: What a worker met with.
        """
        coming = iter(requests)
        self._forget()
        has_more = True
        while has_more or self._taken:
            if has_more and len(self._taken) < TAKEN * self.n_workers:
                request = next(coming, None)
                has_more = request is not None
                if request is not None:
                    self._take(request)
            self._assign()
            if not self._taken:
                continue
            can_take = has_more and len(self._taken) < TAKEN * self.n_workers
            heard = [self._hear(news) for news in self.crew.news(0.0 if can_take else self._patience())]
            self._assign()  # before anyone looks at what was stored: no worker shall wait for that
            yield from (done for done in heard if done is not None)

    def close(self) -> None:
        """Let the workers go; what they are measuring is not waited for."""
        self.crew.close()
        self._workers = [_Worker() for _ in self._workers]
        self._free, self._away, self._n_starting = {}, dict.fromkeys(range(self.n_workers)), 0
        self._holders.clear()
        self._behind.clear()
        self._forget()

    def _forget(self) -> None:
        """Leave what an earlier call asked for and did not wait for; nobody listens to who still measures it."""
        for task in self._taken:
            self._settle(task)
        self._taken, self._waiting, self._n_waiting = {}, {}, 0
        self._pace.clear()

    def _take(self, request: Asked) -> None:
        task = _Task(request)
        self._taken[task] = None
        self._waiting.setdefault(request.group, deque()).append(task)
        self._n_waiting += 1

    def _assign(self) -> None:
        """Give out what there is to give, and start workers for what nobody will take."""
        for worker in list(self._free):
            task = self._next_for(worker) or self._late()
            if task is None:
                break
            self._give(worker, task)
        if not self._waiting:
            return
        self._end_the_slower()
        while self._away and self._n_starting < self._n_waiting:
            worker = min(self._away)
            self._become(worker, "starting")
            self.crew.start(worker)

    def _next_for(self, worker: int) -> _Task | None:
        """Take the shard out of those that wait that suits a worker best."""
        if not self._waiting:
            return None
        group = self._workers[worker].group
        if group not in self._waiting:
            of_nobody = (each for each in self._waiting if not self._holders[each])
            group = next(of_nobody, next(iter(self._waiting)))
        tasks = self._waiting[group]
        task = tasks.popleft()
        self._n_waiting -= 1
        if not tasks:
            del self._waiting[group]
        return task

    def _late(self) -> _Task | None:
        """Return a shard that takes much longer than its like and that one worker alone measures."""
        first = min(self._late_times(), key=lambda each: each[0], default=None)
        if first is None or first[0] > self.clock():
            return None
        return first[1]

    def _late_times(self) -> Iterator[tuple[float, _Task]]:
        """Yield shards that one worker alone measures, and when each has taken much longer than its like."""
        if not self._pace:
            return
        typical = statistics.median(self._pace)
        for task in self._taken:
            if len(task.since) == 1:
                (since,) = task.since.values()
                yield since + max(LEAST_S, LONG * typical * task.request.n_runs), task

    def _give(self, worker: int, task: _Task) -> None:
        if task.since:
            (since,) = task.since.values()
            task.limit_s = self.clock() - since
            self.n_second += 1
        task.since[worker] = self.clock()
        held = self._workers[worker]
        self._holders[held.group] -= 1
        held.task, held.group = task, task.request.group
        self._holders[held.group] += 1
        self._become(worker, "busy")
        self.crew.hand(worker, task.request)

    def _end_the_slower(self) -> None:
        """End workers that are far behind with what another one has stored, since something waits."""
        now = self.clock()
        for worker in [worker for worker, task in self._behind.items() if now >= _end_of(worker, task)]:
            self.crew.end(worker)
            self._leave(worker)

    def _patience(self) -> float | None:
        """Return how long to wait for news until something is to be done without any."""
        if self._waiting:
            times = [_end_of(worker, task) for worker, task in self._behind.items()]
        elif self._free:
            times = [late_at for late_at, _ in self._late_times()]
        else:
            times = []
        first = min(times, default=float("inf"))
        return None if first == float("inf") else max(0.0, first - self.clock())

    def _hear(self, news: News) -> Done | None:
        """Take note of news; return the shard that is stored now and was not before."""
        worker = self._workers[news.worker]
        task = worker.task
        if isinstance(news, Ready):
            worker.failures = 0
            self._become(news.worker, "free")
        elif isinstance(news, Stored):
            self._become(news.worker, "free")
            if task is not None and task.is_open:
                self._pace.append((self.clock() - task.since[news.worker]) / max(1, task.request.n_runs))
                del self._taken[task]
                self._settle(task)
                return Done(task.request, news.entry)
        else:
            was_starting = worker.state == "starting"
            self._leave(news.worker)
            if isinstance(news, Refused):
                if task is None or task.is_open:
                    raise news.error
            elif was_starting:
                self._count_start(news)
            elif task is not None and task.is_open:
                self._count_death(task, news)
        return None

    def _settle(self, task: _Task) -> None:
        """Take note that a shard need not be measured any more; whoever still does is behind."""
        task.is_open = False
        self._behind |= {worker: task for worker in task.since if self._workers[worker].task is task}

    def _count_start(self, news: Gone) -> None:
        """Take note that a worker died before it was ready.

        Raises:
            WorkerLost: It was the third time.
        """
        worker = self._workers[news.worker]
        worker.failures += 1
        if worker.failures >= MOST_DEATHS:
            raise WorkerLost(
                f"worker {news.worker} ended {worker.failures} times before it had opened the model",
                facts=[("last exit", news.words)],
                fix="see whether the model opens here: --set executor.kind=local",
            )

    def _count_death(self, task: _Task, news: Gone) -> None:
        """Take note that a worker died of a shard, which is next for another one unless one has it already.

        Raises:
            WorkerLost: It was the third that died of it.
        """
        task.since.pop(news.worker, None)
        task.deaths += 1
        if task.deaths >= MOST_DEATHS:
            raise WorkerLost(
                f"shard {task.request.key} ended {task.deaths} workers, one after the other",
                facts=[("shard", task.request.words), ("last exit", news.words)],
                fix="measure less at once: --set shards.runs=1000, or --set budget.gib=1",
            )
        if not task.since:
            group = task.request.group
            self._waiting = {group: deque([task, *self._waiting.pop(group, ())]), **self._waiting}
            self._n_waiting += 1

    def _leave(self, worker: int) -> None:
        """Take note that a worker is not there any more."""
        held = self._workers[worker]
        self._holders[held.group] -= 1
        held.group = ""
        self._become(worker, "away")

    def _become(self, worker: int, state: Literal["away", "starting", "free", "busy"]) -> None:
        held = self._workers[worker]
        self._n_starting += (state == "starting") - (held.state == "starting")
        for state_of, workers in (("free", self._free), ("away", self._away)):
            workers.pop(worker, None)
            if state == state_of:
                workers[worker] = None
        if state != "busy":
            held.task = None
            self._behind.pop(worker, None)
        held.state = state


def _end_of(worker: int, task: _Task) -> float:
    """Return when a worker is ended whose shard another one has stored."""
    return task.since[worker] + 2 * task.limit_s
