"""Refusals of causal models, hypotheses and the tests of them."""

import numpy as np
import pytest

import causalpatch as cp
from adders import AB, FIRST, SUM, adder, claim, encode
from causalpatch.base.errors import AlgorithmError, AnswerError, PairError, PatchError, ResultsNotFound, SettingError
from causalpatch.experiment import put_values
from causalpatch.pairs import Pairs
from causalpatch.sites import parse

NAMED = cp.CausalModel({"ab": lambda a, b: a + b, "total": lambda ab, c: ab + c}, ["a", "b", "c"], name="sum")


def test_variables_that_wait_for_each_other_are_shown_in_a_cycle(refuses):
    with refuses(
        AlgorithmError,
        """
        variables of 'loop' wait for each other
          cycle  ab <- total <- ab
          fix: leave one of these parents out
        """,
    ):
        cp.CausalModel({"ab": lambda total, a: a, "total": lambda ab: ab}, ["a"], name="loop")


def test_an_unknown_parent_is_answered_with_what_is_known(refuses):
    with refuses(
        AlgorithmError,
        """
        variable 'total' of 'sum' has an unknown parent 'summ'
          known  a, b, sum, total
          fix: write 'sum', or add it to the inputs
        """,
    ):
        cp.CausalModel({"sum": lambda a, b: a + b, "total": lambda summ: summ}, ["a", "b"], name="sum")


def test_a_name_stands_for_one_thing(refuses):
    with refuses(
        AlgorithmError,
        """
        'a' of 'sum' is defined twice
          inputs     a, b
          variables  a
          fix: rename one of them
        """,
    ):
        cp.CausalModel({"a": lambda b: b}, ["a", "b"], name="sum")


def test_two_possible_outputs_ask_for_one(refuses):
    with refuses(
        AlgorithmError,
        """
        'two' has 2 variables that could be its output
          nobody's parent  x, y
          fix: output="y"
        """,
    ):
        cp.CausalModel({"x": lambda a: a, "y": lambda a: a}, ["a"], name="two")


def test_a_function_that_fails_is_shown_with_what_it_was_given(refuses):
    with refuses(
        AlgorithmError,
        """
        variable 'total' of 'sum' cannot be computed
          given  {'ab': 3, 'c': 'three'}
          error  TypeError: unsupported operand type(s) for +: 'int' and 'str'
          fix: let the function return a value for every input
        """,
    ):
        NAMED.run({"a": 1, "b": 2, "c": "three"})


def test_an_input_that_is_missing_is_named(refuses):
    with refuses(
        AlgorithmError,
        """
        'sum' cannot run without input 'c'
          inputs  a, b, c
          given   a, b
          fix: give a value for each input, and nothing else
        """,
    ):
        NAMED.run({"a": 1, "b": 2})


def test_an_unknown_variable_is_answered_with_the_nearest(refuses):
    with refuses(
        AlgorithmError,
        """
        'sum' has no variable 'abc'
          inputs     a, b, c
          variables  ab, total
          fix: write 'ab'
        """,
    ):
        cp.Hypothesis(NAMED, {"abc": AB})


def test_an_empty_hypothesis_claims_nothing(refuses):
    with refuses(
        AlgorithmError,
        """
        the hypothesis says of no variable of 'sum' where it is
          variables  ab, total
          fix: mapping={"ab": "resid_post.2@-1"}
        """,
    ):
        cp.Hypothesis(NAMED, {})


def test_one_place_holds_one_variable(refuses):
    with refuses(
        AlgorithmError,
        """
        one place is said to hold 'total' and 'ab'
          total  resid_post.1
          ab     resid_post.1@-1
          fix: map each variable to places of its own, such as single heads or tokens
        """,
    ):
        cp.Hypothesis(NAMED, {"total": "resid_post.1", "ab": "resid_post.1@-1"})


def test_inputs_must_be_written_somehow(refuses):
    with refuses(
        AlgorithmError,
        """
        the hypothesis does not say how inputs of 'sum' are written as prompts
          inputs  a, b, c
          fix: Hypothesis(…, encode=function), or give pairs and Hypothesis(…, inputs=function)
        """,
    ):
        cp.interchange_accuracy(adder(), cp.Hypothesis(NAMED, {"ab": AB}))


def test_inputs_must_be_read_somehow(refuses):
    with refuses(
        AlgorithmError,
        """
        the hypothesis does not say how inputs of 'sum' are read off prompts
          pairs   'arrays'
          inputs  a, b, c
          fix: Hypothesis(…, inputs=lambda pair, side: {"a": …})
        """,
    ):
        cp.interchange_accuracy(adder(), claim({"ab": AB}), Pairs.from_arrays([[1.0] * 12], [[0.0] * 12]))


