"""Chats as prompts: special tokens as the template writes them, and the turns of each role as spans."""

from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, PairError
from causalpatch.models.tokens import WrappedTokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]"
    "{% elif m.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% else %} {{ m.content | trim }}</s>{% endif %}{% endfor %}"
)
SHOUTED = "{% for m in messages %}{{ m.role }}: {{ m.content | upper }}\n{% endfor %}"
PLAIN = "{% for m in messages %}|{{ m.role }}|\n{{ m.content }}\n{% endfor %}|assistant|\n"
TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "user"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Is it far?"},
]


def letters(template=None):
    """Make a tokenizer in which every byte is a token and ``<s>`` is put before a text, with a chat template."""
    specials = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    pieces = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: k for k, piece in enumerate(pieces)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(specials)
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="<|im_end|>", pad_token="</s>")
    made.chat_template = template
    return SimpleNamespace(name="letters", tokenizer=WrappedTokenizer(made))


def pair_of(model, clean, corrupt=None, **columns):
    return cp.load_pairs([{"clean": clean, "corrupt": corrupt or clean, **columns}], model)[0]


def held(model, pair):
    """Return the text of each span of the clean prompt."""
    tokens = {name: pair.clean[start:stop].tolist() for name, ((start, stop), _) in pair.spans.items()}
    return {name: model.tokenizer.decode(ids) for name, ids in tokens.items()}


@pytest.mark.parametrize("template", [CHATML, PLAIN])
def test_a_chat_has_the_ids_that_transformers_gives_it(template):
    model = letters(template)
    ids = model.tokenizer.tokenizer.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    assert pair_of(model, TALK).clean.tolist() == ids
    assert (
        model.tokenizer.encode("Hello")[0] == 0
    )  # a text that is no chat gets <s>, which these templates do not write
    assert 0 not in ids


def test_a_template_that_writes_the_first_token_gets_it_once():
    model = letters(INST)
    assert pair_of(model, TALK[1:]).clean.tolist().count(0) == 1


def test_spans_hold_the_words_of_each_role_and_what_opens_the_answer():
    model = letters(CHATML)
    assert held(model, pair_of(model, TALK)) == {
        "system": "Be kind.",
        "user": "Is it far?",
        "user_1": "user",
        "user_2": "Is it far?",
        "assistant": "Yes?",
    }
    assert held(model, pair_of(model, TALK[:2])) == {
        "system": "Be kind.",
        "user": "user",
        "assistant": "<|im_start|>assistant\n",
    }


def test_a_template_without_an_opening_has_what_follows_the_last_words():
    model = letters(INST)
    found = held(model, pair_of(model, [{"role": "user", "content": " Is it far? "}]))
    assert found == {"user": "Is it far?", "assistant": " [/INST]"}


def test_a_chat_that_ends_with_the_assistant_goes_on_behind_its_words():
    model = letters(CHATML)
    pair = pair_of(model, [*TALK[:2], {"role": "assistant", "content": "It is"}], answer=" far"[:1])
    assert model.tokenizer.decode(pair.clean.tolist()).endswith("<|im_start|>assistant\nIt is")
    assert held(model, pair)["assistant"] == "It is"


def test_the_spans_of_chats_of_different_length_are_positions_of_each():
    model = letters(CHATML)
    other = [*TALK[:3], {"role": "user", "content": "Is it very far?"}]
    pairs = cp.load_pairs([{"clean": TALK, "corrupt": other, "answer": "N"}], model)
    clean, corrupt = pairs.positions(0, cp.parse("z.0.0@user").position, "clean")
    assert (len(clean), len(corrupt)) == (10, 15)
    assert pairs[0].answer == ((model.tokenizer.encode("N", special=False)[0],),)


def test_a_span_of_ones_own_wins_over_a_role():
    model = letters(CHATML)
    assert held(model, pair_of(model, TALK, spans={"user": "it far"}))["user"] == "it far"


def test_words_that_a_template_changes_are_refused_rather_than_guessed():
    model = letters(SHOUTED)
    with pytest.raises(PairError, match="do not stand in what the chat template writes"):
        pair_of(model, TALK)


def test_a_chat_needs_a_template_and_roles_that_it_takes():
    with pytest.raises(PairError, match="has no chat template"):
        pair_of(letters(), TALK)
    with pytest.raises(ModelUnsupported, match="refuses these messages"):
        pair_of(letters(INST), TALK)
    with pytest.raises(PairError, match="something that is no message"):
        pair_of(letters(CHATML), [{"role": "tool", "content": "x"}])
