"""Leases: one measures, others wait, and nobody waits for the dead."""

import itertools
import os
import subprocess
import sys
import time
from datetime import datetime

import pytest

import causalpatch as cp
from causalpatch.studies import journal, leases as room
from causalpatch.studies.leases import Leases
from causalpatch.studies.objects import Folder
from small_studies import measured, run_in, same, study_of


class Clock:
    """A steady clock that goes on when told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def elsewhere(monkeypatch):
    """Let leases look as if another machine held them, so that processes cannot be looked up."""
    hosts = iter(f"machine {n}" for n in range(10**6))
    monkeypatch.setattr(room, "_host", lambda: next(hosts))


def held(folder, clock, **more):
    return Leases(Folder(folder), "leases", time_s=10.0, clock=clock, **more)


def test_one_of_two_gets_a_lease_and_the_other_when_it_is_given_back(tmp_path, clock):
    mine, yours = held(tmp_path, clock), held(tmp_path, clock)
    assert mine.take("a")
    assert not yours.take("a")
    assert yours.take("b")
    mine.release("a")
    assert yours.take("a")


def test_a_holder_that_gives_no_sign_of_life_is_dead_after_the_lease_s_time(tmp_path, clock, elsewhere):
    mine, yours = held(tmp_path, clock), held(tmp_path, clock)
    assert mine.take("a")
    assert not yours.take("a")
    clock.now = 9.0
    assert not yours.take("a")
    clock.now = 10.5
    assert yours.take("a")


def test_a_holder_that_lives_keeps_its_lease_however_long_it_takes(tmp_path, clock, elsewhere):
    mine, yours = held(tmp_path, clock), held(tmp_path, clock)
    assert mine.take("a")
    for _ in range(10):
        assert not yours.take("a")
        clock.now += 8.0
        mine.beat()
    assert not yours.take("a")


def test_of_two_that_find_a_dead_holder_one_gets_the_lease(tmp_path, clock, elsewhere):
    dead, mine, yours = (held(tmp_path, clock) for _ in range(3))
    assert dead.take("a")
    assert not mine.take("a")
    assert not yours.take("a")
    clock.now = 11.0
    assert [mine.take("a"), yours.take("a")] == [True, False]


def test_clocks_that_jump_change_nothing(tmp_path, clock, elsewhere, monkeypatch):
    mine, yours = held(tmp_path, clock), held(tmp_path, clock)
    assert mine.take("a")
    for jump in (0.0, 1e12, -1e12):
        monkeypatch.setattr(time, "time", lambda jump=jump: jump)
        assert not yours.take("a")
    clock.now = 10.5
    assert yours.take("a")


def test_a_study_on_a_machine_whose_clock_jumps_is_that_of_any_other(tmp_path, undisturbed, monkeypatch):
    """Wall clocks go back by years and forward again at every look, while two runs share the work."""
    jumps, inner = itertools.cycle([0.0, 4e9, 1e9]), []
    monkeypatch.setattr(time, "time", lambda: next(jumps))

    class Jumping(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.fromtimestamp(next(jumps), tz)

    monkeypatch.setattr(journal, "datetime", Jumping)

    def join_in(line):
        if line["event"] == "shard" and not inner:
            inner.append(None)
            inner[0] = run_in(tmp_path)

    outer = cp.run_study(study_of(), tmp_path, listeners=(join_in,))
    found, told = inner[0]
    assert len(measured(told)) == 2  # the one that was stored is not measured again
    assert same(found.results["heads"], undisturbed)
    assert same(outer.results["heads"], undisturbed)
    assert {line["at"][:4] for line in told} >= {"1970", "2096"}


def test_a_process_of_this_machine_that_is_gone_is_dead_at_once(tmp_path, clock):
    code = (
        "import os, pathlib\n"
        "from causalpatch.studies.leases import Leases\n"
        "from causalpatch.studies.objects import Folder\n"
        f"print(Leases(Folder(pathlib.Path({str(tmp_path)!r})), 'leases').take('a'), flush=True)\nos._exit(0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
    assert held(tmp_path, clock).take("a")


def test_a_process_that_has_the_number_of_a_dead_one_is_another():
    mine = f"{os.getpid()}/{room._started(os.getpid())}"
    assert room._is_alive(mine)
    assert not room._is_alive(f"{os.getpid()}/1")
    assert not room._is_alive("4194300/1")


def test_a_torn_lease_runs_out_like_any_other(tmp_path, clock):
    place = Folder(tmp_path)
    place.put("leases/a/1", b"{torn")
    mine = held(tmp_path, clock)
    assert not mine.take("a")
    clock.now = 10.5
    assert mine.take("a")


def test_closing_gives_everything_back(tmp_path, clock):
    mine = held(tmp_path, clock)
    assert mine.take("a")
    assert mine.take("b")
    mine.close()
    assert Folder(tmp_path).names("leases/a") == Folder(tmp_path).names("leases/b") == []


def test_the_heart_beats_by_itself(tmp_path):
    mine = Leases(Folder(tmp_path), "leases", time_s=0.2)
    assert mine.take("a")
    before = Folder(tmp_path).get("leases/a/1")
    until = time.monotonic() + 10
    while Folder(tmp_path).get("leases/a/1") == before and time.monotonic() < until:
        time.sleep(0.02)
    assert Folder(tmp_path).get("leases/a/1") != before
    mine.close()
