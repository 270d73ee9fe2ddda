"""The studies among the examples run on the embedded model, and running them again measures nothing."""

import importlib.util
import shutil
from pathlib import Path

import pytest

import causalpatch as cp

STUDIES = sorted((Path(__file__).resolve().parents[2] / "examples" / "studies").glob("*.yaml"))


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_an_example_runs_and_is_then_there(file, tmp_path):
    shutil.copy(file, tmp_path)
    study = cp.read_study(tmp_path / file.name, ["executor.kind=local"])
    found = cp.run_study(study, tmp_path)
    assert list(found.results) == study.step_names
    told = []
    again = cp.run_study(study, tmp_path, listeners=(told.append,))
    assert list(again.results) == study.step_names
    assert not [line for line in told if line["event"] == "shard"]


def test_the_heads_of_the_example_are_confirmed(tmp_path):
    (file,) = [each for each in STUDIES if each.stem == "heads"]
    claim = cp.run_study(cp.read_study(file), tmp_path).results["claim"]
    assert claim.supported == ["z.3.2@-1", "z.3.1@-1"]


@pytest.mark.slow
def test_the_example_with_processes_runs_as_it_stands(tmp_path):
    (file,) = [each for each in STUDIES if each.stem == "ablations"]
    assert cp.run_study(cp.read_study(file), tmp_path).results["attention"].is_complete


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="not installed: ray")
def test_the_example_with_ray_runs_as_it_stands(tmp_path):
    (file,) = [each for each in STUDIES if each.stem == "on_ray"]
    shutil.copy(file, tmp_path)
    assert cp.run_study(cp.read_study(tmp_path / file.name), tmp_path).results["neurons"].is_complete
