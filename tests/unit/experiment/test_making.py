"""From failing prompts to pairs: what is kept is what the model says, and everything else is counted."""

import json
from collections import Counter

import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, PairError, SettingError
from causalpatch.cli.main import main
from causalpatch.testing.stories import BEHAVIOURS, templates
from causalpatch.testing.tiny import tiny_model

MET = {"prompt": "When {a} and {b} went to the park, {giver} gave a ring to"}
COUPLES = [("Mary", "John"), ("Linda", "Paul"), ("Susan", "Mark"), ("Karen", "Eric"), ("Lisa", "Adam")]
FILLERS = [{"a": a, "b": b, "giver": giver} for a, b in COUPLES for giver in (a, b)]
# What the model says of each is right; that the first name is wanted makes it a failure.
FAILING = [
    {
        "prompt": MET["prompt"].format(a=a, b=b, giver=a),
        "answer": f" {a}",
        "works": MET["prompt"].format(a=a, b=b, giver=b),
    }
    for a, b in COUPLES
]


@pytest.fixture(scope="module")
def model():
    return cp.open_model("zoo:stories")


def logits(model, prompt):
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    with torch.no_grad():
        return model.module(ids).logits[0, -1]


def id_of(model, word):
    return model.tokenizer.encode(f"Then {word}")[-1]


def test_every_pair_fails_and_works_by_plain_forwards(model):
    made = cp.make_pairs(FAILING, model, ways=["works", "length"], tries=6)
    assert made.reasons  # some partners do not work, so the verdicts below are not empty
    for pair in made.pairs:
        ((right,),), ((wrong,),) = pair.answer, pair.wrong_answer
        clean, corrupt = logits(model, pair.clean_text), logits(model, pair.corrupt_text)
        assert clean[right] > clean[wrong]
        assert corrupt[wrong] > corrupt[right]
        assert int(corrupt.argmax()) == wrong  # the wrong answer was not given: it is the first choice
    kept = {pair.clean_text for pair in made.pairs}
    for one in made.dropped:
        row = FAILING[int(one.failure)]
        right, wrong = id_of(model, row["answer"].strip()), int(logits(model, row["prompt"]).argmax())
        assert one.why == "the partner does not work"
        assert one.prompt not in kept
        assert logits(model, one.prompt)[right] <= logits(model, one.prompt)[wrong]


def test_everything_that_was_tried_is_kept_or_counted(model):
    made = cp.make_pairs(FAILING, model, ways=["works", "length"], tries=6)
    assert sum(made.tried.values()) == len(made.pairs) + len(made.dropped)
    assert made.tried == {"works": 5, "length": 30}
    assert Counter(pair.extra["way"] for pair in made.pairs)["works"] == 5
    assert all(len(p.clean) == len(p.corrupt) for p in made.pairs if p.extra["way"] == "length")
    assert f"partners tried          {sum(made.tried.values())}: works 5, length 30" in str(made)


def test_a_prompt_that_does_not_fail_is_dropped(model):
    fine = [{"prompt": row["works"], "answer": row["answer"], "works": row["prompt"]} for row in FAILING[:2]]
    named = {**fine[0], "wrong_answer": " John", "id": "named"}
    made = cp.make_pairs([*FAILING[:1], *fine[1:], {**named, "answer": " Mary"}], model)
    assert made.failing == ("0",)
    assert {(one.failure, one.way, one.why) for one in made.dropped} == {
        ("1", None, "the prompt does not fail"),
        ("named", None, "the prompt does not fail"),
    }
    assert made.reasons == {"the prompt does not fail": 2}


def test_a_failing_prompt_without_a_partner_is_named(model):
    fails_too = FAILING[1]["prompt"].replace("ring", "coin")
    made = cp.make_pairs([FAILING[0], {**FAILING[1], "works": fails_too}], model)
    assert made.alone == ("1",)
    assert "without a partner       1: 1" in str(made)


def test_an_answer_of_the_partners_own_is_what_it_is_held_to(model):
    works = {"prompt": FAILING[1]["works"], "answer": " Linda"}
    made = cp.make_pairs([{**FAILING[0], "works": works}], model, ways=["works"])
    assert made.pairs[0].answer == ((id_of(model, "Linda"),),)
    assert made.pairs[0].wrong_answer == ((id_of(model, "John"),),)
    same = {"prompt": FAILING[1]["works"], "answer": " John"}
    with pytest.raises(PairError, match="no partner of the 1 failing prompts"):
        cp.make_pairs([{**FAILING[0], "works": same}], model, ways=["works"])


def test_templates_fill_failing_prompts_otherwise(model):
    rows = [{key: row[key] for key in ("prompt", "answer")} for row in FAILING]
    made = cp.make_pairs(rows, model, templates={**MET, "fillers": FILLERS})
    assert {pair.extra["way"] for pair in made.pairs} == {"template"}
    assert {(pair.corrupt_text, pair.clean_text) for pair in made.pairs} >= {(r["prompt"], r["works"]) for r in FAILING}


