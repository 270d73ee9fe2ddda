"""Scores of edges against a slow implementation by hand, and what must not change them."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.testing.tiny import tiny_model
from oracle_edges import EdgePlain, ungrouped
from toys import prompts

torch.set_num_threads(1)

PROMPTS = (
    ([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]),
    ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]),
    ([3, 33, 14, 8, 22, 19], [3, 32, 14, 8, 21, 19]),
)
SHORT = (([4, 6, 15, 8], [4, 7, 16, 8]),)
GROUPED = ("llama", "gemma2", "qwen3")
FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "qwen3", "olmo2", "phi", "granite", "opt")


def experiment_of(family, pairs=PROMPTS, direction="denoise", **more):
    model = cp.open_model(tiny_model(family, kv_heads=2 if family in GROUPED else 4))
    return cp.Experiment(model, prompts(*pairs), direction=direction, **more)


def by_hand(family, pairs=PROMPTS, direction="denoise", shares=(0.0,)):
    """Return the scores of all edges, by receivers' tokens: position, sender, receiver."""
    plain = EdgePlain(ungrouped(family) if family in GROUPED else tiny_model(family, kv_heads=4), family)
    total = 0.0
    for clean, corrupt in pairs:
        base, source = (corrupt, clean) if direction == "denoise" else (clean, corrupt)
        runs = plain.run(base), plain.run(source)
        deltas = plain.deltas(*runs)
        for share in shares:
            embed = runs[0].embed + share * deltas[0]
            slopes = plain.slopes(base, deltas, lambda logits: logits[-1, 5] - logits[-1, 6], embed)
            total = total + slopes / len(shares) / len(pairs)
    return np.asarray(total.movedim(2, 0))


def close(found, wanted, tolerance=1e-5):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_those_of_heads_taken_apart_by_hand(family):
    scores = cp.attribute_edges(experiment_of(family), "eap")
    exists = scores.graph.exists
    wanted = by_hand(family).sum(0)
    assert wanted.shape == scores.graph.shape
    assert not wanted[~exists].any()
    close(scores.values[exists], wanted[exists])
