"""Refusals of metrics: what is none, and what returns something else than one number per pair."""

from dataclasses import replace

import torch

import causalpatch as cp
from causalpatch.base.errors import MetricError


def test_an_unknown_metric_is_answered_with_the_closest(refuses, llama, pairs):
    with refuses(
        MetricError,
        """
        there is no metric 'logit_diff'
          metrics  logit_difference, log_probability, log_probability_difference, probability,
                   probability_difference, answer_logit, rank, top1, cross_entropy, kl_divergence,
                   kl_from_base, cosine, generated_answer
          fix: did you mean logit_difference?
        """,
    ):
        cp.Experiment(llama, pairs, metric="logit_diff")


def test_a_metric_must_return_one_number_per_row(refuses, llama, pairs):
    whole = cp.metric(lambda outputs, pairs: outputs.distribution, name="whole", position=-1)
    with refuses(
        MetricError,
        """
        metric 'whole' did not return one number per row
          returned  shape (2, 40)
          needed    shape (2,)
          fix: return a tensor with one entry per row of outputs.logits
        """,
    ):
        cp.Experiment(llama, pairs, metric=whole).run(["z.0.1"])


def test_a_metric_must_return_a_tensor(refuses, llama, pairs):
    one = cp.metric(lambda outputs, pairs: 1.0, name="one", position=-1)
    with refuses(
        MetricError,
        """
        metric 'one' did not return one number per row
          returned  float
          needed    shape (2,)
          fix: return a tensor with one entry per row of outputs.logits
        """,
    ):
        cp.Experiment(llama, pairs, metric=one).run(["z.0.1"])


def test_a_metric_reads_a_token_that_every_prompt_has(refuses, llama, pairs):
    with refuses(
        MetricError,
        """
        metric 'logit_difference@-5' reads token -5, which pair 0 does not have
          prompt  4 tokens
          fix: read a position that every prompt has, such as -1
        """,
    ):
        cp.Experiment(llama, pairs, metric=cp.logit_difference.at(-5)).run(["z.0.1"])


def test_a_metric_declares_the_runs_it_compares_with(refuses, llama, pairs):
    far = cp.metric(lambda outputs, pairs: outputs.reference("base").amax(-1), name="far")
    with refuses(
        MetricError,
        """
        the base run was not kept for this metric
          fix: declare it: metric(…, compares=("base",))
        """,
    ):
        cp.Experiment(llama, pairs, metric=far).run(["z.0.1"])


def test_class_logits_are_needed_where_classes_are_read(refuses):
    model = cp.open_model(torch.nn.Sequential(torch.nn.Conv1d(1, 2, 3)))
    pairs = cp.Pairs.from_arrays([[[0.0] * 4]], [[[1.0] * 4]], [0], [1])
    with refuses(
        MetricError,
        """
        this metric needs class logits
          output  shape (1, 2, 2)
          needed  (row, class)
          fix: measure the output with your own function: metric(lambda outputs, pairs: …)
        """,
    ):
        cp.Experiment(model, pairs).run(["module(0).output"])


def test_whole_answers_are_read_by_a_metric_that_says_so(refuses, llama, pairs):
    answers = [replace(pair, answer=((3, 4, 5),), wrong_answer=()) for pair in pairs]
    long = cp.Pairs(answers, name="long")

    def whole(outputs, pairs):
        return outputs.answer_log_probs("answer").logsumexp(1)

    with refuses(
        MetricError,
        """
        a metric reads whole answers with 3 tokens, and does not say so
          side    answer
          needed  runs that go on through the answers
          fix: declare it: metric(…, answers=("answer",), position=-1)
        """,
    ):
        cp.Experiment(llama, long, metric=[cp.metric(whole, position=-1), "log_probability"]).run(["z.0.1"])
    told = cp.metric(whole, answers=("answer",), position=-1)
    got = cp.Experiment(llama, long, metric=[told, "log_probability"]).run(["z.0.1"]).to_xarray()["metric"].values
    assert (got[0] == got[1]).all()


def test_a_metric_reads_answers_that_are_there(refuses, llama, pairs):
    none = cp.Pairs([replace(pair, wrong_answer=()) for pair in pairs], name="none")
    wrong = cp.metric(lambda outputs, pairs: outputs.answer_logits("wrong_answer").sum(1), name="wrong", position=-1)
    with refuses(
        MetricError,
        """
        a metric reads the wrong_answer of pairs of which none has one
          fix: add a column 'wrong_answer' to the pairs, or measure something else
        """,
    ):
        cp.Experiment(llama, none, metric=wrong).run(["z.0.1"])
