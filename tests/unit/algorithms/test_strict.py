"""The strict test: what the hypothesis does not name, and does matter, is found."""

import numpy as np
import pytest

import causalpatch as cp
from adders import AB, FIRST, LEFT, RIGHT, SPARE, C, adder, claim, comparer
from causalpatch.algorithms.strict import TOGETHER
from causalpatch.base.errors import AlgorithmError

NODES = [f"{FIRST}#0:4"]


def test_the_true_hypothesis_passes():
    found = cp.strict_test(adder(), claim({"ab": AB, "c": C}), nodes=NODES, n=200)
    assert found.verdict == "passes"
    assert set(found.table["node"]) == {f"{FIRST}#2", f"{FIRST}#3", TOGETHER}
    assert (found.table["changed"] == 0).all()
    assert (found.table["high"] < 0.05).all()


def test_a_variable_that_the_hypothesis_forgets_is_the_worst_node():
    found = cp.strict_test(adder(), claim({"ab": AB}), nodes=NODES, n=200)
    assert (found.verdict, found.worst) == ("fails", C)
    # The answer changes as often as another input has another digit c.
    assert found.row(node=C)["changed"] == pytest.approx(3 / 4, abs=0.1)
    assert found.row(node=SPARE)["verdict"] == "passes"


def test_a_second_way_that_interchange_accuracy_does_not_see_is_found():
    model = adder(leak=0.4)  # the total is off by .4 a at most 1.2, so that answers change now and then
    forgetful = cp.strict_test(model, claim({"ab": AB, "c": C}), nodes=NODES, n=200)
    assert (forgetful.verdict, forgetful.worst) == ("fails", SPARE)


def test_held_sites_hide_what_only_feeds_them():
    model, hypothesis = comparer(left=LEFT, right=RIGHT)
    nodes = ["module(embed).output"]
    fed = cp.strict_test(model, hypothesis, nodes=nodes, n=100)
    around = cp.strict_test(model, hypothesis, nodes=nodes, n=100, hold_mapped=True)
    assert (fed.verdict, around.verdict) == ("fails", "passes")
    assert (around.table["changed"] == 0).all()


def test_positions_that_are_mapped_are_left_out_and_others_are_not():
    model, hypothesis = comparer(left=LEFT, right=RIGHT)
    found = cp.strict_test(model, hypothesis, nodes=["module(flag).output"], positions=[0, 1, 2, -1], n=100)
    assert set(found.table["node"]) == {"module(flag).output@0", "module(flag).output@2", TOGETHER}
    assert found.provenance["notes"] == [
        "not patched, for they are mapped at some position: module(flag).output@1, module(flag).output@-1"
    ]
    assert (found.table["changed"] == 0).all()


def test_changed_is_what_the_samples_say():
    found = cp.strict_test(adder(), claim({"ab": AB}), nodes=NODES, n=80)
    answers = found.samples[f"answer: {C}"]
    assert found.row(node=C)["changed"] == np.mean(answers != found.samples["answer: base"])


def test_a_hypothesis_that_names_every_node_has_none_to_test():
    with pytest.raises(AlgorithmError, match="every node is mapped"):
        cp.strict_test(adder(), claim({"ab": AB}), nodes=[AB])


def test_a_network_of_no_known_family_needs_its_nodes_named():
    with pytest.raises(AlgorithmError, match="no known family"):
        cp.strict_test(adder(), claim({"ab": AB}))
