"""Edges cut by shares: against inputs put together by hand, the exact runs at 0 and 1, and finite differences."""

import functools

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import MetricError
from causalpatch.engine.gradient import differentiable
from causalpatch.engine.soft_edges import SoftEdges
from causalpatch.engine.wiring import wiring_of
from causalpatch.experiment.edge_jobs import carried_of, job_of_edges
from causalpatch.testing.tiny import tiny_model
from oracle_edges import EdgePlain, ungrouped
from toys import hooks_of, prompts

torch.set_num_threads(1)

PROMPTS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]), ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]))
SHORT = (([4, 6, 15, 8], [4, 7, 16, 8]),)
GROUPED = ("llama", "gemma2")
FAMILIES = ["gpt2", "llama", "gemma2", "gpt_neox", "phi", "olmo2"]


@functools.cache
def model_of(family, dtype=torch.float64):
    return cp.open_model(tiny_model(family, kv_heads=2 if family in GROUPED else 4, dtype=dtype))


def soft_of(family, pairs=PROMPTS, value="source", **more):
    experiment = cp.Experiment(model_of(family), prompts(*pairs), **more)
    job, means = job_of_edges(experiment, carried_of(value))
    return experiment, SoftEdges(job, experiment.gauge, wiring_of(experiment.model, experiment.pairs), means)


def drawn(graph, n_rows, seed=0, dtype=np.float64):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.random((n_rows, *graph.shape)).astype(dtype) * graph.exists)


def values_of(soft, rows, shares):
    with differentiable(soft.wiring.model), torch.no_grad():
        return soft.values(np.asarray(rows), shares).numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_shares_are_put_together_as_by_hand(family):
    experiment, soft = soft_of(family)
    shares = drawn(cp.graph_of(experiment), 4)
    found = values_of(soft, [0, 1, 0, 1], shares)
    plain = EdgePlain(ungrouped(family) if family in GROUPED else tiny_model(family, kv_heads=4), family)
    for row, value in enumerate(found):
        clean, corrupt = PROMPTS[row % 2]
        logits = plain.patched(corrupt, plain.run(clean), shares[row])[-1]
        assert value == pytest.approx(float(logits[5] - logits[6]), abs=1e-9)
    assert hooks_of(experiment.model.module) == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("value", ["source", "zero", "mean"])
def test_at_0_and_1_it_is_the_exact_run(family, value):
    experiment, soft = soft_of(family, PROMPTS + SHORT, value, direction="noise")
    graph = cp.graph_of(experiment)
    masks = np.stack([graph.exists, graph.exists & False, drawn(graph, 1, 3)[0].numpy() > 0.5])
    made = cp.patch_edges(experiment, masks[[0, 2]], value=value).to_xarray()["metric"].values.reshape(2, 3)
    wanted = np.stack([made[0], experiment.baseline.clean[0], made[1]])
    shares = torch.tensor(masks.astype(float)).repeat_interleave(3, 0)
    found = values_of(soft, np.tile(np.arange(3), 3), shares).reshape(3, 3)
    np.testing.assert_allclose(found, wanted, atol=1e-9)


def test_float32_agrees_with_the_exact_run():
    model = model_of("llama", torch.float32)
    experiment = cp.Experiment(model, prompts(*PROMPTS))
    graph = cp.graph_of(model)
    job, means = job_of_edges(experiment, carried_of("source"))
    soft = SoftEdges(job, experiment.gauge, wiring_of(model, experiment.pairs), means)
    masks = drawn(graph, 2).numpy() > 0.5
    wanted = cp.patch_edges(experiment, masks).to_xarray()["metric"].values.reshape(2, 2)
    shares = torch.tensor(masks.astype(np.float32)).repeat_interleave(2, 0)
    np.testing.assert_allclose(values_of(soft, [0, 1, 0, 1], shares).reshape(2, 2), wanted, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_slopes_are_those_of_finite_differences(family):
    experiment, soft = soft_of(family, PROMPTS + SHORT, direction="noise")
    graph = cp.graph_of(experiment)
    shares, rows = drawn(graph, 3, 1), np.array([2, 0, 1])
    losses, slopes = soft.slopes(rows, shares, lambda values, pairs: values.square())
    np.testing.assert_allclose(losses, values_of(soft, rows, shares) ** 2, rtol=1e-6)
    rng = np.random.default_rng(2)
    for sender, receiver in graph.edges[rng.permutation(graph.n_edges)[:6]]:
        moved = []
        for step in (1e-5, -1e-5):
            other = shares.clone()
            other[:, sender, receiver] += step
            moved.append(values_of(soft, rows, other) ** 2)
        wanted = (moved[0] - moved[1]) / 2e-5
        np.testing.assert_allclose(slopes[:, sender, receiver], wanted, atol=1e-6 + 1e-4 * np.abs(wanted).max())
    assert float(slopes[:, ~torch.tensor(graph.exists)].abs().max()) == 0


def test_rows_padding_and_budgets_change_nothing():
    shares = drawn(cp.graph_of(model_of("gemma2")), 5)
    rows = np.array([0, 2, 1, 2, 0])
    found = []
    for more in ({}, {"max_rows": 1}, {"max_rows": 2, "budget_gib": 1e-6}, {"padding_side": "left"}):
        _, soft = soft_of("gemma2", PROMPTS + SHORT, **more)
        found.append(soft.slopes(rows, shares, lambda values, pairs: values * (1 + pairs)))
    for losses, slopes in found[1:]:
        np.testing.assert_allclose(losses, found[0][0], rtol=1e-6)
        np.testing.assert_allclose(slopes, found[0][1], atol=1e-9)


def test_a_flat_metric_is_refused():
    _, soft = soft_of("gpt2", metric="top1")
    shares = drawn(soft.wiring.graph, 1)
    with pytest.raises(MetricError, match="it has no gradient"):
        soft.slopes(np.array([0]), shares, lambda values, pairs: values)
