import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import MetricError
from causalpatch.engine import Gauge, check_answers
from causalpatch.pairs import Pair, Pairs
from toys import Chain, opened, prompts, vectors
from worlds import tiny_world

MODEL, PLAIN = tiny_world("mistral", (2, 4, 2, 0))
PAIRS = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([8, 9], [8, 11]))


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("position", [-1, -2, 0, 1])
def test_a_metric_reads_the_real_token_that_it_names(padding_side, position):
    experiment = cp.Experiment(MODEL, PAIRS, f"logit_difference@{position}", padding_side=padding_side)
    for side, got in (("clean", experiment.baseline.clean), ("corrupt", experiment.baseline.corrupt)):
        for number, pair in enumerate(PAIRS):
            logits = PLAIN.logits(pair.input(side))[position]
            assert got[0, number] == pytest.approx((logits[5] - logits[6]).item())


def test_a_token_that_a_prompt_does_not_have_cannot_be_read():
    for position in (2, -3):
        with pytest.raises(MetricError, match=f"reads token {position}, which pair 1 does not have"):
            _ = cp.Experiment(MODEL, PAIRS, f"logit_difference@{position}").baseline


def test_answers_outside_the_vocabulary_are_refused_with_the_pair():
    check_answers(PAIRS, 40, "tiny")
    bad = Pairs([*PAIRS, Pair([3, 4], [5, 4], ((40,),), ((6,),))], name="bad")
    with pytest.raises(MetricError, match="answer 40 of pair 2 of 'bad' is not an output of"):
        check_answers(bad, 40, "tiny")
    with pytest.raises(MetricError, match="answer 40 of pair 2"):
        cp.Experiment(MODEL, bad)


def test_forks_are_the_answers_of_several_tokens_of_metrics_that_spell():
    several = Pairs(
        [Pair([3, 4], [5, 4], ((6, 7), (8,)), ((9,),)), Pair([3], [5], ((6,),), ((9, 1, 2),))], name="several"
    )
    gauge = Gauge([cp.log_probability_difference], several, MODEL)
    assert gauge.forks == [("answer", 0), ("answer", 1), ("wrong_answer", 0)]
    assert gauge.continuations("answer", 0, np.array([0, 1, 0])) == [[6], [], [6]]
    assert gauge.continuations("answer", 1, np.array([0, 1])) == [[], []]
    assert gauge.continuations("wrong_answer", 0, np.array([1, 0])) == [[9, 1], []]
    assert Gauge([cp.kl_divergence], several, MODEL).forks == []


def test_models_that_are_not_text_are_read_whole():
    model, pairs = opened(Chain()), vectors(4)
    first = cp.metric(lambda outputs, pairs: outputs.logits[:, 0], name="first")
    got = cp.Experiment(model, pairs, first).baseline.clean[0]
    with torch.no_grad():
        wanted = model.module.eval()(torch.tensor(pairs.batch("clean").values))[:, 0]
    np.testing.assert_allclose(got, wanted.numpy())
