"""What every refusal must look like, and small models to be refused by."""

import re
from contextlib import contextmanager
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.testing.tiny import tiny_model

EXIT_CODES = {cp.RequestError: 2, cp.UnsupportedError: 3, cp.IntegrityError: 4}
MOST_LINES = 8
WIDTH = 112


def check_form(error):
    """Hold an error against the house's form: what happened; facts, aligned; one thing to type; at most 8 lines."""
    lines = str(error).splitlines()
    assert len(lines) <= MOST_LINES
    assert lines[0] == error.what
    assert not lines[0].startswith(" ")
    assert all(line.startswith("  ") for line in lines[1:])
    values = [re.match(r"  (?:\S.*?(?:  +)| +)(?=\S)", line) for line in lines[1:-1]]
    assert len({match.end() for match in values}) <= 1
    assert all(len(line) <= WIDTH for line in lines[1:-1])
    assert lines[-1] == f"  fix: {error.fix}"
    assert error.fix


@pytest.fixture
def refuses(tmp_path):
    """A context in which exactly this error must be raised, with exactly this text.

    The folder of the test reads ``TMP``, the working directory ``HERE``; checksums and words of others are left out.
    """

    @contextmanager
    def expect(kind, text):
        with pytest.raises(cp.CausalPatchError) as caught:
            yield
        error = caught.value
        said = str(error).replace(str(tmp_path), "TMP").replace(str(Path.cwd()), "HERE")
        said = re.sub(r"sha256 \w{16}", "sha256 …", said)
        said = re.sub(r"(\n  hub +).*(?:\n {12}.*)*", r"\1(what transformers says)", said)
        assert said == dedent(text).strip("\n")
        assert type(error) is kind
        check_form(error)
        assert error.exit_code == next(code for branch, code in EXIT_CODES.items() if isinstance(error, branch))

    return expect


VOCABULARY = ["<pad>", "<s>", "Mary", "Then", " Mary", " John", " Anna", " Jo", " Ann", " met", " saw", " again"]
VOCABULARY += [" left", " came", " and"]


class Words:
    """Every word is a token, with the space before it; ``<s>`` stands first."""

    pad_id = 0
    vocab_size = 40

    def encode(self, text, *, special=True):
        return [1] * special + [VOCABULARY.index(piece) for piece in re.findall(r" ?\w+", text)]

    def encode_with_offsets(self, text):
        return self.encode(text), [(0, 0), *(match.span() for match in re.finditer(r" ?\w+", text))]

    def label(self, token_id):
        return VOCABULARY[token_id]


class Tagger(nn.Module):
    """A model of no known family that embeds ids; one of its modules runs twice, another never."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(40, 6)
        self.mix = nn.Linear(6, 6)
        self.spare = nn.Linear(6, 6)
        self.head = nn.Linear(6, 40)

    def forward(self, ids):
        return self.head(self.mix(torch.relu(self.mix(self.embed(ids)))))


@pytest.fixture(scope="session")
def llama():
    """Two layers, four heads, two kv_heads, forty words."""
    return cp.open_model(tiny_model("llama"), tokenizer=Words())


@pytest.fixture
def no_gpu(monkeypatch):
    """A machine without GPUs, whatever this one has."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture
def tagger():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cp.open_model(Tagger())


@pytest.fixture
def classifier():
    """Four numbers to three classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cp.open_model(nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))


ROWS = [
    {"clean": "Mary met John", "corrupt": "Mary met Anna", "answer": " left", "wrong_answer": " came"},
    {"clean": "Then Anna saw Mary", "corrupt": "Then John saw Mary", "answer": " came", "wrong_answer": " left"},
]


@pytest.fixture
def pairs(llama):
    """Two pairs of equally long prompts."""
    return cp.load_pairs(ROWS, llama, name="two.jsonl")


@pytest.fixture
def uneven(llama):
    """One pair whose corrupted prompt is a word longer."""
    row = {
        "clean": "Mary met John again",
        "corrupt": "Mary met Jo Ann again",
        "answer": " left",
        "wrong_answer": " came",
        "spans": {"who": {"clean": " John", "corrupt": " Jo Ann"}},
    }
    return cp.load_pairs([row], llama, name="uneven.jsonl")


@pytest.fixture
def experiment(llama, pairs):
    return cp.Experiment(llama, pairs, show_progress=False)
