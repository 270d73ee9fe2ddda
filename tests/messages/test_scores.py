"""Refusals of scores and of edges."""

import re

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import (
    MetricError,
    ModelUnsupported,
    NoGap,
    NoGradient,
    PathError,
    SettingError,
    SiteUnsupported,
)
from causalpatch.pairs import Pair, Pairs
from causalpatch.statistics import most_missed
from causalpatch.testing.tiny import tiny_model
from toys import Chain, opened, prompts, vectors


@pytest.fixture(scope="module")
def experiment():
    return cp.Experiment(cp.open_model(tiny_model("gpt2")), prompts(([1, 2, 3], [1, 4, 3])))


def test_a_distance_to_the_base_run_has_no_slope_there(experiment, refuses):
    text = """
        the metric 'kl_from_base' has no slope at the base run, so that all scores would be 0
          why  it compares with the base run, where its slope is taken: it is smallest there
          fix: take a metric that changes there: metric="logit_difference", or method="ig"
        """
    other = experiment.measuring("kl_from_base")
    with refuses(NoGradient, text.replace('"ig"', '"eap-ig"')):
        cp.attribute_edges(other, "eap")
    with refuses(NoGradient, text):
        cp.attribute(other, "z")
    assert np.abs(cp.attribute(other, "z", "ig").values).max() > 0


def test_a_metric_that_is_constant_has_no_slope(experiment, refuses):
    constant = cp.metric(lambda outputs, pairs: outputs.logits.sum((-2, -1)) * 0, name="constant")
    with refuses(
        NoGradient,
        """
        the metric 'constant' has no slope at the base run, so that all scores would be 0
          why  its gradient is 0 at every site that was asked for
          fix: take a metric that changes there: metric="logit_difference", or method="ig"
        """,
    ):
        cp.attribute(experiment.measuring(constant), "z")
    with refuses(
        NoGradient,
        """
        the metric 'constant' has no slope at the base run, so that all scores would be 0
          why  its gradient is 0 at every input of every component
          fix: take a metric that changes there: metric="logit_difference", or method="eap-ig"
        """,
    ):
        cp.attribute_edges(experiment.measuring(constant), "eap")


@pytest.mark.parametrize("name", ["rank", "top1"])
def test_metrics_that_count_have_no_gradient(experiment, refuses, name):
    text = f"""
        no scores can be computed of '{name}': it has no gradient
          such are  rank, top1, and functions that count, compare or detach
          fix: metric="logit_difference", or patch: sweep(experiment, …) measures '{name}'
        """
    with refuses(MetricError, text):
        cp.attribute(experiment.measuring(name), "z")
    with refuses(MetricError, text):
        cp.attribute_edges(experiment.measuring(name))


def test_answers_of_several_tokens_are_not_scored(experiment, refuses):
    pair = Pair(np.array([1, 2, 3]), np.array([1, 4, 3]), ((5, 6),), ((6, 7),), id="pair 0")
    other = cp.Experiment(experiment.model, Pairs([pair], name="long"), "log_probability")
    for call, what in (
        (lambda: cp.attribute(other, "z"), "no scores can be computed of"),
        (lambda: cp.patch_edges(other, ["m0"]), "edges cannot be measured by"),
    ):
        with refuses(
            MetricError,
            f"""
            {what} 'log_probability', which spells out answers of several tokens
              pairs  'long'
              fix: measure the first token: load_pairs(…, first_token=True), or metric="kl_divergence"
            """,
        ):
            call()


def test_steps_and_cells_that_cannot_be_integrated_are_named(experiment, refuses):
    for call, text in (
        (
            lambda: cp.attribute(experiment, "z", "ig", steps=0),
            """
            gradients cannot be integrated in 0 steps
              fix: steps=5
            """,
        ),
        (
            lambda: cp.attribute(experiment, "z", "ig-activations", over="head"),
            """
            'z.*.*' cannot be moved at once along the way of ig-activations: it is in several layers
              axes  head
              fix: walk along the layers: over="layer"
            """,
        ),
    ):
        with refuses(SettingError, text):
            call()


def test_nothing_has_a_gradient_in_inference_mode(experiment, refuses):
    with (
        refuses(
            SettingError,
            """
            scores cannot be computed inside torch.inference_mode(), where nothing has a gradient
              fix: leave it for this call; inside torch.no_grad() they can be computed
            """,
        ),
        torch.inference_mode(),
    ):
        cp.attribute(experiment, "z")


