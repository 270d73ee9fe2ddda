"""Runs that are killed at random moments: nothing that was finished is lost, and the result is that of a quiet run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from causalpatch.studies.results import Results
from causalpatch.studies.verifying import verify
from small_studies import run_in, same, the_run

SCRIPT = Path(__file__).parents[2] / "killed_studies.py"
N_SHARDS = 6


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    return run_in(tmp_path_factory.mktemp("quiet"), "shards.pairs=1")[0].results["heads"]


def kill(folder, n_kills, seed, kind="heads"):
    paths = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), str(n_kills), str(seed), kind],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def hold_against(folder, told, quiet):
    """Compare every study that was finished with the quiet run, and count what its sessions measured."""
    for number, n_measured in enumerate(told["measured"]):
        run = the_run(folder / str(number))
        assert same(Results(run).load("heads"), quiet)
        assert len(run.keys()) == N_SHARDS
        assert verify(run, None).is_sound
        # A shard is told of after it is stored, and only once: whoever finds it there does not measure it again.
        assert n_measured <= N_SHARDS
        assert not list((folder / str(number)).rglob("*.partial"))


def test_a_few_kills_lose_nothing_that_was_finished(tmp_path, quiet):
    told = kill(tmp_path, n_kills=3, seed=0)
    assert told["kills"] == 3
    hold_against(tmp_path, told, quiet)


def test_two_runs_at_once_share_the_shards_and_measure_none_twice(tmp_path, quiet):
    told = kill(tmp_path, n_kills=-1, seed=0)
    assert told["measured"] == [N_SHARDS]
    assert same(Results(the_run(tmp_path)).load("heads"), quiet)


@pytest.mark.slow
def test_two_hundred_kills_lose_nothing_that_was_finished(tmp_path, quiet):
    told = kill(tmp_path, n_kills=200, seed=1)
    assert told["kills"] == 200
    hold_against(tmp_path, told, quiet)


@pytest.mark.slow
def test_forty_kills_of_scores_and_circuits_lose_nothing_that_was_finished(tmp_path):
    told = kill(tmp_path, n_kills=40, seed=2, kind="circuit")
    assert told["kills"] == 40
    quiet = Results(the_run(tmp_path / "0"))
    n_shards = len(quiet.run.keys())
    for number, n_measured in enumerate(told["measured"]):
        found = Results(the_run(tmp_path / str(number)))
        assert found.load("discover").edges() == quiet.load("discover").edges()
        for name in ("scores", "evaluate"):
            np.testing.assert_array_equal(found.load(name).values, quiet.load(name).values)
        assert verify(found.run, None).is_sound
        assert len(found.run.keys()) == n_shards
        assert n_measured <= n_shards
