"""Refusals of ablations in searches and claims, and of searches that are selected again."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PairError, SettingError
from causalpatch.testing.known_shares import world

NONE = cp.Checks.none()


@pytest.fixture(scope="module")
def made():
    return world([0.4, 0.2], 12, name="held-out")


def test_values_that_a_search_cannot_put_in(made, refuses):
    with refuses(
        SettingError,
        """
        a search cannot put in the value 'optimal constant by kl_from_base'
          known  source, interpolate, zero, a number, mean, resample, noise
          why    parts of every size must be able to have it, all of them at once too
          fix: value="mean", or patch what the search found with it: experiment.run(…)
        """,
    ):
        cp.localize(made.experiment(direction="noise"), 1000, value="optimal")
    with refuses(
        SettingError,
        """
        'zero' takes a run apart and cannot restore one
          direction  denoise
          needed     noise: parts of clean runs are ablated
          fix: localize(experiment.turned("noise"), …)
        """,
    ):
        cp.localize(made.experiment(), 1000, value="zero")


def test_values_of_which_no_claim_is_made(made, refuses):
    with refuses(
        SettingError,
        """
        no claim is made of the value 'constant of shape (4,)'
          claimed  source, interpolate, subspaces of these; zero, a number, mean, resample, noise
          why      all attention and MLPs must be able to have it at once: that is what a share is of
          fix: value="mean", or leave it out and ask for Checks(corruptions=(…,))
        """,
    ):
        cp.confirm(made.experiment(direction="noise"), made.sites[0], value=cp.Constant(np.ones(4)), checks=NONE)
    with refuses(
        SettingError,
        """
        'zero' takes a run apart and cannot restore one
          direction  denoise
          needed     noise: components of clean runs are ablated
          fix: confirm(experiment.turned("noise"), …)
        """,
    ):
        cp.confirm(made.experiment(), made.sites[0], value="zero", checks=NONE)
    with refuses(
        PairError,
        """
        'mean over pairs of the corrupt side' would be fitted on the pairs that shall confirm it
          discovery pairs  none were given
          fix: confirm(…, found_on=discovery)
        """,
    ):
        cp.confirm(made.experiment(direction="noise"), made.sites[0], value="mean", checks=NONE)


def test_edges_and_models_that_cannot_be_claimed_with_ablations(made, refuses):
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model), direction="noise", show_progress=False)
    with refuses(
        SettingError,
        """
        edges cannot be claimed with the value 'zero'
          edges  carry what the source run's sender gives
          fix: leave value= out, or claim the heads and MLPs at their ends
        """,
    ):
        cp.confirm(experiment, "a3.h2 -> logits", value="zero", checks=NONE)
    images = cp.Pairs.from_arrays(np.eye(12)[:, None], np.zeros((12, 1, 12)), [0] * 12, [1] * 12)
    network = cp.Experiment(cp.open_model(_Linear()), images, direction="noise", show_progress=False)
    with refuses(
        SettingError,
        """
        no run has 'zero' everywhere, so that there is no gap to take a share of
          model   '_Linear'
          needed  one stream of layers with attention or MLPs
          fix: leave value= out: the gap is then that between clean and corrupted runs
        """,
    ):
        cp.confirm(network, "module(inner).output", value="zero", checks=NONE)


def test_searches_that_cannot_be_selected_again(made, refuses):
    found = cp.localize(made.experiment(), 10**5, units="heads", positions="all")
    with refuses(
        SettingError,
        """
        a search selects again by its own rules
          given  k, delta or parents, which are for effects
          fix: selection_stability(found)
        """,
    ):
        cp.selection_stability(found, k=2)
    with refuses(
        SettingError,
        f"""
        the search was made on other pairs
          search      {made.pairs.content_hash}
          experiment  {made.pairs[:6].content_hash}
          fix: give the experiment that the search was made with
        """,
    ):
        cp.selection_stability(found, experiment=made.experiment(slice(0, 6)), rerun=True)
    with refuses(
        SettingError,
        """
        no cell is selected in 0 of the resamples
          allowed  above 0, up to 1
          fix: threshold=0.9
        """,
    ):
        cp.selection_stability(found, threshold=0)
    with refuses(
        SettingError,
        """
        no neuron was found with an effect beyond 0.2
          found  z.0.0 0.39, z.0.1 0.20
          fix: found.select("head", beyond=0.2), or search with another budget or metric
        """,
    ):
        found.select("neuron", beyond=0.2)


class _Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(12, 4)

    def forward(self, x):
        return self.inner(x[:, 0])
