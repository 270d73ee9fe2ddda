"""The embedded model: really trained, right on what it never saw, and described by its card as it is."""

import json
import re
from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from causalpatch.base.errors import ModelNotFound
from causalpatch.models.zoo import zoo_folder, zoo_names
from causalpatch.models.zoo.card import card_page, measure_folder
from causalpatch.models.zoo.sentences import Sentences, split_words, vocabulary
from causalpatch.models.zoo.train import SPECIAL, Recipe, batches, build_tokenizer, train
from causalpatch.pairs.tasks import TASKS, generate
from causalpatch.pairs.templates import AGREEMENT, GREATER_THAN, INDUCTION, IOI
from causalpatch.pairs.words import CENTURIES, LIST_WORDS, NAMES, NOUNS, never_meet, plural

TINY = Recipe(steps=3, rows=4, length=32, width=16, layers=1, heads=2, mlp_width=8)


@pytest.fixture(scope="module")
def card():
    return json.loads((zoo_folder("stories") / "card.json").read_text())


@pytest.fixture(scope="module")
def measured():
    return measure_folder(zoo_folder("stories"))


@pytest.fixture(scope="module")
def stories():
    """The weights and the tokenizer, as plain transformers loads them."""
    folder = zoo_folder("stories")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_the_zoo_lists_its_models_and_finds_their_folders():
    assert "stories" in zoo_names()
    assert (zoo_folder("stories") / "config.json").is_file()


def test_an_unknown_name_is_answered_with_the_closest():
    with pytest.raises(ModelNotFound) as caught:
        zoo_folder("story")
    assert str(caught.value) == (
        f"no model named 'story' comes with the library\n  zoo  {', '.join(zoo_names())}\n  fix: use 'zoo:stories'"
    )


def test_the_weights_take_two_megabytes_at_most(card):
    size = (zoo_folder("stories") / "model.safetensors").stat().st_size
    assert size <= 2_000_000
    assert card["bytes"] == size


@pytest.mark.parametrize("kind", ["all templates", "held-out template"])
@pytest.mark.parametrize("name", list(TASKS))
def test_held_out_pairs_are_answered_rightly(stories, name, kind):
    model, tokenizer = stories
    rows = generate(name, seed=11, templates=None if kind == "all templates" else [TASKS[name].held_out])
    right = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(row["clean"]).input_ids])).logits[0, -1]
        answers, wrong = row["answer"], row["wrong_answer"]
        if name == "greater_than":
            right.append(logits.softmax(-1)[tokenizer.convert_tokens_to_ids(answers)].sum() >= 0.9)
        elif name == "agreement":
            one, other = (tokenizer.convert_tokens_to_ids(text.strip()) for text in (answers, wrong))
            right.append(logits[one] > logits[other])
        else:
            right.append(tokenizer.convert_ids_to_tokens(int(logits.argmax())) == answers.strip())
    assert np.mean(right) >= 0.99


def test_the_card_says_that_every_behaviour_is_at_least_99_percent_right(card):
    for values in card["accuracy"].values():
        assert min(values["all_templates"], values["held_out_template"]) >= 0.99


def test_the_card_holds_the_numbers_that_the_weights_give(card, measured):
    assert set(card["accuracy"]) == set(card["recovered"]) == set(TASKS)
    for name in TASKS:
        assert card["accuracy"][name] == pytest.approx(measured["accuracy"][name], abs=0.006)
        assert card["recovered"][name] == pytest.approx(measured["recovered"][name], abs=2e-3)
        assert card["recovered_at_last"][name] == pytest.approx(measured["recovered_at_last"][name], abs=2e-3)
        assert card["strong_heads"][name] == measured["strong_heads"][name]
    for key in ("parameters", "bytes", "vocabulary"):
        assert card[key] == measured[key]


def test_the_page_for_people_is_made_from_the_card(card):
    assert (zoo_folder("stories") / "CARD.md").read_text() == card_page(card)


def test_indirect_objects_are_not_found_by_counting_names_in_layer_0(measured):
    strong = measured["strong_heads"]["ioi"]
    assert strong
    assert not all(head.startswith("L0") for head in strong)


def test_two_behaviours_have_different_strongest_heads(measured):
    top = [set(heads) for heads in measured["top_two"].values()]
    assert any(not one & other for one in top for other in top)


