"""The table of scores against effects: what its numbers mean, and that a page comes out."""

import numpy as np
import pytest
from benchmarks import scores
from benchmarks.scores import agreement

import causalpatch as cp


def test_scores_that_are_the_effects_agree_in_all():
    exact = np.array([0.0, 0.1, -0.4, 2.0, 0.3, -1.0, 0.02, 0.5])
    same = agreement(exact, 3 * exact, has_sign=True)
    assert (same.pearson, same.spearman, same.sign, same.recall) == pytest.approx((1, 1, 1, 1))
    turned = agreement(exact, -exact, has_sign=True)
    assert (turned.pearson, turned.spearman, turned.sign, turned.recall) == pytest.approx((-1, -1, 0, 1))
    sizes = agreement(exact, np.abs(exact), has_sign=False)
    assert (sizes.pearson, sizes.spearman) == pytest.approx((1, 1))
    assert np.isnan(sizes.sign)


def test_signs_count_where_effects_do_and_recall_by_size():
    exact = np.array([10.0, 9.0, 8.0, 7.0, 6.0, 0.01, 0.01, 0.01, 0.01, np.nan])
    wrong = np.array([10.0, 9.0, 8.0, 7.0, 0.001, -5.0, -1.0, -1.0, -1.0, 99.0])
    found = agreement(exact, wrong, has_sign=True)
    assert found.sign == 1.0  # the four with the wrong sign are below a hundredth of the largest
    assert found.recall == pytest.approx(4 / 5)  # the cell that could not be patched is left out


def test_constant_scores_have_no_correlation():
    found = agreement(np.array([1.0, 2.0, 3.0]), np.zeros(3), has_sign=True)
    assert np.isnan(found.pearson)
    assert np.isnan(found.spearman)


def test_a_page_is_written(tmp_path, monkeypatch):
    model = cp.open_model("zoo:stories", device="cpu")
    monkeypatch.setattr(scores, "behaviours", lambda: iter([("embedded, ioi", model, cp.load_pairs("ioi", model))]))
    page = tmp_path / "SCORES.md"
    scores.main(["--pairs", "2", "--directions", "noise", "--kinds", "heads", "edges", "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    assert "| embedded, ioi, noise | 16 |" in text
    assert "| embedded, ioi, noise | 479 |" in text
    assert text.count("| **mean** |") == 2
