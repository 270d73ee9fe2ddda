"""Pairs for models with an encoder and a decoder: what each is given, answers as the decoder writes them."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PairError
from causalpatch.pairs import Pair, Pairs

ROW = {"clean": "Mary went home", "corrupt": "John went home", "answer": " Mary", "wrong_answer": " John"}


@pytest.fixture
def seq(toy):
    """A function that makes a model whose decoder begins with some ids."""

    def make(start=(2,), **options):
        model = toy(**options)
        model.decoder_prompt = start
        return model

    return make


def test_the_decoder_begins_as_the_model_says(seq):
    model = seq((2, 9))
    pairs = cp.load_pairs([ROW], model)
    assert pairs[0].clean.tolist() == pairs[0].corrupt.tolist() == [2, 9]
    assert pairs.encoder[0].clean.tolist() == model.tokenizer.encode("Mary went home")
    assert pairs.encoder[0].clean_text == "Mary went home"
    assert pairs[0].answer == (tuple(model.tokenizer.encode(" Mary", special=False)),)
    assert repr(pairs) == "Pairs('rows', 1 pairs of 4 to 4 tokens in the encoder, 2 to 2 tokens in the decoder)"


def test_a_text_goes_on_behind_the_beginning_without_special_tokens(seq):
    model = seq(end=True)
    row = {**ROW, "decoder": "It was", "decoder_spans": {"verb": " was"}, "spans": {"who": {"clean": [1, 2]}}}
    row["spans"]["who"]["corrupt"] = "John"
    pairs = cp.load_pairs([row], model)
    words = model.tokenizer.encode("It was", special=False)
    assert pairs[0].clean.tolist() == [2, *words]
    assert pairs[0].clean_text == "It was"
    assert pairs[0].spans == {"verb": ((2, 3), (2, 3))}
    assert pairs.encoder[0].spans == {"who": ((1, 2), (1, 2))}
    assert len(pairs[0].answer[0]) == 1


def test_either_side_may_have_a_prompt_of_its_own_and_ids_are_taken_as_they_are(seq):
    row = {"clean": [5, 6, 7], "corrupt": [5, 8], "clean_decoder": [2, 4], "corrupted_decoder": [2, 4, 4]}
    pairs = cp.load_pairs([{**row, "answer_id": 9}], seq(), name="ids")
    assert (pairs[0].clean.tolist(), pairs[0].corrupt.tolist()) == ([2, 4], [2, 4, 4])
    assert pairs.lengths("corrupt").tolist() == [3]
    assert pairs.encoder.lengths("clean").tolist() == [3]
    assert pairs.sizes("clean").tolist() == [5]


def test_a_model_with_one_stream_keeps_such_columns_as_they_are(toy):
    pairs = cp.load_pairs([{**ROW, "decoder": "kept"}], toy())
    assert pairs.encoder is None
    assert pairs[0].extra == {"decoder": "kept"}


def test_pairs_are_one_component_when_the_encoder_reads_the_same(seq):
    rows = [ROW, {**ROW, "clean": "Anna went home"}, {**ROW, "clean": "Tom ran", "corrupt": "Jim ran"}]
    pairs = cp.load_pairs(rows, seq())
    assert pairs.components.tolist() == [0, 0, 1]
    found = pairs.check()
    assert found.same_input == ()
    assert found.n_components == 2


def test_swapping_and_taking_carry_the_encoder_along(seq):
    pairs = cp.load_pairs([ROW, {**ROW, "clean": "Anna went home now"}], seq()).align("difference")
    turned = pairs.swapped()
    assert turned.encoder[1].corrupt.tolist() == pairs.encoder[1].clean.tolist()
    assert turned.encoder.aligned().columns.tolist() == pairs.encoder.aligned().columns[:, :, ::-1].tolist()
    assert pairs.take([1]).encoder.aligned().columns.tolist() == pairs.encoder.aligned().columns[1:].tolist()
    assert pairs.one_sided("corrupt").encoder[1].clean.tolist() == pairs.encoder[1].corrupt.tolist()
    assert len({pair.content_hash for pair in (*pairs, *turned)}) == 4


def test_alignments_of_the_two_streams_are_apart(seq):
    rows = [{"clean": [5, 6, 7], "corrupt": [5, 7], "clean_decoder": [2, 4], "corrupt_decoder": [2, 4, 9]}]
    pairs = cp.load_pairs(rows, seq())
    assert pairs.alignment is None
    both = pairs.align("difference")
    assert both.encoder.aligned().columns[0].tolist() == [[0, 0], [-1, -1], [2, 1]]
    assert both.aligned().columns[0].tolist() == [[0, 0], [1, 1]]
    mapped = both.align("map", mapping=[[(0, 0)]])
    assert (mapped.encoder.aligned().n_columns, mapped.aligned().n_columns) == (1, 2)
    assert both.align("map", mapping=[[(0, 0)]], stream="decoder").aligned().n_columns == 1
    assert both.content_hash != mapped.content_hash


def test_a_batch_holds_both_prompts(seq):
    rows = [{"clean": [5, 6, 7], "corrupt": [5, 7]}, {"clean": [5], "corrupt": [6]}]
    batch = cp.load_pairs(rows, seq()).batch("clean", padding_side="left", continuations=[[4], []])
    assert batch.ids.tolist() == [[2, 4], [0, 2]]
    assert batch.encoder.ids.tolist() == [[5, 6, 7], [0, 0, 5]]
    assert batch.of("encoder").start.tolist() == [0, 2]
    assert batch.of("decoder") is batch


def test_all_pairs_have_a_prompt_for_an_encoder_or_none():
    ids = np.array([1])
    with pytest.raises(PairError, match="pair 1 of 'half' has no prompt for an encoder"):
        Pairs([Pair(ids, ids, encoder=Pair(ids, ids)), Pair(ids, ids)], name="half")
