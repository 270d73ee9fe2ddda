"""One row to one pair: inputs, answers, spans, and the errors that name the row."""

import json

import numpy as np
import pytest

from causalpatch.base.errors import AnswerError, PairError, PairFileError
from causalpatch.pairs import load_pairs

NUMBERS = "\n  fix: give a text, a list of ids, or numbers in rows of equal length"
VOCABULARY = "\n  fix: check that the pairs were made for this model's tokenizer"


def load(model, **row):
    row = {"clean": "Tom saw", "corrupt": "Mary saw", **row}
    return load_pairs([row], model, name="rows")


def tokens(model, ids):
    return [model.tokenizer.label(i) for i in ids]


def test_texts_become_ids_and_are_kept(toy):
    pairs = load(toy())
    assert pairs.tokens("clean", 0) == ["<s>", "Tom", " saw"]
    assert pairs[0].text("corrupt") == "Mary saw"
    assert pairs.kind == "tokens"
    assert pairs[0].clean.dtype == np.int64


def test_lists_of_ids_are_taken_as_they_are(toy, bare):
    for model in (toy(), bare, None):
        pair = load(model, clean=[5, 1, 5], corrupt=np.array([6, 1, 5], dtype=np.int32), answer_id=3)[0]
        assert pair.clean.tolist() == [5, 1, 5]
        assert pair.corrupt.dtype == np.int64
        assert pair.clean_text is None


def test_numbers_of_other_shapes_are_arrays(bare):
    pairs = load(bare, clean=[[0.0, 1.0]], corrupt=np.ones((1, 2)), answer=3, wrong_answer=5)
    assert pairs.kind == "arrays"
    assert pairs[0].clean.shape == (1, 2)
    assert pairs[0].answer == ((3,),)
    assert load(bare, clean=[0.5, 1.0], corrupt=[1.0, 2.0]).kind == "arrays"


def test_arrays_are_found_in_the_file_beside(tmp_path, bare):
    np.savez(tmp_path / "data.npz", images=np.arange(8).reshape(2, 2, 2))
    row = {"clean": "data.npz:images[0]", "corrupt": "data.npz:images[1]", "answer": 1}
    (tmp_path / "p.jsonl").write_text(json.dumps(row))
    pairs = load_pairs(tmp_path / "p.jsonl", bare)
    assert pairs.kind == "arrays"
    assert pairs[0].corrupt.tolist() == [[4, 5], [6, 7]]


@pytest.mark.parametrize("reference", ["data.npz:pictures[0]", "data.npz:images[2]"])
def test_an_entry_that_the_file_does_not_hold_is_refused(tmp_path, bare, reference):
    np.savez(tmp_path / "data.npz", images=np.zeros((2, 3)))
    (tmp_path / "p.jsonl").write_text(json.dumps({"clean": reference, "corrupt": reference}))
    with pytest.raises(PairFileError) as error:
        load_pairs(tmp_path / "p.jsonl", bare)
    asked = reference.partition(":")[2]
    assert str(error.value) == (
        f"line 1 of 'p.jsonl' needs {asked}, which 'data.npz' does not hold\n"
        "  arrays  images of 2\n"
        "  fix: write FILE.npz:NAME[i] with a name and an index that are there"
    )


def test_a_file_of_arrays_that_is_not_there_or_is_none_is_refused(tmp_path, bare):
    (tmp_path / "p.jsonl").write_text(json.dumps({"clean": "data.npz:x[0]", "corrupt": "data.npz:x[0]"}))
    with pytest.raises(PairFileError, match=r"line 1 of 'p.jsonl' needs the file '.*data.npz', which is not there"):
        load_pairs(tmp_path / "p.jsonl", bare)
    (tmp_path / "data.npz").write_text("nothing")
    with pytest.raises(PairFileError, match="cannot be read as arrays"):
        load_pairs(tmp_path / "p.jsonl", bare)
    (tmp_path / "data.npz").write_bytes(b"PK\x03\x04broken")
    with pytest.raises(PairFileError, match="cannot be read as arrays"):
        load_pairs(tmp_path / "p.jsonl", bare)


