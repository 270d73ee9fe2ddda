"""Stability: resampled scores are those of resampled pairs."""

from dataclasses import replace

import numpy as np

import causalpatch as cp
from causalpatch.base.seeds import generator
from causalpatch.pairs import Pairs
from causalpatch.testing.tiny import tiny_model
from scored import scores_of
from toys import prompts

SIZES = (1, 2, 3, 4, 1)  # pairs in each independent group


def uneven():
    """A model and pairs in groups of unequal sizes."""
    group = np.repeat(np.arange(len(SIZES)), SIZES)
    made = prompts(*(([3 * n, 3 * n + 1], [3 * n, 3 * n + 2]) for n in range(len(group))))
    pairs = Pairs([replace(pair, group=str(g)) for pair, g in zip(made, group, strict=True)], name="uneven")
    return cp.Experiment(cp.open_model(tiny_model("gpt2")), pairs, show_progress=False)


def test_resampled_scores_are_those_of_resampled_pairs():
    experiment = uneven()
    graph, ids, group = cp.graph_of(experiment), experiment.pairs.ids, experiment.pairs.components
    table = np.random.default_rng(0).normal(size=(len(ids), graph.n_edges))
    asked = []

    def score(some):
        rows = [ids.index(each) for each in some.pairs.ids]
        asked.append(rows)
        return scores_of(graph, table[rows].mean(0), model=experiment.model)

    def circuit_of(rows):
        return cp.discover_circuit(scores_of(graph, table[rows].mean(0)), 7).mask

    found = cp.stability(experiment, score, 7, n_draws=6)
    assert sorted(row for rows in asked for row in rows) == list(range(len(ids)))
    assert sorted(map(len, asked)) == sorted(SIZES)
    np.testing.assert_array_equal(found.circuit.mask, circuit_of(list(range(len(ids)))))
    draw = generator(0, "stability")
    block = (draw.permutation(len(SIZES)) % len(SIZES))[group]
    masks = []
    for _ in range(6):
        times = draw.multinomial(len(SIZES), np.full(len(SIZES), 1 / len(SIZES)))
        masks.append(circuit_of(np.repeat(np.arange(len(ids)), times[block])))
    np.testing.assert_array_equal(found.share, np.mean(masks, axis=0))
    whole = found.circuit.mask
    np.testing.assert_allclose(found.overlap, [(mask & whole).sum() / (mask | whole).sum() for mask in masks])
    assert found.to_dataframe()["share"].is_monotonic_decreasing
    assert "found again on 6 resamples of 5 blocks of pairs" in str(found)
    assert found.circuit.record["pairs"]["hash"] == experiment.pairs.content_hash


def test_scores_are_told_what_edges_carry():
    experiment, told = uneven(), []
    graph = cp.graph_of(experiment)

    def score(some, value="source"):
        told.append(value)
        return scores_of(graph, np.arange(graph.n_edges, dtype=float), model=some.model)

    cp.stability(experiment, score, 7, n_draws=2, value="zero")
    assert told == ["zero"] * len(SIZES)
    cp.stability(experiment, score, 7, n_draws=2)
    assert told[len(SIZES) :] == ["source"] * len(SIZES)
