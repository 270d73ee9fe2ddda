"""The benchmark of edges: what is done by hand gives our numbers, and what all edges take follows from a sample."""

import pytest
from benchmarks import edges
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
    assert edges.beside_published(part, "eap", 0.5) == pytest.approx(2 * edges.PUBLISHED["eap"] / 0.5)


def test_what_was_not_run_is_said_to_be():
    results = {"workloads": {}, "memory": {}}
    rows = [row for row in rows_of(results) if "edge" in row.what]
    assert len(rows) == 2
    assert all(row.verdict == "not measured" for row in rows)
    assert "Skipped: **auto-circuit**" in write(results, "python -m benchmarks.run", {}, is_tiny=False)
