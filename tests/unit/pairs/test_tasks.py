"""The built-in tasks: well-formed rows, independent pairs, and words that a test can trust."""

import re
from itertools import combinations
from types import SimpleNamespace

import pytest

from causalpatch.base.errors import PairError, TaskNotFound
from causalpatch.models.tokens import WrappedTokenizer
from causalpatch.models.zoo.train import build_tokenizer
from causalpatch.pairs.readers import load_pairs
from causalpatch.pairs.tasks import TASKS, find_task, generate
from causalpatch.pairs.words import ADJECTIVES, EVENTS, LIST_WORDS, NAMES, NOUNS, YEARS, never_meet, plural

ALL = list(TASKS)
WORD = re.compile(r"\d\d|\w+|[^\w\s]")


@pytest.fixture(scope="module")
def stories():
    """What load_pairs asks of a model, with the embedded model's tokenizer."""
    return SimpleNamespace(name="zoo:stories", tokenizer=WrappedTokenizer(build_tokenizer()))


def texts_of(value):
    """All texts of a span: one for both prompts, or one for each."""
    return (value, value) if isinstance(value, str) else (value["clean"], value["corrupt"])


@pytest.mark.parametrize("name", ALL)
def test_rows_hold_prompts_answers_templates_entities_and_spans(name):
    for row in generate(name):
        assert set(row) == {"id", "clean", "corrupt", "answer", "wrong_answer", "template", "entities", "spans"}
        assert row["clean"] != row["corrupt"]
        assert "{" not in row["clean"] + row["corrupt"]
        assert row["template"] in TASKS[name].templates


@pytest.mark.parametrize("name", ALL)
def test_clean_and_corrupted_prompts_differ_in_one_word(name):
    for row in generate(name, seed=3):
        clean, corrupt = (WORD.findall(row[role]) for role in ("clean", "corrupt"))
        assert len(clean) == len(corrupt)
        assert sum(one != other for one, other in zip(clean, corrupt, strict=True)) == 1


@pytest.mark.parametrize("name", ALL)
def test_by_default_no_two_pairs_share_an_entity_or_a_prompt(name):
    rows = generate(name, TASKS[name].capacity, seed=1)
    for one, other in combinations(rows, 2):
        assert not set(one["entities"]) & set(other["entities"])
        assert not {one["clean"], one["corrupt"]} & {other["clean"], other["corrupt"]}


@pytest.mark.parametrize("name", ALL)
def test_a_default_task_has_forty_independent_components_over_six_templates(name, stories):
    pairs = load_pairs(name, stories)
    assert len(set(pairs.components.tolist())) == len(pairs) == TASKS[name].default_pairs >= 40
    assert len({row["template"] for row in generate(name)}) == len(TASKS[name].templates) >= 6


@pytest.mark.parametrize("name", ALL)
def test_pairs_that_may_share_entities_have_fewer_components_than_pairs(name, stories):
    pairs = load_pairs(generate(name, TASKS[name].capacity + 5, entity_disjoint=False), stories)
    assert len(set(pairs.components.tolist())) < len(pairs)


@pytest.mark.parametrize("name", ALL)
def test_prompts_are_equally_long_answers_are_single_tokens_and_no_word_is_unknown(name, stories):
    unknown = stories.tokenizer.encode("zyzzyva", special=False)
    for pair in load_pairs(generate(name, TASKS[name].capacity, seed=1), stories):
        assert len(pair.clean) == len(pair.corrupt)
        answers = [*pair.answer, *pair.wrong_answer]
        assert {len(answer) for answer in answers} == {1}
        ids = {*pair.clean.tolist(), *pair.corrupt.tolist(), *(answer[0] for answer in answers)}
        assert not ids & set(unknown)


@pytest.mark.parametrize("name", ALL)
def test_the_entities_of_a_pair_stand_in_its_prompts(name):
    for row in generate(name, seed=2):
        for entity in row["entities"]:
            assert entity in row["clean"]


def test_the_couples_that_are_asked_for_never_met_in_training():
    for row in generate("ioi", 80):
        assert never_meet(*(NAMES.index(name) for name in row["entities"]))
    for row in generate("agreement", 80):
        assert never_meet(*(NOUNS.index(noun) for noun in row["entities"]))
    for row in generate("induction"):
        cue, answer = row["clean"].split()[-1], row["answer"].strip()
        assert never_meet(LIST_WORDS.index(cue), LIST_WORDS.index(answer))


