import dataclasses

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import MetricError
from causalpatch.engine import Gauge, check_answers
from causalpatch.metrics import Metric
from causalpatch.pairs import Pair, Pairs
from toys import Chain, opened, prompts, vectors
from worlds import random_pairs, tiny_world

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


UNEVEN = random_pairs(1, lengths="equal")


def means_of_all_columns(outputs, pairs):
    return outputs.logits.mean((1, 2))


def means_of_all_tokens(outputs, pairs):
    return outputs.logits.mean(-1).masked_fill(~outputs.mask, 0).sum(1) / outputs.mask.sum(1)


@pytest.mark.parametrize("engine", ["rows", "restart", "wavefront"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_never_comes_into_a_number(engine, padding_side):
    assert len(set(UNEVEN.lengths("clean").tolist())) > 1
    alone = cp.Experiment(MODEL, UNEVEN, cp.metric(means_of_all_columns), engine="reference").run("resid_pre.1")
    wanted = alone.to_xarray()["metric"].values
    settings = {"engine": engine, "padding_side": padding_side}
    with pytest.raises(MetricError, match="metric 'means_of_all_columns' reads padding") as caught:
        cp.Experiment(MODEL, UNEVEN, cp.metric(means_of_all_columns), **settings).run("resid_pre.1")
    assert "outputs.mask" in str(caught.value)
    got = cp.Experiment(MODEL, UNEVEN, cp.metric(means_of_all_tokens), **settings).run("resid_pre.1")
    assert np.abs(got.to_xarray()["metric"].values - wanted).max() < 1e-10


@pytest.mark.parametrize("engine", ["reference", "rows", "restart", "wavefront"])
def test_a_metric_made_directly_reads_the_vocabulary_and_one_that_reads_answers_nothing_else(engine):
    def surprise(outputs, pairs):
        return outputs.distribution.logsumexp(-1)

    effects = cp.Experiment(MODEL, UNEVEN, Metric("surprise", surprise), engine=engine).run("resid_pre.1")
    known = cp.metric(surprise, position=-1)
    wanted = cp.Experiment(MODEL, UNEVEN, known, engine="reference").run("resid_pre.1")
    assert np.abs(effects.to_xarray()["metric"].values - wanted.to_xarray()["metric"].values).max() < 1e-10
    for metric in (
        Metric("surprise", surprise, columns="answers"),
        dataclasses.replace(cp.logit_difference, function=surprise),
    ):
        with pytest.raises(MetricError, match='columns="answers" reads'):
            cp.Experiment(MODEL, UNEVEN, metric, engine=engine).run("resid_pre.1")
    # Beside another that reads the vocabulary too.
    with pytest.raises(MetricError, match="which holds the whole vocabulary"):
        cp.Experiment(MODEL, UNEVEN, [known, metric], engine=engine).run("resid_pre.1")