def test_importance_needs_a_sign_and_a_gap(experiment, refuses):
    with refuses(
        SettingError,
        """
        scores by 'atp*' have no sign, so that importance is not defined
          why  they are means of magnitudes
          fix: rank by scores.score(), or take method="atp"
        """,
    ):
        cp.attribute(experiment, "z", "atp*").importance()
    same = cp.Experiment(experiment.model, prompts(([1, 2, 3], [1, 2, 3])))
    mean = same.baseline.clean.mean()
    with refuses(
        NoGap,
        f"""
        base and source runs have the same mean metric, so that importance is not defined
          mean  {mean:.6g}
          fix: use scores.score(), or pairs on which the metric differs
        """,
    ):
        cp.attribute_edges(same, "eap").importance()


def test_edges_take_their_values_from_the_same_model(experiment, refuses):
    older = cp.open_model(tiny_model("gpt2", seed=1))
    other = cp.Experiment(experiment.model, experiment.pairs, source_model=older)
    with refuses(
        ModelUnsupported,
        """
        edges cannot take values from another model's runs
          why  what a head sends depends on its own output projection
          fix: leave source_model= out, or take scores of nodes: attribute(experiment, 'z')
        """,
    ):
        cp.attribute_edges(other)


def test_models_whose_stream_is_no_sum_have_no_edges(refuses):
    with refuses(
        ModelUnsupported,
        """
        'BertForMaskedLM' has no graph of edges
          why     the stream goes through norms, so that it is not the sum of what components add
          needed  heads and MLPs that read a stream and add to it
          fix: take scores of nodes: attribute(experiment, 'resid_pre')
        """,
    ):
        cp.graph_of(cp.open_model(tiny_model("bert")))


def test_attention_that_cannot_be_opened_shows_no_heads_own_keys(refuses):
    other = cp.Experiment(cp.open_model(tiny_model("falcon")), prompts(([1, 2, 3], [1, 4, 3])))
    with refuses(
        ModelUnsupported,
        """
        edges of 'FalconForCausalLM' cannot be scored
          why  heads share keys, and its attention does not let each head's own be seen
          fix: take scores of nodes: attribute(experiment, 'z'), or measure edges: patch_edges(experiment, …)
        """,
    ):
        cp.attribute_edges(other)
    whole = cp.patch_edges(other, cp.graph_of(other.model).exists).to_xarray()["metric"].values
    np.testing.assert_allclose(whole.reshape(-1), other.baseline.clean[0], atol=1e-9)


def test_layers_may_share_their_activation():
    module, other = tiny_model("gpt2"), tiny_model("gpt2")
    module.transformer.h[1].mlp.act = module.transformer.h[0].mlp.act
    found = [
        cp.attribute(cp.Experiment(cp.open_model(each), prompts(([1, 2, 3], [1, 4, 3]))), "z", "relp").values
        for each in (module, other)
    ]
    np.testing.assert_array_equal(*found)


def test_an_activation_that_is_no_module_has_no_rule(refuses):
    module = tiny_model("gpt2")
    for block in module.transformer.h:
        del block.mlp.act
        block.mlp.act = torch.nn.functional.gelu
    experiment = cp.Experiment(cp.open_model(module), prompts(([1, 2, 3], [1, 4, 3])))
    with refuses(
        ModelUnsupported,
        """
        the rules of RelP cannot be applied to 'GPT2LMHeadModel'
          why  the activation of the MLP in 'transformer.h.0' is a function, not a module
          fix: method="atp"
        """,
    ):
        cp.attribute(experiment, "z", "relp")


def test_a_slope_that_is_but_rounding_is_no_slope(experiment):
    """A divergence from the base run that does not say so: its slope is 0 there, but for rounding."""
    with torch.no_grad():
        base = experiment.model.module(torch.tensor([[1, 4, 3]])).logits[0, -1].log_softmax(-1)

    def divergence(outputs, pairs):
        return (base.exp() * (base - outputs.logits[:, -1].log_softmax(-1))).sum(-1)

    other = experiment.measuring(cp.metric(divergence))
    with pytest.raises(NoGradient, match=r"the metric 'divergence' has no slope at the base run") as caught:
        cp.attribute_edges(other, "eap")
    assert re.search(r"why  the largest score is \d\.\de-\d+, of a gap of \d+\.\d+", str(caught.value))
    (note,) = cp.attribute(other, "z").provenance["notes"]
    assert "hardly any slope where it is taken" in note
    assert np.abs(cp.attribute_edges(other, "eap-ig").values[cp.graph_of(other).exists]).max() > 0


