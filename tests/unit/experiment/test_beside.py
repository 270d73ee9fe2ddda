"""Runs with further arguments beside their prompts: every engine gives them to the model."""

import numpy as np
import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import PairError
from causalpatch.models import open_model
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import VOCAB, tiny_model


class Seeing(nn.Module):
    """A language model whose embedding a picture is added to, and whose logits a fixed vector."""

    def __init__(self):
        super().__init__()
        self.language = tiny_model("llama")
        self.look = nn.Linear(3, self.language.config.hidden_size, dtype=torch.float64)

    def forward(self, input_ids, attention_mask=None, position_ids=None, pixel_values=None, shift=None):
        embedded = self.language.model.embed_tokens(input_ids) + self.look(pixel_values)[:, None]
        output = self.language(inputs_embeds=embedded, attention_mask=attention_mask, position_ids=position_ids)
        return output.logits if shift is None else output.logits * shift


@pytest.fixture(scope="module")
def seeing():
    torch.manual_seed(0)
    return open_model(Seeing())


@pytest.fixture(scope="module")
def pairs():
    drawn = np.random.default_rng(0)
    made = []
    for length in (4, 6, 5):
        ids = drawn.integers(0, VOCAB, (2, length))
        made.append(Pair(ids[0], ids[1], answer=((3,),), wrong_answer=((7,),), id=str(length)))
    return Pairs(made).with_beside(pixel_values=drawn.standard_normal((2, 3, 3)).tolist()[0])


def by_hand(module, pair, path):
    """Put the clean output of a module into the corrupted run, by plain hooks; return the difference of two logits."""
    kept = []
    part = module.get_submodule(path)

    def run(role):
        ids = torch.tensor(pair.input(role))[None]
        more = {name: torch.tensor(array)[None] for name, array in pair.besides(role).items()}
        logits = module(ids, **more)[0, -1]
        return float(logits[3] - logits[7])

    handle = part.register_forward_hook(lambda _, __, output: kept.append(output))
    run("clean")
    handle.remove()
    handle = part.register_forward_hook(lambda *_: kept[0])
    value = run("corrupt")
    handle.remove()
    return value


@pytest.mark.parametrize("engine", ["reference", "rows", "graph"])
def test_runs_are_given_what_stands_beside_their_prompts(seeing, pairs, engine):
    drawn = np.random.default_rng(1)
    pairs = pairs.with_beside(pixel_values=(drawn.standard_normal((3, 3)), drawn.standard_normal((3, 3))))
    path = "language.model.layers.0.mlp"
    experiment = cp.Experiment(seeing, pairs, cp.logit_difference, engine=engine)
    with torch.no_grad():
        wanted = [by_hand(seeing.module, pair, path) for pair in pairs]
    got = experiment.run([f"module({path}).output"]).to_xarray()["metric"].values.ravel()
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)


def test_what_is_the_same_in_every_run_reaches_the_model(seeing, pairs):
    factor = np.linspace(1, 2, VOCAB)
    plain = cp.Experiment(seeing, pairs, cp.answer_logit).baseline.clean
    scaled = cp.Experiment(seeing, pairs.with_common(shift=factor), cp.answer_logit).baseline.clean
    np.testing.assert_allclose(scaled, plain * factor[3], rtol=1e-12)


def test_answers_are_spelt_out_before_the_same_picture(seeing, pairs):
    several = pairs.with_answers([((3, 5),)] * 3)
    experiment = cp.Experiment(seeing, several, cp.log_probability)
    pair = several[0]
    with torch.no_grad():
        ids = torch.tensor([[*pair.clean.tolist(), 3]])
        picture = torch.tensor(pair.beside["pixel_values"][0])[None]
        logits = seeing.module(ids, pixel_values=picture)[0, -2:].log_softmax(-1)
    assert experiment.baseline.clean[0, 0] == pytest.approx(float(logits[0, 3] + logits[1, 5]), abs=1e-10)


def test_arguments_that_the_forward_does_not_take_are_refused(seeing, pairs):
    assert seeing.further == ("pixel_values", "shift")
    with pytest.raises(PairError, match="an argument 'pixels' that its forward does not take"):
        cp.Experiment(seeing, pairs.with_beside(pixels=np.zeros((3, 3))), cp.logit_difference)
