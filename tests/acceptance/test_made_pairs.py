"""Entity-disjoint pairs of what a trained model does, made from templates and answered right by plain forwards."""

from pathlib import Path

import pytest
import torch

import causalpatch as cp
from causalpatch.testing.stories import BEHAVIOURS, templates


@pytest.mark.slow
@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_templates_give_forty_independent_pairs_that_are_answered_right(behaviour, shared: Path):
    model = cp.open_model(shared / "models" / "stories260k")
    made = cp.make_pairs(
        None, model, templates=templates(behaviour), tries=2, entity_disjoint=True, first_token=True, name=behaviour
    )
    assert made.n_components == len(made.pairs) >= 40
    assert len({pair.extra["template"] for pair in made.pairs}) >= 6
    entities = [name for pair in made.pairs for name in pair.entities]
    assert len(entities) == len(set(entities)) == 2 * len(made.pairs)
    for pair in made.pairs:
        ((right,),), ((wrong,),) = pair.answer, pair.wrong_answer
        with torch.no_grad():
            clean, corrupt = (model.module(torch.tensor(ids)[None]).logits[0, -1] for ids in (pair.clean, pair.corrupt))
        assert clean[right] > clean[wrong]
        assert corrupt[wrong] > corrupt[right]
