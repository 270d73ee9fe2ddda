"""Who measures which shard: the rules, on workers that are not real and a clock that is turned by hand."""

import heapq
import itertools
from dataclasses import dataclass

import pytest

from causalpatch.base.errors import ModelNotFound, WorkerLost
from causalpatch.studies.scheduling import TAKEN, Crew, Crewed, Gone, Ready, Refused, Stored


@dataclass(frozen=True)
class Shard:
    key: str
    group: str = ""
    n_runs: int = 1
    words: str = "4 cells on 2 pairs"


class Scripted:
    """Workers that open the model in no time, and take a second for a shard unless the script says otherwise.

    A script holds, by the shard's name, what happens each time that it is measured: seconds, "dies", or an error.
    """

    def __init__(self, n_workers, script=None, start=()):
        self.n_workers, self.script, self.starts = n_workers, dict(script or {}), list(start)
        self.now, self.handed, self.started, self.ended = 0.0, [], [], []
        self._events, self._count = [], itertools.count()

    def start(self, worker):
        self.started.append(worker)
        self._tell(0.0, Gone(worker, "at once") if self.starts and self.starts.pop(0) == "dies" else Ready(worker))

    def hand(self, worker, request):
        self.handed.append((worker, request.key))
        said = self.script.get(request.key) or [1.0]
        happens = said.pop(0) if len(said) > 1 else said[0]
        if happens == "dies":
            self._tell(1.0, Gone(worker, "signal SIGKILL"))
        elif isinstance(happens, Exception):
            self._tell(1.0, Refused(worker, happens))
        else:
            self._tell(happens, Stored(worker, {"by": worker}))

    def news(self, timeout_s):
        until = self.now + (1e9 if timeout_s is None else timeout_s)
        found = []
        while self._events and (self._events[0][0] <= self.now or (not found and self._events[0][0] <= until)):
            at, _, news = heapq.heappop(self._events)
            self.now = max(self.now, at)
            if news.worker not in self.ended:
                found.append(news)
        self.now = self.now if found else until
        assert self.now < 1e8, "nothing will ever happen"
        return found

    def end(self, worker):
        self.ended.append(worker)

    def close(self):
        self._events.clear()

    def _tell(self, after, news):
        heapq.heappush(self._events, (self.now + after, next(self._count), news))


def crewed(crew):
    assert isinstance(crew, Crew)
    return Crewed(crew, clock=lambda: crew.now)


