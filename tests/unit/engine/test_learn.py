"""Optimal ablation: constants that are learnt are as good as they can be, and never worse than means."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PatchError, SettingError
from causalpatch.pairs import Pair, Pairs
from toys import Chain, opened, prompts, vectors
from worlds import tiny_world, unchecked

PAIRS = prompts(
    *[(np.random.default_rng(n).integers(3, 40, 6).tolist(), [4, 5, 6, 7, 8, 9 + n]) for n in range(6)],
    answer=1,
    wrong=2,
)


def ablated(model, pairs, patches, **settings):
    with unchecked():
        return cp.Experiment(model, pairs, metric="kl_from_base", direction="noise", **settings).run(patches)


def test_the_best_constant_logits_are_those_of_the_mean_probabilities():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    effects = ablated(model, PAIRS, [cp.Patch("logits@-1", cp.Optimal(steps=200, rate=0.3))])
    with torch.no_grad():
        logits = torch.stack([model.module(input_ids=torch.tensor([p.clean.tolist()])).logits[0, -1] for p in PAIRS])
    probabilities = logits.softmax(-1)
    mean = probabilities.mean(0)
    # The mean of the divergences from a fixed distribution is least for the mean distribution.
    least = (probabilities * (logits.log_softmax(-1) - mean.log())).sum(-1)
    got = effects.to_xarray()["metric"].values[0]
    assert got.mean() == pytest.approx(float(least.mean()), rel=2e-3)
    assert np.abs(got - least.numpy()).max() < 0.05 * float(least.mean())


@pytest.mark.parametrize("family", ["gpt2", "gemma2"])
def test_constants_are_never_worse_than_means_on_the_pairs_they_were_learnt_on(family):
    model, _ = tiny_world(family, (2, 4, 2, 0))
    sites = ["z.0.1", "mlp_out.1@-1", "attn_out.0", "mlp_post.1.3", "resid_pre.1@2"]
    value = cp.Optimal(steps=12)
    learnt = ablated(model, PAIRS, [cp.Patch(site, value) for site in sites])
    means = ablated(model, PAIRS, [cp.Patch(site, cp.Mean("positions", "clean")) for site in sites])
    losses, of_means = (each.to_xarray()["metric"].values.mean(1) for each in (learnt, means))
    assert (losses <= of_means * (1 + 1e-9)).all()
    assert losses[4] < 0.9 * of_means[4]
    (record,) = learnt.provenance["fitted"]
    assert record["mean_loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert record["mean_loss_of_means"] == pytest.approx(of_means.mean(), rel=1e-6)
    assert record["side"] == "clean"


def test_constants_of_one_intervention_are_learnt_together_and_others_apart():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    value = cp.Optimal(steps=12)
    both = ["z.0.0", "z.0.1"]
    alone = ablated(model, PAIRS, [cp.Patch("z.0.0", value), cp.Patch("z.0.1", value)])
    together = ablated(model, PAIRS, [[cp.Patch(site, value) for site in both], cp.Patch("z.0.0", value)])
    fitted = cp.Experiment(model, PAIRS, direction="noise").fit([cp.Patch(site, value) for site in both])
    reused = ablated(model, PAIRS, [[each.patches[0] for each in fitted]])
    loss = together.to_xarray()["metric"].values.mean(1)
    assert loss[1] == pytest.approx(alone.to_xarray()["metric"].values[0].mean(), rel=1e-9)
    assert loss[0] <= reused.to_xarray()["metric"].values.mean() * (1 + 1e-9)


def test_the_reference_takes_the_constants_of_the_single_runs():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    value, sites = cp.Optimal(steps=5), ["z.0.0", "z.1.1"]
    experiment = cp.Experiment(model, PAIRS, metric="kl_from_base", direction="noise")
    effects = experiment.run([cp.Patch(site, value) for site in sites])
    fitted = experiment.fit([cp.Patch(site, value) for site in sites])
    together = experiment.run([[each.patches[0] for each in fitted]])
    wanted = together.to_xarray()["metric"].values[0]
    np.testing.assert_allclose(effects.to_xarray()["baseline_reference"].values, wanted, rtol=0, atol=1e-10)


def test_constants_are_learnt_in_any_module():
    model, pairs = opened(Chain()), vectors(8)
    patches = [cp.Patch("module(first).output", value) for value in (cp.Optimal(steps=20), cp.Mean(side="clean"))]
    losses = ablated(model, pairs, patches).to_xarray()["metric"].values.mean(1)
    assert losses[0] < losses[1]


def test_learning_by_a_metric_raises_it_where_higher_is_better():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    values = [cp.Optimal("log_probability", steps=12), cp.Mean("positions", "clean")]
    experiment = cp.Experiment(model, PAIRS, metric="log_probability", direction="noise")
    found = experiment.run([cp.Patch("resid_pre.1@-1", value) for value in values]).effect().values
    assert found[0] > found[1]


def test_an_objective_without_a_gradient_is_refused():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    with pytest.raises(SettingError, match="has no gradient"):
        ablated(model, PAIRS, [cp.Patch("z.0.0", cp.Optimal("top1"))])


def test_answers_of_several_tokens_are_no_objective():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    pairs = Pairs([Pair(p.clean, p.corrupt, ((1, 2),), ((2, 3),), p.id) for p in PAIRS])
    with pytest.raises(SettingError, match="several tokens"):
        ablated(model, pairs, [cp.Patch("z.0.0", cp.Optimal("log_probability"))])


def test_one_intervention_learns_in_one_way():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    with pytest.raises(PatchError, match="two ways"):
        ablated(model, PAIRS, [[cp.Patch("z.0.0", "optimal"), cp.Patch("z.0.1", "optimal(steps=3)")]])
