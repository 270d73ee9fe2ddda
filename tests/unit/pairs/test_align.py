"""Alignment by position, by token difference, by named spans and by the user's map."""

import difflib

import numpy as np
import pytest
from hypothesis import given, strategies as st

from causalpatch.base.errors import PairError, SettingError
from causalpatch.pairs import Pair, Pairs, load_pairs
from causalpatch.pairs.align import difference

IDS = st.lists(st.integers(0, 6), min_size=1, max_size=12).map(np.array)


def ids(*numbers):
    return np.array(numbers, dtype=np.int64)


def test_equal_lengths_align_by_position_unasked():
    pairs = Pairs([Pair(ids(1, 2, 3), ids(1, 5, 3)), Pair(ids(1, 2), ids(4, 2))])
    assert pairs.alignment.columns.tolist() == [[[0, 0], [1, 1], [2, 2]], [[0, 0], [1, 1], [-1, -1]]]
    assert pairs.alignment.how == "position"
    assert str(pairs.alignment) == "3 columns aligned by position: every token has a partner"


def test_labels_are_tokens_where_all_pairs_share_them(toy):
    model = toy()
    rows = [
        {"clean": f"the {a} saw the end", "corrupt": f"the {b} saw the end"}
        for a, b in [("cat", "dog"), ("cow", "dog")]
    ]
    alignment = load_pairs(rows, model).alignment
    assert alignment.labels("clean") == ["<s>", "the", "(varies)", " saw", " the", " end"]
    assert alignment.labels("corrupt") == ["<s>", "the", " dog", " saw", " the", " end"]


def test_a_column_that_only_some_pairs_have_is_labelled_by_those():
    pairs = Pairs([Pair(ids(1, 2, 3), ids(1, 5, 3)), Pair(ids(1, 2), ids(4, 2))])
    assert pairs.alignment.labels("clean") == ["1", "2", "3"]
    assert pairs.alignment.labels("corrupt") == ["(varies)", "(varies)", "3"]


def test_unequal_lengths_have_no_alignment_until_one_is_chosen():
    pairs = Pairs([Pair(ids(1, 2), ids(1, 3)), Pair(ids(1, 2), ids(1, 2, 3))], name="ioi.jsonl")
    assert pairs.alignment is None
    assert pairs.align("difference").alignment.how == "difference"


def test_pairs_of_unequal_length_are_refused_with_both_prompts_shown(toy):
    rows = [
        {"clean": "then John gave it", "corrupt": "then Mary gave it"},
        {"clean": "then John gave it", "corrupt": "then Joseph gave it"},
    ]
    pairs = load_pairs(rows, toy(), name="ioi.jsonl")
    with pytest.raises(PairError) as error:
        pairs.positions(0, None, "clean")
    assert str(error.value) == (
        "pair 1 of 'ioi.jsonl' cannot be aligned by position\n"
        "  clean      5 tokens: ... ' John' ' gave' ...\n"
        "  corrupted  6 tokens: ... ' Jo' 'seph' ' gave' ...\n"
        '  fix: drop it (pairs.drop(1)) or align by token difference (pairs.align("difference"))'
    )
    with pytest.raises(PairError, match=r"pair 1 of 'ioi\.jsonl' cannot be aligned by position"):
        pairs.align("position")
    assert pairs.drop(1).alignment.how == "position"


def test_the_repair_names_spans_where_every_pair_has_them(toy):
    rows = [{"clean": "a John b", "corrupt": "a Joseph b", "spans": {"name": {"clean": "John", "corrupt": "Joseph"}}}]
    pairs = load_pairs(rows, toy())
    with pytest.raises(PairError) as error:
        pairs.aligned()
    assert error.value.fix == 'drop it (pairs.drop(0)) or align by span (pairs.align("spans"))'


def test_difference_matches_shared_tokens_and_equally_long_changes():
    assert difference(ids(1, 2, 3, 4), ids(1, 9, 3, 4)) == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert difference(ids(1, 2, 3, 4), ids(1, 8, 9, 3, 4)) == [(0, 0), (-1, -1), (2, 3), (3, 4)]
    assert difference(ids(1, 2, 3), ids(1, 3)) == [(0, 0), (-1, -1), (2, 1)]


def test_difference_does_not_take_frequent_tokens_of_long_prompts_for_junk():
    clean = np.arange(400) % 3
    corrupt = np.insert(clean, 200, 9)
    assert difference(clean, corrupt) == [(k, k + (k >= 200)) for k in range(400)]


def test_difference_reports_what_finds_no_partner(toy):
    rows = [{"clean": "then John gave it", "corrupt": "then Joseph gave it"}]
    alignment = load_pairs(rows, toy()).align("difference").alignment
    assert alignment.unmatched("clean") == [[2]]
    assert alignment.unmatched("corrupt") == [[2, 3]]
    assert alignment.labels("clean") == ["<s>", "then", "(unmatched)", " gave", " it"]
    assert str(alignment) == (
        "5 columns aligned by difference: tokens without a partner in 1 clean and 1 corrupted prompts of 1"
    )


@given(IDS, IDS)
def test_difference_is_a_partial_matching_in_order_that_keeps_every_equal_block(clean, corrupt):
    found = difference(clean, corrupt)
    assert len(found) == len(clean)
    matched = [(a, b) for a, b in found if a >= 0]
    assert all(a == k for k, (a, _) in enumerate(found) if a >= 0)
    assert matched == sorted(set(matched))
    assert len({b for _, b in matched}) == len(matched)
    matcher = difflib.SequenceMatcher(None, clean.tolist(), corrupt.tolist(), autojunk=False)
    equal = {(i + k, j + k) for i, j, n in matcher.get_matching_blocks() for k in range(n)}
    assert equal <= set(matched)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=12), st.data())
