"""Which tokens can matter to what is read."""

import numpy as np

from causalpatch.engine.reads import Reads, what_matters


def causal(n_tokens: int, window: int | None = None) -> np.ndarray:
    """Return a mask (1, query, key) that sees the past, or a window of it."""
    seen = np.tri(n_tokens, dtype=bool)
    if window is not None:
        seen &= ~np.tri(n_tokens, k=-window, dtype=bool)
    return seen[None]


def enumerated(masks: list[np.ndarray], tokens: np.ndarray, prompt: int) -> np.ndarray:
    """Return (depth, position), by following every path of the masks one by one."""
    n_layers, n_tokens = len(masks), masks[0].shape[-1]

    def reaches(depth: int, position: int) -> bool:
        if depth == n_layers:
            return position in tokens[prompt]
        mask = masks[depth][prompt if len(masks[depth]) > 1 else 0]
        later = [query for query in range(n_tokens) if query == position or mask[query, position]]
        return any(reaches(depth + 1, query) for query in later)

    return np.array([[reaches(depth, position) for position in range(n_tokens)] for depth in range(n_layers + 1)])


def test_what_matters_is_what_a_path_of_the_masks_leads_from():
    rng = np.random.default_rng(0)
    for _ in range(30):
        n_tokens, n_layers, n_prompts = rng.integers(2, 6), rng.integers(1, 4), rng.integers(1, 3)
        windows = [causal(n_tokens, rng.choice([None, 1, 2, 3])) for _ in range(n_layers)]
        tokens = rng.integers(0, n_tokens, size=(n_prompts, rng.integers(1, 3)))
        found = what_matters(windows, Reads.of(tokens))
        for prompt in range(n_prompts):
            assert np.array_equal(found[:, prompt], enumerated(windows, tokens, prompt))


def test_a_mask_that_all_layers_share_gives_the_same_as_one_for_each():
    mask, tokens = causal(6, 2), np.array([[5], [3]])
    masks = [mask] * 4, [mask.copy() for _ in range(4)]
    shared, own = (what_matters(some, Reads.of(tokens)) for some in masks)
    assert np.array_equal(shared, own)
    assert shared[4].sum() == 2
    assert not shared[0, 1, 4:].any()


def test_prompts_that_are_read_at_the_same_tokens_are_of_one_kind():
    reads = Reads.of(np.array([[4, 2], [2, 4], [3, 3], [4, 2]]))
    assert reads.kinds.tolist() == [0, 0, 1, 0]
    assert [kind.tolist() for kind in reads.of_kind] == [[2, 4], [3]]
    assert reads.stops.tolist() == [5, 5, 4, 5]
