"""Splits by whole components."""

import numpy as np
import pytest
from hypothesis import assume, given, strategies as st

from causalpatch.base.errors import PairError, SettingError
from causalpatch.pairs import Pair, Pairs

EDGES = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), min_size=4, max_size=25)


def pairs_of(edges, **columns):
    return Pairs([Pair(np.array([a]), np.array([b]), id=str(i)) for i, (a, b) in enumerate(edges)], name="rows")


def prompts(pairs):
    return {one.tobytes() for pair in pairs for one in (pair.clean, pair.corrupt)}


@given(EDGES, st.floats(0.05, 0.95), st.integers(0, 5))
def test_the_sides_share_no_prompt_and_lose_no_pair(edges, fraction, seed):
    pairs = pairs_of(edges)
    assume(len(set(pairs.components.tolist())) >= 4)
    first, second = pairs.split(fraction, seed=seed)
    assert not prompts(first) & prompts(second)
    assert sorted([*first.ids, *second.ids], key=int) == pairs.ids
    assert min(len(set(side.components.tolist())) for side in (first, second)) >= 2


@given(EDGES, st.integers(0, 5), st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_change_the_split(edges, seed, random):
    pairs = pairs_of(edges)
    assume(len(set(pairs.components.tolist())) >= 4)
    order = list(range(len(edges)))
    random.shuffle(order)
    assert set(pairs.take(order).split(seed=seed)[0].ids) == set(pairs.split(seed=seed)[0].ids)


def test_independent_pairs_are_divided_as_the_fraction_says():
    pairs = pairs_of([(2 * k, 2 * k + 1) for k in range(40)])
    first, second = pairs.split(0.25)
    assert (len(first), len(second)) == (10, 30)


def test_another_seed_gives_another_split_and_the_same_seed_the_same():
    pairs = pairs_of([(2 * k, 2 * k + 1) for k in range(40)])
    assert pairs.split(seed=1)[0].ids == pairs.split(seed=1)[0].ids
    assert pairs.split(seed=1)[0].ids != pairs.split(seed=2)[0].ids


def test_one_giant_component_leaves_two_components_on_each_side():
    pairs = pairs_of([(0, k) for k in range(1, 30)] + [(100, 101), (200, 201), (300, 301)])
    first, second = pairs.split(seed=0)
    assert min(len(set(side.components.tolist())) for side in (first, second)) == 2


def test_the_sides_of_a_split_by_columns_share_none_of_their_values():
    rows = [(2 * k, 2 * k + 1) for k in range(24)]
    pairs = Pairs(
        [
            Pair(np.array([a]), np.array([b]), id=str(k), extra={"template": k % 6, "place": "xyz"[k % 3]})
            for k, (a, b) in enumerate(rows)
        ],
        name="rows",
    )
    first, second = pairs.split(seed=1, by="template")
    sides = [{pair.extra["template"] for pair in side} for side in (first, second)]
    assert not sides[0] & sides[1]
    assert sides[0] | sides[1] == set(range(6))
    assert len(first) + len(second) == 24
    with pytest.raises(PairError, match="3 independent components, too few"):
        pairs.split(by=["template", "place"])
    with pytest.raises(PairError, match="no column 'colour'"):
        pairs.split(by="colour")


def test_too_few_components_are_refused_with_the_number_needed():
    with pytest.raises(PairError) as error:
        pairs_of([(0, 1), (1, 2), (3, 4), (5, 6)]).split()
    assert str(error.value) == (
        "'rows' has 3 independent components, too few to split\n"
        "  pairs   4\n"
        "  needed  4 components, 2 on each side\n"
        "  fix: add pairs that share no prompt, entity or group with these"
    )


@pytest.mark.parametrize("fraction", [0, 1, 1.5, float("nan")])
def test_a_fraction_that_leaves_a_side_empty_is_refused(fraction):
    with pytest.raises(SettingError, match="a split cannot put a share of"):
        pairs_of([(2 * k, 2 * k + 1) for k in range(8)]).split(fraction)


def test_the_files_own_split_is_honoured():
    rows = [Pair(np.array([2 * k]), np.array([2 * k + 1]), split="ab"[k % 2], id=str(k)) for k in range(5)]
    sides = Pairs(rows).split_by_column()
    assert {name: side.ids for name, side in sides.items()} == {"a": ["0", "2", "4"], "b": ["1", "3"]}


def test_a_given_split_that_leaks_is_refused():
    rows = [
        Pair(np.array([1]), np.array([2]), id="a", split="train"),
        Pair(np.array([2]), np.array([3]), id="b", split="test"),
    ]
    with pytest.raises(PairError) as error:
        Pairs(rows, name="rows").split_by_column()
    assert str(error.value) == (
        "the splits of 'rows' leak: 1 components stand in several of them\n"
        "  for instance  pair 'a' in train and pair 'b' in test\n"
        "  shared        prompts, entities or groups, directly or through other pairs\n"
        "  fix: divide by components: pairs.split()"
    )


def test_a_pair_without_a_split_is_refused():
    with pytest.raises(PairError) as error:
        pairs_of([(1, 2)]).split_by_column()
    assert str(error.value) == (
        "pair 0 of 'rows' is in no split\n"
        "  pair  0\n"
        "  fix: fill the column split, or divide by components: pairs.split()"
    )
