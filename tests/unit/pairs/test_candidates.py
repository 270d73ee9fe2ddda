"""Partners of failing prompts: what differs, what is put in its place, which templates fit."""

import pytest

from causalpatch.base.errors import PairError, PairFileError
from causalpatch.pairs.candidates import Material, PromptTemplate, candidates
from causalpatch.pairs.edits import Prompt, differences
from causalpatch.pairs.failures import read_failures, read_working


def made(row, way, *, works=(), templates=(), vocabulary=None, tries=100, seed=0):
    """Return the partners of one failing prompt, a token for each word."""
    failures, _ = read_failures([row])
    working = read_working(works) if works else []
    read = [PromptTemplate.of(one, k) for k, one in enumerate(templates)]
    material = Material.of(failures, working, read, vocabulary)
    return candidates(failures[0], [way], material, lambda prompt: len(str(prompt).split()), tries, seed)


def texts(found):
    return [str(one.prompt) for one in found[0]]


def test_putting_the_differences_in_gives_the_other_prompt():
    one, other = Prompt(("A dog, a cat and I ran home.",)), Prompt(("A cow, a cat and he ran far away.",))
    changed = differences(one, other)
    assert [(one.text(place), text) for place, text in changed] == [
        ("dog", "cow"),
        ("I", "he"),
        ("home", "far away"),
    ]
    for place, text in reversed(changed):
        one = one.replaced(place, text)
    assert one == other


def test_chats_are_changed_in_their_words_and_compared_turn_by_turn():
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Is it far?"}]
    one = Prompt.of(chat, "row")
    other = Prompt.of([chat[0], {"role": "user", "content": "Is it near?"}], "row")
    ((place, text),) = differences(one, other)
    assert one.replaced(place, text).given == other.given
    assert differences(one, Prompt(("Be kind.",))) == []


def test_prompts_that_work_come_nearest_first_and_ones_own_before_all():
    row = {"prompt": "the red dog ran", "answer": " x", "works": "some other dog ran there"}
    works = ["the red dog ran off", "a blue cat ran", "the red cat ran"]
    assert texts(made(row, "works", works=works)) == [
        "some other dog ran there",
        "the red cat ran",
        "a blue cat ran",
        "the red dog ran off",
    ]
    found, untried = made(row, "works", works=works, tries=2)
    assert (len(found), untried) == (2, {"works": 2})


def test_each_difference_from_a_prompt_that_works_is_substituted_alone():
    row = {"prompt": "the red dog ran", "answer": " x", "works": {"prompt": "the blue dog sat", "answer": " y"}}
    found, _ = made(row, "substitution")
    assert {str(one.prompt) for one in found} == {"the blue dog ran", "the red dog sat"}
    assert {one.answer["answer"] for one in found} == {" y"}
    # Where one stretch differs, the prompt that works is that substitution.
    assert made({**row, "works": "the blue dog ran"}, "substitution")[0] == []


def test_a_named_span_takes_its_replacements_or_what_that_span_holds_elsewhere():
    row = {"prompt": "Mary met Tom", "answer": " x", "spans": {"who": "Mary"}}
    given = {**row, "replacements": {"who": ["Anna", "Sue"]}}
    assert sorted(texts(made(given, "substitution"))) == ["Anna met Tom", "Sue met Tom"]
    elsewhere = made(row, "substitution", works=[{"prompt": "Ben met Tom", "spans": {"who": "Ben"}}])
    assert texts(elsewhere) == ["Ben met Tom"]
    assert elsewhere[0][0].spans == {"who": ("Ben", "Mary")}
    assert elsewhere[0][0].changed == ("Mary", "Ben")


def test_a_template_is_filled_otherwise_and_says_the_answer():
    template = {
        "name": "met",
        "prompt": "{a} met {b}. {a} saw",
        "answer": " {b}",
        "fillers": {"a": ["Mary", "Sue"], "b": ["Tom"]},
    }
    found, _ = made({"prompt": "Mary met Tom. Mary saw", "answer": " Tom"}, "template", templates=[template])
    assert [str(one.prompt) for one in found] == ["Sue met Tom. Sue saw"]
    assert (found[0].answer, found[0].changed, found[0].extra) == (
        {"answer": " Tom"},
        ("Sue", "Mary"),
        {"template": "met"},
    )
    assert found[0].spans == {"b": ("Tom", "Tom")}  # a stands twice, so it is no span
    assert texts(made({"prompt": "Mary met Tom. Sue saw", "answer": " x"}, "template", templates=[template])) == []


def test_replacements_of_length_keep_the_number_of_tokens():
    row = {"prompt": "Mary met Tom", "answer": " x", "spans": {"who": "Mary"}}
    vocabulary = ["Sue", "Mary Ann", "Ben", "Mary"]
    assert sorted(texts(made(row, "length", vocabulary=vocabulary))) == ["Ben met Tom", "Sue met Tom"]
    anywhere = texts(made({"prompt": "a b", "answer": " x"}, "length", vocabulary=["c"]))
    assert sorted(anywhere) == ["a c", "c b"]


def test_more_partners_than_tries_are_drawn_by_the_seed_and_counted():
    row = {"prompt": "Mary met Tom", "answer": " x", "spans": {"who": "Mary"}}
    vocabulary = [f"N{k}" for k in range(30)]
    drawn = [made(row, "length", vocabulary=vocabulary, tries=5, seed=seed) for seed in (0, 0, 1)]
    assert texts(drawn[0]) == texts(drawn[1]) != texts(drawn[2])
    assert drawn[0][1] == {"length": 25}


@pytest.mark.parametrize(
    ("row", "error", "said"),
    [
        ({"prompt": "a"}, PairFileError, "has no 'answer'"),
        ({"answer": "a"}, PairFileError, "has no 'prompt'"),
        ({"prompt": 3, "answer": "a"}, PairError, "neither a text nor a list of messages"),
        ({"prompt": "a b", "answer": "a", "spans": {"x": "c"}}, PairError, "does not occur"),
        ({"prompt": "a b a", "answer": "a", "spans": {"x": "a"}}, PairError, "occurs 2 times"),
        ({"prompt": "a b", "answer": "a", "spans": ["a"]}, PairError, "no mapping"),
        ({"prompt": "a b", "answer": "a", "replacements": {"x": "c"}}, PairError, "none of its spans"),
    ],
)
def test_a_row_that_cannot_be_read_is_refused(row, error, said):
    with pytest.raises(error, match=said):
        read_failures([row])
    with pytest.raises(PairError, match="are called"):
        read_failures([{"prompt": "a", "answer": "b", "id": 1}] * 2)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ({"prompt": "no slot", "fillers": {"a": ["b"]}}, "has no slot"),
        ({"prompt": "{a}", "fillers": {"b": ["b"]}}, "cannot be filled"),
        ({"prompt": "{a}", "answer": "{c}", "fillers": [{"a": "b"}]}, "cannot be filled"),
        ({"prompt": "{a}"}, "cannot be filled"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(template, said):
    with pytest.raises(PairError, match=said):
        PromptTemplate.of(template, 0)
