"""Causal scrubbing: the true hypothesis loses nothing, wrong ones do, and what is resampled is what is said."""

import itertools

import numpy as np
import pytest

import causalpatch as cp
from adders import AB, DIGITS, LEFT, OTHER_SUM, RIGHT, SPARE, TOTAL, C, adder, claim, comparer, random_adder
from causalpatch.algorithms.scrubbing import SHUFFLED, WHOLE

DEEP = {"ab": AB, "total": TOTAL}


def test_the_true_hypothesis_recovers_everything():
    for mapping in ({"ab": AB, "c": C}, DEEP, {"ab": AB}, {"total": TOTAL}):
        found = cp.causal_scrubbing(adder(), claim(mapping), n=80)
        assert found.recovered == pytest.approx(1.0, abs=1e-9)
        row = found.row(hypothesis=WHOLE)
        assert (row["right"], row["right_original"]) == (1.0, 1.0)
        assert row["right_random"] < 0.5
        assert row["resampled"] > 0.5


def test_wrong_hypotheses_do_not():
    wrong = [claim({"bc": AB}, OTHER_SUM), claim({"ab": C, "c": AB}), claim({"ab": SPARE})]
    for hypothesis in wrong:
        row = cp.causal_scrubbing(adder(), hypothesis, n=120).row(hypothesis=WHOLE)
        assert row["high"] < 0.8
        assert row["right"] < 0.5


def test_the_shuffled_mapping_is_scrubbed_beside_it():
    found = cp.causal_scrubbing(adder(), claim({"ab": AB, "c": C}), n=120)
    assert list(found.table["hypothesis"]) == [WHOLE, "c alone", "ab alone", SHUFFLED]
    assert found.row(hypothesis=SHUFFLED)["high"] < 0.5


def test_a_random_network_has_nothing_to_recover():
    row = cp.causal_scrubbing(random_adder(), claim({"ab": AB}), n=120, metric="top1").row(hypothesis=WHOLE)
    assert row["right"] == pytest.approx(row["right_random"], abs=0.15)


def test_variables_at_tokens_of_a_network_of_prompts():
    model, hypothesis = comparer(left=LEFT, right=RIGHT)
    assert cp.causal_scrubbing(model, hypothesis, n=80).recovered == pytest.approx(1.0, abs=1e-9)
    swapped = cp.causal_scrubbing(model, comparer(left=RIGHT, right=LEFT)[1], n=120)
    assert swapped.row(hypothesis=WHOLE)["right"] < 0.95


def test_values_travel_up_the_tree_through_runs_of_their_own():
    """The total's site is read in a run in which ab's site was put in and c is the base's, as spelt out by hand.

    In the network with a leak a is added a second time around the site of ab. So the total's run must have the leak
    of its own base, not that of the input that ab was taken from: over all draws the scrubbed totals are ab + c of the
    reference and .4 a of inputs drawn at random.
    """
    found = cp.causal_scrubbing(adder(leak=0.4), claim(DEEP), n=300, metric="answer_logit")
    whole = found.samples[found.samples["hypothesis"] == WHOLE]
    inputs = list(itertools.product(range(DIGITS), repeat=3))
    possible, means = [], []
    for reference in whole["reference"]:
        total = sum(inputs[reference])
        # The total's reference agrees on the total alone; ab + c is that total, and a of the base is free.
        possible.append({round(2 * total * (total + 0.4 * a) - total**2, 9) for a in range(DIGITS)})
        means.append(np.mean([2 * total * (total + 0.4 * a) - total**2 for a in range(DIGITS)]))
    scrubbed = whole["scrubbed"].round(9).tolist()
    assert all(value in those for value, those in zip(scrubbed, possible, strict=True))
    assert whole["scrubbed"].mean() == pytest.approx(np.mean(means), rel=0.05)
    # The references' own runs have their own leak, so the two differ.
    assert (whole["scrubbed"].round(9) != whole["original"].round(9)).mean() > 0.5


def test_nodes_that_are_held_cut_the_ways_between_sites():
    """Without nodes whatever lies between is part of an edge; with the second layer held, nothing gets through."""
    hypothesis = claim({"ab": AB, "c": C})
    free = cp.causal_scrubbing(adder(), hypothesis, n=80)
    held = cp.causal_scrubbing(adder(), hypothesis, n=80, nodes=["module(second).output"])
    assert free.recovered == pytest.approx(1.0, abs=1e-9)
    assert held.row(hypothesis=WHOLE)["right"] < 0.5
    # With the total mapped, too, the last edge is from its site to the logits, and nothing is between.
    last = cp.causal_scrubbing(adder(), claim({"total": TOTAL}), n=80, nodes=["module(first).output"])
    assert last.recovered == pytest.approx(1.0, abs=1e-9)


def test_an_input_that_is_mapped_is_carried_by_its_site():
    alone = cp.causal_scrubbing(adder(), claim({"c": C}), n=80)
    assert alone.recovered == pytest.approx(1.0, abs=1e-9)
    # b is fixed by the unmapped parents of the output, a by what its site holds.
    wrong = cp.causal_scrubbing(adder(), claim({"a": SPARE}), n=80)
    assert wrong.row(hypothesis=WHOLE)["right"] < 0.5


def test_the_share_is_the_ratio_of_means_of_the_samples():
    found = cp.causal_scrubbing(adder(), claim({"bc": AB}, OTHER_SUM), n=60)
    means = found.samples[["original", "scrubbed", "random"]].mean()
    share = (means["scrubbed"] - means["random"]) / (means["original"] - means["random"])
    assert found.recovered == pytest.approx(share)


def test_where_nothing_else_agrees_it_says_that_little_was_tested():
    exact = cp.CausalModel(
        {"code": lambda a, b, c: (a, b, c), "total": lambda code: sum(code)}, claim(DEEP).algorithm.values
    )
    found = cp.causal_scrubbing(adder(), claim({"code": "module(first).output"}, exact), n=40)
    assert found.recovered == pytest.approx(1.0)
    # The base is another input; what is put into it comes from the reference itself, in a run on the reference.
    assert found.row(hypothesis=WHOLE)["resampled"] == pytest.approx(1 / 3, abs=0.03)
    assert "little was tested" in found.provenance["notes"][0]


def test_engines_agree_and_findings_come_back(tmp_path):
    runs = [cp.causal_scrubbing(adder(), claim(DEEP), n=30, engine=engine) for engine in ("reference", "auto")]
    assert np.allclose(runs[0].samples["scrubbed"], runs[1].samples["scrubbed"], atol=1e-9)
    same = cp.Scrubbing.load(runs[1].save(tmp_path / "scrubbed"))
    assert str(same) == str(runs[1])
    assert same.recovered == runs[1].recovered
