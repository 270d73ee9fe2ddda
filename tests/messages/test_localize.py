"""Refusals of searches and races."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, NotFinite, SettingError
from causalpatch.statistics.racing import Racing
from causalpatch.testing.tiny import tiny_model
from planted_heads import planted_heads
from toys import prompts
from worlds import unchecked


@pytest.fixture(scope="module")
def numbers():
    return planted_heads({(1, 3): 0.5}, n_pairs=12)


@pytest.mark.parametrize("budget", ["some", "3 weeks", 0, True])
def test_a_budget_is_a_number_of_something(budget, numbers, refuses):
    with refuses(
        SettingError,
        f"""
        budget={budget!r} is not a budget
          units  runs (or forwards), s, min, h, FLOP, GFLOP, TFLOP, PFLOP
          fix: budget=2000, or budget="5 min"
        """,
    ):
        cp.localize(numbers, budget)


def test_a_budget_must_allow_the_coarsest_parts(numbers, refuses):
    with refuses(
        SettingError,
        """
        a budget of 100 runs does not allow the coarsest parts
          parts   8 sublayers on 12 pairs
          needed  168 runs for these alone
          fix: budget="672 runs", or use fewer pairs
        """,
    ):
        cp.localize(numbers, 100)


def test_settings_of_a_search(numbers, refuses):
    with refuses(
        SettingError,
        """
        a search cannot have halves=-1
          allowed  delta above 0; halves and sample from 0; scores atp, relp or None
          fix: localize(experiment, budget=2000)
        """,
    ):
        cp.localize(numbers, 1000, halves=-1)
    said = "units cannot be 'layers'\n  known  heads, neurons, all, none\n  fix: units=\"heads\""
    with refuses(SettingError, said), unchecked():
        cp.localize(numbers, 1000, units="layers")
    with refuses(
        SettingError,
        """
        not all pairs have a span 'subject'
          all have  none
          fix: positions=["-1"], or positions="all"
        """,
    ):
        cp.localize(numbers, 1000, positions="subject")
    with refuses(
        SettingError,
        """
        no dictionary is named 'sae'
          known  none
          fix: model.add_dictionary("sae", FOLDER)
        """,
    ):
        cp.localize(numbers, 1000, features="sae")


def test_a_race_needs_candidates_and_one_aim(numbers, refuses):
    with refuses(
        SettingError,
        """
        a race needs two candidates or more with different names
          given  z.0.0
          fix: race(experiment, ["z.3.0", "z.3.1"], k=1)
        """,
    ):
        cp.race(numbers, ["z.0.0"], k=1)
    with refuses(
        SettingError,
        """
        12 independent components are too few for a race by a metric without bounds
          needed  more than 30, or a bounded metric, such as probability or top1
          fix: measure all of them: experiment.run(candidates)
        """,
    ):
        cp.race(numbers, ["z.0.0", "z.0.1"], k=1)
    with refuses(
        SettingError,
        """
        there is no such race
          candidates  3
          groups      40
          k, above    2, 0.1; one of them
          bounds      None
          fix: k=3, from 1 to the number of candidates, or above=0.1
        """,
    ):
        Racing(3, 40, k=2, above=0.1)
    with refuses(
        SettingError,
        """
        a race cannot have alpha=2, tie=0.0
          fix: alpha=0.05, tie=0.01
        """,
    ):
        Racing(3, 40, k=2, alpha=2)


def test_values_of_a_race_belong_to_who_is_in_it(refuses):
    racing = Racing(3, 40, k=1)
    with refuses(
        SettingError,
        """
        values do not belong to the candidates in the race
          values       (2, 5)
          running      3
          groups left  40
          fix: give (running candidate, new group)
        """,
    ):
        racing.add(np.zeros((2, 5)))
    with refuses(
        NotFinite,
        """
        a value in a race is not a number
          fix: leave that group or candidate out
        """,
    ):
        racing.add(np.full((3, 5), np.nan))


def test_parts_are_those_of_one_stream(refuses):
    model = cp.open_model(tiny_model("t5", layers=1, heads=2))
    rows = [{"clean": [5, 6, 7], "corrupt": [5, 8, 7], "answer_id": 9, "wrong_answer_id": 4}]
    experiment = cp.Experiment(model, cp.load_pairs(rows, model), show_progress=False)
    with refuses(
        ModelUnsupported,
        """
        'T5ForConditionalGeneration' has several streams of tokens, and parts are those of one
          streams  encoder, decoder
          fix: sweep each by itself: sweep(experiment, "encoder/attn_out"), then "decoder/attn_out"
        """,
    ):
        cp.localize(experiment, 1000)


def test_a_model_without_parts_is_refused(refuses):
    model = cp.open_model(torch.nn.Identity())
    pairs = cp.Pairs.from_arrays(np.eye(3), np.ones((3, 3)), [0, 1, 2], [1, 2, 0])
    experiment = cp.Experiment(model, pairs, "kl_divergence", show_progress=False)
    with refuses(
        ModelUnsupported,
        """
        'Identity' has no parts that could be patched one by one
          needed  modules inside it that run once and give one tensor
          fix: patch what it has: sweep(experiment, "module().output")
        """,
    ):
        cp.localize(experiment, 1000)


def test_columns_that_are_not_the_same_tokens_have_no_names(numbers, refuses):
    pairs = prompts(([1, 2, 3], [1, 4, 3]), ([5, 6], [5, 7]))
    with refuses(
        SettingError,
        """
        aligned columns are not the same tokens in all pairs, so that no site can name them
          pairs  'prompts', of different lengths
          fix: positions=["-1"], a span that all pairs have, or positions="all"
        """,
    ):
        cp.localize(cp.Experiment(numbers.model, pairs, "kl_divergence"), 1000, positions="each")
