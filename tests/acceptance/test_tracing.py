"""Causal tracing on a trained model whose mechanism is known: a head of layer 4 copies the name from the subject."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import causalpatch as cp
from worlds import unchecked


@pytest.fixture(scope="module")
def traced(shared: Path):
    model = cp.open_model(shared / "models" / "stories260k", device="cpu")
    pairs = cp.load_pairs(shared / "models" / "stories260k" / "pairs.jsonl", model).where(behaviour="name_copy")
    spans = [tuple(np.flatnonzero(pair.clean != pair.corrupt)[[0, -1]] + [0, 1]) for pair in pairs]
    places = [(int(first), int(last)) for first, last in spans]
    named = [
        dataclasses.replace(pair, spans={"subject": (place, place)}) for pair, place in zip(pairs, places, strict=True)
    ]
    alike = [n for n, pair in enumerate(named) if (len(pair.clean), places[n]) == (21, (14, 17))][:8]
    chosen = cp.Pairs([named[n] for n in alike], name="name_copy", tokenizer=pairs.tokenizer)
    with unchecked():
        return cp.trace(cp.Experiment(model, chosen), span="subject", window=2, kind=("resid", "attn"), draws=2)


@pytest.mark.parametrize("by", ["noise", "pairs"])
def test_the_subject_carries_the_name_up_to_layer_3_and_the_last_token_behind_layer_4(traced, by):
    share = traced[by, "resid"].over_draws().recovered().values
    assert share.shape == (5, 21)
    assert (share[:4, 14] > 0.85).all()
    assert np.abs(share[4, 14:20]).max() < 0.01
    assert np.abs(share[:4, 20]).max() < 0.1
    assert share[4, 20] == pytest.approx(1.0, abs=1e-4)
    assert np.abs(share[:, :14]).max() < 1e-4


@pytest.mark.parametrize("by", ["noise", "pairs"])
def test_attention_of_layer_4_brings_it_to_the_last_token(traced, by):
    share = traced[by, "attn"].over_draws().recovered().values
    # Windows of two layers begin a layer before their middle: that around 4 holds layer 4, that around 3 does not.
    assert share[4, 20] > 0.9
    assert np.abs(share[:4, 20]).max() < 0.1