def shards(n, groups="a"):
    return [Shard(f"{number}", groups[number * len(groups) // n]) for number in range(n)]


def keys(done):
    return sorted(each.request.key for each in done)


def test_every_shard_is_measured_once_and_few_are_taken_ahead():
    crew, taken, stored = Scripted(3), [], []

    def requests():
        for shard in shards(20):
            taken.append(shard.key)
            assert len(taken) - len(stored) <= TAKEN * 3
            yield shard

    executor = crewed(crew)
    for done in executor.measure(requests()):
        stored.append(done.request.key)
    assert sorted(stored) == keys_of(20)
    assert len(crew.handed) == 20
    assert max(number for number, _ in crew.handed) == 2
    assert executor.n_second == 0


def keys_of(n):
    return sorted(str(number) for number in range(n))


def test_no_more_workers_are_started_than_there_are_shards():
    crew = Scripted(5)
    assert keys(crewed(crew).measure(shards(2))) == keys_of(2)
    assert crew.started == [0, 1]


def test_a_worker_keeps_to_its_pairs():
    crew = Scripted(2)
    list(crewed(crew).measure([Shard(f"{group}{n}", group) for n in range(4) for group in "ab"]))
    groups = {worker: {key[0] for number, key in crew.handed if number == worker} for worker in (0, 1)}
    assert groups == {0: {"a"}, 1: {"b"}}


def test_who_has_done_with_its_pairs_helps_with_others():
    crew = Scripted(2)
    list(crewed(crew).measure([Shard("b0", "b"), *(Shard(f"a{n}", "a") for n in range(5))]))
    assert sum(number == 0 for number, _ in crew.handed) == 3


def test_a_straggler_is_measured_by_another_worker_too_and_counts_once():
    crew = Scripted(2, {"3": [1000.0, 1.0]})
    executor = crewed(crew)
    assert keys(executor.measure(shards(6))) == keys_of(6)
    assert [key for _, key in crew.handed].count("3") == 2
    assert executor.n_second == 1
    assert crew.now < 20


def test_the_first_to_store_a_straggler_is_taken_and_the_other_not_listened_to():
    crew = Scripted(2, {"0": [6.0, 5.0], "slow": [10.0]})
    executor = crewed(crew)
    first = list(executor.measure(shards(4)))
    assert keys(first) == keys_of(4)
    assert {done.request.key: done.entry["by"] for done in first}["0"] == 0
    again = list(executor.measure([Shard("slow"), Shard("5"), Shard("6")]))
    assert keys(again) == ["5", "6", "slow"]
    assert crew.ended == []


def test_the_slower_worker_is_ended_when_it_is_far_behind_and_something_waits():
    crew = Scripted(2, {"0": [1e7, 1.0]})
    executor = crewed(crew)
    assert keys(executor.measure(shards(3))) == keys_of(3)
    assert crew.ended == []
    crew.script = {}
    stuck = next(number for number, key in crew.handed if key == "0")
    assert keys(executor.measure(Shard(f"{n}") for n in range(10, 60))) == sorted(str(n) for n in range(10, 60))
    assert crew.ended == [stuck]


def test_the_shard_of_a_dead_worker_is_next_and_the_worker_replaced():
    crew = Scripted(2, {"1": ["dies", 1.0]})
    assert keys(crewed(crew).measure(shards(8))) == keys_of(8)
    order = [key for _, key in crew.handed]
    assert order.count("1") == 2
    assert order.index("1", order.index("1") + 1) <= 4
    assert len(crew.started) == 3


def test_a_shard_that_ends_three_workers_is_an_error():
    crew = Scripted(2, {"1": ["dies"]})
    with pytest.raises(WorkerLost, match="shard 1 ended 3 workers"):
        list(crewed(crew).measure(shards(4)))


def test_a_copy_that_dies_is_no_loss():
    crew = Scripted(2, {"0": [9.0, "dies"]})
    assert keys(crewed(crew).measure(shards(3))) == keys_of(3)


def test_workers_that_end_before_they_are_ready_are_an_error_the_third_time():
    crew = Scripted(1, start=["dies", "dies", "opens"])
    assert keys(crewed(crew).measure(shards(1))) == ["0"]
    crew = Scripted(1, start=["dies"] * 3)
    with pytest.raises(WorkerLost, match="worker 0 ended 3 times before it had opened the model"):
        list(crewed(crew).measure(shards(1)))


def test_what_a_worker_met_with_is_raised_unless_the_shard_is_there_by_then():
    with pytest.raises(ModelNotFound):
        list(crewed(Scripted(2, {"1": [ModelNotFound("none")]})).measure(shards(3)))
    crew = Scripted(2, {"0": [3.5, ModelNotFound("none")], "9": [9.0]})
    executor = crewed(crew)
    assert keys(executor.measure(shards(2))) == keys_of(2)
    assert keys(executor.measure([Shard("9")])) == ["9"]


def test_what_a_call_left_is_not_taken_for_the_next_ones():
    crew = Scripted(2)
    executor = crewed(crew)
    broken = executor.measure(shards(6))
    next(broken)
    broken.close()
    assert keys(executor.measure([Shard("8"), Shard("9")])) == ["8", "9"]


def test_after_closing_workers_are_started_anew():
    crew = Scripted(1)
    executor = crewed(crew)
    list(executor.measure(shards(1)))
    executor.close()
    assert keys(executor.measure(shards(2))) == keys_of(2)
    assert crew.started == [0, 0]