def test_inputs_without_values_cannot_be_listed(refuses):
    with refuses(
        AlgorithmError,
        """
        'sum' does not say which values its inputs can take
          inputs  a, b, c
          fix: give them: CausalModel(…, inputs={"a": range(10), …})
        """,
    ):
        cp.causal_scrubbing(adder(), cp.Hypothesis(NAMED, {"ab": AB}, encode=encode))


def test_an_encoder_that_fails_is_shown_its_input(refuses):
    with refuses(
        AlgorithmError,
        """
        encode cannot write an input of 'sum'
          input  {'a': 0, 'b': 0, 'c': 9}
          error  IndexError: index 17 is out of bounds for axis 0 with size 12
          fix: let it take the inputs by name, such as def encode(a, b): …
        """,
    ):
        cp.strict_test(adder(), claim({"ab": AB}), [{"a": 0, "b": 0, "c": 9}], nodes=[FIRST])


def test_every_output_needs_its_answer(refuses):
    with refuses(
        AlgorithmError,
        """
        the hypothesis does not say which answer output 1 is
          output  total
          known   0
          fix: add it: answers={1: …}
        """,
    ):
        cp.interchange_accuracy(adder(), claim({"ab": AB}, answers={0: 0}))


def test_an_answer_in_words_needs_prompts_in_words(refuses):
    with refuses(
        AnswerError,
        """
        output 0 stands for the text ' 0', but the prompts are not texts
          fix: give the token's id instead
        """,
    ):
        cp.interchange_accuracy(adder(), claim({"ab": AB}, answers=lambda total: f" {total}"))


def test_a_variable_that_is_nowhere_cannot_be_interchanged(refuses):
    with refuses(
        AlgorithmError,
        """
        the hypothesis does not say where 'c' is
          mapped  ab
          fix: add it to the mapping: {"c": "resid_post.2@-1"}
        """,
    ):
        cp.interchange_accuracy(adder(), claim({"ab": AB}), variables=["c"])


def test_nodes_of_an_unknown_network_must_be_named(refuses):
    with refuses(
        AlgorithmError,
        """
        'Adder' is of no known family, so its nodes have no names
          modules  first, second, head
          fix: name them: nodes=["module(PATH).output", …]
        """,
    ):
        cp.strict_test(adder(), claim({"ab": AB}))


def test_a_tolerance_is_a_share(refuses):
    with refuses(
        SettingError,
        """
        a tolerance of 5 is no share of answers
          fix: tolerance=0.05
        """,
    ):
        cp.strict_test(adder(), claim({"ab": AB}), nodes=[FIRST], tolerance=5)


def test_values_of_their_own_need_pairs_of_their_own(refuses, experiment):
    with refuses(
        PairError,
        """
        pairs of 'two.jsonl' cannot be told apart to be given values of their own
          pairs             2
          different groups  0
          fix: give each pair a group of its own in the column group
        """,
    ):
        put_values(experiment, parse("z.0.0@-1"), [np.zeros((1, 4))] * 2)


def test_a_variable_is_mapped_to_sites(refuses):
    with refuses(
        PatchError,
        """
        'ab' is mapped to no site
          fix: name a site, or several: {"ab": ["z.2.1@-1", "z.3.0@-1"]}
        """,
    ):
        cp.Hypothesis(NAMED, {"ab": []})


def test_findings_that_are_not_there(refuses, tmp_path):
    with refuses(
        ResultsNotFound,
        """
        no saved findings in 'TMP/nothing'
          looked for  record.json
          found       there is no such folder
          fix: name the folder that findings.save(folder) wrote
        """,
    ):
        cp.Interchange.load(tmp_path / "nothing")


def test_a_row_that_was_not_measured(refuses):
    found = cp.interchange_accuracy(adder(), claim({"ab": AB}), n=10, n_random=0)
    with refuses(
        AlgorithmError,
        """
        no row of these findings has variable='c'
          known  ab
          fix: name one of these
        """,
    ):
        found.accuracy("c")


@pytest.mark.parametrize("run", [cp.interchange_accuracy, cp.causal_scrubbing])
def test_one_draw_is_no_share(run):
    with pytest.raises(SettingError, match="too few"):
        run(adder(), cp.Hypothesis(SUM, {"ab": AB}, encode=encode), n=1)
