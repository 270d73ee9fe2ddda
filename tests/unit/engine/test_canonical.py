"""Interventions that are one run."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.engine import Job, Means, targets_of
from causalpatch.engine.canonical import without_repeats
from causalpatch.engine.job import Block
from causalpatch.pairs import Pair, Pairs
from causalpatch.results.status import Status
from causalpatch.testing.tiny import tiny_model
from tiers import assert_agree, run_model
from worlds import random_pairs, tiny_world


def job_of(*interventions: list, n_controls: int = 0) -> Job:
    model = cp.open_model(tiny_model("gpt2"))
    pairs = Pairs([Pair(np.arange(3, 7), np.arange(4, 8), ((5,),), ((6,),))])
    targets = [targets_of(model, cp.Intervention.of(some)) for some in interventions]
    return Job(model, pairs, targets, "corrupt", n_controls=n_controls)


def test_the_stream_out_of_a_layer_is_the_stream_into_the_next():
    asked = ["resid_post.0@1"], ["z.0.1"], ["resid_pre.1@1"], ["resid_post.1@1"]
    job, _, copies = without_repeats(job_of(*asked), Means())
    assert [str(targets[0].site) for targets in job.interventions] == ["resid_pre.1", "z.0.1", "resid_post.1"]
    assert [some.tolist() for some in copies.of] == [[0, 2], [1], [3]]


@pytest.mark.parametrize("heads", [["z.1@2"], [f"z.1.{head}@2" for head in (2, 0, 3, 1)]])
def test_all_heads_of_a_layer_are_what_its_attention_gives(heads):
    asked = heads, ["attn_out.1@2"], ["z.0.1@0", *heads, "mlp_out.0"], ["z.0.1@0", "attn_out.1@2", "mlp_out.0"]
    _, _, copies = without_repeats(job_of(*asked), Means())
    assert [some.tolist() for some in copies.of] == [[0, 1], [2, 3]]


@pytest.mark.parametrize(
    "asked",
    [
        ["z.1.0@2", "z.1.1@2", "z.1.2@2"],
        ["z.1.0@2", "z.1.1@2", "z.1.2@2", "z.1.3@1"],
        ["z.1.0@2", "z.1.1@2", "z.1.2@2", cp.Patch("z.1.3@2", "zero")],
        ["z.1@2", "mlp_out.1@2"],
        [cp.Patch("z.1@2", "zero")],
        ["z.1@2", "module(transformer.h.1.attn).output@2"],
    ],
    ids=["one is missing", "another position", "another value", "more of the layer", "not the source's", "a module"],
)
def test_heads_that_may_differ_from_what_attention_gives_run_by_themselves(asked):
    job, _, copies = without_repeats(job_of(asked, ["attn_out.1@2"]), Means())
    assert len(copies.of) == 2
    assert len(job.interventions[0]) >= len(asked)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_all_heads_and_what_attention_gives_are_measured_as_the_reference_does(family):
    model, _ = tiny_world(family, (3, 4, 2, 0))
    pairs = random_pairs(3, 4)
    sites = ["z.1@2", "attn_out.1@2", cp.Intervention.of(["z.0.1@1", "z.2@-1"]), "z.1", "attn_out.1"]
    assert_agree(run_model("wavefront", model, pairs, sites), run_model("reference", model, pairs, sites))


def test_other_values_positions_and_functions_are_other_runs():
    function = cp.Function(lambda current, source: -current, "flip", needs_source=False)
    again = cp.Function(lambda current, source: current, "flip", needs_source=False)
    values = ["source", "zero", function, again]
    asked = ["z.0.1@2", *(cp.Patch("z.0.1@1", value) for value in values)]
    job, _, _ = without_repeats(job_of(*([one] for one in asked)), Means())
    assert len(job.interventions) == len(asked)


def test_controls_are_made_whatever_else_is_made():
    job, _, copies = without_repeats(job_of(["z.0.1"], ["z.0.1"], ["z.0.1"], n_controls=1), Means())
    assert [some.tolist() for some in copies.of] == [[0, 1], [2]]
    assert job.n_asked == 1


def test_numbers_are_spread_to_all_that_a_run_stands_for():
    _, _, copies = without_repeats(job_of(["z.0.1"], ["z.0.0"], ["z.0.1"]), Means())
    block = Block.of(np.array([1, 0]), np.array([0, 0]), np.array([[1.0, 2.0]]), Status.MEASURED)
    (spread,) = copies.spread(block)
    assert spread.interventions.tolist() == [1, 0, 2]
    assert spread.values.tolist() == [[1.0, 2.0, 2.0]]
