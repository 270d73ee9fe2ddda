"""Attention of packed rows, multiplied head by head: the same numbers as side by side."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import rows
from causalpatch.testing.tiny import tiny_model
from toys import prompts

torch.set_num_threads(1)

PAIRS = (([1, 7, 3, 9, 12, 4], [1, 7, 3, 10, 12, 5]), ([2, 5, 30, 11], [2, 5, 31, 17]))


@pytest.mark.parametrize("most", [0, 10**9])
def test_matrices_that_lie_side_by_side_are_multiplied_as_they_lie(most, monkeypatch):
    monkeypatch.setattr(rows, "MANY_NUMBERS", most)
    draw = torch.Generator().manual_seed(0)
    left = torch.randn(5, 7, 3, 4, generator=draw).permute(2, 0, 1, 3)
    right = torch.randn(5, 6, 3, 4, generator=draw).permute(2, 0, 3, 1)
    torch.testing.assert_close(rows._by_head(left, right), left @ right)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
def test_sweeps_are_what_full_forwards_give(family, monkeypatch):
    monkeypatch.setattr(rows, "MANY_NUMBERS", 0)
    model = cp.open_model(tiny_model(family))
    found, wanted = (
        cp.sweep(cp.Experiment(model, prompts(*PAIRS), engine=engine, show_progress=False), "resid_pre")
        for engine in ("wavefront", "rows")
    )
    np.testing.assert_allclose(found.to_xarray()["metric"].values, wanted.to_xarray()["metric"].values, atol=1e-10)
