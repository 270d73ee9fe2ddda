"""The examples of the docstrings and of the guide run as they stand."""

import doctest
import importlib
from pathlib import Path
from types import SimpleNamespace

import pytest

import causalpatch as cp
from causalpatch.models.tokens import WrappedTokenizer
from causalpatch.models.zoo import zoo_names

GUIDE = Path(__file__).resolve().parents[3] / "docs" / "pairs.md"


@pytest.mark.parametrize("name", ["align", "collection", "components", "readers"])
def test_examples_of_docstrings_are_true(name):
    result = doctest.testmod(importlib.import_module(f"causalpatch.pairs.{name}"))
    assert result.attempted
    assert not result.failed


def test_examples_of_the_guide_are_true(monkeypatch):
    if "stories" not in zoo_names():  # until the model is trained, its tokenizer is all that the guide needs
        tokenizer = WrappedTokenizer(importlib.import_module("causalpatch.models.zoo.train").build_tokenizer())
        monkeypatch.setattr(cp, "open_model", lambda name: SimpleNamespace(tokenizer=tokenizer))
    result = doctest.testfile(str(GUIDE), module_relative=False)
    assert result.attempted > 15
    assert not result.failed
