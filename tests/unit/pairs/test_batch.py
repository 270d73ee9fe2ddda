"""Batches: padding changes nothing but the rectangle."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from causalpatch.base.errors import PairError, SettingError
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.batch import pad, stack

PROMPTS = st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=9), min_size=1, max_size=6)
SIDES = st.sampled_from(["left", "right"])


@given(PROMPTS, SIDES, st.integers(0, 60), st.data())
def test_padded_batches_unpad_to_the_same_ids_with_positions_from_zero(prompts, side, pad_id, data):
    arrays = [np.array(prompt) for prompt in prompts]
    more = data.draw(st.lists(st.lists(st.integers(0, 50), max_size=3), min_size=len(prompts), max_size=len(prompts)))
    batch = pad(arrays, pad_id=pad_id, padding_side=side, continuations=more)
    for row, (prompt, after) in enumerate(zip(prompts, more, strict=True)):
        whole = prompt + after
        assert batch.ids[row][batch.mask[row]].tolist() == whole
        assert batch.position_ids[row][batch.mask[row]].tolist() == list(range(len(whole)))
        assert (batch.ids[row][~batch.mask[row]] == pad_id).all()
        assert (batch.position_ids[row][~batch.mask[row]] == 0).all()
        assert batch.lengths[row] == len(prompt)
        at = batch.column(row, np.arange(len(whole)))
        assert batch.ids[row][at].tolist() == whole


def test_left_and_right_padding_put_the_same_tokens_on_the_asked_side():
    prompts = [np.array([7, 8, 9]), np.array([5])]
    assert pad(prompts, pad_id=0, padding_side="right").ids.tolist() == [[7, 8, 9], [5, 0, 0]]
    left = pad(prompts, pad_id=0, padding_side="left")
    assert left.ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert left.mask.tolist() == [[True, True, True], [False, False, True]]
    assert left.position_ids.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert left.start.tolist() == [0, 2]
    assert left.column(np.array([0, 1]), np.array([2, 0])).tolist() == [2, 2]


def test_a_batch_takes_its_rows_in_the_asked_order_with_repeats():
    pairs = Pairs([Pair(np.array([k]), np.array([k, 10 + k])) for k in range(3)])
    assert pairs.batch("corrupt", [2, 0, 2]).ids.tolist() == [[2, 12], [0, 10], [2, 12]]
    assert len(pairs.batch("clean")) == 3


def test_the_tokenizers_own_pad_id_fills_the_padding(toy):
    tokenizer = toy().tokenizer
    tokenizer.pad_id = 77
    pairs = Pairs([Pair(np.array([1]), np.array([1])), Pair(np.array([1, 2]), np.array([1, 2]))], tokenizer=tokenizer)
    assert pairs.batch("clean").ids.tolist() == [[1, 77], [1, 2]]


def test_arrays_are_stacked_without_token_positions():
    values = [np.full((2, 2), k) for k in range(3)]
    batch = stack(values, "images")
    assert batch.values.shape == (3, 2, 2)
    assert batch.values.dtype == values[0].dtype
    assert batch.ids.shape == batch.mask.shape == (3, 0)


def test_arrays_of_different_shapes_are_refused():
    with pytest.raises(PairError) as error:
        stack([np.zeros((1, 28, 28)), np.zeros((1, 32, 32))], "digits")
    assert str(error.value) == (
        "inputs of 'digits' cannot stand in one batch: their shapes differ\n"
        "  shapes  (1, 28, 28), (1, 32, 32)\n"
        "  fix: bring them to one shape first: pairs.transformed(function)"
    )


def test_a_side_that_does_not_exist_is_refused():
    with pytest.raises(SettingError, match="'middle' is not a side to pad on"):
        pad([np.array([1])], padding_side="middle")


def test_continuations_must_be_one_per_row():
    with pytest.raises(SettingError) as error:
        pad([np.array([1]), np.array([2])], continuations=[[3]])
    assert str(error.value) == (
        "every row needs its own continuation\n"
        "  rows           2\n"
        "  continuations  1\n"
        "  fix: give one list of ids per row, an empty one where nothing follows"
    )