def test_the_saved_tokenizer_is_the_one_that_the_script_builds(stories):
    _, saved = stories
    built = build_tokenizer()
    assert saved.get_vocab() == built.get_vocab()
    text = "The war lasted from 1732 to 17"
    assert saved(text).input_ids == built(text).input_ids
    assert " ".join(saved.convert_ids_to_tokens(saved(text).input_ids)) == "<s> The war lasted from 17 32 to 17"


def test_a_seed_gives_the_same_weights_again_and_another_seed_gives_others():
    one, again, other = (train(recipe).state_dict() for recipe in (TINY, TINY, replace(TINY, seed=1)))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_training_changes_the_weights():
    untrained, trained = (train(replace(TINY, steps=steps)).state_dict() for steps in (0, 3))
    assert not any(torch.equal(untrained[name], trained[name]) for name in untrained)


def test_only_words_that_follow_count_fully_and_the_first_list_not_at_all():
    tokens, weights = next(batches(Recipe(rows=10, length=48, recitals=0.5)))
    words = [*SPECIAL, *vocabulary()]
    assert weights[:, 0].eq(0).all()
    assert weights[5:, 1:].unique().tolist() == pytest.approx([0.05, 1.0])
    for row in range(5):
        recited = [words[token] for token in tokens[row].tolist()]
        for place in torch.nonzero(weights[row]).flatten().tolist():
            assert weights[row, place] == 1
            couple = recited[place - 1 : place + 1]
            assert couple in [recited[start : start + 2] for start in range(place - 1)]


@pytest.fixture(scope="module")
def stories_told():
    """Many training stories, each a list of texts, without stars."""
    sentences = Sentences(3)
    rows = [sentences.story() for _ in range(1500)]
    return [[next(row).replace("*", "") for _ in range(8)] for row in rows]


@pytest.fixture(scope="module")
def recitals_told():
    """Many training recitals, each a list of texts of which the first holds the whole list, without stars."""
    sentences = Sentences(4)
    rows = [sentences.recital() for _ in range(1500)]
    return [[next(row).replace("*", "") for _ in range(3)] for row in rows]


def test_training_texts_hold_every_word_of_the_vocabulary_but_year_00(stories_told, recitals_told):
    seen = {word for row in stories_told + recitals_told for text in row for word in split_words(text)}
    assert set(vocabulary()) - seen == {"00"}


@pytest.mark.parametrize("templates", [IOI, AGREEMENT, GREATER_THAN], ids=["ioi", "agreement", "greater_than"])
def test_the_held_out_template_is_no_training_sentence_though_another_is(stories_told, templates):
    def told(template):
        shape = re.compile(re.sub(r"\\{\w+\\}", r"\\w+", re.escape(template.text)))
        return any(shape.search(text) for row in stories_told for text in row)

    assert told(templates[0])
    assert not told(templates[-1])


def test_the_held_out_list_frame_is_no_training_frame_though_another_is(recitals_told):
    def told(frame):
        return any(text.startswith(frame.between) for row in recitals_told for text in row[1:])

    assert told(INDUCTION[3])
    assert not told(INDUCTION[-1])


def test_names_that_are_kept_apart_never_stand_in_one_story(stories_told):
    for row in stories_told:
        people = {NAMES.index(word) for text in row for word in split_words(text) if word in NAMES}
        assert not any(never_meet(one, other) for one, other in combinations(people, 2))


def test_years_that_are_kept_apart_from_a_century_begin_no_event(stories_told):
    starts = [found[0] for row in stories_told for text in row if (found := re.findall(r"(\d\d)(\d\d)", text))]
    assert len(starts) > 1000
    assert not any(never_meet(CENTURIES.index(century), int(year)) for century, year in starts)


def test_nouns_that_are_kept_apart_are_never_subject_and_attractor(stories_told):
    number = {form: place for place, noun in enumerate(NOUNS) for form in (noun, plural(noun))}
    shape = re.compile(r"[Tt]he (\w+) (?:near|behind|beside|from) the (\w+) (?:is|are|was|were)\b")
    couples = [found.groups() for row in stories_told for text in row if (found := shape.search(text))]
    assert len(couples) > 100
    assert not any(never_meet(number[one], number[other]) for one, other in couples)


def test_list_words_that_are_kept_apart_are_never_neighbours_in_a_list(recitals_told):
    for whole, *_ in recitals_told:
        listed = [LIST_WORDS.index(word) for word in split_words(whole) if word in LIST_WORDS]
        assert len(listed) >= 6
        assert not any(never_meet(one, other) for one, other in pairwise(listed))
