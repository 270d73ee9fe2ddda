import doctest

import pytest

from causalpatch.results import labels
from causalpatch.results.labels import axis_text, cell_text, visible


@pytest.mark.parametrize(
    ("token", "text"),
    [
        ("the", "the"),
        (" the", "·the"),
        ("the ", "the·"),
        (" unbelievable", "·unbelievable"),
        ("of the", "of the"),
        ("a  b", "a··b"),
        ("        return", "·x8return"),
        (" ", "(space)"),
        ("    ", "(4 spaces)"),
        ("\n", "\\n"),
        ("\t", "\\t"),
        ("\r\n", "\\r\\n"),
        ("", '""'),
        ("<s>", "<s>"),
        ("\x00", "\\x00"),
        ("\u200b", "\\u200b"),
        ("\ud800", "\\ud800"),
        ("\u00a0", "\\xa0"),
        ("\u0301", "◌\u0301"),
        ("日本", "日本"),
        ("(varies)", "(varies)"),
    ],
)
def test_every_character_of_a_token_can_be_seen(token, text):
    assert visible(token) == text


def test_the_index_keeps_repeated_tokens_apart():
    assert [axis_text(index, "the") for index in (3, 7)] == ["3 the", "7 the"]
    assert axis_text(5) == "5"


def test_a_cell_is_named_by_its_axes_and_an_intervention_by_itself():
    assert cell_text({"layer": 4, "kv_head": 1}) == "layer 4, kv head 1"
    assert cell_text({"intervention": "z.9.6@-1"}) == "z.9.6@-1"
    assert cell_text({"layer": 0, "position": 2}, {"position": " a"}) == "layer 0, position 2 ·a"


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(labels).failed == 0
