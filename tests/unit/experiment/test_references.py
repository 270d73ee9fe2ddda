"""Which run a share is a share of: it follows from the values patched in, and never silently from two at once."""

import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import NoGap
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import tiny_model


def prompts():
    draw = torch.Generator().manual_seed(3)
    rows = torch.randint(1, 40, (12, 2, 5), generator=draw).numpy()
    return Pairs([Pair(clean, corrupt, ((4,),), ((5,),), id=str(k)) for k, (clean, corrupt) in enumerate(rows)])


@pytest.fixture(scope="module")
def model():
    return cp.open_model(tiny_model("llama", seed=2, layers=2))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("metric", ["kl_divergence", "kl_from_base", "cosine"])
def test_comparing_metrics_have_a_gap_in_both_directions(model, metric, direction):
    experiment = cp.Experiment(model, prompts(), metric=metric, direction=direction)
    everything = experiment.run(["resid_pre.0"])
    assert everything.recovered().item() == pytest.approx(1.0, abs=1e-9)


def test_source_patches_and_ablations_together_have_no_share(model):
    experiment = cp.Experiment(model, prompts(), metric="kl_divergence")
    effects = experiment.run(["z.0.1", cp.Patch("z.1.1", "zero")])
    assert effects.effect().shape == (2,)
    with pytest.raises(NoGap, match="a reference of its own"):
        effects.recovered()
    with pytest.raises(NoGap, match="a reference of its own"):
        effects.summary()


def test_the_identity_has_no_reference_of_its_own(model):
    experiment = cp.Experiment(model, prompts(), metric="kl_divergence")
    effects = experiment.run(["resid_pre.0", cp.Patch("z.1.1", "identity")])
    assert effects.recovered().values == pytest.approx([1.0, 0.0], abs=1e-9)


def test_the_reference_of_ablations_is_everything_ablated(model):
    experiment = cp.Experiment(model, prompts(), metric="answer_logit", direction="noise")
    effects = cp.sweep(experiment, "z", value="zero", over="layer")
    together = experiment.run([[cp.Patch("z", "zero")]])
    found = effects.to_xarray()["baseline_reference"].values
    assert found == pytest.approx(together.to_xarray()["metric"].values[0], abs=1e-10)
    assert effects.provenance["reference"] == "zero at 8 places together"
