"""Causal models: what they compute, what an interchange changes, and what is refused."""

import subprocess
import sys

import pytest
from hypothesis import given, strategies as st

import causalpatch as cp
from causalpatch.base.errors import AlgorithmError
from worlds import unchecked

DIGITS = st.integers(-5, 5)
SUM = cp.CausalModel({"total": lambda ab, c: ab + c, "ab": lambda a, b: a + b}, ["a", "b", "c"])
SETTING = st.fixed_dictionaries({"a": DIGITS, "b": DIGITS, "c": DIGITS})


def test_variables_are_computed_after_their_parents_in_whatever_order_they_are_named():
    assert SUM.order == ("ab", "total")
    assert SUM.output == "total"
    assert SUM.run({"a": 1, "b": 2, "c": 3}) == {"a": 1, "b": 2, "c": 3, "ab": 3, "total": 6}


@given(SETTING, SETTING)
def test_an_interchange_takes_one_value_from_the_source_and_all_else_from_the_base(base, source):
    assert SUM.interchange(base, {"ab": source}) == source["a"] + source["b"] + base["c"]
    assert SUM.interchange(base, {"a": source}) == source["a"] + base["b"] + base["c"]
    assert SUM.interchange(base, {"ab": source, "c": base}) == source["a"] + source["b"] + base["c"]
    assert SUM.interchange(base, {"total": source}) == SUM.run(source)["total"]
    assert SUM.interchange(base, {}) == SUM.run(base)["total"]


def test_a_list_of_functions_goes_by_their_names_and_defaults_stay():
    def double(a, factor=2):
        return a * factor

    model = cp.CausalModel([double], ["a"])
    assert (model.parents, model.run({"a": 4})["double"]) == ({"double": ("a",)}, 8)


def test_all_inputs_are_listed_with_the_last_changing_fastest():
    model = cp.CausalModel({"both": lambda a, b: (a, b)}, {"a": [0, 1], "b": "xy"})
    assert [tuple(each.values()) for each in model.every_input()] == [(0, "x"), (0, "y"), (1, "x"), (1, "y")]
    assert model.n_inputs == 4
    assert SUM.n_inputs == 0


def test_unmapped_variables_are_seen_through_to_what_is_known_above_them():
    assert SUM.depends_on("total") == ("a", "b", "c")
    assert SUM.depends_on("total", ["ab"]) == ("c", "ab")
    assert SUM.depends_on("ab", ["ab"]) == ("a", "b")


@pytest.mark.parametrize(
    "make",
    [
        lambda: cp.CausalModel({"x": lambda y: y, "y": lambda x: x}, ["a"]),
        lambda: cp.CausalModel({"x": lambda y: y}, ["a"]),
        lambda: cp.CausalModel({"a": lambda b: b}, ["a", "b"]),
        lambda: cp.CausalModel({"x": lambda *a: a}, ["a"]),
        lambda: cp.CausalModel({"x": lambda a: a, "y": lambda a: a}, ["a"]),
        lambda: cp.CausalModel({}, ["a"]),
        lambda: cp.CausalModel({"x": 3}, ["a"]),
        lambda: cp.CausalModel({"x": lambda a: a}, {"a": []}),
        lambda: cp.CausalModel({"x": lambda a: a}, ["a"], output="y"),
        lambda: SUM.run({"a": 1, "b": 2}),
        lambda: SUM.run({"a": 1, "b": 2, "c": 3, "d": 4}),
        lambda: SUM.interchange({"a": 1, "b": 2, "c": 3}, {"sum": {"a": 1, "b": 2, "c": 3}}),
        lambda: SUM.run({"a": 1, "b": 2, "c": "three"}),
        lambda: cp.CausalModel({"x": lambda a: [a]}, ["a"]).run({"a": 1}),
        lambda: list(SUM.every_input()),
    ],
)
def test_what_is_no_algorithm_is_refused(make):
    with unchecked(), pytest.raises(AlgorithmError):
        make()


def test_a_causal_model_needs_no_torch():
    code = (
        "import sys, causalpatch as cp\n"
        "cp.CausalModel({'x': lambda a: a}, ['a']).run({'a': 1})\n"
        "print({'torch', 'transformers', 'pandas', 'scipy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