def test_difference_of_equally_long_prompts_with_changed_tokens_keeps_what_stands_between(clean, data):
    changed = data.draw(st.sets(st.integers(0, len(clean) - 1)))
    corrupt = [100 + k if k in changed else token for k, token in enumerate(clean)]
    assert difference(np.array(clean), np.array(corrupt)) == [(k, k) for k in range(len(clean))]


def test_spans_align_their_tokens_in_order_and_say_what_is_left_over(toy):
    spans = {"name": {"clean": "John", "corrupt": "Joseph"}, "end": [-2, -1]}
    rows = [
        {"clean": "then John gave it", "corrupt": "then Joseph gave it", "spans": spans},
        {
            "clean": "then Joseph gave it",
            "corrupt": "then Joseph took it",
            "spans": {"name": "Joseph", "end": [-2, -1]},
        },
    ]
    pairs = load_pairs(rows, toy()).align("spans")
    assert pairs.alignment.labels("clean") == ["name[0]", "name[1]", "end[0]"]
    assert pairs.alignment.columns.tolist() == [[[2, 2], [-1, -1], [3, 4]], [[2, 2], [3, 3], [4, 4]]]
    assert pairs.alignment.unmatched("corrupt")[0] == [0, 1, 3, 5]
    assert load_pairs(rows, toy()).align("spans", spans=["end"]).alignment.labels() == ["end[0]"]


def test_spans_that_no_pair_names_are_refused():
    with pytest.raises(PairError) as error:
        Pairs([Pair(ids(1, 2), ids(1, 2, 3))], name="rows").align("spans")
    assert str(error.value) == (
        "pairs of 'rows' cannot be aligned by span: no span is named in every pair\n"
        "  spans of pair 0  none\n"
        '  fix: add a column spans, for instance {"subject": " Mary"}, or pairs.align("difference")'
    )


def test_a_span_that_one_pair_lacks_is_refused():
    named = Pair(ids(1, 2), ids(1, 3), spans={"verb": ((0, 1), (0, 1))})
    with pytest.raises(PairError) as error:
        Pairs([named, Pair(ids(1, 2), ids(1, 3))], name="rows").align("spans", spans=["verb"])
    assert str(error.value) == (
        "pair 1 of 'rows' has no span 'verb'\n"
        "  its spans  none\n"
        '  fix: drop it (pairs.drop(1)) or name other spans (pairs.align("spans", spans=[…]))'
    )


def test_the_users_map_is_taken_as_it_is_with_ends_counted_from_the_back():
    pairs = Pairs([Pair(ids(1, 2), ids(1, 2, 3), id="a"), Pair(ids(1, 2, 3), ids(1, 2), id="b")])
    by_list = pairs.align("map", mapping=[[(0, 0), (-1, -1)], [(2, 1)]])
    assert by_list.alignment.columns.tolist() == [[[0, 0], [1, 2]], [[2, 1], [-1, -1]]]
    by_id = pairs.align("map", mapping={"b": [(2, 1)], "a": [(0, 0), (1, 2)]})
    assert by_id.alignment.columns.tolist() == by_list.alignment.columns.tolist()


def test_a_map_that_leaves_the_prompt_is_refused():
    pairs = Pairs([Pair(ids(1, 2), ids(1, 2, 3))], name="rows")
    with pytest.raises(PairError) as error:
        pairs.align("map", mapping=[[(0, 0), (2, 2)]])
    assert str(error.value) == (
        "the map of pair 0 of 'rows' holds (2, 2), which is no pair of positions in it\n"
        "  clean      2 tokens\n"
        "  corrupted  3 tokens\n"
        "  fix: give (clean, corrupted) positions, counted in tokens from 0"
    )


def test_a_map_of_another_number_of_pairs_is_refused():
    pairs = Pairs([Pair(ids(1, 2), ids(1, 2, 3), id="a")], name="rows")
    with pytest.raises(PairError, match="the map of 'rows' has 2 entries for 1 pairs"):
        pairs.align("map", mapping=[[], []])
    with pytest.raises(PairError, match="the map has no entry for pair 'a' of 'rows'"):
        pairs.align("map", mapping={"b": []})
    with pytest.raises(SettingError, match="alignment by map needs a map"):
        pairs.align("map")


def test_an_unknown_way_to_align_is_refused():
    with pytest.raises(SettingError) as error:
        Pairs([Pair(ids(1), ids(2))]).align("role")
    assert str(error.value) == (
        "pairs cannot be aligned by 'role'\n"
        "  known  position, difference, spans, map\n"
        '  fix: pairs.align("difference")'
    )


@given(IDS, IDS)
def test_swapping_pairs_swaps_their_alignment(clean, corrupt):
    pairs = Pairs([Pair(clean, corrupt)]).align("difference")
    there, back = pairs.alignment.columns, pairs.swapped().alignment.columns
    assert (there == back[..., ::-1]).all()
    assert pairs.alignment.unmatched("clean") == pairs.swapped().alignment.unmatched("corrupt")
    assert pairs.alignment.labels("clean") == pairs.swapped().alignment.labels("corrupt")


def test_an_alignment_stays_with_the_pairs_that_are_taken():
    pairs = Pairs([Pair(ids(1, k, 9), ids(1, 9)) for k in range(4)]).align("difference")
    taken = pairs.take([3, 1])
    assert taken.alignment.how == "difference"
    assert taken.alignment.columns.tolist() == pairs.alignment.columns[[3, 1]].tolist()
