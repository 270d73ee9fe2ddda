"""Positions: real tokens of each prompt, counted as Python counts."""

import numpy as np
import pytest
from hypothesis import given, strategies as st

from causalpatch.base.errors import PairError, SettingError
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites.site import EVERY, Range, Span

LENGTHS = st.integers(1, 9)
INDEX = st.integers(-12, 12)
ROLES = st.sampled_from(["clean", "corrupt"])


def pairs_of(n_clean, n_corrupt):
    return Pairs([Pair(np.arange(n_clean), np.arange(n_corrupt), spans={"name": ((0, 1), (1, 3))})], name="rows")


@given(LENGTHS, LENGTHS, INDEX, ROLES)
def test_one_position_resolves_as_python_indexes_each_prompt(n_clean, n_corrupt, index, base):
    sizes = {"clean": n_clean, "corrupt": n_corrupt}
    places = [list(range(sizes[role])) for role in (base, "corrupt" if base == "clean" else "clean")]
    try:
        expected = [[prompt[index]] for prompt in places]
    except IndexError:
        with pytest.raises(PairError):
            pairs_of(n_clean, n_corrupt).positions(0, index, base)
    else:
        found = pairs_of(n_clean, n_corrupt).positions(0, index, base)
        assert [one.tolist() for one in found] == expected


@given(LENGTHS, LENGTHS, st.none() | INDEX, st.none() | INDEX, ROLES)
def test_a_range_resolves_as_python_slices_each_prompt(n_clean, n_corrupt, start, stop, base):
    sizes = {"clean": n_clean, "corrupt": n_corrupt}
    expected = [list(range(sizes[role]))[start:stop] for role in (base, "corrupt" if base == "clean" else "clean")]
    pairs = pairs_of(n_clean, n_corrupt)
    if all(expected):
        found = pairs.positions(0, Range(start, stop), base)
        assert [one.tolist() for one in found] == expected
    else:
        with pytest.raises(PairError):
            pairs.positions(0, Range(start, stop), base)


def test_a_span_is_all_its_tokens_even_where_their_number_differs():
    base, source = pairs_of(3, 4).positions(0, Span("name"), "corrupt")
    assert base.tolist() == [1, 2]
    assert source.tolist() == [0]


@pytest.mark.parametrize("position", [None, EVERY])
def test_no_position_means_all_aligned_columns_of_the_pair(position):
    pairs = pairs_of(3, 4).align("map", mapping=[[(0, 0), (2, 3)]])
    base, source = pairs.positions(0, position, "corrupt")
    assert base.tolist() == [0, 3]
    assert source.tolist() == [0, 2]


def test_columns_that_a_pair_lacks_are_left_out():
    pairs = Pairs([Pair(np.arange(2), np.arange(2)), Pair(np.arange(3), np.arange(3))])
    assert pairs.positions(0, None, "clean")[0].tolist() == [0, 1]
    assert pairs.positions(1, None, "clean")[0].tolist() == [0, 1, 2]


def test_a_position_outside_the_prompt_is_refused():
    with pytest.raises(PairError) as error:
        pairs_of(5, 3).positions(0, 4, "clean")
    assert str(error.value) == (
        "@4 lies outside the corrupted prompt of pair 0 of 'rows'\n"
        "  corrupted  3 tokens: @0 to @2, or @-3 to @-1\n"
        "  fix: name a position that every prompt has, such as @-1, or a span"
    )


def test_a_range_that_reaches_no_token_is_refused():
    with pytest.raises(PairError) as error:
        pairs_of(5, 5).positions(0, Range(5, 9), "clean")
    assert str(error.value) == (
        "@5:9 is empty in the clean prompt of pair 0 of 'rows'\n"
        "  clean  5 tokens: @0 to @4, or @-5 to @-1\n"
        "  fix: name a range that every prompt has, or a span"
    )


def test_a_span_that_the_pair_does_not_have_is_refused_with_those_it_has():
    with pytest.raises(PairError) as error:
        pairs_of(5, 5).positions(0, Span("nane"), "clean")
    assert str(error.value) == (
        "pair 0 of 'rows' has no span 'nane'\n"
        "  its spans  name\n"
        '  fix: name it in the column spans, for instance {"nane": " Mary"}'
    )


def test_arrays_have_no_token_positions():
    pairs = Pairs.from_arrays(np.zeros((1, 2, 2)), np.ones((1, 2, 2)), name="digits")
    with pytest.raises(PairError) as error:
        pairs.positions(0, -1, "clean")
    assert str(error.value) == (
        "'digits' holds arrays, which have no token positions\n"
        "  fix: leave the position out of the site, or name the axes of the module: axes=(…)"
    )


def test_an_unknown_role_is_refused():
    with pytest.raises(SettingError, match="'corrupted' is not a role of a pair"):
        pairs_of(2, 2).positions(0, -1, "corrupted")
