"""Interchange accuracy on networks whose mechanism was built in, and on such as have none."""

import dataclasses

import numpy as np
import pytest

import causalpatch as cp
from adders import (
    AB,
    INPUTS,
    LEFT,
    OTHER_SUM,
    RIGHT,
    SPARE,
    SUM,
    C,
    adder,
    claim,
    comparer,
    encode,
    random_adder,
)
from causalpatch.base.errors import AlgorithmError, AnswerError, ResultsNotFound, StoreCorrupt
from causalpatch.pairs import Pair, Pairs

TRUE = {"ab": AB, "c": C}


def test_the_true_hypothesis_has_accuracy_1_and_its_controls_have_not():
    found = cp.interchange_accuracy(adder(), claim(TRUE), n=120)
    for name in ("ab", "c"):
        row = found.row(variable=name)
        assert (row["changing"], row["whole"], row["identity"], row["model"]) == (1.0, 1.0, 0.0, 1.0)
        assert row["low"] > 0.93
        assert row["n_random"] == 2
        assert row["random_most"] == 0.0
        assert row["shuffled_most"] < 0.5
        assert row["chance"] < 0.5
    assert found.accuracy("c", "ab") == 1.0


def test_what_is_counted_is_what_the_samples_say():
    found = cp.interchange_accuracy(adder(), claim({"ab": AB}), n=50)
    rows = found.samples
    inputs = [dict(zip("abc", digits, strict=True)) for digits in np.ndindex(4, 4, 4)]
    for base, source, expected, answer in rows[["base", "source", "expected", "answer: mapped"]].itertuples(
        index=False
    ):
        wanted = inputs[source]["a"] + inputs[source]["b"] + inputs[base]["c"]
        assert (int(expected), answer) == (wanted, wanted)
    changes = rows["expected"] != rows["base_output"]
    assert (rows["is_changing"] == changes).all()
    assert changes.sum() == 25
    totals = [sum(each.values()) for each in inputs]
    couples = [(a, b) for a in range(64) for b in range(64) if a != b]
    share = np.mean([inputs[b]["a"] + inputs[b]["b"] != inputs[a]["a"] + inputs[a]["b"] for a, b in couples])
    assert found.row(variable="ab")["changing_share"] == pytest.approx(share)
    assert max(totals) == 9


def test_a_wrong_intermediate_variable_fails():
    wrong = cp.interchange_accuracy(adder(), claim({"bc": AB}, OTHER_SUM), n=120)
    assert wrong.row(variable="bc")["high"] < 0.5
    assert wrong.row(variable="bc")["model"] == 1.0


def test_a_permuted_mapping_fails():
    wrong = cp.interchange_accuracy(adder(), claim(TRUE).shuffled(), n=120)
    assert max(wrong.row(variable=name)["high"] for name in ("ab", "c")) < 0.5
    # Both together are the whole input, whichever is called which.
    assert wrong.accuracy("c", "ab") == 1.0


def test_a_neuron_that_nothing_reads_never_changes_the_answer():
    row = cp.interchange_accuracy(adder(), claim({"a": SPARE}), n=120).row(variable="a")
    assert (row["changing"], row["identity"]) == (0.0, 0.0)
    # Draws that change nothing are passed by it, which is why they are not counted alone.
    assert row["whole"] == pytest.approx(1 - row["changing_share"])
    assert 0.2 < row["whole"] < 0.3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_random_network_is_at_chance(seed):
    found = cp.interchange_accuracy(random_adder(seed), claim(TRUE), n=120)
    for name in ("ab", "c"):
        row = found.row(variable=name)
        assert row["changing"] <= row["chance"] + 0.15


def test_variables_at_tokens_of_a_network_of_prompts():
    model, hypothesis = comparer(left=LEFT, right=RIGHT)
    found = cp.interchange_accuracy(model, hypothesis, n=80)
    assert [found.accuracy(name) for name in ("left", "right")] == [1.0, 1.0]
    swapped = cp.interchange_accuracy(model, comparer(left=RIGHT, right=LEFT)[1], n=80)
    assert swapped.row(variable="left")["high"] < 0.75


def test_every_engine_gives_the_same_answers():
    runs = [
        cp.interchange_accuracy(adder(), claim(TRUE), n=40, engine=engine) for engine in ("reference", "rows", "auto")
    ]
    for other in runs[1:]:
        assert other.samples.equals(runs[0].samples)


def test_the_same_seed_draws_the_same_and_another_seed_others():
    first, again, other = (cp.interchange_accuracy(adder(), claim({"ab": AB}), n=30, seed=s) for s in (3, 3, 4))
    assert first.samples.equals(again.samples)
    assert not (first.samples["base"] == other.samples["base"]).all()


