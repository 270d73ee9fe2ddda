"""Independent components of the graph of prompts, entities and groups."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, strategies as st

from causalpatch.pairs import Pair, Pairs, load_pairs
from causalpatch.pairs.components import connected

EDGES = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


def pairs_of(edges):
    return Pairs([Pair(np.array([a]), np.array([b])) for a, b in edges])


def partition(numbers):
    """Return which indices stand together, whatever the components are called."""
    held = {}
    for index, number in enumerate(numbers):
        held.setdefault(int(number), set()).add(index)
    return {frozenset(members) for members in held.values()}


def reachable(edges):
    """Return the same by walking from pair to pair over shared prompts, without a forest."""
    found = set()
    for start in range(len(edges)):
        together, prompts = {start}, set(edges[start])
        while True:
            more = {i for i, edge in enumerate(edges) if prompts & set(edge)} - together
            if not more:
                break
            together |= more
            prompts |= {prompt for i in more for prompt in edges[i]}
        found.add(frozenset(together))
    return found


@given(EDGES)
def test_components_are_what_can_be_reached_over_shared_prompts(edges):
    assert partition(pairs_of(edges).components) == reachable(edges)


@given(EDGES, st.randoms(use_true_random=False))
def test_the_order_of_the_pairs_does_not_change_which_hang_together(edges, random):
    order = list(range(len(edges)))
    random.shuffle(order)
    shuffled = partition(pairs_of([edges[i] for i in order]).components)
    assert {frozenset(order[i] for i in members) for members in shuffled} == partition(pairs_of(edges).components)


@given(EDGES)
def test_swapping_inputs_does_not_change_which_hang_together(edges):
    pairs = pairs_of(edges)
    assert pairs.components.tolist() == pairs.swapped().components.tolist()


def test_components_are_numbered_in_order_of_first_appearance():
    assert connected([("a", "b"), ("c", "d"), ("e", "d"), ("f", "b"), ("g",)]).tolist() == [0, 1, 1, 0, 2]


def test_a_shared_entity_or_group_ties_pairs_together_as_a_prompt_does():
    def pair(number, **ties):
        return Pair(np.array([number]), np.array([number + 1]), **ties)

    alone = Pairs([pair(0), pair(2), pair(4)])
    assert alone.components.tolist() == [0, 1, 2]
    by_entity = Pairs([pair(0, entities=("Mary", "Tom")), pair(2), pair(4, entities=("Mary",))])
    assert by_entity.components.tolist() == [0, 1, 0]
    by_group = Pairs([pair(0, group="Mary"), pair(2, entities=("Mary",)), pair(4, group="Mary")])
    assert by_group.components.tolist() == [0, 1, 0]


def test_a_prompt_ties_whichever_role_it_has():
    assert pairs_of([(1, 2), (2, 3), (4, 5)]).components.tolist() == [0, 0, 1]


def test_arrays_hang_together_by_their_content():
    images = np.arange(16.0).reshape(4, 2, 2)
    pairs = Pairs.from_arrays(images[[0, 2, 1]], images[[1, 3, 0]])
    assert pairs.components.tolist() == [0, 1, 0]


@pytest.mark.parametrize(("behaviour", "expected"), [("name_copy", 5), ("object_copy", 4), ("pronoun", 8)])
def test_trained_storys_pairs_have_the_recorded_number_of_components(shared, trained, behaviour, expected):
    path = shared / "models" / "stories260k" / "pairs.jsonl"
    pairs = load_pairs(path, trained("stories260k")).where(behaviour=behaviour)
    rows = [row for row in map(json.loads, path.read_text().splitlines()) if row["behaviour"] == behaviour]
    assert len(pairs) == len(rows)
    assert len(set(pairs.components.tolist())) == expected
    assert partition(pairs.components) == reachable([(row["clean"], row["corrupt"]) for row in rows])
    assert Counter(pairs.components.tolist()).total() == len(rows)
