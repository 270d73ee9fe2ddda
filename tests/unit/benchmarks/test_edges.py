"""The benchmark of edges: what is done by hand gives our numbers, and what all edges take follows from a sample."""

import pytest
from benchmarks import edges, prototypes
from benchmarks.report import write
from benchmarks.targets import rows_of


def test_edges_by_hand_are_ours_and_every_layer_is_sampled():
    part = edges.measure_exact(1, is_tiny=True)
    assert part["difference"] < 1e-6 < part["largest"]
    assert [each["layer"] for each in part["strata"]] == [0, 1, 2, 3]
    assert sum(each["all"] for each in part["strata"]) == part["edges"]
    assert {each["sampled"] for each in part["strata"]} == {13, 26, 2}
    assert [point["edges"] for point in part["growth"]] == [13, 26, 52]  # 5 senders are heard there
    for each in part["strata"]:
        assert set(each["seconds"]) == {edges.OURS, edges.FIXED, edges.SPLIT, edges.HOOKED}


def test_scores_by_hand_are_ours():
    part = edges.measure_scores(1, is_tiny=True)
    assert max(part["differences"].values()) < edges.TOLERANCE
    assert set(part["times"]) == {"eap", "eap-ig", "plain"}
    assert set(part["first"]) == {"eap", "eap-ig"}
    assert len(part["gemm"]) == 1


def test_the_time_of_all_edges_follows_from_the_sample():
    strata = [
        {
            "sampled": 10,
            "all": 40,
            "seconds": {edges.OURS: [6.0, 3.0], edges.FIXED: [1.0, 2.0], edges.SPLIT: [2.0, 9.0]},
        },
        {"sampled": 5, "all": 60, "seconds": {edges.OURS: [2.0], edges.FIXED: [1.0], edges.SPLIT: [3.0]}},
    ]
    growth = [{"edges": 10, "seconds": [3.0, 9.0]}, {"edges": 20, "seconds": [5.0]}, {"edges": 40, "seconds": [12.0]}]
    part = {"edges": 100, "strata": strata, "growth": growth, "gemm": [edges.PUBLISHED_RATE / 2, 1.0]}
    assert edges.per_edge(part) == pytest.approx([0.2, 0.2])
    assert edges.implied(part) == pytest.approx(1.0 + 0.2 * 40 + 0.2 * 60)
    assert edges.times_as_fast(part, edges.SPLIT) == pytest.approx(250 / 21)
    # Fixed 1 s: 0.2, 0.2 and 0.275 s each.
    assert edges.off_proportion(part) == pytest.approx(0.375)
    # On a machine half as fast their code would take twice as long.
    assert edges.by_gemm(part, "eap") == pytest.approx(2 * edges.PUBLISHED["eap"])
    # And where the prototype takes half as long again, so does theirs.
    assert edges.by_prototype(part, "eap") is None
    part["prototype"] = {"eap": [9.0, 1.5 * prototypes.THEN["eap"]]}
    assert edges.by_prototype(part, "eap") == pytest.approx(1.5 * edges.PUBLISHED["eap"])


def test_what_prototypes_print_is_read():
    said = "EAP (157, 445) 0.81 s\nEAP (157, 445) 0.5 s\nEAP-IG (157, 445) 1.75 s\nEAP-IG (157, 445) 1.9 s\n"
    assert prototypes.said_of_scores(said) == {"eap": 0.5, "eap-ig": 1.75}
    said = "dst layer 11: 0.10s for 144 edges = 0.7 ms/edge\nall 31320 qkv edges extrapolated 313s (= 10.0 ms/edge); A"
    assert prototypes.said_of_edges(said) == pytest.approx(313 / 31320)


def test_without_the_prototypes_their_scale_is_left_out_and_said_to_be(tmp_path, monkeypatch):
    assert "one size" in prototypes.why_not(prototypes.SCORES, is_tiny=True)
    monkeypatch.setattr(prototypes, "FOLDER", tmp_path)
    assert "there is no eap_analytic.py" in prototypes.why_not(prototypes.SCORES, is_tiny=False)
    (tmp_path / prototypes.SCORES).touch()
    assert prototypes.why_not(prototypes.SCORES, is_tiny=False) is None
    part = edges.measure_scores(1, is_tiny=True)
    assert "Skipped: the design's prototype" in "\n".join(edges.lines_scores(part | {"date": "today"}))
    rows = rows_of({"workloads": {}, "memory": {}, "edge-scores": part})
    assert [row.is_met for row in rows if edges.BY_PROTOTYPE in row.of] == [None, None]


def test_what_was_not_run_is_said_to_be():
    results = {"workloads": {}, "memory": {}}
    rows = [row for row in rows_of(results) if "edge" in row.what]
    assert len(rows) == 2
    assert all(row.verdict == "not measured" for row in rows)
    assert "Skipped: **auto-circuit**" in write(results, "python -m benchmarks.run", {}, is_tiny=False)