@pytest.mark.parametrize("name", ALL)
def test_each_span_stands_once_in_its_prompt(name):
    for seed in range(5):
        for row in generate(name, TASKS[name].capacity, seed=seed):
            for value in row["spans"].values():
                clean, corrupt = texts_of(value)
                assert row["clean"].count(clean) == 1
                assert row["corrupt"].count(corrupt) == 1


@pytest.mark.parametrize("name", ALL)
def test_a_seed_gives_the_same_rows_again_and_another_seed_gives_others(name):
    assert generate(name, 8, seed=4) == generate(name, 8, seed=4)
    assert generate(name, 8, seed=4) != generate(name, 8, seed=5)


@pytest.mark.parametrize("name", ALL)
def test_fewer_pairs_are_the_first_of_more(name):
    assert generate(name, 5) == generate(name, 9)[:5]


@pytest.mark.parametrize("name", ALL)
def test_asking_for_more_pairs_than_entities_allow_says_how_many_are_possible(name):
    capacity = TASKS[name].capacity
    with pytest.raises(PairError) as caught:
        generate(name, capacity + 1)
    assert str(caught.value) == (
        f"{capacity + 1} pairs of '{name}' that share no entity cannot be made\n"
        f"  possible  {capacity} pairs\n"
        f"  fix: ask for n={capacity} or fewer, or allow sharing with entity_disjoint=False"
    )


@pytest.mark.parametrize("name", ALL)
def test_pairs_that_may_share_entities_can_be_many_and_all_differ(name):
    rows = generate(name, 200, entity_disjoint=False)
    assert len({row["clean"] for row in rows}) == len({row["id"] for row in rows}) == 200


def test_only_the_templates_that_are_asked_for_are_used():
    rows = generate("ioi", 6, templates=["once-back", "when-went"])
    assert [row["template"] for row in rows] == ["once-back", "when-went"] * 3


def test_an_unknown_template_is_answered_with_those_that_exist():
    with pytest.raises(PairError, match="task 'agreement' has no template 'nearby'") as caught:
        generate("agreement", templates=["nearby"])
    assert "templates  near, behind" in str(caught.value)


def test_an_unknown_task_is_answered_with_the_closest():
    with pytest.raises(TaskNotFound) as caught:
        generate("inductoin")
    assert str(caught.value) == (
        "no task is named 'inductoin'\n  tasks  ioi, induction, agreement, greater_than\n  fix: use 'induction'"
    )


@pytest.mark.parametrize("n", [0, -3])
def test_less_than_one_pair_cannot_be_asked_for(n):
    with pytest.raises(PairError, match="ask for n=1 or more"):
        generate("ioi", n)


def test_later_years_answer_and_all_others_are_wrong():
    for row in generate("greater_than"):
        start = int(row["clean"].partition(row["spans"]["start"]["clean"])[1][2:])
        assert start >= 30
        assert row["spans"]["start"]["corrupt"].endswith("01")
        assert [int(year) for year in row["answer"]] == list(range(start + 1, 100))
        assert row["wrong_answer"] == list(YEARS[: start + 1])


def test_the_receiver_is_the_one_who_does_not_give():
    for row in generate("ioi"):
        assert row["spans"]["giver"]["clean"].startswith(row["wrong_answer"].strip())
        assert row["spans"]["giver"]["corrupt"].startswith(row["answer"].strip())


def test_the_verb_has_the_number_of_the_subject_and_the_attractor_has_the_other():
    for row in generate("agreement"):
        subject, attractor = row["entities"]
        singular = row["answer"] == " is"
        assert row["spans"]["subject"]["clean"].endswith(subject if singular else plural(subject))
        assert row["spans"]["attractor"].endswith(f" {plural(attractor) if singular else attractor}")


def test_the_induction_answer_follows_the_cue_in_the_list():
    for row in generate("induction"):
        for role, answer in (("clean", "answer"), ("corrupt", "wrong_answer")):
            words = row["entities"]
            assert words[words.index(row[role].split()[-1]) + 1] == row[answer].strip()


def test_every_task_is_found_by_its_name_and_names_its_held_out_template():
    for name in ALL:
        assert find_task(name).held_out == TASKS[name].templates[-1]


def test_word_lists_are_plentiful_and_hold_no_word_twice():
    for words, least in ((NAMES, 150), (NOUNS, 150), (EVENTS, 60), (ADJECTIVES, 60), (LIST_WORDS, 240)):
        assert len(set(words)) == len(words) >= least


def test_no_noun_begins_with_another_so_a_span_is_found_once():
    forms = [*NOUNS, *EVENTS]
    assert [(one, other) for one in forms for other in forms if one != other and other.startswith(one)] == []
