"""A character-level Llama from another repository opens with nothing but its folder."""

from pathlib import Path

import numpy as np
import pytest

import causalpatch as cp

FOLDER = Path("models") / "babyllama-105"


@pytest.fixture(scope="module")
def model(shared: Path) -> cp.Model:
    return cp.open_model(shared / FOLDER)


@pytest.fixture(scope="module")
def pairs(shared: Path, model: cp.Model) -> cp.Pairs:
    return cp.load_pairs(shared / FOLDER / "pairs.jsonl", model)


def test_the_model_opens_with_its_family_and_its_tokenizer(model):
    assert model.family.name == "llama"
    assert not model.is_assumed
    assert model.shape.n_layers == 5
    assert model.shape.units == {"head": 8, "kv_head": 4, "neuron": 352}
    assert model.tokenizer.vocab_size == model.vocab_size == 105


def test_the_tokenizer_reads_characters_and_the_pairs_store_the_same_ids(model, pairs):
    assert pairs.tokens("clean", 0)[:6] == ["<s>", " ", "O", "n", "c", "e"]
    assert all(len(pair.clean) == len(pair.corrupt) == pair.extra["n_tokens"] for pair in pairs)
    assert {model.tokenizer.label(pair.answer[0][0]) for pair in pairs} == {"S", "H"}


def test_the_model_is_right_on_its_pairs(model, pairs):
    assert len(pairs) == 70
    baseline = cp.Experiment(model, pairs).baseline
    assert baseline.right_clean.mean() >= 0.99
    assert baseline.right_corrupt.mean() >= 0.99
    assert baseline.clean.mean() == pytest.approx(3.39, abs=0.01)
    np.testing.assert_allclose(baseline.clean[0], [p.extra["clean_logit_diff"] for p in pairs], rtol=0, atol=2e-3)


def test_grouped_keys_and_values_have_their_own_axis(model, pairs):
    effects = cp.sweep(cp.Experiment(model, pairs[:4]), "v")
    assert effects.dims == ("layer", "kv_head", "pair")
    assert effects.to_xarray()["kv_head_label"].values[1] == "(heads 2-3)"