def test_texts_need_a_tokenizer(bare):
    with pytest.raises(PairError) as error:
        load(bare)
    assert str(error.value) == (
        "'clean' of row 0 of 'rows' is a text, but the model has no tokenizer\n"
        "  text  'Tom saw'\n"
        "  fix: open_model(…, tokenizer=…), or give token ids or arrays"
    )


@pytest.mark.parametrize(
    ("clean", "text"),
    [
        ([], "'clean' of row 0 of 'rows' has no tokens\n  fix: give a prompt of at least one token"),
        (7, "'clean' of row 0 of 'rows' is a single number\n  value  7\n  fix: give a list"),
        ({"a": 1}, "'clean' of row 0 of 'rows' is neither text, token ids nor numbers\n  value  {'a': 1}" + NUMBERS),
        (
            [[1], [1, 2]],
            "'clean' of row 0 of 'rows' is neither text, token ids nor numbers\n  value  [[1], [1, 2]]" + NUMBERS,
        ),
        ([1, 1000], "'clean' of row 0 of 'rows' holds 1000, which is no token id\n  ids  0 to 999" + VOCABULARY),
        ([1, -1], "'clean' of row 0 of 'rows' holds -1, which is no token id\n  ids  0 to 999" + VOCABULARY),
    ],
)
def test_an_input_that_is_none_is_refused(toy, clean, text):
    with pytest.raises(PairError) as error:
        load(toy(), clean=clean)
    assert str(error.value) == text


def test_a_prompt_is_not_paired_with_an_array(toy):
    with pytest.raises(PairError) as error:
        load(toy(), clean=[[1.0]])
    assert str(error.value) == (
        "row 0 of 'rows' pairs a prompt with an array\n"
        "  clean    arrays\n"
        "  corrupt  tokens\n"
        "  fix: give both as text, both as token ids or both as arrays"
    )


def test_answers_are_tokenised_in_context(toy):
    model = toy()
    pair = load(model, answer=" Joseph", wrong_answer=[" Mary", " Tom"])[0]
    assert [tokens(model, one) for one in pair.answer] == [[" Jo", "seph"]]
    assert [tokens(model, one) for one in pair.wrong_answer] == [[" Mary"], [" Tom"]]


def test_ids_win_over_text_which_is_then_not_even_read(toy):
    pair = load(toy(), answer="merges", answer_id=[8, 9], wrong_answer=" Tom", wrong_answer_id=[[4, 5], [6]])[0]
    assert pair.answer == ((8,), (9,))
    assert pair.wrong_answer == ((4, 5), (6,))


def test_answers_may_be_ids_and_sets_lose_repeats(toy):
    assert load(toy(), answer=8)[0].answer == ((8,),)
    assert load(toy(), answer=[8, 9, 8])[0].answer == ((8,), (9,))
    assert load(toy(), answer=[[8, 9], 7])[0].answer == ((8, 9), (7,))
    assert load(toy(), answer=np.int64(8))[0].answer == ((8,),)
    assert load(toy())[0].answer == ()


def test_first_token_cuts_answers(toy):
    model = toy()
    row = {"clean": "Tom saw", "corrupt": "Mary saw", "answer": " Joseph", "wrong_answer_id": [[4, 5], [4, 6]]}
    pair = load_pairs([row], model, first_token=True)[0]
    assert [tokens(model, one) for one in pair.answer] == [[" Jo"]]
    assert pair.wrong_answer == ((4,),)


def test_an_answer_with_other_tokens_after_the_other_prompt_is_refused(toy):
    with pytest.raises(AnswerError) as error:
        load(toy(), corrupt="Mary # saw", answer=" Tom", wrong_answer=" Mary")
    assert str(error.value) == (
        "the answer ' Tom' of row 0 of 'rows' has different tokens after its two prompts\n"
        "  clean      ' Tom'\n"
        "  corrupted  ' ' 'T' 'o' 'm'\n"
        "  fix: end both prompts alike, or give answer_id"
    )


def test_text_answers_need_text_prompts(toy):
    with pytest.raises(AnswerError) as error:
        load(toy(), clean=[1, 2], corrupt=[1, 3], wrong_answer=" Tom")
    assert str(error.value) == (
        "'wrong_answer' of row 0 of 'rows' is a text, but its prompts are not\n"
        "  text  ' Tom'\n"
        "  fix: give its id in a column wrong_answer_id"
    )


