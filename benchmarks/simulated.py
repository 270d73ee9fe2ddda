"""A cluster that is simulated: the library's own scheduling, on workers and a clock that are not real.

1. ``Crewed`` (``causalpatch.studies.scheduling``) is the real class, with all its rules: two shards for each worker
   taken, the next one handed out before the last is looked at, second copies of stragglers, replaced workers.
2. Its crew is simulated. A worker opens the model, then each shard takes as long as one that was measured, drawn with
   replacement; it may be slow, hang or die. What will happen stands in a heap by its time.
3. The study's own process is one queue, as it is: taking a shard (its lease, a look into the store) and settling it
   (reading it back, giving the lease back) take the time that was measured, and nobody is heard meanwhile.
4. Time moves on by the study's own work, and to the next event where it waits for one.

Not simulated: a network or a store that gets slower the more ask at once.
"""

import heapq
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from causalpatch.studies.scheduling import Crewed, Gone, News, Ready, Stored


@dataclass(frozen=True)
class Measured:
    """Seconds that were measured.

    Args:
        loads: From the start of a worker until it has opened the model.
        shards: From handing a shard over until it is said to be stored.
        takes: Taking a shard, in the study's own process.
        settles: Settling a shard, likewise.
    """

    loads: tuple[float, ...]
    shards: tuple[float, ...]
    takes: tuple[float, ...]
    settles: tuple[float, ...]


@dataclass(frozen=True)
class World:
    """What is simulated.

    Args:
        n_workers: Workers.
        n_shards: Shards.
        size: Work in a shard, times that of a measured one.
        load_s: Seconds to open the model; None takes what was measured. Each takes up to half as long again.
        deaths_per_hour: How often a worker dies, on average.
        replaced_s: Seconds until a dead one's successor is there and begins to open the model.
        slow: Share of shards that take ``slower`` times as long.
        slower: How much longer.
        hanging: Share of shards that never end where they were begun.
        seed: Of all draws.
    """

    n_workers: int
    n_shards: int
    size: float = 1.0
    load_s: float | None = None
    deaths_per_hour: float = 0.0
    replaced_s: float = 0.0
    slow: float = 0.0
    slower: float = 1.0
    hanging: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a simulation gave.

    Args:
        seconds: From the start to the last shard settled.
        ideal_s: What it would take if all workers only measured, all the time.
        own_s: Seconds in which the study's own process had something to do.
        n_deaths: Workers that died.
        n_second: Shards that were given to a second worker.
    """

    seconds: float
    ideal_s: float
    own_s: float
    n_deaths: int
    n_second: int

    @property
    def efficiency(self) -> float:
        """Share of all workers' time that measured what counts."""
        return self.ideal_s / self.seconds


@dataclass(frozen=True)
class Shard:
    """A shard that is no more than its name."""

    key: str
    group: str
    n_runs: int = 1
    words: str = "one"


@dataclass
class SimulatedCrew:
    """Workers that are not there."""

    measured: Measured
    world: World
    now: float = 0.0
    n_deaths: int = 0
    _events: list[tuple[float, int, int, News]] = field(default_factory=list)
    _life: dict[int, int] = field(default_factory=dict)  # which life of a worker events belong to
    _dies_at: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.n_workers = self.world.n_workers
        self._draw = random.Random(self.world.seed)
        self._count = itertools.count()

    def start(self, worker: int) -> None:
        world, draw = self.world, self._draw
        self._life[worker] = life = self._life.get(worker, 0) + 1
        load = draw.choice(self.measured.loads) if world.load_s is None else world.load_s * draw.uniform(1, 1.5)
        begins = self.now + (world.replaced_s if life > 1 else 0.0)
        rate = world.deaths_per_hour / 3600
        self._dies_at[worker] = begins + (draw.expovariate(rate) if rate else float("inf"))
        self._tell(begins + load, worker, Ready(worker))

    def hand(self, worker: int, request: Any) -> None:
        del request
        world, draw = self.world, self._draw
        takes = draw.choice(self.measured.shards) * world.size
        chance = draw.random()
        if chance < world.hanging:
            takes = float("inf")
        elif chance < world.hanging + world.slow:
            takes *= world.slower
        self._tell(self.now + takes, worker, Stored(worker, {}))

    def news(self, timeout_s: float | None) -> list[News]:
        until = float("inf") if timeout_s is None else self.now + timeout_s
        found: list[News] = []
        while self._events and (self._events[0][0] <= self.now or (not found and self._events[0][0] <= until)):
            at, _, life, news = heapq.heappop(self._events)
            if life == self._life[news.worker]:
                self.now = max(self.now, at)
                found.append(news)
                self.n_deaths += isinstance(news, Gone)
        if not found:
            if until == float("inf"):
                raise RuntimeError("nothing will ever happen")
            self.now = until
        return found

    def end(self, worker: int) -> None:
        self._life[worker] += 1

    def close(self) -> None:
        self._events.clear()

    def _tell(self, at: float, worker: int, news: News) -> None:
        """Let news come, or that of the worker's death where this is first."""
        dies_at = max(self._dies_at[worker], self.now)
        at, news = (at, news) if at <= dies_at else (dies_at, Gone(worker, "simulated"))
        if at < float("inf"):
            heapq.heappush(self._events, (at, next(self._count), self._life[worker], news))


def simulate(measured: Measured, world: World) -> Outcome:
    """Let the library's scheduler give shards to simulated workers until all are measured."""
    crew = SimulatedCrew(measured, world)
    draw = random.Random(world.seed + 1)
    own = 0.0

    def spend(seconds: Sequence[float]) -> None:
        nonlocal own
        spent = draw.choice(seconds)
        own += spent
        crew.now += spent

    def requests() -> Iterator[Shard]:
        for number in range(world.n_shards):
            spend(measured.takes)
            yield Shard(f"{number:08d}", str(number))

    scheduler: Any = Crewed(crew, clock=lambda: crew.now)
    stored = set()
    for done in scheduler.measure(requests()):
        stored.add(done.request.key)
        spend(measured.settles)
    if len(stored) != world.n_shards:
        raise RuntimeError(f"{world.n_shards - len(stored)} shards were lost")
    mean = sum(measured.shards) / len(measured.shards)
    ideal = mean * world.size * world.n_shards / world.n_workers
    return Outcome(crew.now, ideal, own, crew.n_deaths, scheduler.n_second)
