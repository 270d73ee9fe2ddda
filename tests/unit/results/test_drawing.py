"""Drawings of circuits: what stands where, and how wide lines are."""

import numpy as np
import pytest

from causalpatch import Circuit, Graph
from scored import scores_of

GRAPH = Graph(3, 2)
EDGES = ["embed -> a0.h1<v>", "a0.h1 -> m1", "a0.h1 -> a2.h0<q>", "a2.h0 -> logits"]
RECORD = {
    "model": {"name": "made up", "hash": ""},
    "found": {"method": "given"},
    "facts": {"circuit": "circuit: its edges intact, all others ablated"},
}


def drawn(scores=None):
    picture = Circuit(GRAPH, GRAPH.mask(EDGES), RECORD).plot(scores)
    return picture, picture.to_dict()["datasets"]


def test_components_that_are_used_stand_in_rows_by_depth():
    picture, sheet = drawn()
    at = {row["name"]: (row["x"], row["y"]) for row in sheet["components"]}
    assert set(at) == {"embed", "logits", "a0.h1", "m1", "a2.h0"}
    assert [at[name][1] for name in ("embed", "a0.h1", "m1", "a2.h0", "logits")] == [0, 1, 2, 3, 4]
    assert at["a0.h1"][0] > at["a2.h0"][0]
    assert set(picture.frame["edge"]) == set(EDGES)


def test_lines_go_from_senders_to_the_input_that_they_reach():
    _, sheet = drawn()
    at = {row["name"]: (row["x"], row["y"]) for row in sheet["components"]}
    rows = {row["edge"]: row for row in sheet["edges"]}
    for row in rows.values():
        assert (row["x"], row["y"]) == at[row["sender"]]
        assert row["y2"] == at[row["component"]][1]
    head = at["a2.h0"][0]
    assert rows["a0.h1 -> a2.h0<q>"]["x2"] < head
    assert rows["embed -> a0.h1<v>"]["x2"] > at["a0.h1"][0]
    assert rows["a0.h1 -> m1"]["x2"] == at["m1"][0]
    assert {row["reads"] for row in rows.values()} == {"values", "queries", "MLP, logits"}


def test_lines_are_as_wide_as_scores_whatever_their_sign():
    values = np.zeros(GRAPH.n_edges)
    names = list(GRAPH.names(GRAPH.edges))
    for edge, value in zip(EDGES, (4, -2, 1, 0), strict=True):
        values[names.index(edge)] = value
    picture, sheet = drawn(scores_of(GRAPH, values))
    width = {row["edge"]: row["width"] for row in sheet["edges"]}
    assert [width[edge] for edge in EDGES] == pytest.approx([1, 0.5, 0.25, 0.08])
    assert sorted(picture.frame["value"]) == [-2, 0, 1, 4]
    svg = picture.to_svg()
    assert f"4 of {GRAPH.n_edges} edges: given" in svg
    assert "queries" in svg
