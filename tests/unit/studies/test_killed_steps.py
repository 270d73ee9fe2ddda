"""Every kind of step, killed in the middle: what was stored is not measured again, and the result is the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from causalpatch.results.effects import Effects
from causalpatch.studies.results import Results
from killed_steps import STEPS
from small_studies import same, the_run

SCRIPT = Path(__file__).parents[2] / "killed_steps.py"


def kill(folder, *kinds):
    paths = os.pathsep.join([str(SCRIPT.parent), *filter(None, sys.path)])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(folder), *kinds], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def hold(folder, told):
    for kind, each in told.items():
        first, second = each["sessions"]
        assert first == (each["whole"] + 1) // 2 > 0, kind
        # One process measures, so that at most the piece that it was at is lost: here it died just behind one.
        assert second == each["whole"] - first, kind
        quiet, killed = (Results(the_run(folder / kind / name)) for name in ("quiet", "killed"))
        assert quiet.names() == killed.names()
        for name in quiet.names():
            one, other = quiet.load(name), killed.load(name)
            if isinstance(one, Effects):
                assert same(one, other)
            elif hasattr(one, "edges") and hasattr(one, "mask"):
                assert np.array_equal(one.mask, other.mask), kind
            else:
                np.testing.assert_array_equal(one.to_dataframe().values, other.to_dataframe().values, err_msg=kind)


def test_scores_and_circuits_that_were_killed_go_on(tmp_path):
    hold(tmp_path, kill(tmp_path, "edges", "evaluate"))


@pytest.mark.slow
def test_a_step_of_any_kind_that_was_killed_goes_on(tmp_path):
    told = kill(tmp_path, *STEPS)
    assert all(each["whole"] > 2 for each in told.values()), told
    hold(tmp_path, told)
