"""A trained language model, against numbers made by plain forward hooks without this library."""

import json
from pathlib import Path

import numpy as np
import pytest

import causalpatch as cp

BEHAVIOURS = ("name_copy", "object_copy", "pronoun")


@pytest.fixture(scope="module")
def model(shared: Path) -> cp.Model:
    return cp.open_model(shared / "models" / "stories260k")


@pytest.fixture(scope="module")
def pairs(shared: Path, model: cp.Model) -> cp.Pairs:
    return cp.load_pairs(shared / "models" / "stories260k" / "pairs.jsonl", model)


@pytest.fixture(scope="module")
def reference(shared: Path) -> dict[str, dict]:
    made = json.loads((shared / "reference" / "stories260k_heads.json").read_text())
    assert (made["site"], made["direction"]) == ("z@-1", "denoise")
    return made["layer_by_head"]


def changed_tokens(pairs: cp.Pairs) -> cp.Pairs:
    """Align the pairs at the tokens that differ, so that a site without a position means these together."""
    return pairs.align("map", mapping=[[(i, i) for i in np.flatnonzero(p.clean != p.corrupt)] for p in pairs])


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_every_head_recovers_what_plain_hooks_measured(behaviour, model, pairs, reference):
    chosen = pairs.where(behaviour=behaviour)
    effects = cp.sweep(cp.Experiment(model, chosen, metric="logit_difference", direction="denoise"), "z@-1")
    recovered = effects.recovered()
    assert recovered.dims == ("layer", "head")
    assert recovered.shape == (5, 8)
    assert len(chosen) == reference[behaviour]["n_pairs"]
    np.testing.assert_allclose(recovered.values, reference[behaviour]["recovered"], rtol=0, atol=5e-6)
    assert recovered.attrs["mean_gap"] == pytest.approx(reference[behaviour]["mean_gap"], abs=1e-5)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_stream_at_the_changed_tokens_carries_the_behaviour_into_layer_3(behaviour, model, pairs):
    chosen = changed_tokens(pairs.where(behaviour=behaviour))
    assert all((pair.clean != pair.corrupt).any() for pair in chosen)
    experiment = cp.Experiment(model, chosen)
    recovered = experiment.run([f"resid_pre.{layer}" for layer in range(4)]).recovered().values
    assert recovered[0] == pytest.approx(1.0, abs=1e-5)  # the embeddings of all that differs
    assert (recovered >= 0.9).all()


def test_the_behaviours_reach_the_last_token_in_the_last_layer_only(model, pairs):
    chosen = pairs.where(behaviour="name_copy")
    recovered = cp.Experiment(model, chosen).run(["resid_pre.4@-1", "resid_post.4@-1"]).recovered().values
    assert abs(recovered[0]) <= 0.04
    assert recovered[1] == pytest.approx(1.0, abs=1e-5)


def test_few_components_give_values_but_no_interval(model, pairs):
    chosen = pairs.where(behaviour="name_copy")
    top = cp.Experiment(model, chosen).run(["z.4.4@-1"]).summary()
    assert top["recovered"][0] == pytest.approx(0.983, abs=1e-3)
    assert np.isnan([top["low"][0], top["high"][0]]).all()
    assert any("too few independent groups: 5" in note for note in top.attrs["notes"])
