"""Pairs that hang together are one observation in the statistics of effects."""

import causalpatch as cp
from causalpatch.testing.tiny import tiny_model

ANSWERS = {"answer_id": 8, "wrong_answer_id": 9}


def test_pairs_that_share_a_prompt_are_counted_as_one():
    model = cp.open_model(tiny_model("llama"))
    shared = [{"clean": [3, 4], "corrupt": [3, number], **ANSWERS} for number in range(10, 16)]
    alone = [{"clean": [5, number], "corrupt": [6, number], **ANSWERS} for number in range(10, 13)]
    pairs = cp.load_pairs([*shared, *alone], model)
    effects = cp.Experiment(model, pairs).run(["resid_pre.1@-1"])
    assert effects.to_xarray()["component"].values.tolist() == [0] * 6 + [1, 2, 3]
    assert effects.n_components == 4
