"""Queries that nothing reads are not worked out, and the numbers stay what they are."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import unread_queries
from causalpatch.testing.tiny import tiny_model
from toys import prompts

torch.set_num_threads(1)

PAIRS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 5]), ([2, 5, 30, 11], [2, 5, 31, 17]))
QUERIES = 32  # columns, of four heads


def effects_of(family, site="resid_pre", dtype=torch.float64, **more):
    model = cp.open_model(tiny_model(family, dtype=dtype))
    experiment = cp.Experiment(model, prompts(*PAIRS), show_progress=False, **more)
    return cp.sweep(experiment, site).to_xarray()["metric"].values


@pytest.fixture
def left_out(monkeypatch):
    """Note how many columns of a projection are left out in each call."""
    found, own = [], unread_queries._rest

    def noting(module, n_zeros):
        found.append(n_zeros)
        return own(module, n_zeros)

    monkeypatch.setattr(unread_queries, "_rest", noting)
    return found


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "phi3", "qwen3"])
def test_tokens_that_are_only_attended_to_need_no_queries(family, left_out):
    found = effects_of(family)
    assert set(left_out) == {QUERIES}
    np.testing.assert_allclose(found, effects_of(family, engine="rows"), atol=1e-10)


def test_queries_that_stand_between_keys_are_worked_out(left_out):
    np.testing.assert_allclose(effects_of("gpt_neox"), effects_of("gpt_neox", engine="rows"), atol=1e-10)
    assert not left_out


def test_patched_queries_are_what_they_were(left_out):
    np.testing.assert_allclose(effects_of("gpt2", "q"), effects_of("gpt2", "q", engine="rows"), atol=1e-10)
    assert set(left_out) == {QUERIES}


def test_in_few_bits_the_whole_projection_runs():
    model = cp.open_model(tiny_model("gpt2"))
    projection = model.module.transformer.h[1].attn.c_attn
    for deltas, is_replaced in (((), True), ((object(),), False)):
        with unread_queries.without_queries(model, SimpleNamespace(deltas=deltas), 1, ()):
            assert ("forward" in vars(projection)) == is_replaced
        assert "forward" not in vars(projection)


def test_a_projection_without_a_bias_and_other_dtypes_give_what_the_module_gives():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, generator=draw)
    for bias in (True, False):
        module = torch.nn.Linear(5, 7, bias=bias)
        with torch.no_grad():
            wanted, found = module(x), unread_queries._rest(module, 4)(x)
        torch.testing.assert_close(found[..., 4:], wanted[..., 4:])
        assert not found[..., :4].any()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(unread_queries._rest(module, 4)(x), module(x))
