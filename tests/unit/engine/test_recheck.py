import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from causalpatch.base.errors import SettingError
from causalpatch.engine.recheck import ScreenNoise, estimate_noise, needs_float32, sample_cells

# Whole numbers make ties, and noise that reaches exactly to a boundary, common.
WHOLE = st.integers(-12, 12).map(float)
OFF = st.sampled_from([-1.0, 0.0, 1.0]) | st.floats(-1, 1)
CELLS = st.lists(st.tuples(WHOLE, st.integers(0, 4), OFF), min_size=1, max_size=12)
BY = st.sampled_from(["magnitude", "value"])


def size_of(effects, by):
    return np.abs(effects) if by == "magnitude" else effects


def laid_out(cells):
    """Return screened effects, their noise, and float32 effects that are as far off as the last number says."""
    screened, noise, off = (np.array(column, dtype=float) for column in zip(*cells, strict=True))
    return screened, noise, screened + noise * off


@given(cells=CELLS, top_k=st.integers(1, 12), by=BY, chosen_too=st.booleans())
@settings(max_examples=300, deadline=None)
def test_the_largest_after_measuring_again_are_the_largest_in_float32(cells, top_k, by, chosen_too):
    screened, noise, true = laid_out(cells)
    again = needs_float32(screened, noise, top_k=top_k, by=by, chosen_too=chosen_too)
    mixed = size_of(np.where(again, true, screened), by)
    true = size_of(true, by)
    chosen = np.argsort(-mixed, kind="stable")[:top_k]
    kth = np.sort(true)[::-1][min(top_k, len(true)) - 1]
    assert (true[chosen] >= kth - 1e-12).all()


@given(cells=CELLS, threshold=WHOLE, by=BY, chosen_too=st.booleans())
@settings(max_examples=300, deadline=None)
def test_what_reaches_a_threshold_after_measuring_again_reaches_it_in_float32(cells, threshold, by, chosen_too):
    screened, noise, true = laid_out(cells)
    again = needs_float32(screened, noise, threshold=threshold, by=by, chosen_too=chosen_too)
    mixed = size_of(np.where(again, true, screened), by)
    assert np.array_equal(mixed >= threshold, size_of(true, by) >= threshold)
    if chosen_too:
        chosen = size_of(true, by) >= threshold
        assert (again | (noise == 0))[chosen].all()


@given(cells=CELLS, top_k=st.integers(1, 12))
@settings(max_examples=300, deadline=None)
def test_only_cells_that_could_fall_on_either_side_are_measured_again(cells, top_k):
    screened, noise, _ = laid_out(cells)
    for cell in np.flatnonzero(needs_float32(screened, noise, top_k=top_k, by="value")):
        others = np.arange(len(screened)) != cell
        best = (screened - noise)[others] > (screened + noise)[cell]
        worst = (screened + noise)[others] >= (screened - noise)[cell]
        assert best.sum() < top_k <= worst.sum()


def test_cells_without_a_number_are_neither_measured_nor_in_the_way():
    effects = np.array([np.nan, 3.0, 1.0, np.nan])
    assert not needs_float32(effects, 0.5, top_k=1).any()
    assert not needs_float32(effects, 0.5, top_k=2).any()
    assert needs_float32(effects, 0.5, top_k=2, chosen_too=True).tolist() == [False, True, True, False]
    assert needs_float32(effects, np.array([np.nan] * 4), top_k=1).tolist() == [False, True, True, False]
    assert not needs_float32(effects[[0, 3]], 0.5, top_k=1).any()


def test_exact_cells_are_never_measured_again():
    effects = np.array([1.0, 1.0, 1.05])
    assert needs_float32(effects, np.array([0.0, 0.0, 0.1]), top_k=1).tolist() == [False, False, True]
    assert not needs_float32(effects, 0.0, top_k=1, chosen_too=True).any()


def test_magnitude_and_value_decide_differently():
    effects = np.array([-5.0, 2.0, 1.9])
    assert not needs_float32(effects, 0.2, top_k=1).any()
    assert needs_float32(effects, 0.2, top_k=1, by="value").tolist() == [False, True, True]


