"""Pairs as a collection: selecting, swapping, hashing."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from causalpatch.base.errors import PairError, SettingError
from causalpatch.pairs import Pair, Pairs

IDS = st.lists(st.integers(0, 9), min_size=2, max_size=6).map(np.array)


@st.composite
def one_pair(draw):
    return Pair(
        draw(IDS),
        draw(IDS),
        answer=((draw(st.integers(0, 9)),),),
        spans={"name": ((0, 1), (0, draw(st.integers(1, 2))))},
        clean_text="clean",
        corrupt_text="corrupt",
    )


def tiny(n=5):
    kinds = [{"kind": "ab"[k % 2]} for k in range(n)]
    return Pairs([Pair(np.array([k]), np.array([k + 1]), id=f"p{k}", extra=kinds[k]) for k in range(n)], name="tiny")


@given(st.lists(one_pair(), min_size=1, max_size=4), st.booleans())
def test_swapped_twice_is_the_identity(made, is_aligned):
    pairs = Pairs(made).align("difference") if is_aligned else Pairs(made)
    again = pairs.swapped().swapped()
    assert again.content_hash == pairs.content_hash
    for one, two in zip(pairs, again, strict=True):
        assert (one.clean_text, one.corrupt_text, one.spans) == (two.clean_text, two.corrupt_text, two.spans)
        assert one.clean.tolist() == two.clean.tolist()


@given(one_pair())
def test_swapping_exchanges_inputs_texts_and_spans_and_keeps_answers(pair):
    other = pair.swapped()
    assert other.clean.tolist() == pair.corrupt.tolist()
    assert (other.clean_text, other.corrupt_text) == ("corrupt", "clean")
    assert other.spans["name"] == pair.spans["name"][::-1]
    assert other.answer == pair.answer
    assert other.id == pair.id


def test_a_pairs_arrays_are_copied_and_cannot_be_changed():
    ids = np.array([1, 2])
    pair = Pair(ids, ids)
    ids[0] = 9
    assert pair.clean.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        pair.clean[0] = 9


def test_taking_keeps_order_and_repeats_and_reads_truth_values():
    assert tiny().take([3, 0, 3]).ids == ["p3", "p0", "p3"]
    assert tiny().take(np.array([True, False, True, False, False])).ids == ["p0", "p2"]
    assert tiny()[1:3].ids == ["p1", "p2"]
    assert tiny()[-1].id == "p4"


def test_dropping_goes_by_index_or_id():
    assert tiny().drop(1).ids == ["p0", "p2", "p3", "p4"]
    assert tiny().drop(-1).ids == ["p0", "p1", "p2", "p3"]
    assert tiny().drop("p2").ids == ["p0", "p1", "p3", "p4"]


@pytest.mark.parametrize("which", [5, -6, "p9"])
def test_dropping_what_is_not_there_is_refused(which):
    with pytest.raises(PairError) as error:
        tiny().drop(which)
    assert str(error.value) == f"'tiny' has no pair {which!r}\n  pairs  0 to 4, or an id\n  fix: see the ids: pairs.ids"


def test_selecting_by_columns_keeps_what_equals_all_of_them():
    assert tiny().where(kind="a").ids == ["p0", "p2", "p4"]
    assert tiny().where(kind="a", id="p2").ids == ["p2"]


def test_selecting_by_an_unknown_column_is_refused_with_those_there_are():
    with pytest.raises(PairError) as error:
        tiny().where(behaviour="a")
    assert str(error.value) == (
        "'tiny' has no column 'behaviour'\n  columns  group, id, kind, split\n  fix: select by one of these"
    )


def test_an_empty_selection_is_refused():
    with pytest.raises(PairError) as error:
        tiny().where(kind="c")
    assert str(error.value) == "no pairs are left of 'tiny'\n  fix: select at least one"


def test_the_hash_sees_content_order_and_alignment_and_not_the_name():
    pairs = tiny()
    assert Pairs(pairs.pairs, name="other").content_hash == pairs.content_hash
    assert pairs.take([1, 0]).content_hash != pairs.take([0, 1]).content_hash
    assert pairs.align("difference").content_hash != pairs.content_hash
    changed = Pair(np.array([0]), np.array([1]), id="p0", answer=((3,),))
    assert Pairs([changed, *pairs.pairs[1:]]).content_hash != pairs.content_hash


def test_the_hash_tells_arrays_of_equal_bytes_and_other_shapes_apart():
    flat = Pairs.from_arrays(np.zeros((1, 4)), np.ones((1, 4)))
    square = Pairs.from_arrays(np.zeros((1, 2, 2)), np.ones((1, 2, 2)))
    assert flat.content_hash != square.content_hash


def test_lengths_count_real_tokens_of_each_role():
    pairs = Pairs([Pair(np.array([1, 2, 3]), np.array([1])), Pair(np.array([1]), np.array([1, 2]))])
    assert pairs.lengths("clean").tolist() == [3, 1]
    assert pairs.lengths("corrupt").tolist() == [1, 2]
    assert repr(pairs) == "Pairs('pairs', 2 pairs of 1 to 3 tokens)"


def test_arrays_of_any_kind_become_pairs():
    torch = pytest.importorskip("torch")
    images = torch.arange(8.0, requires_grad=True).reshape(2, 2, 2)
    pairs = Pairs.from_arrays(
        images, [np.ones((2, 2))] * 2, answer=np.array([3, 4]), wrong_answer=[5, 6], group=["x", "x"]
    )
    assert pairs.kind == "arrays"
    assert pairs[1].clean.tolist() == [[4.0, 5.0], [6.0, 7.0]]
    assert pairs[1].answer == ((4,),)
    assert pairs[1].wrong_answer == ((6,),)
    assert pairs.components.tolist() == [0, 0]
    assert pairs.alignment is None
    assert pairs.lengths("clean").tolist() == [1, 1]


def test_arrays_that_do_not_pair_up_are_refused():
    with pytest.raises(PairError) as error:
        Pairs.from_arrays(np.zeros((2, 3)), np.zeros((1, 3)), name="digits")
    assert str(error.value) == ("'digits' has 2 clean inputs and 1 of corrupt\n  fix: give one of each per pair")


def test_inputs_that_are_no_numbers_are_refused():
    with pytest.raises(PairError, match="an input holds something other than numbers"):
        Pairs.from_arrays([["a"]], [["b"]])
    with pytest.raises(PairError, match="an input cannot be read as an array"):
        Pairs.from_arrays([[[1], [1, 2]]], [[[1], [1, 2]]])


def test_transforming_applies_to_both_inputs_of_arrays_only():
    pairs = Pairs.from_arrays(np.zeros((2, 3), np.uint8), np.full((2, 3), 2, np.uint8), answer=[0, 1])
    scaled = pairs.transformed(lambda image: image / 2)
    assert scaled[0].corrupt.tolist() == [1.0, 1.0, 1.0]
    assert scaled[1].answer == ((1,),)
    with pytest.raises(PairError, match="'tiny' holds prompts; only inputs that are arrays can be transformed"):
        tiny().transformed(lambda image: image)


def test_an_unknown_kind_is_refused():
    with pytest.raises(SettingError, match="'texts' is not a kind of pairs"):
        Pairs([Pair(np.array([1]), np.array([2]))], kind="texts")
