"""The report on pairs: counted by hand on small sets."""

import numpy as np

from causalpatch.pairs import Pair, Pairs, load_pairs


def pair(clean, corrupt, answer=7, wrong=8, **other):
    return Pair(np.array(clean), np.array(corrupt), answer=((answer,),), wrong_answer=((wrong,),), **other)


def test_a_mirror_exchanges_inputs_and_answers():
    pairs = Pairs([pair([1], [2], 7, 8), pair([2], [1], 8, 7), pair([3], [4], 7, 8), pair([4], [3], 7, 8)])
    assert pairs.check().mirrored_share == 0.5


def test_pairs_without_answers_mirror_by_their_inputs_alone():
    pairs = Pairs([Pair(np.array([1]), np.array([2])), Pair(np.array([2]), np.array([1]))])
    assert pairs.check().mirrored_share == 1.0


def test_duplicates_are_those_that_repeat_an_earlier_pair():
    pairs = Pairs([pair([1], [2], id="a"), pair([1], [2], id="b"), pair([1], [2], 9, id="c"), pair([1], [2], id="d")])
    assert pairs.check().duplicates == ("b", "d")


def test_equal_inputs_unequal_lengths_and_missing_answers_are_named():
    pairs = Pairs(
        [
            pair([1, 2], [1, 2], id="same"),
            pair([1, 2], [1, 2, 3], id="longer"),
            Pair(np.array([1]), np.array([2]), id="mute"),
        ]
    )
    report = pairs.check()
    assert report.same_input == ("same",)
    assert report.unequal_lengths == ("longer",)
    assert report.without_answer == report.without_wrong_answer == ("mute",)


def test_answers_are_counted_by_their_number_of_tokens():
    many = Pair(np.array([1]), np.array([2]), answer=((5,), (6, 7)), wrong_answer=((8, 9, 9),))
    assert Pairs([many, pair([3], [4])]).check().answer_tokens == {1: 3, 2: 1, 3: 1}


def test_given_splits_that_share_a_prompt_leak():
    pairs = Pairs(
        [
            pair([1], [2], id="a", split="train"),
            pair([2], [3], id="b", split="test"),
            pair([5], [6], id="c", split="train"),
            pair([7], [8], id="d", split="test"),
            pair([7], [9], id="e"),
        ]
    )
    report = pairs.check()
    assert report.leaks == (("a", "b"),)
    assert report.split_sizes == {"test": 2, "train": 2}
    assert report.notes[-1] == "given splits share prompts, entities or groups; use pairs.split()"


def test_words_that_the_tokenizer_does_not_know_are_reported(toy):
    rows = [{"clean": f"a {word} b", "corrupt": "a c b", "id": word} for word in ("owl", "zyzzyva", "xylem")]
    report = load_pairs(rows, toy()).check()
    assert report.unknown_words == ("zyzzyva", "xylem")
    assert report.duplicates == ("xylem",)
    assert "words that the model does not know are all one token to it" in str(report)


def test_the_report_is_a_table_to_read():
    pairs = Pairs([pair([k], [k + 1], id=f"p{k}") for k in range(0, 20, 2)], name="ten.jsonl")
    assert str(pairs.check()) == (
        "pairs of 'ten.jsonl'\n"
        "  pairs                   10\n"
        "  independent components  10\n"
        "  mirrored                0%\n"
        "  duplicates              0\n"
        "  clean equals corrupted  0\n"
        "  unknown words           0\n"
        "  unequal lengths         0\n"
        "  tokens per answer       20 of 1\n"
        "  without answer          0\n"
        "  without wrong answer    0\n"
        "  note: fewer than 30 independent components: intervals are approximate"
    )


def test_the_table_lists_the_first_five_offenders():
    pairs = Pairs([Pair(np.array([k]), np.array([k]), id=f"p{k}") for k in range(7)])
    assert "  clean equals corrupted  7: p0, p1, p2, p3, p4, …\n" in str(pairs.check())
    assert "note: pairs with equal inputs have no gap; drop them" in str(pairs.check())


def test_too_few_components_and_mirrors_are_noted():
    notes = Pairs([pair([1], [2], 7, 8), pair([2], [1], 8, 7)]).check().notes
    assert notes == (
        "fewer than 10 independent components: no interval can be given",
        "mirrored pairs: denoise and noise give the same numbers; the second is redundant by construction",
    )


def test_enough_independent_pairs_need_no_note():
    assert Pairs([pair([k], [k + 1]) for k in range(0, 60, 2)]).check().notes == ()
