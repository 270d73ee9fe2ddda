"""Commands on claims: what they print, write and return."""

import json

import pytest

import causalpatch as cp
from causalpatch.cli.main import main

ASKED = ("zoo:stories", "ioi", "--device", "cpu")


def run(capsys, *words):
    """Run the program and return its exit code and what it printed."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_what_a_sweep_finds_on_one_half_is_confirmed_on_the_other_once(capsys, tmp_path):
    asked = ("confirm", *ASKED, "--sweep", "z@-1", "--top", 2, "--few-checks", "--ledger", tmp_path / "book.jsonl")
    code, out, _ = run(capsys, *asked, "--out", tmp_path)
    assert code == 0
    claim = cp.Claim.load(tmp_path / "claim.json")
    assert claim.verdict == "supported"
    assert claim.supported == ["z.3.2@-1", "z.3.1@-1"]
    assert str(claim) in out
    assert f"next: {claim.next_step}" in out
    assert all((tmp_path / name).is_file() for name in ("effects.svg", "effects.png", "effects.csv", "pairs.svg"))
    code, out, _ = run(capsys, *asked, "--json")
    said = json.loads(out)
    assert (code, said["verdict"]) == (0, "inconclusive")
    assert "reused hold-out" in said["reasons"][0]
    assert said["next"] == "confirm it once, on pairs that no claim has opened"


def test_components_and_unrelated_behaviours_are_named(capsys, tmp_path):
    asked = ("confirm", *ASKED, "--component", "z.3.2@-1", "--found-on", "agreement", "--unrelated", "agreement")
    code, out, _ = run(capsys, *asked, "--few-checks", "--delta", 0.2, "--json")
    said = json.loads(out)
    assert (code, said["spec"]["delta"], said["spec"]["pairs"]["n"]) == (0, 0.2, 48)
    assert said["checks"]["specificity"]["rows"][0]["behaviour"] == "agreement"


def test_components_are_named_or_searched_for(capsys):
    for words in ((), ("--component", "z.3.2@-1", "--sweep", "z@-1")):
        code, _, err = run(capsys, "confirm", *ASKED, *words)
        assert code == 2
        assert "confirm takes components, or a sweep that finds them" in err


def test_a_claim_is_rechecked_with_an_exit_code(capsys, tmp_path):
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model), show_progress=False)
    path = cp.confirm(experiment, "z.3.2@-1", checks=cp.Checks.none()).save(tmp_path / "claim.json")
    code, out, _ = run(capsys, "recheck", path, "--model", "zoo:stories")
    assert code == 0
    assert "holds in 'zoo:stories'" in out
    # A checkpoint in which the head's output goes nowhere.
    attention = model.module.get_submodule("model.layers.3.self_attn.o_proj")
    width = attention.weight.shape[1] // 4
    attention.weight.data[:, 2 * width : 3 * width] = 0
    model.module.save_pretrained(tmp_path / "broken")
    code, out, _ = run(capsys, "recheck", path, "--model", tmp_path / "broken", "--json")
    said = json.loads(out)
    assert (code, said["holds"]) == (1, False)
    assert said["reasons"][0].startswith("not again supported")


def test_a_plan_is_made_of_a_claim_or_of_a_sweep(capsys, tmp_path):
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model), show_progress=False)
    cp.sweep(experiment, "z@-1").save(tmp_path / "heads")
    claim = cp.confirm(experiment, "z.3.2@-1", checks=cp.Checks.none()).save(tmp_path / "claim.json")
    code, out, _ = run(capsys, "power", tmp_path / "heads", "--components", 2, "--effect", 0.3)
    assert code == 0
    assert "For a share of 0.3 to be called more than 0.1" in out
    assert "next: gather that many pairs" in out
    code, out, _ = run(capsys, "power", claim, "--power", 0.9, "--json")
    assert json.loads(out)["needed"] >= 10
