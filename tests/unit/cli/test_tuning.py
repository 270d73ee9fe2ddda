"""The command that tunes: what it writes, prints and returns."""

import json

import pytest
from transformers import AutoModelForCausalLM

import causalpatch as cp
from causalpatch.cli.main import main
from causalpatch.pairs.tasks import generate
from causalpatch.tuning import train as training


def rows_of(pairs):
    """Return corrupted prompts of which the clean ones' answer is wanted."""
    return [
        {
            "prompt": row["corrupt"],
            "wanted": row["answer"],
            "unwanted": row["wrong_answer"],
            "entities": row["entities"],
        }
        for row in pairs
    ]


@pytest.fixture
def asked(tmp_path):
    target, retain = tmp_path / "target.jsonl", tmp_path / "retain.txt"
    model = cp.open_model("zoo:stories", device="cpu")
    target.write_text("\n".join(json.dumps(row) for row in rows_of(generate("agreement", 20))))
    retain.write_text("\n\n".join(pair.clean_text for pair in cp.load_pairs("induction", model)[:12]))
    quick = ("--steps", 5, "--rate", 0.01, "--device", "cpu", "--out", tmp_path / "out")
    return ("tune", "zoo:stories", target, "--retain", retain, *quick)


def run(capsys, *words):
    """Run the program and return its exit code and what it printed."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_a_component_is_tuned_and_written_as_a_checkpoint_and_a_change(capsys, asked, tmp_path):
    code, out, _ = run(capsys, *asked, "--component", "z.3.1")
    assert code == 0
    assert "slice: " in out
    assert "wrote checkpoint, change into" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint")
    record = json.loads((tmp_path / "out" / "change" / "tuning.json").read_text())
    assert record["sites"] == ["z.3.1"]
    assert record["data"]["target"]["train"]["n"] == 8
    cp.load_change(tmp_path / "out" / "change", cp.open_model("zoo:stories", device="cpu"))
    code, out, _ = run(capsys, *asked, "--component", "z.3.1", "--way", "lora", "--json")
    assert code == 0
    assert [folder.rpartition("/")[2] for folder in json.loads(out)["folders"]] == ["checkpoint", "adapter"]


@pytest.mark.parametrize("words", [("--way", "offset"), ("--way", "lora", "--rank", 2), ("--shared", "take")])
def test_ways_and_their_settings_are_options(capsys, asked, tmp_path, words):
    code, out, _ = run(capsys, *asked, "--component", "z.3.1", *words, "--json")
    assert code == 0
    said = json.loads(out)
    folder = "adapter" if "lora" in words else "change"
    assert f"{tmp_path / 'out' / folder}" in said["folders"]
    if folder == "adapter":
        assert json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text())["r"] == 2
    if "offset" in words:
        assert said["n_trained"] == cp.open_model("zoo:stories", device="cpu").head_width
    if "take" in words:
        code, out, _ = run(capsys, *asked, "--component", "z.3.1", "--json")
        assert json.loads(out)["n_trained"] <= said["n_trained"]


def test_a_stop_by_the_user_keeps_the_best_until_then(capsys, asked, tmp_path, monkeypatch):
    real, seen = training.looks, []

    def looks(*given):
        seen.append(1)
        if len(seen) > 2:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(training, "looks", looks)
    code, out, _ = run(capsys, *asked, "--component", "z.3.1", "--steps", 200)
    assert code == 130
    assert "stopped by the user" in out
    AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint")


@pytest.mark.slow
def test_a_comparison_is_counted_first_and_its_report_written(capsys, asked, tmp_path):
    compared = (*asked, "--component", "z.3.1", "--compare", "ioi", "--arm", "full", "--arm", "prefix", "--seeds", 1)
    code, out, _ = run(capsys, *compared, "--plan")
    assert code == 0
    assert "2 trainings of at most 5 steps: 2 arms" in out
    code, out, _ = run(capsys, *compared)
    assert code == 0
    assert out.index("2 trainings of at most") < out.index("no evidence of advantage")
    report = cp.TuningReport.load(tmp_path / "out" / "report.json")
    assert [arm.name for arm in report.arms] == ["base", "located", "full", "prefix"]
    assert all((tmp_path / "out" / f"arms.{ending}").is_file() for ending in ("svg", "png", "csv"))


def test_settings_of_a_comparison_reach_its_plan_and_its_report(capsys, asked, tmp_path):
    compared = (*asked, "--component", "mlp_post.3.1", "--compare", "ioi", "--arm", "random", "--seeds", 1)
    code, out, _ = run(capsys, *compared, "--draws", 25, "--plan")
    assert code == 0
    assert "25 random draws" in out
    code, _, err = run(capsys, *compared, "--draws", 18, "--plan")
    assert code == 2
    assert "--draws" in err
    only = (*asked, "--component", "mlp_post.3.1", "--compare", "ioi", "--arm", "prefix", "--seeds", 1)
    code, _, _ = run(capsys, *only, "--batch", 3, "--ahead", 1.5)
    assert code == 0
    schedule = cp.TuningReport.load(tmp_path / "out" / "report.json").spec["schedule"]
    assert (schedule["batch"], schedule["ahead"]) == (3, 1.5)


def test_what_does_not_go_together_is_refused(capsys, asked):
    code, _, err = run(capsys, *asked)
    assert code == 2
    assert "tune takes components, or a claim" in err
    code, _, err = run(capsys, *asked, "--component", "z.3.1", "--plan")
    assert code == 2
    assert "--arm, --draws, --lm-eval, --margin, --plan and --seeds are of a comparison" in err
    code, _, err = run(capsys, *asked, "--component", "z.3.1", "--seeds", 5)
    assert code == 2
    assert "--seeds are of a comparison" in err
    code, _, err = run(capsys, *asked, "--component", "z.3.1", "--compare", "ioi", "--margin", "kl=0.1", "--plan")
    assert code == 2
    assert "--margin 'kl=0.1' is not NAME=MOST" in err
    code, _, err = run(capsys, *asked, "--component", "z.3.99")
    assert code == 2
    assert "z.3.99" in err
