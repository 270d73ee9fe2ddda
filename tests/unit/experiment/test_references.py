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


def no_share(effects):
    """Return the reason why these effects are a share of nothing, which every way to ask for one gives."""
    reasons = set()
    for ask in (effects.recovered, effects.summary, effects.top):
        with pytest.raises(NoGap, match="a share of nothing") as refusal:
            ask()
        reasons.add(dict(refusal.value.facts)["because"])
    assert effects.effect().notnull().all()
    return reasons.pop()


def test_source_patches_and_ablations_together_have_no_share(model):
    experiment = cp.Experiment(model, prompts(), metric="kl_divergence", direction="noise")
    effects = experiment.run(["z.0.1", cp.Patch("z.1.1", "zero")])
    assert "different references" in no_share(effects)


def test_ablations_of_two_kinds_have_no_share(model):
    experiment = cp.Experiment(model, prompts(), metric="kl_divergence", direction="noise")
    effects = experiment.run([cp.Patch("z.0.1", "mean"), cp.Patch("z.1.1", "zero")])
    assert "different kinds" in no_share(effects)


def test_ablating_the_corrupted_run_has_no_share(model):
    experiment = cp.Experiment(model, prompts(), metric="kl_divergence", direction="denoise")
    effects = cp.sweep(experiment, "z", value="zero")
    assert 'direction="noise"' in no_share(effects)


def test_an_ablation_is_not_a_share_of_itself(model):
    experiment = cp.Experiment(model, prompts(), metric="kl_divergence", direction="noise")
    effects = experiment.run([cp.Patch("z.0.1", "zero")])
    assert "would be 1 whatever it does" in no_share(effects)


def test_a_function_of_the_source_moves_towards_the_source(model):
    experiment = cp.Experiment(model, prompts(), metric="kl_divergence")
    half = cp.Function(lambda current, source: (current + source) / 2, name="half way")
    effects = experiment.run([cp.Patch("resid_pre.1", half), "resid_pre.1"])
    assert effects.provenance["reference"] == "corrupted run"
    assert 0 < effects.recovered().values[0] < effects.recovered().values[1] == pytest.approx(1.0)


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


def test_tokens_without_a_partner_are_counted_in_the_notes(model):
    rows = [([1, 2, 3, 4], [1, 5, 6, 3, 4]), ([7, 8, 9], [7, 8, 10])]
    made = [Pair(torch.tensor(a).numpy(), torch.tensor(b).numpy(), ((4,),), ((5,),), id=str(a)) for a, b in rows]
    experiment = cp.Experiment(model, Pairs(made).align("difference"), metric="kl_divergence")
    note = experiment.run(["resid_pre.0"]).provenance["notes"][0]
    assert note == "2 tokens of 1 base prompts have no partner in the source: they are not patched"
