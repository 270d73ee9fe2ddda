"""A toy tokenizer whose rules are known, and the trained ones that stand beside the project."""

import re
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from causalpatch.models.tokens import WrappedTokenizer

UNKNOWN = ("zyzzyva", "xylem")
LONG = {" Joseph": (" Jo", "seph"), " marbles": (" mar", "bles")}


class Words:
    """Words with the space before them; long ones in two pieces; after a ``#`` every letter alone; two words unknown.

    Args:
        begin: Whether ``<s>`` (id 1) stands before each text.
        end: Whether ``</s>`` (id 2) stands after each text.
    """

    pad_id = 0
    vocab_size = 1000

    def __init__(self, begin=True, end=False):
        self.begin, self.end = begin, end
        self.pieces = ["<pad>", "<s>", "</s>", "<unk>"]

    def cut(self, text):
        head, sign, tail = text.partition("#")
        found = re.findall(r"<s>|</s>| ?\d\d| ?\w+|\W", head) + [sign] * bool(sign) + list(tail)
        return [piece for word in found for piece in LONG.get(word, (word,))]

    def encode(self, text, *, special=True):
        pieces = ["<unk>" if piece.strip() in UNKNOWN else piece for piece in self.cut(text)]
        self.pieces += [piece for piece in dict.fromkeys(pieces) if piece not in self.pieces]
        ids = [self.pieces.index(piece) for piece in pieces]
        return [1] * (special and self.begin) + ids + [2] * (special and self.end)

    def encode_with_offsets(self, text):
        spans, at = [(0, 0)] * self.begin, 0
        for piece in self.cut(text):
            spans.append((at, at + len(piece)))
            at += len(piece)
        return self.encode(text), spans + [(0, 0)] * self.end

    def label(self, token_id):
        return self.pieces[token_id]


@pytest.fixture
def toy():
    """A function that makes a model with the toy tokenizer."""

    def make(**options):
        return SimpleNamespace(name="toy", tokenizer=Words(**options))

    return make


@pytest.fixture
def bare():
    """A model without a tokenizer."""
    return SimpleNamespace(name="bare", tokenizer=None)


@pytest.fixture(scope="session")
def trained(shared):
    """A function that opens the tokenizer of a trained model."""

    def make(name):
        folder = shared / "models" / name
        return SimpleNamespace(name=name, tokenizer=WrappedTokenizer(AutoTokenizer.from_pretrained(folder)))

    return make