def test_two_streams_have_no_one_way_from_input_to_output(refuses):
    model = cp.open_model(tiny_model("t5"))
    ids = [np.array(each) for each in ([3, 4, 5], [3, 6, 5], [7, 8], [7, 9])]
    pair = Pair(ids[2], ids[3], ((3,),), ((4,),), id="pair 0", encoder=Pair(ids[0], ids[1]))
    experiment = cp.Experiment(model, Pairs([pair], name="two streams"))
    for method, what, fix in (
        ("ig", "gradients cannot be integrated from input to input", 'method="ig-activations"'),
        ("relp", "the rules of RelP cannot be applied", 'method="atp"'),
        ("atp*", "layers cannot be dropped one after the other", 'method="atp"'),
    ):
        with refuses(
            ModelUnsupported,
            f"""
            {what} in 'T5ForConditionalGeneration'
              why  it has an encoder and a decoder, each with a stream of its own
              fix: {fix}
            """,
        ):
            cp.attribute(experiment, "encoder/z", method)
    with refuses(
        ModelUnsupported,
        """
        'T5ForConditionalGeneration' has no graph of edges
          why     it has an encoder and a decoder, each with a stream of its own
          needed  heads and MLPs that read a stream and add to it
          fix: take scores of nodes: attribute(experiment, 'resid_pre')
        """,
    ):
        cp.graph_of(model)


def test_what_a_router_chooses_has_no_slope(refuses):
    other = cp.Experiment(cp.open_model(tiny_model("mixtral")), prompts(([1, 2, 3], [1, 4, 3])))
    with refuses(
        SiteUnsupported,
        """
        'router.0' has no score
          why  weights are put in by choosing experts anew, which has no slope
          fix: patch it: sweep(experiment, 'router')
        """,
    ):
        cp.attribute(other, "router")


def test_rules_need_norms_that_are_known(refuses):
    with refuses(
        ModelUnsupported,
        """
        the rules of RelP cannot be applied to 'Chain'
          why  its norms, activations and gates are not known by name
          fix: method="atp"
        """,
    ):
        other = cp.Experiment(opened(Chain()), vectors(), "answer_logit")
        cp.attribute(other, "module(first).output", "relp")


def test_edges_are_named_as_the_graph_names_them(experiment, refuses):
    graph = cp.graph_of(experiment.model)
    for call, text in (
        (
            lambda: graph.parse("a0.h0"),
            """
            'a0.h0' is not an edge
              grammar  SENDER -> RECEIVER
              fix: "a0.h3 -> a2.h1<q>"
            """,
        ),
        (
            lambda: graph.parse("a9.h0 -> m1"),
            """
            there is no 'a9.h0' in this graph
              layers  0 to 1
              fix: name one of these
            """,
        ),
        (
            lambda: graph.parse("m1 -> a0.h0<q>"),
            """
            there is no edge 'm1 -> a0.h0<q>'
              why  'a0.h0<q>' reads the stream before 'm1' adds to it
              fix: name a receiver behind the sender
            """,
        ),
        (
            lambda: graph.parse("z.0 -> m1"),
            """
            'z.0' is not a sender of the graph
              such as  embed  a0.h0  m0
              fix: name one of these
            """,
        ),
        (
            lambda: cp.patch_edges(experiment, np.zeros((2, 2), dtype=bool)),
            """
            a mask of edges does not fit: shape (2, 2)
              needed  (11, 27): senders, receivers
              fix: make it by graph.mask([...])
            """,
        ),
        (
            lambda: cp.patch_edges(experiment, np.ones(graph.shape, dtype=bool)),
            """
            a mask names 'a0.h0 -> a0.h0<q>', which is no edge
              fix: mask & graph.exists
            """,
        ),
        (
            lambda: cp.patch_edges(experiment, []),
            """
            there are no edges to interchange
              fix: patch_edges(experiment, ["m0 -> logits"])
            """,
        ),
    ):
        with refuses(PathError, text):
            call()


