"""The commands on studies: what they print and write, and how they end."""

import json
import shlex
import subprocess
import sys

import pandas as pd
import pytest
import xarray as xr

from causalpatch.cli.main import main
from causalpatch.studies import objects
from small_studies import TEXT, the_run


@pytest.fixture
def run(capsys):
    """A function that runs the program and returns its exit code and what it printed."""

    def run_words(*words):
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in words])
        captured = capsys.readouterr()
        return stop.value.code or 0, captured.out, captured.err

    return run_words


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a study that was run."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "study.yaml").write_text(TEXT, encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["run", str(folder / "study.yaml")])
    assert not stop.value.code
    return folder


def test_init_writes_a_study_once(run, tmp_path):
    code, out, _ = run("init", tmp_path / "new" / "study.yaml")
    assert code == 0
    assert "causalpatch check" in out
    assert run("init", tmp_path / "new" / "study.yaml")[0] == 2
    assert run("init", tmp_path / "new" / "study.yaml", "--force")[0] == 0


def test_what_init_writes_can_be_checked(run, tmp_path):
    run("init", tmp_path / "study.yaml")
    code, out, _ = run("check", tmp_path / "study.yaml")
    assert code == 0
    assert "3 steps" in out
    assert "independent" in out
    assert not (tmp_path / "studies").exists()


def test_schema_prints_json(run):
    code, out, _ = run("schema")
    assert code == 0
    assert json.loads(out)["properties"]["steps"]


def test_check_prints_json(run, tmp_path):
    (tmp_path / "study.yaml").write_text(TEXT, encoding="utf-8")
    code, out, _ = run("check", tmp_path / "study.yaml", "--json", "--set", "steps.heads.site=z.0@-1")
    assert code == 0
    assert json.loads(out)["steps"][0]["patched"] == 4 * 6


@pytest.mark.parametrize(
    ("store", "code", "words"),
    [
        ("foo://x", 3, "'foo://x' is no address of a store"),
        ("s3://bucket/place", 3, "the package 'a_package_that_is_not_there' is not installed"),
        (".", 4, "is no store of studies"),
        ("study.yaml", 3, "cannot be the folder of a store"),
    ],
)
def test_check_refuses_a_store_that_run_would_refuse(run, tmp_path, monkeypatch, store, code, words):
    monkeypatch.setitem(objects._DOORS, "s3", "a_package_that_is_not_there")
    (tmp_path / "study.yaml").write_text(TEXT, encoding="utf-8")
    for command in ("check", "run"):
        ended, _, err = run(command, tmp_path / "study.yaml", "--set", f"store={store}")
        assert ended == code
        assert words in err


def test_mistakes_in_a_file_are_said_with_their_line(run, tmp_path):
    (tmp_path / "study.yaml").write_text(TEXT + "stores: here\n", encoding="utf-8")
    code, _, err = run("run", tmp_path / "study.yaml")
    assert code == 2
    assert "'study.yaml' line 12: unknown key 'stores'" in err
    assert "did you mean 'store'?" in err


def test_running_again_makes_no_run(run, finished):
    code, out, err = run("run", finished / "study.yaml")
    assert code == 0
    assert "0 runs were made just now" in out
    assert "step 1 of 1, heads: was there" in err


def test_run_tells_events_as_json_when_asked_to(run, finished):
    code, out, err = run("run", finished / "study.yaml", "--verbose", "--json")
    assert code == 0
    assert json.loads(out)["made"] == 0
    assert [json.loads(line)["event"] for line in err.splitlines()] == ["session", "step was there", "finished"]


def test_status_and_ls_say_what_there_is(run, finished):
    code, out, _ = run("status", finished / "study.yaml")
    assert code == 0
    assert "finished, 3 shards" in out
    code, out, _ = run("ls", finished / "store", "--json")
    (row,) = json.loads(out)["runs"]
    assert row["run"] == the_run(finished).hash
    assert run("status", finished / "study.yaml", "--set", "direction=noise")[0] == 2


def test_show_prints_what_steps_found(run, finished):
    code, out, _ = run("show", finished / "study.yaml", "--step", "heads", "--top", 2)
    assert code == 0
    assert "exploratory: the 2 largest of 8 cells" in out
    assert run("show", finished / "study.yaml", "--step", "tails")[0] == 2


def test_what_was_run_with_changes_is_shown_with_them(run, tmp_path):
    (tmp_path / "study.yaml").write_text(TEXT, encoding="utf-8")
    changes = ("--set", "direction=noise", "--set", "pairs={name: ioi, first: 2}")
    code, out, _ = run("run", tmp_path / "study.yaml", *changes)
    assert code == 0
    (hint,) = [line for line in out.splitlines() if "next: " in line]
    said = shlex.split(hint.split("next: causalpatch ")[1].split(", or export")[0])
    assert said == ["show", str(tmp_path / "study.yaml"), *changes, "--step", "heads"]
    code, out, _ = run(*said)
    assert code == 0
    assert "exploratory" in out
    assert run("show", tmp_path / "study.yaml")[0] == 2


@pytest.mark.parametrize("ending", ["parquet", "csv", "nc"])
def test_export_writes_what_other_tools_read(run, finished, tmp_path, ending):
    code, _, _ = run("export", finished / "study.yaml", "--out", tmp_path / f"heads.{ending}")
    assert code == 0
    if ending == "nc":
        with xr.open_dataset(tmp_path / "heads.nc", engine="scipy") as data:
            assert dict(data["metric"].sizes) == {"layer": 2, "head": 4, "pair": 6}
            assert json.loads(data.attrs["provenance"])["site"] == "z.2:4.*@-1"
        return
    frame = pd.read_csv(tmp_path / "heads.csv") if ending == "csv" else pd.read_parquet(tmp_path / "heads.parquet")
    assert len(frame) == 8 * 6
    assert set(frame["status"]) == {"measured"}


def test_cells_of_a_sweep_are_exported_with_their_intervals(run, finished, tmp_path):
    code, _, _ = run("export", finished / "study.yaml", "--cells", "--out", tmp_path / "cells.parquet")
    assert code == 0
    frame = pd.read_parquet(tmp_path / "cells.parquet")
    assert list(frame.columns[:4]) == ["layer", "head", "effect", "recovered"]
    assert frame[["layer", "head"]].values.tolist() == [[layer, head] for layer in (2, 3) for head in range(4)]
    assert (frame["n_pairs"] == 6).all()
    assert run("export", finished / "study.yaml", "--cells", "--out", tmp_path / "cells.nc")[0] == 2


def test_an_unknown_ending_is_refused(run, finished, tmp_path):
    assert run("export", finished / "study.yaml", "--out", tmp_path / "heads.xlsx")[0] == 2


def test_verify_measures_cells_again(run, finished):
    code, out, _ = run("verify", finished / "study.yaml", "--cells", 3)
    assert code == 0
    assert "3 shards read, 0 shards, results or records damaged" in out
    assert "3 cells measured again in 18 runs" in out


def test_verify_names_what_is_damaged(run, tmp_path):
    (tmp_path / "study.yaml").write_text(TEXT.replace("first: 6", "first: 2"), encoding="utf-8")
    run("run", tmp_path / "study.yaml")
    for path in (tmp_path / "store").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-9])
    code, out, err = run("verify", tmp_path / "study.yaml", "--cells", 0)
    assert code == 4
    assert "1 shards read, 2 shards, results or records damaged" in out
    assert "bytes instead of" in err


def test_help_of_study_commands_loads_nothing_heavy():
    code = (
        "import sys\nfrom causalpatch.cli.main import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'fsspec'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
