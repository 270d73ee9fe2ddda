"""How far patches are off: by the lengths of values and by what changes where nothing is asked."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from oracle import Edit
from toys import Chain, opened, vectors
from worlds import random_pairs, tiny_world, unchecked

PAIRS = random_pairs(6, n_pairs=4)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_lengths_and_divergences_are_those_of_raw_hooks(padding_side):
    model, plain = tiny_world("llama", (2, 4, 2, 0))
    vector = np.random.default_rng(0).normal(size=model.width)
    asked = [cp.Patch("resid_pre.1@1", cp.Steer(vector)), cp.Patch("z.0.2@-1", "zero"), "mlp_out.0"]
    with unchecked():
        experiment = cp.Experiment(model, PAIRS, padding_side=padding_side, max_rows=3)
        table = cp.off_distribution(experiment, asked)
    wanted = np.zeros((2, 3, len(PAIRS)))
    for number, pair in enumerate(PAIRS):
        n = len(pair.corrupt)
        stream, z, mlp = (
            plain.value(pair.corrupt, s) for s in (("resid_pre", 1, None), ("z", 0, 2), ("mlp_out", 0, None))
        )
        source = plain.value(pair.clean, ("mlp_out", 0, None))
        edits = [
            (Edit(("resid_pre", 1, None), [1], stream[[1]] + torch.as_tensor(vector)), stream[[1]], 1),
            (Edit(("z", 0, 2), [n - 1], torch.zeros_like(z[[n - 1]])), z[[n - 1]], n - 1),
            (Edit(("mlp_out", 0, None), list(range(n)), source), mlp, 0),
        ]
        base = plain.logits(pair.corrupt).log_softmax(-1)
        for place, (edit, old, first) in enumerate(edits):
            wanted[0, place, number] = float(edit.new.norm(dim=-1).mean() / old.norm(dim=-1).mean())
            new = plain.logits(pair.corrupt, [edit]).log_softmax(-1)
            # The logit difference reads the last token.
            divergence = (base.exp() * (base - new)).sum(-1)[first : n - 1]
            wanted[1, place, number] = float(divergence.mean()) if len(divergence) else np.nan
    np.testing.assert_allclose(table["norm_ratio"], wanted[0].mean(1), rtol=1e-9, atol=1e-12)
    assert np.isnan(table["change_elsewhere"][1])
    np.testing.assert_allclose(table["change_elsewhere"][[0, 2]], wanted[1, [0, 2]].mean(1), rtol=1e-6, atol=1e-12)


def test_what_is_drawn_and_fitted_has_a_distance_too():
    model, _ = tiny_world("gpt2", (2, 4, 2, 0))
    values = ["mean(positions)", "noise", "resample", "interpolate(0.5)", "identity"]
    with unchecked():
        table = cp.off_distribution(
            cp.Experiment(model, PAIRS), [cp.Patch("resid_post.0@-1", value) for value in values]
        )
    assert list(table.columns) == ["intervention", "norm_ratio", "change_elsewhere"]
    assert (table["norm_ratio"] > 0).all()
    assert table["norm_ratio"][4] == pytest.approx(1.0, abs=1e-12)
    assert table["norm_ratio"][1] > 1.5


def test_arrays_have_lengths_but_no_other_tokens():
    model, pairs = opened(Chain()), vectors(4)
    table = cp.off_distribution(cp.Experiment(model, pairs), [cp.Patch("module(first).output", "zero")])
    assert table["norm_ratio"].tolist() == [0.0]
    assert np.isnan(table["change_elsewhere"][0])
