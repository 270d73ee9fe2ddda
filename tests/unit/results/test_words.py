import doctest

import pytest

from causalpatch.results import words


def test_the_examples_in_the_docstrings_hold():
    result = doctest.testmod(words)
    assert result.attempted >= 4
    assert result.failed == 0


@pytest.mark.parametrize(
    ("direction", "value", "said"),
    [
        ("denoise", "source", "clean values at z.3 of the corrupted run"),
        ("noise", "source", "corrupted values at z.3 of the clean run"),
        ("noise", "zero", "zero at z.3 of the clean run"),
        ("noise", "mean over pairs, source", "mean over pairs, corrupted values at z.3 of the clean run"),
    ],
)
def test_a_patch_is_named_by_what_it_puts_where(direction, value, said):
    assert words.change({"direction": direction, "value": value, "site": "z.3"}) == said


def test_what_was_not_recorded_is_not_made_up():
    assert words.share_words({}, "m") == (
        "recovered: share of the gap in m from clean run to reference run, restored by putting clean values at the "
        "patched sites of the corrupted run (denoise)"
    )
    assert words.own_notes({}) == words.own_notes({"notes": None}) == []
