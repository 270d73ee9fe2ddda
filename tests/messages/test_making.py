"""Refusals of making pairs: nothing fails, nothing works, no tokenizer, spans and templates that do not fit."""

import pytest

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, PairError, PairFileError, SettingError

PROMPT = "When Mary and John went to the park, {} gave a ring to"
FAILS = {"prompt": PROMPT.format("Mary"), "answer": " Mary"}


@pytest.fixture(scope="module")
def stories():
    return cp.open_model("zoo:stories")


def test_prompts_that_are_answered_right_make_no_pairs(refuses, stories):
    with refuses(
        PairError,
        """
        none of the 1 prompts of 'failures' fails in 'zoo:stories'
          1 dropped  the prompt does not fail, such as 'When Mary and John went to the park, John gave …'
          fix: check that answer is what is wanted (mostly with a space in front), and that this is the model
        """,
    ):
        cp.make_pairs([{**FAILS, "prompt": PROMPT.format("John")}], stories)


def test_partners_that_do_not_work_make_no_pairs(refuses, stories):
    works = [FAILS["prompt"].replace("ring", word) for word in ("coin", "lamp")]
    with refuses(
        PairError,
        """
        no partner of the 1 failing prompts of 'failures' works in 'zoo:stories'
          partners   works 2
          2 dropped  the partner does not work, such as 'When Mary and John went to the park, Mary gave …'
                     (wrong answer ahead by 6.78)
          fix: give similar prompts that the model answers right: make_pairs(…, works=[{"prompt": "…", "answer": " …"}])
        """,
    ):
        cp.make_pairs([{**FAILS, "works": works}], stories, ways=["works"])


def test_templates_must_fit_a_failing_prompt(refuses, stories):
    with refuses(
        PairError,
        """
        no partner of the 1 failing prompts of 'failures' works in 'zoo:stories'
          partners   template 0
          templates  no failing prompt fits one
          fix: give similar prompts that the model answers right: make_pairs(…, works=[{"prompt": "…", "answer": " …"}])
        """,
    ):
        cp.make_pairs([FAILS], stories, templates={"prompt": "The {x} of", "fillers": {"x": ["key"]}})


def test_a_template_needs_fillers_for_all_its_slots(refuses, stories):
    with refuses(
        PairError,
        """
        template 0 cannot be filled
          prompt           '{x} and {y}'
          without fillers  y
          fix: write {"prompt": "{name} ran to", "fillers": {"name": ["Mary", "Tom"]}}
        """,
    ):
        cp.make_pairs([FAILS], stories, templates={"prompt": "{x} and {y}", "fillers": {"x": ["key"]}})


def test_a_model_without_a_tokenizer_is_no_model_to_make_pairs_for(refuses, tagger):
    with refuses(
        ModelUnsupported,
        """
        'Tagger' has no tokenizer, so no prompts can be made for it
          fix: open_model(…, tokenizer=…), or pair token ids yourself: load_pairs(rows, model)
        """,
    ):
        cp.make_pairs([FAILS], tagger)


def test_a_span_must_stand_in_its_prompt(refuses, stories):
    with refuses(
        PairError,
        """
        span 'who' ('Linda') does not occur in the prompt of row 0 of 'failures'
          prompt  'When Mary and John went to the park, Mary gave a ring to'
          fix: name a text that stands in it once, with as many words around it as that takes
        """,
    ):
        cp.make_pairs([{**FAILS, "spans": {"who": "Linda"}}], stories)


def test_a_row_must_say_what_is_wanted(refuses, stories):
    with refuses(
        PairFileError,
        """
        row 0 of 'failures' has no 'answer'
          columns  prompt
          fix: write {"prompt": "…", "answer": " what is wanted"} on each line, and wrong_answer where you know it
        """,
    ):
        cp.make_pairs([{"prompt": "Mary met"}], stories)


def test_a_chat_needs_a_template(refuses, stories):
    with refuses(
        PairError,
        """
        the clean prompt of row 0 of 'rows' is a chat, but the model's tokenizer has no chat template
          roles  user
          fix: set tokenizer.chat_template, or write the prompt out as one text
        """,
    ):
        cp.load_pairs([{"clean": [{"role": "user", "content": "Hi"}], "corrupt": "Hi"}], stories)


def test_a_model_to_compare_with_that_fails_too_is_no_partner(refuses, stories):
    with refuses(
        PairError,
        """
        'zoo:stories' answers none of the 1 failing prompts of 'failures' right
          1 dropped  the other model does not answer it right either, such as 'When Mary and John went to the
                     park, Mary gave …' (wrong answer ahead by 7.63)
          fix: take a checkpoint that worked, or make partners in the model itself: leave against= out
        """,
    ):
        cp.make_pairs([FAILS], stories, against=cp.open_model("zoo:stories"))


def test_partners_are_prompts_or_another_model_but_not_both(refuses, stories):
    with refuses(
        SettingError,
        """
        no partners are made of other prompts where another model is the partner
          against  'zoo:stories' runs the failing prompts themselves
          fix: give failing prompts and against= alone, or leave against= out
        """,
    ):
        cp.make_pairs([FAILS], stories, against=stories, works=[PROMPT.format("John")])
