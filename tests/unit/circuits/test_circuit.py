"""Circuits as sets of edges: what they hold, what lies on a way through them, and their files."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch import Circuit
from causalpatch.circuits.circuit import inputs_of
from causalpatch.sites.graph import Graph
from causalpatch.testing.tiny import tiny_model

RECORD = {
    "model": {"name": "made up", "hash": ""},
    "found": {"method": "given"},
    "facts": {"circuit": "circuit: its edges intact, all others ablated"},
}


def circuit(graph, *edges):
    return Circuit(graph, graph.mask(edges), RECORD)


def on_a_way(graph, mask):
    """Edges on some path from the embedding to the logits, by walking all paths."""
    into = inputs_of(graph)
    found = set()

    def walk(receiver, path):
        for sender in np.flatnonzero(mask[:, receiver]).tolist():
            longer = [*path, (sender, receiver)]
            if sender == 0:
                found.update(longer)
            for before in into[sender]:
                walk(before, longer)

    walk(graph.logits, [])
    return found


@pytest.mark.parametrize("graph", [Graph(2, 2), Graph(2, 2, is_parallel=True)])
def test_what_is_connected_lies_on_a_path(graph):
    rng = np.random.default_rng(1)
    for share in (0.1, 0.2, 0.4):
        mask = graph.exists & (rng.random(graph.shape) < share)
        kept = Circuit(graph, mask, RECORD).connected()
        assert {tuple(edge) for edge in np.argwhere(kept.mask).tolist()} == on_a_way(graph, mask)


def test_inputs_of_components_are_named_after_them():
    graph = Graph(3, 2)
    for sender, receivers in enumerate(inputs_of(graph)):
        name = graph.sender_label(sender)
        assert {graph.receiver_label(each).partition("<")[0] for each in receivers} <= {name}
        assert len(receivers) == (0 if name == "embed" else 1 if name.startswith("m") else 3)


def test_a_circuit_knows_its_edges_and_the_rest():
    graph = Graph(2, 2)
    some = circuit(graph, "embed -> a0.h1<v>", "m0 -> logits")
    assert (len(some), some.n_edges, some.fraction) == (2, 2, 2 / graph.n_edges)
    assert some.edges() == ["embed -> a0.h1<v>", "m0 -> logits"]
    assert some.nodes() == ["embed", "m0"]
    assert "m0 -> logits" in some
    assert "m1 -> logits" not in some
    rest = some.complement()
    assert rest.n_edges == graph.n_edges - 2
    assert not (rest.mask & some.mask).any()
    assert rest.facts["circuit"].startswith("complement")
    assert rest.complement().facts == some.facts
    with pytest.raises(ValueError, match="read-only"):
        some.mask[0, 0] = True


def test_a_circuit_prints_its_facts_and_some_edges():
    some = circuit(Graph(1, 1), "embed -> logits")
    text = str(some)
    assert repr(some) == "Circuit(1 of 8 edges, 12.5%; given; 'made up')"
    assert text.startswith(repr(some))
    assert text.endswith("    embed -> logits")
    many = Circuit(Graph(2, 2), Graph(2, 2).exists, RECORD)
    assert str(many).endswith(f"… and {many.n_edges - 12} more")


def test_a_file_gives_the_circuit_back(tmp_path):
    graph = Graph(2, 2, is_parallel=True)
    some = circuit(graph, "embed -> a0.h1<v>", "m0 -> logits")
    back = Circuit.load(some.save(tmp_path / "new" / "circuit.npz"))
    assert back.graph == graph
    np.testing.assert_array_equal(back.mask, some.mask)
    assert back.record == some.record


def test_edges_of_a_model_are_named():
    model = cp.open_model(tiny_model("gpt2"))
    some = Circuit.of(model, ["m0 -> logits"], nodes=["a1.h0"])
    assert some.edges() == ["m0 -> logits", "a1.h0 -> m1", "a1.h0 -> logits"]
    assert some.facts["direction"] == "noise"
    some.require(model)