@pytest.mark.parametrize("answer_id", [1.5, "x", [], [[]], [None], {}])
def test_ids_must_be_whole_numbers(toy, answer_id):
    with pytest.raises(AnswerError) as error:
        load(toy(), answer_id=answer_id)
    assert str(error.value) == (
        "'answer_id' of row 0 of 'rows' is not a token id\n"
        f"  value  {answer_id!r}\n"
        "  fix: give a whole number, a list of them (a set), or a list of lists (answers of several tokens)"
    )


def test_answers_outside_the_vocabulary_are_refused(toy):
    with pytest.raises(AnswerError) as error:
        load(toy(), answer_id=1000)
    assert (
        str(error.value) == "'answer' of row 0 of 'rows' holds 1000, which is no token id\n  ids  0 to 999" + VOCABULARY
    )


def test_a_models_larger_vocabulary_counts(toy):
    model = toy()
    model.vocab_size = 1024
    assert load(model, answer_id=1000)[0].answer == ((1000,),)


def test_an_answer_that_is_both_right_and_wrong_is_refused(toy):
    with pytest.raises(AnswerError) as error:
        load(toy(), answer=[" Tom", " Ann"], wrong_answer=" Ann")
    assert str(error.value).startswith("an answer of row 0 of 'rows' is both right and wrong\n  ids  [")
    row = {"clean": "a", "corrupt": "b", "answer_id": [[4, 5]], "wrong_answer_id": [[4, 6]]}
    with pytest.raises(AnswerError) as error:
        load_pairs([row], toy(), first_token=True)
    assert str(error.value) == (
        "an answer of row 0 of 'rows' is both right and wrong\n"
        "  ids  [4]\n"
        "  fix: drop the pair, or read it whole: first_token=False"
    )


def test_spans_are_texts_ranges_or_one_of_these_for_each_prompt(toy):
    spans = {
        "verb": "saw",
        "all": [1, 3],
        "last": [-1, None],
        "name": {"clean": "Tom", "corrupt": "Joseph"},
        "mixed": {"clean": [0, 1], "corrupt": "saw"},
    }
    pair = load(toy(), corrupt="Ann Joseph saw", clean="Tom saw x", spans=spans)[0]
    assert pair.spans == {
        "verb": ((2, 3), (4, 5)),
        "all": ((1, 3), (1, 3)),
        "last": ((3, 4), (4, 5)),
        "name": ((1, 2), (2, 4)),
        "mixed": ((0, 1), (4, 5)),
    }


def test_spans_that_are_no_mapping_are_refused(toy):
    with pytest.raises(PairError) as error:
        load(toy(), spans=["saw"])
    assert str(error.value) == (
        "'spans' of row 0 of 'rows' is not a mapping\n"
        "  value  ['saw']\n"
        '  fix: write {"subject": " Mary"} or {"subject": [3, 5]}'
    )


@pytest.mark.parametrize("value", [[1, 4], [2, 2], [-4, 2], [1], [0.0, 1.0], 1, {"clean": [0, 1]}])
def test_a_span_outside_a_prompt_is_refused(toy, value):
    with pytest.raises(PairError) as error:
        load(toy(), spans={"verb": value})
    role = "corrupted" if isinstance(value, dict) else "clean"
    shown = None if isinstance(value, dict) else value
    assert str(error.value) == (
        f"span 'verb' of row 0 of 'rows' is no part of the {role} prompt\n"
        f"  {'value':<{len(role)}}  {shown!r}\n"
        f"  {role:<5}  3 tokens\n"
        '  fix: give a text that stands in it, or its tokens: {"verb": [first, last + 1]}'
    )


def test_a_text_span_needs_a_text_prompt(toy):
    with pytest.raises(PairError, match="3 tokens, no text"):
        load(toy(), clean=[1, 2, 3], spans={"verb": "saw"})


def test_a_span_text_that_occurs_twice_names_the_row_and_the_prompt(toy):
    with pytest.raises(
        PairError, match=r"span 'verb' \('saw'\) occurs 2 times in the corrupted prompt of row 0 of 'rows'"
    ):
        load(toy(), corrupt="Mary saw saw", spans={"verb": "saw"})
