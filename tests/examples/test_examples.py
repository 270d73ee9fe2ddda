"""The examples run as they stand, and say what they are there to say."""

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """A function that runs a script of the examples in an empty folder and returns what it printed."""

    def run_script(name, *words):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_script


def test_which_head_copies_names_the_head_and_its_limits(run, shared):
    said = run("which_head_copies.py")
    assert "the name is copied by head 4 of layer 4" in said
    assert "recovered    0.983 of the gap" in said
    assert "interval     none: it needs 10 independent components" in said
    assert "5 components are too few for a claim" in said
    at_name, at_end = zip(*re.findall(r"layer \d: (\S+) at the name, (\S+) at the last token", said), strict=True)
    assert min(map(float, at_name)) > 0.9
    assert max(map(float, at_end)) < 0.1


def test_your_own_model_shows_layers_channels_and_intervals(run):
    said = run("your_own_model.py")
    assert re.findall(r"module\((\w+)\).output +(\S+)", said) == [
        ("first", "1.00"),
        ("second", "1.00"),
        ("classes", "1.00"),
    ]
    channels = re.findall(r"\d: +(\S+), interval +(\S+) to +(\S+)", said)
    assert len(channels) == 6
    assert all(float(low) <= float(recovered) <= float(high) for recovered, low, high in channels)
    assert len(set(channels)) > 3


def test_the_first_sweep_finds_heads_and_draws_pictures(run, tmp_path):
    said = run("first_sweep.py", tmp_path / "pictures")
    assert "exploratory: the 5 largest of" in said
    assert "0.99 at token" in said or "1.00 at token" in said  # into layer 0 at the token that was changed
    for name in ("heads.svg", "layers.svg"):
        assert (tmp_path / "pictures" / name).read_text().startswith("<svg")


@pytest.mark.slow
def test_two_behaviours_are_claimed_of_different_heads_and_contrasted(run, shared, tmp_path):
    said = run("two_behaviours.py", tmp_path)
    assert said.count("\nsupported. On ") == 2
    assert min(map(int, re.findall(r"independent components  (\d+)", said))) >= 40
    contrast = re.search(r"supported: double .* z\.4\.4@-1 and z\.4\.2@-1, contrast \S+ \(95% interval (\S+)", said)
    assert float(contrast[1]) > 0.2
    for name in ("two_behaviours", "name_copy_search", "name_copy_claim", "pronoun_search", "pronoun_claim"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_every_example_has_a_test_and_says_how_it_is_run():
    scripts = sorted(path.name for path in EXAMPLES.glob("*.py"))
    tested = re.findall(r'run\("(\w+\.py)"', Path(__file__).read_text())
    assert scripts == sorted(tested)
    for name in scripts:
        assert f"\n    python examples/{name}" in (EXAMPLES / name).read_text()


def test_causal_trace_draws_both_protocols(run, tmp_path):
    said = run("causal_trace.py", tmp_path)
    subject = re.findall(r"layer 0 restores (\S+) at the subject's last token", said)
    assert len(subject) == 2
    assert min(map(float, subject)) > 0.7
    assert re.findall(r"layer 3 restores (\S+) at the last token", said) == ["1.00", "1.00"]
    picture = (tmp_path / "causal_trace.svg").read_text()
    assert "by noise, resid_post" in picture
    assert "by pairs, mlp_out, windows of 2 layers" in picture


def test_how_not_only_where_tells_two_algorithms_apart(run, tmp_path):
    said = run("how_not_only_where.py", tmp_path / "numbers")
    (_, name, recovered), (_, slot, lost) = re.findall(
        r"(\w+): interchange accuracy (\S+), scrubbing recovers (\S+)", said
    )
    assert (float(name), float(recovered)) == (1.0, 1.0)
    assert float(slot) < 0.6
    assert float(lost) < 0.3
    assert "worst node that the hypothesis does not name: z." in said
    for variable in ("name", "slot"):
        assert (tmp_path / "numbers" / variable / "samples.parquet").is_file()


def test_follow_the_paths_finds_the_way_through_values(run):
    said = run("follow_the_paths.py")
    assert "head_out.0.2 recovers 0.8" in said
    assert "head_out.3.2 writes the answer: 0.5" in said
    assert "it is told by v.3.2" in said
    assert len(re.findall(r"head_out\.1\.\d 0\.\d\d", said)) == 4
    assert re.search(r"-> v.3.2 -> logits: 0\.[34]", said)


def test_a_subspace_is_learnt_held_to_other_sentences_and_read_again(run, tmp_path):
    said = run("learn_subspace.py", tmp_path)
    assert float(re.search(r"interchange accuracy (\S+)", said)[1]) >= 0.95
    assert float(re.search(r"best random +(\S+)", said)[1]) <= 0.2
    assert "its part in the null space" in said
    assert (tmp_path / "number.safetensors").is_file()
    assert float(re.search(r"restores (\S+) of the gap", said)[1]) > 0.8