def test_templates_alone_give_pairs_of_which_no_two_share_an_entity(model):
    template = {**MET, "answer": " {receiver}", "fillers": [
        {"a": a, "b": b, "giver": giver, "receiver": b if giver == a else a} for a, b in COUPLES for giver in (a, b)
    ]}  # fmt: skip
    made = cp.make_pairs(None, model, templates=[template], entity_disjoint=True, tries=4)
    names = [set(pair.entities) for pair in made.pairs]
    assert all(names)
    assert sum(map(len, names)) == len(set.union(*names))
    assert made.n_components == len(made.pairs) > 1
    freely = cp.make_pairs(None, model, templates=[template], tries=4)
    assert len(freely.pairs) > len(made.pairs)
    assert made.reasons["shares an entity with a kept pair"] == len(freely.pairs) - len(made.pairs)


def test_the_changed_tokens_are_a_span(model):
    made = cp.make_pairs(FAILING, model, ways=["works"])
    for pair in made.pairs:
        ((start, stop), corrupt) = pair.spans["changed"]
        differ = [k for k in range(len(pair.clean)) if pair.clean[k] != pair.corrupt[k]]
        assert (start, stop) == corrupt == (differ[0], differ[-1] + 1)
    assert made.pairs.positions(0, cp.parse("z.0.0@changed").position, "clean")[0].tolist() == [differ[0]]


def test_saved_pairs_are_read_back_as_they_are(model, tmp_path):
    rows = [{**row, "spans": {"who": row["answer"].strip() + " gave"}, "kind": "met"} for row in FAILING]
    made = cp.make_pairs(rows, model, ways=["works", "length"])
    again = cp.load_pairs(made.save(tmp_path / "deep" / "pairs.jsonl"), model)
    assert again.content_hash == made.pairs.content_hash
    assert again[0].extra == made.pairs[0].extra
    assert again[0].extra["kind"] == "met"


def test_strict_also_asks_for_first_choices(model):
    named = [{**row, "wrong_answer": " Irene"} for row in FAILING[:1]]  # not what the model says, nor above the wanted
    with pytest.raises(PairError, match="none of the 1 prompts"):
        cp.make_pairs(named, model)
    swapped = [{**FAILING[0], "answer": " Irene", "wrong_answer": " Mary", "works": FAILING[0]["works"]}]
    with pytest.raises(PairError, match="the first choice is neither answer"):
        cp.make_pairs(swapped, model, strict=True)


def test_no_tokenizer_no_way_and_nothing_given_are_refused(model):
    with pytest.raises(ModelUnsupported, match="has no tokenizer"):
        cp.make_pairs(FAILING, cp.open_model(tiny_model("llama")))
    with pytest.raises(SettingError, match="no way to make a partner"):
        cp.make_pairs(FAILING, model, ways=["luck"])
    with pytest.raises(SettingError, match="made of nothing"):
        cp.make_pairs(None, model)
    with pytest.raises(PairError, match="does not say how its prompts are to be answered"):
        cp.make_pairs(None, model, templates={**MET, "fillers": FILLERS})


def test_the_program_writes_the_same_pairs(model, tmp_path, capsys):
    source = tmp_path / "failures.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in FAILING))
    with pytest.raises(SystemExit) as stop:
        main(["pairs", "zoo:stories", str(source), "--out", str(tmp_path / "pairs.jsonl"), "--way", "works", "--json"])
    said = json.loads(capsys.readouterr().out)
    assert not stop.value.code
    assert (said["given"], said["failing"], said["kept"], said["dropped"]) == (5, 5, 5, {})
    read = cp.load_pairs(said["file"], model)
    assert read.content_hash == cp.make_pairs(FAILING, model, ways=["works"]).pairs.content_hash


def test_partners_of_as_many_tokens_are_made_on_request(model):
    template = {**MET, "fillers": [*FILLERS, {"a": "Mary", "b": "John and Paul", "giver": "John and Paul"}]}
    made = {
        is_equal: cp.make_pairs(FAILING, model, ways=["template"], templates=template, equal_length=is_equal)
        for is_equal in (False, True)
    }
    tried = {
        is_equal: {one.prompt for one in each.dropped} | {pair.clean_text for pair in each.pairs}
        for is_equal, each in made.items()
    }
    longer = {prompt for prompt in tried[False] if "John and Paul" in prompt}
    assert longer
    assert tried[True] == tried[False] - longer
    assert all(len(pair.clean) == len(pair.corrupt) for pair in made[True].pairs)


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_the_templates_of_stories_have_room_for_forty_pairs(behaviour):
    made = templates(behaviour)
    assert len({one["prompt"] for one in made}) == len({one["name"] for one in made}) == 8
    fillers = made[0]["fillers"]
    texts = [one["name"] for one in fillers] if isinstance(fillers, list) else next(iter(fillers.values()))
    assert len(set(texts)) == len(texts) >= 80
