"""Prompts to ids: special tokens once, answers in context, spans of text."""

import pytest
from hypothesis import given, strategies as st

from causalpatch.base.errors import AnswerError, PairError
from causalpatch.pairs.prompts import Prompts

TEXTS = st.text("ab #.", min_size=1, max_size=12)


@pytest.fixture
def prompts(toy):
    return Prompts(toy().tokenizer)


def shown(prompts, ids):
    return [prompts.tokenizer.label(i) for i in ids]


def test_special_tokens_are_added_once(prompts):
    assert shown(prompts, prompts.ids("a b")) == ["<s>", "a", " b"]


def test_a_text_that_has_its_special_tokens_gets_none_again(toy):
    for options in ({}, {"end": True}, {"begin": False, "end": True}):
        prompts = Prompts(toy(**options).tokenizer)
        bare = prompts.ids("a b")
        written = "<s>" * prompts.tokenizer.begin + "a b" + "</s>" * prompts.tokenizer.end
        assert prompts.ids(written) == bare


def test_a_templated_text_that_comes_first_gets_none_again_either(toy):
    prompts = Prompts(toy().tokenizer)
    assert shown(prompts, prompts.ids("<s>a b")) == ["<s>", "a", " b"]
    assert shown(prompts, prompts.ids("a b")) == ["<s>", "a", " b"]


def test_trained_tokenizers_do_not_double_their_special_token(trained):
    prompts = Prompts(trained("stories260k").tokenizer)
    assert prompts.ids("Lily had a ball.")[0] == 1
    assert 1 not in prompts.ids("<s>Lily had a ball.")[1:]


def test_answers_are_what_the_prompt_goes_on_with(prompts):
    assert shown(prompts, prompts.answer("she saw", " Mary", "line 1")) == [" Mary"]
    assert shown(prompts, prompts.answer("she saw", " Joseph", "line 1")) == [" Jo", "seph"]


def test_answers_do_not_take_the_special_token_at_the_end_for_their_own(toy):
    prompts = Prompts(toy(end=True).tokenizer)
    assert shown(prompts, prompts.answer("she saw", " Mary", "line 1")) == [" Mary"]


@given(TEXTS, TEXTS)
def test_prompt_and_answer_make_up_the_whole(toy, prompt, answer):
    prompts = Prompts(toy().tokenizer)
    try:
        found = prompts.answer(prompt, answer, "line 1")
    except AnswerError:
        return
    assert prompts.ids(prompt) + list(found) == prompts.ids(prompt + answer)


def test_an_answer_that_merges_with_the_prompt_is_refused(prompts):
    with pytest.raises(AnswerError) as error:
        prompts.answer("he gave it to", "Mary", "line 3 of 'ioi.jsonl'")
    assert str(error.value) == (
        "the answer 'Mary' of line 3 of 'ioi.jsonl' changes the tokens of the prompt that it follows\n"
        "  prompt ends  ' it' ' to'\n"
        "  with answer  ' it' ' toMary'\n"
        "  fix: put the space before the answer (' Mary'), or give its id"
    )


def test_an_answer_that_the_model_does_not_know_is_refused(prompts):
    with pytest.raises(AnswerError) as error:
        prompts.answer("she saw a", " zyzzyva", "line 3")
    assert str(error.value) == (
        "the answer ' zyzzyva' of line 3 is not in the model's vocabulary\n"
        "  tokens  '<unk>'\n"
        "  fix: ask for a word that the model knows"
    )


def test_an_empty_answer_is_refused(prompts):
    with pytest.raises(AnswerError) as error:
        prompts.answer("he gave it to", "", "line 3")
    assert str(error.value) == "the answer '' of line 3 has no tokens\n  fix: give a text that is not empty"


@pytest.mark.parametrize(
    ("text", "tokens"), [("Joseph", (3, 5)), (" Joseph", (3, 5)), ("saw Joseph", (2, 5)), ("seph", (4, 5))]
)
def test_a_span_is_every_token_that_holds_one_of_its_characters(prompts, text, tokens):
    assert prompts.span("she saw Joseph run", text, "name", "it") == tokens


def test_tokens_of_mere_space_at_its_edges_do_not_belong_to_a_span(trained):
    prompts = Prompts(trained("babyllama-105").tokenizer)
    text = "a girl named Lily. "
    pieces = shown(prompts, prompts.ids(text))
    start, stop = prompts.span(text, "Lily", "name", "it")
    assert pieces[start:stop] == ["L", "i", "l", "y"]
    start, stop = prompts.span(text, "a girl", "first", "it")
    assert pieces[start] == "a"
    start, stop = prompts.span(text, " Lily", "name", "it")
    assert pieces[start:stop] == [" ", "L", "i", "l", "y"]


def test_spans_count_the_special_token(trained):
    prompts = Prompts(trained("stories260k").tokenizer)
    assert prompts.span("Lily had a red ball.", "Lily", "name", "it") == (1, 2)
    start, stop = prompts.span("<s>Lily had a red ball.", "red", "colour", "it")
    assert shown(prompts, prompts.ids("<s>Lily had a red ball.")[start:stop]) == [" r", "ed"]


def test_a_span_that_occurs_twice_is_refused(prompts):
    with pytest.raises(PairError) as error:
        prompts.span("Mary saw Mary", "Mary", "name", "the clean prompt of line 2 of 'ioi.jsonl'")
    assert str(error.value) == (
        "span 'name' ('Mary') occurs 2 times in the clean prompt of line 2 of 'ioi.jsonl'\n"
        "  prompt  'Mary saw Mary'\n"
        '  fix: give its tokens instead: {"name": [first, last + 1]}'
    )


def test_a_span_that_does_not_occur_is_refused(prompts):
    with pytest.raises(PairError) as error:
        prompts.span("Mary saw Mary", "John", "name", "the corrupted prompt of line 2")
    assert str(error.value) == (
        "span 'name' ('John') does not occur in the corrupted prompt of line 2\n"
        "  prompt  'Mary saw Mary'\n"
        '  fix: give its tokens instead: {"name": [first, last + 1]}'
    )


def test_an_empty_span_is_refused(prompts):
    with pytest.raises(PairError, match="span 'name' \\(''\\) does not occur in it"):
        prompts.span("Mary", "", "name", "it")
