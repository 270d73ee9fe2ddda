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


# What a function of all positions may make of padding without a NaN coming out.
WHOLE = {
    "mean": lambda outputs, pairs: outputs.logits.mean((1, 2)),
    "mean where the mask is true": lambda outputs, pairs: (
        outputs.logits.mean(-1).masked_fill(~outputs.mask, 0).sum(1) / outputs.mask.sum(1)
    ),
    "share of tokens": lambda outputs, pairs: (outputs.logits[:, :, 5] > 0).double().mean(1),
    "share of tokens whose best is 5": lambda outputs, pairs: (outputs.logits.argmax(-1) == 5).double().mean(1),
    "mean without NaN": lambda outputs, pairs: outputs.logits[:, :, 5].nan_to_num().mean(1),
    "best at the last column": lambda outputs, pairs: outputs.logits[:, -1].argmax(-1).double(),
    "columns": lambda outputs, pairs: torch.full((len(pairs),), outputs.logits.shape[1], dtype=torch.float64),
    "distance": lambda outputs, pairs: (outputs.logits[:, -1] - outputs.reference("source")).square().sum(1),
}
METRICS = [cp.metric(function, name=name, compares=("source",)) for name, function in WHOLE.items()]


def measured(**settings):
    effects = cp.Experiment(MODEL, UNEVEN, METRICS, **settings).run(["resid_pre.0@0", "resid_pre.1"])
    return effects.to_xarray()["metric"].values


@pytest.mark.parametrize("engine", ["rows", "restart", "wavefront"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("budget_gib", [None, 1e-9])
def test_padding_never_comes_into_a_number(engine, padding_side, budget_gib):
    lengths = UNEVEN.lengths("corrupt")
    assert len(set(lengths.tolist())) > 1
    alone = measured(engine="reference")
    assert (alone[list(WHOLE).index("columns")] == lengths).all()
    got = measured(engine=engine, padding_side=padding_side, budget_gib=budget_gib)
    assert np.abs(got - alone).max() < 1e-10


@pytest.mark.parametrize("engine", ["reference", "rows", "restart", "wavefront"])
def test_a_metric_that_names_a_position_reads_no_other_on_any_engine(engine):
    metrics = [cp.metric(lambda outputs, pairs: outputs.logits[:, -1, 5], name="one", position=-1), METRICS[0]]
    with pytest.raises(MetricError, match="metric that names a position reads"):
        cp.Experiment(MODEL, UNEVEN, metrics, engine=engine).run("resid_pre.1")


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
