"""Heads written behind attention through their own rows of the projection: the same numbers as by the whole of it."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine.head_shares import HeadShares
from causalpatch.testing.tiny import tiny_model
from toys import prompts

torch.set_num_threads(1)

PAIRS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 5]), ([2, 5, 30, 11], [2, 5, 31, 17]))
FAMILIES = ("gpt2", "llama", "gemma2", "gpt_neox", "granite", "opt")  # with biases, post-norms, multipliers


def values_of(family, patches, **more):
    experiment = cp.Experiment(cp.open_model(tiny_model(family)), prompts(*PAIRS), show_progress=False, **more)
    return experiment.run(patches).to_xarray()["metric"].values


@pytest.fixture
def taken(monkeypatch):
    """Note the layers of calls in which heads went through rows of their own."""
    found, own = [], HeadShares.given

    def noting(self, layer, writes, place):
        found.append(layer)
        return own(self, layer, writes, place)

    monkeypatch.setattr(HeadShares, "given", noting)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_give_what_they_give_through_the_whole_projection(family, taken):
    model = cp.open_model(tiny_model(family))
    found, wanted = (
        cp.sweep(cp.Experiment(model, prompts(*PAIRS), show_progress=False, engine=engine), "z")
        for engine in ("wavefront", "rows")
    )
    np.testing.assert_allclose(found.to_xarray()["metric"].values, wanted.to_xarray()["metric"].values, atol=1e-10)
    assert set(taken) == {0, 1}


def test_several_heads_and_other_values_of_one_run_are_put_together(taken):
    patches = [
        [cp.Patch("z.0.1"), cp.Patch("z.0.2@1")],
        [cp.Patch("z.1.0", "zero"), cp.Patch("z.1.3", cp.Interpolate(0.25))],
        [cp.Patch("z.0.1"), cp.Patch("z.0.1@2", cp.Constant(0.5))],  # the later one counts where both write
        [cp.Patch("z.0.1", "identity")],
    ]
    found = values_of("gpt2", patches, engine="wavefront")
    np.testing.assert_allclose(found, values_of("gpt2", patches, engine="rows"), atol=1e-10)
    assert taken


def test_a_head_beside_another_site_goes_through_the_whole_projection(taken):
    patches = [[cp.Patch("z.0.1"), cp.Patch("attn_out.0@1")]]
    found = values_of("gpt2", patches, engine="wavefront")
    np.testing.assert_allclose(found, values_of("gpt2", patches, engine="rows"), atol=1e-10)
    assert not taken
