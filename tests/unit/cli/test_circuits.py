"""Commands on edges: what they print and write, and that what one writes the other reads."""

import json

import numpy as np
import pytest

from causalpatch import Circuit, Confirmation, EdgeScores, Evaluation
from causalpatch.cli.main import main

ASKED = ("zoo:stories", "ioi", "--first", "8", "--device", "cpu")


def run(capsys, *words):
    """Run the program and return its exit code and what it printed."""
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_edges_and_nodes_are_scored(capsys, tmp_path):
    code, out, _ = run(capsys, "attribute", *ASKED, "--method", "eap", "--top", 2, "--out", tmp_path)
    assert code == 0
    assert "2 of 479 edges" in out
    assert EdgeScores.load(tmp_path / "edges.npz").graph.n_edges == 479
    code, out, _ = run(capsys, "attribute", *ASKED, "--site", "z@-1", "--top", 3, "--json")
    (rows,) = json.loads(out)["scores"].values()
    assert len(rows) == 3


def test_scores_are_confirmed(capsys, tmp_path):
    asked = ("attribute", *ASKED, "--site", "z", "--top", 2, "--confirm", 4, "--sample", 5)
    code, out, _ = run(capsys, *asked, "--out", tmp_path)
    assert code == 0
    found = Confirmation.load(tmp_path / "z-confirmed.npz")
    assert (int(found.is_top.sum()), int(found.sampled.sum())) == (4, 5)
    assert str(found) in out
    assert (tmp_path / "z-confirmed.svg").is_file()
    code, out, _ = run(capsys, *asked, "--json")
    said = json.loads(out)["confirmed"]["z"]
    assert said["missed_at_most"] == found.missed_at_most
    assert said["spearman"] == pytest.approx(found.summary()["spearman"][0])
    code, out, _ = run(capsys, "attribute", *ASKED, "--method", "eap", "--confirm", 2, "--sample", 3)
    assert "Scores of 479 edges (eap) against exact effects" in out


def test_a_circuit_is_found_on_one_half_and_evaluated_on_the_other(capsys, tmp_path):
    code, out, _ = run(capsys, "discover", *ASKED, "--scores", "eap", "--n-edges", 30, "--out", tmp_path)
    assert code == 0
    assert "found on 4 of 8 pairs; wrote circuit.npz, circuit.svg, circuit.png, circuit.csv, circuit.json" in out
    path = tmp_path / "circuit.npz"
    assert Circuit.load(path).n_edges == 30
    code, out, _ = run(capsys, "evaluate", *ASKED, "--circuit", path, "--random", 1, "--out", tmp_path, "--json")
    assert code == 0
    (row,) = json.loads(out)["circuits"]
    assert (row["n_edges"], row["verdict"], row["low"]) == (30, "too few independent groups", None)
    assert json.loads(out)["notes"] == []
    found = Evaluation.load(tmp_path / "evaluation.npz")
    np.testing.assert_allclose(found.f()[0], row["f"])
    assert (tmp_path / "faithfulness.svg").is_file()
    code, out, _ = run(capsys, "evaluate", *ASKED, "--circuit", path, "--random", 0, "--all-pairs")
    assert "30 edges by top by importance: too few independent groups" in out


def test_acdc_takes_a_threshold_and_nothing_else(capsys, tmp_path):
    for words in (("--method", "acdc"), ("--threshold", 0.1), ("--method", "acdc", "--threshold", 1, "--n-edges", 3)):
        code, _, err = run(capsys, "discover", *ASKED, "--out", tmp_path, *words)
        assert code == 2
        assert "acdc takes a threshold, and other methods a number of edges" in err


def test_masks_are_learnt_and_edges_ablated_by_zero(capsys, tmp_path):
    words = ("--method", "hard-concrete", "--steps", 3, "--n-edges", 20, "--value", "zero", "--out", tmp_path, "--json")
    code, out, _ = run(capsys, "discover", *ASKED, *words)
    assert code == 0
    said = json.loads(out)
    assert (said["n_edges"], said["found"]["steps"], said["facts"]["value"]) == (20, 3, "zero: nothing")
    path = tmp_path / "circuit.npz"
    code, out, _ = run(capsys, "evaluate", *ASKED, "--circuit", path, "--value", "zero", "--random", 0, "--json")
    assert json.loads(out)["notes"] == []
    code, _, err = run(capsys, "discover", *ASKED, "--value", "mean", "--out", tmp_path)
    assert code == 2
    assert "scores by gradients are those of the source's values" in err