@pytest.mark.parametrize("decision", [{}, {"top_k": 1, "threshold": 0.5}, {"top_k": 0}])
def test_a_decision_that_is_none_is_refused(decision):
    with pytest.raises(SettingError, match="top_k"):
        needs_float32(np.zeros(2), 0.1, **decision)


def test_negative_noise_is_refused():
    with pytest.raises(SettingError, match="a noise of -1 is negative"):
        needs_float32(np.zeros(2), np.array([0.0, -1.0]), top_k=1)


@given(
    pairs=st.lists(st.tuples(st.floats(-1e3, 1e3), st.floats(-1, 1)), min_size=1, max_size=20),
    factor=st.floats(1, 5),
    unit=st.sampled_from([0.25, 1.0, 1024.0]),
)
@settings(max_examples=200, deadline=None)
def test_noise_covers_its_own_sample_and_follows_the_unit_of_the_metric(pairs, factor, unit):
    screened, off = (np.array(column) for column in zip(*pairs, strict=True))
    noise = estimate_noise(screened, screened + off, factor=factor)
    error = np.abs(screened - (screened + off))
    assert (noise.of(screened) >= error * (1 - 1e-9)).all()
    scaled = estimate_noise(unit * screened, unit * (screened + off), factor=factor)
    np.testing.assert_allclose(scaled.of(unit * screened), unit * noise.of(screened), rtol=1e-6)


def test_the_estimate_is_its_formula():
    noise = estimate_noise(np.array([1.0, -3.0, 8.0]), np.array([1.0, -3.5, 8.0]), factor=2.0, floor=0.01)
    assert noise == ScreenNoise(2 * 0.5 / 6**0.5, 3.0, 0.01, 3)
    np.testing.assert_allclose(noise.of(np.array([-3.0, 0.0])), [1.01, 1 / 2**0.5 + 0.01])


def test_cells_that_were_not_measured_both_ways_say_nothing():
    holes = estimate_noise(np.array([np.nan, 1.0, 2.0]), np.array([1.0, np.nan, 2.5]))
    assert holes == estimate_noise(np.array([2.0]), np.array([2.5]))
    nothing = estimate_noise(np.array([np.nan]), np.array([1.0]))
    assert needs_float32(np.array([1.0, 9.0]), nothing.of(np.array([1.0, 9.0])), top_k=1).all()


def test_screened_zeros_that_float32_contradicts_are_not_trusted():
    assert np.isinf(estimate_noise(np.zeros(3), np.array([0.0, 0.1, 0.0])).of(np.zeros(1))).all()
    assert estimate_noise(np.zeros(3), np.zeros(3)).of(np.zeros(1)) == 0


def test_noise_of_one_law_in_a_random_sample_covers_the_other_cells():
    stream = np.random.default_rng(0)
    effects = stream.lognormal(0, 2, 4000) * stream.choice([-1, 1], 4000)
    screened = effects + 0.01 * np.sqrt(np.abs(effects)) * stream.normal(size=4000)
    sample = sample_cells(4000)
    noise = estimate_noise(screened[sample], effects[sample])
    assert (np.abs(screened - effects) <= noise.of(screened)).all()
    again = needs_float32(screened, noise.of(screened), top_k=20)
    assert again.sum() < 60
    mixed = np.abs(np.where(again, effects, screened))
    assert set(np.argsort(-mixed)[:20]) == set(np.argsort(-np.abs(effects))[:20])


def test_samples_are_drawn_without_replacement_and_by_the_seed():
    drawn = sample_cells(1000, n_sample=64, seed=3)
    assert len(set(drawn.tolist())) == 64
    assert (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, sample_cells(1000, n_sample=64, seed=3))
    assert not np.array_equal(drawn, sample_cells(1000, n_sample=64, seed=4))
    assert sample_cells(5, n_sample=64).tolist() == [0, 1, 2, 3, 4]
