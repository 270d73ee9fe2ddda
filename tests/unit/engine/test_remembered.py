"""Untouched runs that outlive a piece of work: the next piece makes none, and its numbers are bit for bit the same."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import Remembered, targets_of
from causalpatch.patches import Intervention

CASES = [
    ("wavefront", "z.{}.1@-1", "logit_difference"),
    ("wavefront", "resid_pre.{}", "kl_divergence"),
    ("wavefront", "mlp_post.{}.7", "logit_difference"),
    ("wavefront", "q.{}.1", "logit_difference"),
    ("restart", "resid_post.{}@2", "logit_difference"),
    ("rows", "z.{}.1@-1", "kl_divergence"),
    ("reference", "attn_out.{}", "logit_difference"),
]


@pytest.fixture(scope="module")
def model():
    return cp.open_model("zoo:stories", device="cpu")


@pytest.fixture(scope="module")
def pairs(model):
    return cp.load_pairs("ioi", model).take(range(4))


def pieces_of(site, n_layers=4):
    """Return a piece of work for each layer."""
    return [[Intervention.of(site.format(layer))] for layer in range(n_layers)]


def measure(model, pairs, piece, remembered=None, beside=(), **how):
    experiment = cp.Experiment(model, pairs, how.pop("metric", "logit_difference"), show_progress=False, **how)
    if remembered is not None:
        remembered.turn_to(pairs.content_hash, [targets_of(model, each) for each in beside])
        experiment.remembered = remembered
    return experiment.measured(piece)


def same(one, other):
    return all(
        np.array_equal(a, b, equal_nan=True)
        for a, b in [(one.values, other.values), *((one.baselines[k], other.baselines[k]) for k in one.baselines)]
    )


@pytest.mark.parametrize(("engine", "site", "metric"), CASES)
def test_later_pieces_are_the_same_bit_for_bit_and_make_no_untouched_run(model, pairs, engine, site, metric):
    pieces, how = pieces_of(site), {"engine": engine, "metric": metric}
    alone = [measure(model, pairs, piece, **how) for piece in pieces]
    remembered, beside = Remembered(), [piece[0] for piece in pieces]
    found = [measure(model, pairs, piece, remembered, beside, **how) for piece in pieces]
    assert all(same(one, other) for one, other in zip(alone, found, strict=True))
    spared = [a.record["cost"]["forwards"] - b.record["cost"]["forwards"] for a, b in zip(alone, found, strict=True)]
    untouched = {"wavefront": 1, "restart": 2, "rows": 2, "reference": 2}[engine]
    assert spared[0] == 0
    assert all(each >= untouched for each in spared[1:])


def test_a_piece_of_the_wavefront_makes_no_forward_at_all_when_its_pairs_are_known(model, pairs):
    pieces, remembered = pieces_of("z.{}.0@-1"), Remembered()
    beside = [piece[0] for piece in pieces]
    costs = [measure(model, pairs, piece, remembered, beside).record["cost"]["forwards"] for piece in pieces]
    assert costs[0] > 0
    assert costs[1:] == [0, 0, 0]


def test_what_nobody_announced_is_made_again_and_then_known(model, pairs):
    first, second = pieces_of("z.{}.0@-1", 2)
    remembered = Remembered()
    costs = [
        measure(model, pairs, piece, remembered).record["cost"]["forwards"] for piece in (first, second, first, second)
    ]
    assert costs[1] > 0
    assert costs[2:] == [0, 0]


def test_other_pairs_are_other_runs(model, pairs):
    (piece,) = pieces_of("z.{}.0@-1", 1)
    remembered, other = Remembered(), pairs.take([1, 2])
    measure(model, pairs, piece, remembered)
    found = measure(model, other, piece, remembered)
    assert found.record["cost"]["forwards"] > 0
    assert same(found, measure(model, other, piece))
    assert measure(model, pairs, piece, remembered).record["cost"]["forwards"] > 0


def test_the_other_direction_reads_the_same_runs_the_other_way(model, pairs):
    (piece,) = pieces_of("z.{}.0@-1", 1)
    remembered = Remembered()
    measure(model, pairs, piece, remembered)
    found = measure(model, pairs, piece, remembered, direction="noise")
    assert same(found, measure(model, pairs, piece, direction="noise"))


def test_more_than_a_batch_may_take_is_not_kept(model, pairs):
    (piece,) = pieces_of("z.{}.0@-1", 1)
    remembered, how = Remembered(), {"budget_gib": 2e-4}
    costs = [measure(model, pairs, piece, remembered, **how).record["cost"]["forwards"] for _ in range(2)]
    assert costs[1] > 0


def test_runs_of_another_model_are_told_apart(model, pairs):
    (piece,) = pieces_of("z.{}.0@-1", 1)
    other = cp.open_model("zoo:stories", device="cpu")
    with torch.no_grad():
        next(other.module.parameters()).mul_(1.1)
    remembered = Remembered()
    first = measure(model, pairs, piece, remembered, source_model=other)
    again = measure(model, pairs, piece, remembered, source_model=other)
    assert same(first, measure(model, pairs, piece, source_model=other))
    assert same(again, first)