def test_points_positions_and_bounds_are_options(capsys, tmp_path):
    words = ("attribute", *ASKED, "--method", "eap-ig", "--steps", 2, "--rule", "eap-ig", "--positions")
    code, _, _ = run(capsys, *words, "--out", tmp_path)
    assert code == 0
    scores = EdgeScores.load(tmp_path / "edges.npz")
    assert scores.provenance["points"] == "2 points from the corrupted end"
    assert scores.provenance["facts"]["positions"] == "each aligned column by itself"
    words = ("attribute", *ASKED, "--site", "z", "--over", "layer", "--confirm", 1, "--at-most", 2, "--delta", 0.3)
    code, out, _ = run(capsys, *words, "--out", tmp_path, "--json")
    found = Confirmation.load(tmp_path / "z-confirmed.npz")
    assert found.provenance["delta"] == 0.3
    assert int(found.is_top.sum()) == 1
    assert json.loads(out)["confirmed"]["z"]["missed_at_most"] <= 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--site", "z", "--positions"), "--positions is for edges, and nodes are asked for"),
        (("--over", "layer"), "--over is for nodes, and edges are asked for"),
        (("--delta", 0.1), "--at-most and --delta say how scores are confirmed, and none are"),
        (("--at-most", 0), "--at-most and --delta say how scores are confirmed, and none are"),
    ],
)
def test_options_of_another_kind_are_refused(capsys, words, problem):
    code, _, err = run(capsys, "attribute", *ASKED, *words)
    assert code == 2
    assert problem in err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--method", "greedy", "--n-edges", 12), {"method": "greedy by importance", "n_edges": 12}),
        (("--by", "magnitude", "--n-edges", 12), {"method": "top by magnitude", "n_edges": 12}),
        (("--method", "acdc", "--threshold", 0.5), {"method": "acdc", "threshold": 0.5}),
        (("--method", "ugs", "--steps", 2, "--n-edges", 12), {"method": "ugs", "steps": 2}),
        (("--method", "sigmoid-topk", "--steps", 2, "--n-edges", 12), {"method": "sigmoid-topk", "steps": 2}),
    ],
)
def test_circuits_are_found_by_every_method(capsys, tmp_path, words, found):
    code, out, _ = run(capsys, "discover", *ASKED, "--scores", "eap", *words, "--out", tmp_path, "--json")
    assert code == 0
    said = json.loads(out)
    assert {name: said["found"][name] for name in found} == found
    circuit = Circuit.load(tmp_path / "circuit.npz")
    assert circuit.n_edges == said["n_edges"] == (12 if "--n-edges" in words else circuit.n_edges) > 0
    assert (tmp_path / "circuit.svg").is_file()
    drawn = json.loads((tmp_path / "circuit.json").read_text(encoding="utf-8"))["datasets"]
    assert circuit.n_edges in {len(rows) for rows in drawn.values()}


def test_without_a_circuit_all_sizes_are_evaluated(capsys, tmp_path):
    words = ("--scores", "eap", "--random", 1, "--out", tmp_path)
    code, out, _ = run(capsys, "evaluate", *ASKED, *words)
    assert code == 0
    found = Evaluation.load(tmp_path / "evaluation.npz")
    circuits = [each for each in found.runs if each["kind"] == "circuit"]
    assert {each["order"] for each in circuits} == {"importance", "magnitude"}
    assert len(circuits) == 20
    assert "by importance: CPR" in out
    assert "by magnitude: CMD" in out
    assert "tests of Shi et al." in out
    code, out, _ = run(capsys, "evaluate", *ASKED, *words[:-2], "--json")
    (last,) = [row for row in json.loads(out)["circuits"] if row["order"] == "importance" and row["fraction"] == 1]
    assert last["f"] == pytest.approx(1)
    assert last["smallest_dependence"] == pytest.approx(1 / 24)  # four pairs that share nothing
    assert last["p_non_equivalence"] == found.hypotheses()["p_non_equivalence"].iloc[9]
