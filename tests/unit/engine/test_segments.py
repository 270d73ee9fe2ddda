"""Segments side by side: parts, layouts, groups."""

import numpy as np
import pytest

from causalpatch.engine.segments import Layout, Segments, cut
from causalpatch.engine.values import Row


def segments_of(*extents: tuple[int, int, int]) -> Segments:
    """Return segments of (start, stop, slot), in packed order, each prompt read at its last token."""
    start, stop, slot = (np.array(column) for column in zip(*sorted(extents), strict=True))
    nothing = np.zeros(len(start), dtype=np.int64)
    return Segments([Row(0, 0, 0, ())] * len(start), start, stop, stop, slot, nothing, nothing)


def test_parts_are_even_whole_and_no_larger_than_allowed():
    rng = np.random.default_rng(0)
    for _ in range(300):
        lengths, most = rng.integers(1, 20, rng.integers(0, 40)), int(rng.integers(1, 60))
        parts = list(cut(lengths, most))
        assert [i for part in parts for i in range(part.start, part.stop)] == [*range(len(lengths))]
        assert all(part.stop - part.start == 1 or lengths[part].sum() <= most for part in parts)
    assert [part.stop - part.start for part in cut(np.full(9, 10), 80)] == [5, 4]


def test_a_layout_finds_the_row_of_every_token_and_no_other():
    layout = Layout.of(segments_of((1, 4, 0), (2, 4, 0), (2, 4, 1)), np.array([0, 1, 2]))
    assert layout.token.tolist() == [1, 2, 3, 2, 3, 2, 3]
    assert layout.slot.tolist() == [0, 0, 0, 0, 0, 1, 1]
    owner, token = np.array([0, 0, 1, 2, 1]), np.array([0, 3, 1, 3, 2])
    assert layout.find(owner, token).tolist() == [-1, 2, -1, 6, 3]
    last = layout.where(layout.token == 3)
    assert last.find(np.array([0, 2]), np.array([3, 2])).tolist() == [0, -1]


def test_groups_join_equal_extents_of_neighbouring_prompts_and_cover_all_rows():
    segments = segments_of((1, 4, 0), (1, 4, 0), (1, 4, 1), (1, 4, 1), (2, 4, 0), (2, 4, 1), (2, 4, 1), (2, 5, 2))
    groups = Layout.of(segments, np.arange(8)).groups()
    assert [(g.start, g.slots.tolist(), g.count, g.tokens.tolist()) for g in groups] == [
        (1, [0, 1], 2, [1, 2, 3]),
        (2, [0], 1, [2, 3]),
        (2, [1], 2, [2, 3]),
        (2, [2], 1, [2, 3, 4]),
    ]
    assert [g.first for g in groups] == [0, 12, 14, 18]
    assert sum(g.n_rows for g in groups) == 21


@pytest.mark.parametrize("most", [1, 3, 100])
def test_parts_of_nothing_are_none(most):
    assert list(cut(np.zeros(0, dtype=np.int64), most)) == []