def test_scores_are_confirmed_in_their_own_setting(experiment, refuses):
    scores, edges = cp.attribute(experiment, "z"), cp.attribute_edges(experiment, "eap", positions=True)
    other = cp.Experiment(cp.open_model(tiny_model("llama")), experiment.pairs)
    walked = cp.attribute(experiment, "resid_pre")
    shorter = cp.Experiment(experiment.model, prompts(([1, 2], [1, 4])))
    own, given = (each.model.content_hash[:12] for each in (experiment, other))
    with refuses(
        ModelUnsupported,
        f"""
        scores are confirmed in the model that they are of
          of     'GPT2LMHeadModel', weights {own}
          given  'LlamaForCausalLM', weights {given}
          fix: open that model, or score this one
        """,
    ):
        cp.confirm_scores(other, scores)
    for call, text in (
        (
            lambda: cp.confirm_scores(experiment.turned("noise"), scores),
            """
            scores and exact effects are of different directions
              scores      denoise
              experiment  noise
              fix: confirm_scores(experiment.turned("denoise"), scores)
            """,
        ),
        (
            lambda: cp.confirm_scores(experiment.measuring("log_probability"), scores),
            """
            scores and exact effects are of different metrics
              scores      logit_difference
              experiment  log_probability
              fix: confirm_scores(experiment.measuring("logit_difference"), scores)
            """,
        ),
        (
            lambda: cp.confirm_scores(shorter, walked),
            """
            the scores of 'resid_pre.*' stand on another grid than this experiment has
              scores      layer 2 x position 3
              experiment  layer 2 x position 2
              fix: score it by the same experiment, or at a named position: attribute(experiment, 'resid_pre@-1')
            """,
        ),
        (
            lambda: edges.confirm(),
            """
            edges are interchanged at all positions, and these scores tell positions apart
              fix: scores.over_positions().confirm(…)
            """,
        ),
        (
            lambda: cp.Scores(scores.values, scores.coordinates, ["pair 0"], scores.provenance).confirm(),
            """
            scores that were read from a file, or made by hand, do not know their experiment
              fix: name it: cp.confirm_scores(experiment, scores, top=50, random_sample=100)
            """,
        ),
    ):
        with refuses(SettingError, text):
            call()


def test_numbers_to_confirm_are_possible(experiment, refuses):
    scores = cp.attribute(experiment, "z")
    for asked, wrong in (
        ({"delta": -0.1}, "delta=-0.1"),
        ({"top": 0, "random_sample": 0}, "top=0, random_sample=0"),
    ):
        with refuses(
            SettingError,
            f"""
            scores cannot be confirmed with {wrong}
              allowed  0 or more, not both 0
              fix: top=50, random_sample=100
            """,
        ):
            scores.confirm(**asked)
    with refuses(
        SettingError,
        """
        a bound cannot hold with probability 95
          allowed  above .5, below 1
          fix: level=0.95
        """,
    ):
        scores.confirm(level=95)
    with refuses(
        SettingError,
        """
        at_most=-1 is no whole number from 0 on
          fix: at_most=20
        """,
    ):
        scores.confirm(top=2, at_most=-1)
    with refuses(
        SettingError,
        """
        a sample does not belong to its strata
          sizes    [10]
          sampled  [4]
          found    [5]
          fix: give for each stratum its size, how many were drawn, and how many of these were found
        """,
    ):
        most_missed([10], [4], [5])


def test_recall_is_known_within_the_top(refuses):
    model = cp.open_model(tiny_model("gpt2"))
    pairs = prompts(([1, 2, 3], [1, 4, 3]))
    if cp.Experiment(model, pairs).baseline.clean < cp.Experiment(model, pairs).baseline.corrupt:
        pairs = prompts(([1, 2, 3], [1, 4, 3]), answer=6, wrong=5)
    found = cp.attribute(cp.Experiment(model, pairs), "z").confirm(top=3, random_sample=2)
    with refuses(
        SettingError,
        """
        recall at 4 is not known
          top  3 components
          fix: recall_at(3)
        """,
    ):
        found.recall_at(4)
