"""Metrics that read the whole vocabulary, whose logits take each other's room."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import shares
from causalpatch.engine.head import Head
from causalpatch.testing.tiny import tiny_model
from tiers import assert_agree, quickly, run_model, tier_of
from worlds import numbers, random_pairs, tiny_world

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


@pytest.mark.parametrize("family", quickly(["gpt2", "llama", "gemma2"], "gemma2"))
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

    run_model("wavefront", model, PAIRS, SITES, metric=cp.log_probability)  # the check of the model is behind us then
    small.clear()
    run_model("wavefront", model, PAIRS, SITES, metric=[cp.metric(keep, name="keep"), cp.log_probability])
    assert len(kept) > 2
    assert all(torch.equal(held, then) for held, then in kept)
    assert not small


@pytest.mark.parametrize("metric", OWN, ids=lambda metric: metric.name)
def test_an_unembedding_with_a_forward_of_its_own_runs_it(metric):
    module = tiny_model("llama", layers=3, seed=2)
    weight = module.lm_head.weight
    module.lm_head.forward = lambda x: 3.0 * torch.nn.functional.linear(x, weight).tanh()
    model = cp.open_model(module)
    got = run_model("auto", model, PAIRS, SITES, metric=metric)
    assert tier_of(got) == "wavefront"
    assert_agree(got, run_model("reference", model, PAIRS, SITES, metric=metric))


class Sparse(torch.Tensor):
    """A weight of a kind that no product with a place to write to knows."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is not torch.mm
        return super().__torch_function__(function, types, args, kwargs or {})


def test_weights_of_another_kind_are_left_to_the_model():
    module = tiny_model("llama", layers=3, seed=2)
    module.lm_head.weight = torch.nn.Parameter(module.lm_head.weight.detach().as_subclass(Sparse), requires_grad=False)
    model = cp.open_model(module)
    got = run_model("wavefront", model, PAIRS, SITES, metric=OWN)
    assert_agree(got, run_model("reference", model, PAIRS, SITES, metric=OWN))


def test_under_autocast_logits_of_patched_runs_are_as_exact_as_those_of_untouched_ones():
    model = cp.open_model(tiny_model("llama", layers=3, seed=2, dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        effects = run_model("wavefront", model, PAIRS, SITES, metric=cp.log_probability)
        again = run_model("wavefront", model, PAIRS, [cp.Patch("final_norm", "identity")], metric=cp.log_probability)
    assert np.isfinite(numbers(effects)).all()
    assert (np.abs(again.effect(per_pair=True).values) == 0).all()


class Times:
    """A callable that claims to equal anything and cannot be hashed."""

    __hash__ = None

    def __init__(self, factor):
        self.factor = factor

    def __eq__(self, other):
        return True

    def __call__(self, given, other):
        return self.factor * (given.distribution.amax(-1) if isinstance(given, cp.Outputs) else given)


@pytest.mark.parametrize("engine", ["auto", "rows", "reference"])
def test_functions_that_cannot_be_hashed_measure_and_patch_each_for_itself(engine):
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    patches = [cp.Patch("resid_pre.1@0", cp.Function(Times(factor), name="times")) for factor in (0.5, 3.0)]
    metrics = [cp.metric(Times(factor), name=f"times {factor}", position=-1) for factor in (1.0, 2.0)]
    got = numbers(run_model(engine, model, PAIRS, patches, metric=metrics))
    assert np.allclose(got[1], 2 * got[0], rtol=1e-12)
    assert (got[:, 0] != got[:, 1]).all()
