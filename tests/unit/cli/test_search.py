"""The command that searches: its plan, what it prints and writes."""

import json

import pytest

from causalpatch import Localization
from causalpatch.cli.main import main

ASKED = ("localize", "zoo:stories", "ioi", "--first", "12", "--device", "cpu", "--units", "heads", "--position", "all")


def run(capsys, *words):
    """Run the program and return its exit code and what it printed."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_a_search_prints_its_plan_then_what_it_found_and_spent(capsys, tmp_path):
    code, out, _ = run(capsys, *ASKED, "--budget", 600, "--out", tmp_path)
    assert code == 0
    assert out.startswith("search with a budget of 600 runs, 6 pairs; runs at most\n")
    found = Localization.load(tmp_path / "localization.npz")
    assert str(found) in out
    assert found.spent["runs"] <= 600
    assert "searched on 6 of 12 pairs" in out
    assert (tmp_path / "localization.svg").is_file()


def test_a_search_as_one_object(capsys):
    code, out, _ = run(capsys, *ASKED, "--budget", "600 runs", "--json")
    assert code == 0
    said = json.loads(out)
    wanted = {"components", "unopened", "selected_again", "pending", "spent", "edges", "plan", "n_pairs", "files"}
    assert wanted == set(said)
    assert {row["cell"] for row in said["selected_again"]} >= {row["component"] for row in said["components"]}
    assert said["n_pairs"] == 6
    code, out, _ = run(capsys, *ASKED, "--plan", "--json")
    assert (code, json.loads(out)["budget"]) == (0, "300 seconds")


def test_a_search_by_ablation(capsys):
    words = ("--budget", 600, "--value", "zero", "--json")
    code, out, _ = run(capsys, *ASKED, *words, "--direction", "noise")
    assert code == 0
    assert json.loads(out)["components"]
    code, out, err = run(capsys, *ASKED, *words)
    assert code == 2
    assert "'zero' takes a run apart and cannot restore one" in out + err


def test_a_budget_that_allows_nothing_is_refused(capsys):
    code, _, err = run(capsys, *ASKED, "--budget", 20)
    assert code == 2
    assert "a budget of 20 runs does not allow the coarsest parts" in err
