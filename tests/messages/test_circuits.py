"""Refusals of circuits, of searches for them, and of their evaluation."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import (
    ModelUnsupported,
    NoGap,
    PairError,
    PathError,
    RequestError,
    SettingError,
)
from causalpatch.statistics.areas import areas_under
from causalpatch.testing.tiny import tiny_model
from scored import scores_of
from toys import prompts


@pytest.fixture(scope="module")
def experiment():
    return cp.Experiment(cp.open_model(tiny_model("gpt2")), prompts(([1, 2, 3], [1, 4, 3])), show_progress=False)


@pytest.fixture(scope="module")
def scores(experiment):
    graph = cp.graph_of(experiment)
    return scores_of(graph, np.arange(graph.n_edges), model=experiment.model)


def test_an_empty_circuit_is_not_evaluated(experiment, refuses):
    with refuses(
        RequestError,
        """
        the circuit has no edges
          found by  given
          f         0 by definition: everything is ablated
          fix: take more edges, or a lower threshold
        """,
    ):
        cp.evaluate_circuit(experiment, cp.Circuit.of(experiment))
    with refuses(
        SettingError,
        """
        there are no circuits to evaluate
          fix: evaluate_circuit(experiment, circuit)
        """,
    ):
        cp.evaluate_circuit(experiment, [])


def test_a_circuit_stays_in_its_model(experiment, scores, refuses):
    other = cp.Experiment(cp.open_model(tiny_model("gpt2", seed=1)), experiment.pairs)
    hashes = [each.model.content_hash[:12] for each in (experiment, other)]
    text = f"""
        a circuit is evaluated in the model that it was found in
          circuit of  'GPT2LMHeadModel', weights {hashes[0]}, 110 edges
          given       'GPT2LMHeadModel', weights {hashes[1]}, 110 edges
          fix: open the model it was found in, or name its edges in this one: Circuit.of(model, circuit.edges())
        """
    circuit = cp.discover_circuit(scores, 3)
    for call in (
        lambda: cp.evaluate_circuit(other, circuit),
        lambda: cp.evaluate_circuit(other, scores),
        lambda: cp.completeness(other, circuit),
        lambda: cp.minimality(other, circuit),
    ):
        with refuses(ModelUnsupported, text):
            call()
    moved = cp.Circuit.of(other.model, circuit.edges())
    assert cp.evaluate_circuit(other, moved, n_random=0).values.shape == (2, 1)
    with refuses(
        PathError,
        """
        a mask of edges does not fit: shape (1, 1)
          needed  (11, 27): senders, receivers
          fix: make it by graph.mask([...])
        """,
    ):
        cp.Circuit(scores.graph, np.ones((1, 1)), circuit.record)


def test_sizes_lie_within_the_graph(experiment, scores, refuses):
    n = scores.graph.n_edges
    for call, text in (
        (
            lambda: cp.discover_circuit(scores, n + 1),
            f"""
            a circuit of {n + 1} edges is larger than the graph
              edges         {n}
              with a score  {n}
              fix: n_edges={n}, or fewer
            """,
        ),
        (
            lambda: cp.discover_circuit(scores),
            f"""
            a circuit has a number of edges or a share of them
              edges  {n}
              fix: n_edges=20
            """,
        ),
        (
            lambda: cp.discover_circuit(scores, 0),
            f"""
            n_edges=0 is no size of a circuit
              edges              {n}
              smallest fraction  {1 / n:.2g}
              fix: n_edges=20
            """,
        ),
        (
            lambda: cp.discover_circuit(scores, fraction=0.0001),
            f"""
            fraction=0.0001 is no size of a circuit
              edges              {n}
              smallest fraction  {1 / n:.2g}
              fix: n_edges=20
            """,
        ),
        (
            lambda: cp.evaluate_circuit(experiment, scores, fractions=(0.5, 2)),
            """
            2 is no share of the edges
              allowed  above 0, at most 1
              fix: leave fractions= out for the usual ten
            """,
        ),
        (
            lambda: cp.acdc(experiment, 0),
            """
            threshold=0 is no number above 0
              fix: threshold=0.01
            """,
        ),
    ):
        with refuses(SettingError, text):
            call()


def test_the_greedy_search_ends_where_edges_have_no_score(scores, refuses):
    graph = scores.graph
    values = np.full(graph.n_edges, np.nan)
    values[:5] = 1
    logits = [n for n, (_, receiver) in enumerate(graph.edges.tolist()) if receiver == graph.logits]
    values[logits[0]] = 1
    n = int(np.isfinite(values).sum())
    with refuses(
        SettingError,
        f"""
        only 1 edges with a score lead to the logits
          asked for  {n}
          fix: n_edges=…, or method="top"
        """,
    ):
        cp.discover_circuit(scores_of(graph, values), n, method="greedy")


def test_importance_needs_a_gap_and_f_too(experiment, scores, refuses):
    same = scores_of(scores.graph, np.ones(scores.graph.n_edges), base=1.0, source=1.0)
    with refuses(
        NoGap,
        """
        base and source runs have the same mean metric, so that importance is not defined
          mean  1
          fix: use scores.score(), or pairs on which the metric differs
        """,
    ):
        cp.discover_circuit(same, 3)
    alike = cp.Experiment(experiment.model, prompts(([1, 2, 3], [1, 2, 3])), show_progress=False)
    found = cp.evaluate_circuit(alike, cp.discover_circuit(scores, 3), n_random=0)
    clean = f"{found.clean.mean():.4g}"
    with refuses(
        NoGap,
        f"""
        clean and reference runs have no gap in 'logit_difference', so no share of it can be given
          clean      {clean} (mean of 1 pairs)
          reference  {clean}
          gap        {(found.clean - found.empty).mean():.4g}
          fix: read evaluation.values instead, or choose pairs that the model tells apart (pairs.check())
        """,
    ):
        found.f()


def test_held_out_pairs_share_nothing_with_those_it_was_found_on(experiment, scores, refuses):
    with refuses(
        PairError,
        """
        'prompts' is not independent of the pairs that the circuit was found on
          shared  prompts, entities or groups in 1 independent components
          fix: found_on, held_out = pairs.split()
        """,
    ):
        cp.evaluate_circuit(experiment, scores, found_on=prompts(([1, 4, 3], [1, 5, 3])))


def test_areas_need_a_curve(experiment, scores, refuses):
    found = cp.evaluate_circuit(experiment, cp.discover_circuit(scores, 3), n_random=0)
    with refuses(
        SettingError,
        """
        no circuits found by 'importance' were evaluated
          known  top by importance
          fix: areas('top by importance')
        """,
    ):
        _ = found.cpr
    with refuses(
        SettingError,
        """
        an area needs the curve of one method at two sizes or more, which rise
          sizes  0.5
          fix: evaluate the scores that circuits are taken from: evaluate_circuit(experiment, scores)
        """,
    ):
        areas_under([0.5], [1.0])


def test_searches_for_bounds_try_something(experiment, scores, refuses):
    circuit = cp.discover_circuit(scores, 3)
    with refuses(
        SettingError,
        """
        there are no random edges to compare those of the circuit with
          random     100
          quantile   0.9
          left over  0
          fix: n_random=100, quantile=0.9, and a circuit that leaves edges over
        """,
    ):
        cp.minimality_test(experiment, cp.discover_circuit(scores, fraction=1.0))
    with refuses(
        SettingError,
        """
        no sets of edges are to be tried
          fix: n_random=40
        """,
    ):
        cp.completeness(experiment, circuit, n_random=0, n_steps=0)
    with refuses(
        SettingError,
        """
        pairs cannot be resampled in 1 blocks
          components  1
          needed      4 or more
          fix: take more independent pairs
        """,
    ):
        cp.stability(experiment, lambda _: scores, 3)
    with refuses(
        SettingError,
        """
        'attribute_edges' does not ask what ablated edges carry
          value     'zero'
          asked by  learn_edges, and functions with an argument value=
          fix: leave value= out, or stability(experiment, lambda e, value: learn_edges(e, value=value), …)
        """,
    ):
        cp.stability(experiment, cp.attribute_edges, 3, value="zero")


def test_sets_of_edges_are_masks_of_0_and_1_that_name_some(experiment, refuses):
    exists = cp.graph_of(experiment).exists
    with refuses(
        PathError,
        """
        a mask of edges holds more than 0 and 1
          why  an edge is interchanged or not; there are no shares of one
          fix: mask > 0.5
        """,
    ):
        cp.patch_edges(experiment, exists * 0.5)
    for empty, name in ((exists & False, "mask 0"), ([["m0 -> logits"], []], "set 1")):
        with refuses(
            PathError,
            f"""
            {name} names no edge
              empty  1 of {1 if name == "mask 0" else 2}
              fix: leave it out: the base run is experiment.baseline
            """,
        ):
            cp.patch_edges(experiment, empty)


def test_circuits_may_come_one_after_the_other(experiment):
    circuit = cp.Circuit.of(experiment, ["m0 -> logits"])
    assert len(cp.evaluate_circuit(experiment, (each for each in (circuit,)), n_random=0).runs) == 2


def test_numbers_are_whole_or_above_nothing(experiment, scores, refuses):
    circuit = cp.discover_circuit(scores, 3)
    for call, name, value, rest in (
        (lambda: cp.discover_circuit(scores, -2), "n_edges", -2, ("1", "20")),
        (lambda: cp.learn_edges(experiment, steps=0), "steps", 0, ("1", "300")),
        (lambda: cp.evaluate_circuit(experiment, circuit, n_random=-3), "n_random", -3, ("0", "20")),
        (lambda: cp.stability(experiment, cp.attribute_edges, 3, n_draws=0), "n_draws", 0, ("1", "200")),
        (lambda: cp.minimality_test(experiment, circuit, n_random=0), "n_random", 0, ("1", "100")),
        (lambda: cp.attribute(experiment, "z").confirm(-1), "top", -1, ("0", "50")),
        (lambda: cp.attribute(experiment, "z").confirm(1, at_most=-1), "at_most", -1, ("0", "20")),
    ):
        least, usual = rest
        with refuses(
            SettingError,
            f"""
            {name}={value} is no whole number from {least} on
              fix: {name}={usual}
            """,
        ):
            call()
    for call, name, value, usual in (
        (lambda: cp.learn_edges(experiment, rate=float("inf")), "rate", "inf", "0.1"),
        (lambda: cp.evaluate_circuit(experiment, circuit, n_random=0).equivalence(delta=-1), "delta", "-1", "0.1"),
        (lambda: cp.acdc(experiment, -0.1), "threshold", "-0.1", "0.01"),
    ):
        with refuses(
            SettingError,
            f"""
            {name}={value} is no number above 0
              fix: {name}={usual}
            """,
        ):
            call()


def test_means_have_a_value_for_every_token(experiment, refuses):
    """Held-out prompts that are longer than those that means are of, before anything is run."""
    longer = prompts(([1, 2, 3, 7, 8], [1, 4, 3, 7, 9]))
    circuit = cp.Circuit.of(experiment, ["m0 -> logits"])
    other = cp.Experiment(experiment.model, longer, show_progress=False)
    text = """
        'prompts' has longer prompts than the pairs that means are of
          longest             5 tokens
          where means are of  3 tokens
          fix: take one mean over all positions: value="mean(over=positions)"
        """
    with refuses(PairError, text):
        cp.evaluate_circuit(other, circuit, n_random=0, value="mean", found_on=experiment.pairs)
    with refuses(PairError, text):
        cp.completeness(experiment, circuit, longer, value="mean")
    found = cp.evaluate_circuit(
        other, circuit, n_random=0, value="mean(over=positions)", found_on=prompts(([4, 5, 6], [4, 9, 6]))
    )
    assert np.isfinite(found.values).all()


def test_masks_of_every_kind_and_none(experiment, refuses):
    exists = cp.graph_of(experiment).exists
    masks = torch.as_tensor(exists)
    whole = cp.patch_edges(experiment, masks).effect().values
    for same in (masks.to(torch.bfloat16), masks.long(), exists.astype(float)):
        np.testing.assert_array_equal(cp.patch_edges(experiment, same).effect().values, whole)
    for wrong in (np.array(["m0 -> logits"]), np.ones((2, 3))):
        with pytest.raises(PathError, match="a mask of edges does not fit"):
            cp.patch_edges(experiment, wrong)
    with pytest.raises(PathError, match="there are no edges to interchange"):
        cp.patch_edges(experiment, exists[None][:0])
