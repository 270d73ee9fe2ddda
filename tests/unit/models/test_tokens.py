import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from causalpatch.base.tokens import Tokenizer as TokenizerProtocol
from causalpatch.models import open_model
from causalpatch.models.tokens import WrappedTokenizer
from causalpatch.testing.tiny import tiny_model

VOCAB = {"<s>": 0, "</s>": 1, "<unk>": 2, "Anna": 3, "met": 4, "Ben": 5}


def words(frame=True, **special):
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        inner.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 1)])
    given = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return WrappedTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner, **(given | special)))


def test_it_is_what_the_rooms_below_ask_for():
    assert isinstance(words(), TokenizerProtocol)
    assert words().vocab_size == 6


def test_special_tokens_are_added_once():
    tokenizer = words()
    assert tokenizer.encode("Anna met Ben") == [0, 3, 4, 5, 1]
    assert tokenizer.encode("Anna met Ben", special=False) == [3, 4, 5]
    assert tokenizer.encode("<s> Anna met") == [0, 3, 4, 1]
    assert tokenizer.encode("<s> Anna met </s>") == [0, 3, 4, 1]


def test_a_tokenizer_that_adds_nothing_keeps_what_the_text_doubles():
    assert words(frame=False).encode("<s> <s> Anna") == [0, 0, 3]


def test_offsets_are_spans_of_the_text_and_empty_for_special_tokens():
    tokenizer = words()
    assert tokenizer.encode_with_offsets("Anna hid") == ([0, 3, 2, 1], [(0, 0), (0, 4), (5, 8), (0, 0)])
    ids, spans = tokenizer.encode_with_offsets("<s> Anna")
    assert ids == [0, 3, 1]
    assert spans == [(0, 0), (4, 8), (0, 0)]


@pytest.mark.parametrize(
    ("special", "pad_id"),
    [({"pad_token": "<unk>"}, 2), ({}, 1), ({"eos_token": None, "bos_token": None}, 0)],
)
def test_padding_falls_back_to_the_end_of_text_and_then_to_zero(special, pad_id):
    assert words(frame=False, **special).pad_id == pad_id


def test_an_id_outside_the_vocabulary_is_labelled_by_its_number():
    assert words().label(4) == "met"
    assert words().label(60) == "[60]"
    assert words().label(-1) == "[-1]"


def test_labels_of_byte_level_pieces_keep_their_space():
    inner = Tokenizer(models.BPE({"\u0120the": 0, "the": 1, "\u00e2": 2}, []))
    inner.decoder = decoders.ByteLevel()
    tokenizer = WrappedTokenizer(PreTrainedTokenizerFast(tokenizer_object=inner))
    assert [tokenizer.label(token_id) for token_id in range(3)] == [" the", "the", "\u00e2"]


def test_labels_of_sentencepiece_keep_their_space(shared):
    tokenizer = open_model(shared / "models" / "stories260k").tokenizer
    labels = [tokenizer.label(token_id) for token_id in tokenizer.encode("Lily had a ball.\n")]
    assert labels == ["<s>", " Lily", " had", " a", " b", "all", ".", "\n"]
    assert tokenizer.encode("<s> Lily")[:2] == [1, 410]


def test_a_tokenizer_may_be_given_in_any_form(tmp_path):
    module, tokenizer = tiny_model("llama"), words()
    tokenizer.tokenizer.save_pretrained(tmp_path)
    for given in (tokenizer, tokenizer.tokenizer, tmp_path, str(tmp_path)):
        assert open_model(module, tokenizer=given).tokenizer.encode("Anna") == [0, 3, 1]
