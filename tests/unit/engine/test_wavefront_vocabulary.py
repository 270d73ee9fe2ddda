"""Metrics that read the whole vocabulary, whose logits take each other's room."""

import pytest
import torch

import causalpatch as cp
from causalpatch.engine import shares
from causalpatch.engine.head import Head
from tiers import assert_agree, run_model
from worlds import random_pairs, tiny_world

PAIRS = random_pairs(5, 4)
SITES = [f"{name}@{place}" for name in ("mlp_post.1.3", "resid_pre.1", "z.2.0", "logits") for place in (-1, 0)]
OWN = [cp.log_probability, cp.kl_divergence, cp.top1, cp.logit_difference, cp.log_probability.at(1)]


@pytest.fixture
def small(monkeypatch):
    """Unembed one row at once, and count how often that is done in the room of those before."""
    monkeypatch.setattr(shares, "LOGITS_BYTES", 1)
    monkeypatch.setattr(shares, "PORTION", 8)
    calls = []
    real = Head._unembed_in_room

    def count(self, x):
        calls.append(self._room is not None)
        return real(self, x)

    monkeypatch.setattr(Head, "_unembed_in_room", count)
    return calls


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_logits_that_take_each_others_room_give_the_same_numbers(family, small):
    model, _ = tiny_world(family, (3, 4, 2, 0))
    got = run_model("wavefront", model, PAIRS, SITES, metric=OWN)
    assert_agree(got, run_model("reference", model, PAIRS, SITES, metric=OWN))
    assert any(small)


def test_what_a_function_of_ones_own_keeps_is_not_written_over(small):
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    kept = []

    def keep(outputs, pairs):
        kept.append((outputs.distribution, outputs.distribution.clone()))
        return outputs.answer_logits("answer")[:, 0]

    run_model("wavefront", model, PAIRS, SITES, metric=[cp.metric(keep, name="keep"), cp.log_probability])
    assert len(kept) > 2
    assert all(torch.equal(held, then) for held, then in kept)
    assert not small
