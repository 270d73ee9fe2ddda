"""Areas under curves by hand."""

import numpy as np
import pytest

from causalpatch.base.errors import SettingError
from causalpatch.circuits.against import count_found, hold_against

NAN = np.nan


def both(is_true, scores, **more):
    found = hold_against(np.array(is_true, dtype=bool), scores, **more)
    return found.auroc, found.auprc


def test_the_best_and_the_worst_order():
    assert both([1, 1, 0, 0], [4, 3, 2, 1]) == (1.0, 1.0)
    # Precision when the two true ones come last: 1/3 and 2/4, each half of the recall.
    assert both([1, 1, 0, 0], [1, 2, 3, 4]) == (0.0, pytest.approx((1 / 3 + 2 / 4) / 2))


def test_one_inversion_by_hand():
    # In order: true, false, true, false. Pairs (true, false): 3 of 4 are won. Precision 1 and 2/3.
    assert both([1, 0, 1, 0], [4, 3, 2, 1]) == (0.75, pytest.approx((1 + 2 / 3) / 2))


def test_ties_are_half_won():
    # Both true edges tie with one false one, below another false one: pairs won 0, tied 2, lost 2.
    assert both([1, 1, 0, 0], [1, 1, 1, 2])[0] == pytest.approx(0.25)
    # All alike: chance, and precision is the share of true edges.
    assert both([1, 0, 0, 0], [5, 5, 5, 5]) == (0.5, 0.25)


def test_what_has_no_score_is_missed():
    # One true edge is found first, the other one is missed; of three false ones one scores. The ROC curve goes
    # (0, 0), (0, 1/2), (1/3, 1/2), (1, 1): area 1/6 + 2/3 * 3/4.
    found = hold_against([True, True, False, False, False], [2.0, NAN, 1.0, NAN, NAN])
    assert found.auroc == pytest.approx(1 / 6 + 2 / 3 * 3 / 4)
    assert found.auprc == pytest.approx(0.5)
    assert (found.n_true, found.n_false, found.n_missed) == (2, 3, 1)


def test_nothing_found_is_chance_and_no_precision():
    assert both([1, 0], [NAN, NAN]) == (0.5, 0.0)


def test_areas_agree_with_counting_pairs():
    rng = np.random.default_rng(0)
    for _ in range(20):
        truth, scores = rng.random(30) < 0.3, rng.integers(0, 6, 30).astype(float)
        a, b = scores[truth][:, None], scores[~truth]
        assert hold_against(truth, scores).auroc == pytest.approx(((a > b) + 0.5 * (a == b)).mean())


def test_rounding_is_a_tie():
    scores = [1.0, 2e-16, 1e-16, 0.0]
    assert both([1, 0, 1, 0], scores)[0] == 0.75
    assert both([1, 0, 1, 0], scores, floor=1e-6)[0] == 0.75
    assert both([1, 1, 0, 0], scores)[0] == 1.0
    assert both([1, 1, 0, 0], scores, floor=1e-6)[0] == 0.75


def test_without_true_or_without_false_edges_there_is_no_curve():
    assert np.isnan(both([0, 0], [1, 2])).all()
    assert np.isnan(both([1, 1], [1, 2])[0])


def test_a_set_is_counted():
    assert count_found([True, False, True], [True, True, False]) == (1, 1)


def test_scores_of_other_edges_are_refused():
    with pytest.raises(SettingError, match="do not belong"):
        hold_against([True, False], [1.0])
