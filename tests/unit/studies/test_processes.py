"""Workers in processes: their numbers are those of a local run, bit for bit, and one that dies is replaced."""

import os
import random
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import causalpatch as cp
from causalpatch.base.errors import ModelNotFound, WorkerLost
from causalpatch.studies import processes, running
from causalpatch.studies.results import Results
from causalpatch.studies.study import ModelPart
from causalpatch.studies.verifying import verify
from small_studies import begin, kill, kill_after_a_shard, measured, run_in, same, study_of, the_run

TWO = ("executor={kind: processes, workers: 2, threads: 1, device: cpu}",)


@pytest.fixture
def made(monkeypatch):
    """The crews that runs make."""
    kept = []

    class Seen(processes.Processes):
        is_deadly = False

        def __post_init__(self):
            super().__post_init__()
            kept.append(self)

        def hand(self, worker, request):
            if self.is_deadly:
                os.kill(self._workers[worker].process.pid, signal.SIGKILL)
            super().hand(worker, request)

    monkeypatch.setattr(running, "Processes", Seen)
    return kept


def test_workers_give_the_local_numbers_though_one_is_killed(tmp_path, undisturbed, made):
    killed, told = [], []

    def kill(line):
        told.append(line)
        if line["event"] == "shard" and not killed:
            killed.extend(made[0].pids)
            os.kill(killed[0], signal.SIGKILL)

    found = cp.run_study(study_of(*TWO), tmp_path, listeners=(kill,))
    assert killed
    assert len(set(measured(told))) == 3
    assert same(found.results["heads"], undisturbed)
    assert made[0].pids == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_a_study_that_is_killed_with_its_workers_running_goes_on(tmp_path):
    stored = kill_after_a_shard(tmp_path, *TWO, "shards.pairs=1")
    (tmp_path / "local").mkdir()
    local, _ = run_in(tmp_path / "local", "shards.pairs=1")
    found, told = run_in(tmp_path, *TWO, "shards.pairs=1")
    assert len(found.run.keys()) == 6
    assert len(measured(told)) == 6 - len(stored)
    assert not stored & set(measured(told))
    assert same(found.results["heads"], local.results["heads"])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
def test_twenty_kills_of_a_study_with_workers_lose_nothing_that_was_stored(tmp_path):
    (tmp_path / "local").mkdir()
    local, _ = run_in(tmp_path / "local", "shards.pairs=1")
    draw, kills, rounds = random.Random(3), 0, 0
    while kills < 20:
        rounds += 1
        place = tmp_path / str(rounds)
        place.mkdir()
        stored = set()
        while True:
            began = begin(place, *TWO, "shards.pairs=1")
            try:
                code = began.wait(draw.uniform(2.0, 9.0))
            except subprocess.TimeoutExpired:
                kill(began)
                kills += 1
                now = {each.stem for each in place.rglob("*.parquet")}
                assert stored <= now
                stored = now
                continue
            assert code == 0, (place / "said").read_text(encoding="utf-8")
            break
        run = the_run(place)
        assert same(Results(run).load("heads"), local.results["heads"])
        assert len(run.keys()) == 6
        assert verify(run, None).is_sound


@pytest.mark.slow
def test_a_shard_that_ends_every_worker_is_an_error(tmp_path, made):
    def kill(line):
        if line["event"] == "call":
            made[0].is_deadly = True

    with pytest.raises(WorkerLost, match="ended 3 workers"):
        cp.run_study(study_of(*TWO, "shards.pairs=6"), tmp_path, listeners=(kill,))


@pytest.mark.slow
def test_what_a_worker_meets_with_is_what_the_run_says(tmp_path, made):
    def spoil(line):
        if line["event"] == "call":
            made[0].posts[:] = [replace(post, model=ModelPart(name="zoo:none")) for post in made[0].posts]

    with pytest.raises(ModelNotFound):
        cp.run_study(study_of(*TWO), tmp_path, listeners=(spoil,))
    assert made[0].pids == []


@pytest.mark.slow
def test_shards_of_workers_and_of_this_process_are_one_run(tmp_path):
    found, _ = run_in(tmp_path)
    for each in list((tmp_path / "store").rglob("*.parquet"))[1:]:
        each.unlink()
    again, told = run_in(tmp_path, *TWO)
    assert len(measured(told)) == 2
    assert same(found.results["heads"], again.results["heads"])