def as_pairs(n=40, seed=0):
    """Pairs of three digits each, whose clean and corrupted input differ in all of them."""
    rng = np.random.default_rng(seed)
    digits = rng.permutation(64)[: 2 * n].reshape(-1, 2) if n <= 32 else rng.integers(0, 64, (n, 2))
    unpacked = [[np.unravel_index(i, (4, 4, 4)) for i in both] for both in digits.tolist()]
    pairs = [
        Pair(encode(*clean), encode(*corrupt), id=str(k), extra={"clean": clean, "corrupt": corrupt})
        for k, (clean, corrupt) in enumerate(unpacked)
    ]
    return Pairs(pairs, name="digits", kind="arrays")


def read(pair, side):
    return dict(zip("abc", map(int, pair.extra[side]), strict=True))


def test_inputs_are_read_off_pairs_and_couples_of_components_are_the_unit():
    hypothesis = cp.Hypothesis(SUM, {"ab": AB}, inputs=read)
    pairs = as_pairs(32)
    found = cp.interchange_accuracy(adder(), hypothesis, pairs, n=60)
    row = found.row(variable="ab")
    assert row["changing"] == 1.0
    assert row["n_units"] <= len(set(pairs.components.tolist())) // 2
    assert "couple of independent components" in found.provenance["unit"]
    # No prompt stands in two units.
    seen = {}
    for base, source, group in found.samples[["base", "source", "group"]].itertuples(index=False):
        assert seen.setdefault(base, group) == seen.setdefault(source, group) == group


def test_answers_that_are_not_allowed_count_only_where_all_of_the_vocabulary_is_read():
    model = adder()
    with pytest.raises(AnswerError):
        cp.interchange_accuracy(model, claim({"ab": AB}, answers=lambda total: -1 - total), n=20)
    few = claim({"ab": AB}, answers=lambda total: [total, 9 - total])
    assert cp.interchange_accuracy(model, few, n=20).accuracy("ab") == 1.0
    assert cp.interchange_accuracy(model, claim({"ab": AB}, read="vocabulary"), n=20).accuracy("ab") == 1.0


def test_findings_come_back_from_disk_as_they_were(tmp_path):
    found = cp.interchange_accuracy(adder(), claim(TRUE), n=30)
    same = cp.Interchange.load(found.save(tmp_path / "found"))
    assert same.table.equals(found.table)
    assert same.samples.equals(found.samples)
    assert str(same) == str(found)
    assert same.provenance["seed"] == 0
    with pytest.raises(ResultsNotFound, match="another kind"):
        cp.StrictTest.load(tmp_path / "found")
    with (tmp_path / "found" / "samples.parquet").open("ab") as file:
        file.write(b" ")
    with pytest.raises(StoreCorrupt):
        cp.Interchange.load(tmp_path / "found")


def test_a_table_prints_what_was_measured():
    text = str(cp.interchange_accuracy(adder(), claim(TRUE), n=30))
    assert text.startswith("interchange accuracy of 'sum' in 'Adder'")
    assert "hypothesis: ab at " in text
    assert "likeliest of 10 possible answers; seed 0" in text


def test_an_interchange_that_never_matters_is_refused():
    constant = cp.CausalModel({"ab": lambda a, b: a + b, "total": lambda ab: 0 * ab}, {"a": range(3), "b": range(3)})
    hypothesis = cp.Hypothesis(constant, {"ab": AB}, encode=lambda a, b: encode(a, b, 0))
    with pytest.raises(AlgorithmError, match="no interchange of 'ab' changes the output"):
        cp.interchange_accuracy(adder(), hypothesis)


def test_one_place_cannot_hold_two_variables_nor_what_the_output_does_not_need():
    with pytest.raises(AlgorithmError, match="one place is said to hold 'ab' and 'total'"):
        claim({"ab": "resid_post.1", "total": "resid_post.1@-1"})
    claim({"ab": "resid_post.1@-1", "total": "resid_post.1@-2"})
    more = cp.CausalModel({"total": lambda a: a, "aside": lambda a: a}, INPUTS, output="total")
    with pytest.raises(AlgorithmError, match="does not depend on 'aside'"):
        cp.Hypothesis(more, {"aside": AB})


def test_parts_of_a_hypothesis_keep_all_else():
    whole = claim(TRUE, read="vocabulary")
    part = whole.only(["ab"])
    kept = [field.name for field in dataclasses.fields(whole) if field.name not in ("mapping", "places")]
    assert all(getattr(part, name) is getattr(whole, name) for name in kept)
    assert part.variables == ("ab",)
