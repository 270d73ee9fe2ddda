"""Edges interchanged exactly: against inputs put together by hand, and the laws that sets of edges obey."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import CausalPatchWarning, NoGap, SettingError
from causalpatch.engine import shares
from causalpatch.experiment.tally import Tally
from causalpatch.results.status import Status
from causalpatch.testing.tiny import tiny_model
from oracle_edges import EdgePlain, ungrouped
from toys import hooks_of, prompts

torch.set_num_threads(1)

PROMPTS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]), ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]))
SHORT = (([4, 6, 15, 8], [4, 7, 16, 8]),)
GROUPED = ("llama", "gemma2")


@functools.cache
def model_of(family):
    return cp.open_model(tiny_model(family, kv_heads=2 if family in GROUPED else 4))


def experiment_of(family, pairs=PROMPTS, **more):
    return cp.Experiment(model_of(family), prompts(*pairs), **more)


def masks_of(graph, seed=0):
    """Return all edges, all but one, many, few, one edge and one node."""
    rng = np.random.default_rng(seed)
    draws = rng.random((2, *graph.shape)) < np.array([0.3, 0.03])[:, None, None]
    one = graph.mask([tuple(graph.edges[rng.integers(graph.n_edges)])])
    return np.stack([graph.exists, graph.exists & ~one, *(graph.exists & draws), one, graph.mask(nodes=["a0.h1"])])


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox", "phi", "olmo2"])
def test_inputs_are_put_together_as_by_hand(family):
    experiment = experiment_of(family)
    masks = masks_of(cp.graph_of(experiment))
    found = cp.patch_edges(experiment, masks).to_xarray()["metric"].values.reshape(len(masks), -1)
    plain = EdgePlain(ungrouped(family) if family in GROUPED else tiny_model(family, kv_heads=4), family)
    for pair, (clean, corrupt) in enumerate(PROMPTS):
        source = plain.run(clean)
        for mask, value in zip(masks, found[:, pair], strict=True):
            logits = plain.patched(corrupt, source, torch.tensor(mask))[-1]
            assert value == pytest.approx(float(logits[5] - logits[6]), abs=1e-9)
    node = experiment.run(["z.0.1"]).to_xarray()["metric"].values
    np.testing.assert_allclose(found[5], node.reshape(-1), atol=1e-9)
    np.testing.assert_allclose(found[0], experiment.baseline.clean[0], atol=1e-9)
    tensors = cp.patch_edges(experiment, torch.as_tensor(masks)).to_xarray()["metric"].values.reshape(len(masks), -1)
    np.testing.assert_array_equal(tensors, found)
    assert hooks_of(experiment.model.module) == 0


@pytest.mark.parametrize("edges", [["a0.h1 -> a1.h0<q>", "a0.h1 -> m1", "m0 -> logits"], [["m0"], ["a0.h1"]]])
@pytest.mark.parametrize("value", ["source", "zero"])
def test_what_was_measured_is_kept_when_it_is_stopped(edges, value, monkeypatch):
    experiment = experiment_of("gpt2", direction="noise", max_rows=2)
    monkeypatch.setattr(shares, "PORTION", 2)
    whole = cp.patch_edges(experiment, edges, value=value).to_xarray()["metric"].values
    add, n_blocks = Tally.add, []

    def stopping(tally, block):
        found = add(tally, block)
        n_blocks.append(int((block.interventions >= 0).any()))
        if sum(n_blocks) == 1 + (value == "zero"):  # behind the reference
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Tally, "add", stopping)
    with pytest.warns(CausalPatchWarning, match=f"of {2 * len(edges)} runs were made and are kept"):
        effects = cp.patch_edges(experiment, edges, value=value)
    assert not effects.is_complete
    found = effects.to_xarray()["metric"].values
    is_there = np.isfinite(found)
    assert 0 < is_there.sum() < is_there.size
    np.testing.assert_array_equal(found[is_there], whole[is_there])
    assert (effects.to_xarray()["status"].values[~is_there[..., 0]] == Status.SKIPPED).all()


def test_untouched_runs_are_made_once_for_an_experiment():
    module = tiny_model("gpt2", kv_heads=4)
    experiment = cp.Experiment(cp.open_model(module), prompts(*PROMPTS))
    edges = [["m0", "a0.h1 -> logits"], ["a1.h0 -> logits", "m1 -> logits"]]

    def run(made):
        effects = cp.patch_edges(made, edges)
        return effects.to_xarray()["metric"].values, effects.provenance["cost"]["forwards"]

    (first, whole), (again, fewer) = run(experiment), run(experiment)
    np.testing.assert_array_equal(again, first)
    assert fewer == 1 < whole  # both sets begin at the last layer
    assert not np.allclose(run(experiment.turned("noise"))[0], first)
    assert run(experiment.turned("noise"))[1] == whole
    assert run(experiment.measuring("answer_logit"))[1] == whole
    hook = module.transformer.h[0].mlp.register_forward_hook(lambda part, args, out: 0.5 * out)
    assert not np.allclose(run(experiment)[0], first)
    hook.remove()
    np.testing.assert_array_equal(run(experiment)[0], first)
    with torch.no_grad():
        module.transformer.wte.weight *= 1.5
    after, anew = run(experiment)
    assert anew == whole
    np.testing.assert_array_equal(after, run(cp.Experiment(cp.open_model(module), prompts(*PROMPTS)))[0])


def test_circuits_are_not_measured_by_a_part_of_their_runs(monkeypatch):
    def stop(tally, block):
        add(tally, block)
        raise KeyboardInterrupt

    experiment, add = experiment_of("gpt2"), Tally.add
    circuit = cp.Circuit.of(experiment.model, ["m0 -> logits"])
    monkeypatch.setattr(Tally, "add", stop)
    with pytest.raises(KeyboardInterrupt):
        cp.evaluate_circuit(experiment, circuit, n_random=1)


def without_anything(run):
    return replace(run, embed=0 * run.embed, z=[0 * z for z in run.z], mlp=[0 * out for out in run.mlp])


def mean_of(runs):
    def over(name):
        return [torch.stack(parts).mean(0) for parts in zip(*(getattr(run, name) for run in runs), strict=True)]

    return replace(runs[0], embed=torch.stack([run.embed for run in runs]).mean(0), z=over("z"), mlp=over("mlp"))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "phi", "granite"])
def test_edges_that_carry_zero_or_a_mean_are_put_together_as_by_hand(family):
    experiment = experiment_of(family, direction="noise")
    masks = masks_of(cp.graph_of(experiment))
    plain = EdgePlain(ungrouped(family) if family in GROUPED else tiny_model(family, kv_heads=4), family)
    runs = [plain.run(corrupt) for _, corrupt in PROMPTS]
    for value, source in (("zero", without_anything(runs[0])), ("mean", mean_of(runs))):
        effects = cp.patch_edges(experiment, masks, value=value)
        found = effects.to_xarray()["metric"].values.reshape(len(masks), -1)
        for pair, (clean, _) in enumerate(PROMPTS):
            for mask, wanted in zip(masks, found[:, pair], strict=True):
                logits = plain.patched(clean, source, torch.tensor(mask))[-1]
                assert wanted == pytest.approx(float(logits[5] - logits[6]), abs=1e-9)
        reference = effects.to_xarray()["baseline_reference"].values.reshape(-1)
        np.testing.assert_allclose(reference, found[0], atol=1e-9)
        assert "at all edges together" in effects.provenance["reference"]


def test_ablations_have_no_share_where_they_cannot_restore_a_run():
    effects = cp.patch_edges(experiment_of("gpt2"), ["m0"], value="zero")
    with pytest.raises(NoGap, match="zero takes a run apart"):
        effects.recovered()
    with pytest.raises(SettingError, match="edges cannot carry 'identity'"):
        cp.patch_edges(experiment_of("gpt2"), ["m0"], value="identity")


def test_one_edge_is_a_path_of_one_edge():
    experiment = experiment_of("llama", PROMPTS + SHORT, direction="noise")
    edges = {
        "a0.h1 -> a1.h2<q>": "head_out.0.1 -> q.1.2",
        "m0 -> m1": "mlp_out.0 -> mlp_in.1",
        "embed -> logits": "embed -> logits",
    }
    paths = cp.path_patch(experiment, paths=list(edges.values())).effect(per_pair=True).values
    found = cp.patch_edges(experiment, list(edges)).effect(per_pair=True).values
    np.testing.assert_allclose(found, paths, atol=1e-9)
    # A path into a shared key is the edges into the keys of all heads that share it.
    path = cp.path_patch(experiment, paths=["mlp_out.0 -> k.1.1"]).effect(per_pair=True).values
    both = cp.patch_edges(experiment, [["m0 -> a1.h2<k>", "m0 -> a1.h3<k>"]]).effect(per_pair=True).values
    np.testing.assert_allclose(both, path, atol=1e-9)


def test_batches_padding_and_neighbours_change_nothing():
    pairs = PROMPTS + SHORT
    graph = cp.graph_of(model_of("gemma2"))
    masks = masks_of(graph)
    wanted = cp.patch_edges(experiment_of("gemma2", pairs), masks).effect(per_pair=True).values
    for other in (experiment_of("gemma2", pairs, max_rows=1), experiment_of("gemma2", pairs, padding_side="left")):
        np.testing.assert_allclose(cp.patch_edges(other, masks).effect(per_pair=True), wanted, atol=1e-10)
    alone = cp.patch_edges(experiment_of("gemma2", pairs), masks[3]).effect(per_pair=True).values
    np.testing.assert_allclose(alone[0], wanted[3], atol=1e-10)


def test_tokens_without_a_partner_keep_what_they_have():
    pairs = prompts(([1, 7, 3, 9, 4], [1, 8, 8, 3, 9, 4])).align("difference")
    experiment = cp.Experiment(model_of("gpt2"), pairs)
    node = experiment.run(["mlp_out.0"]).effect(per_pair=True).values
    np.testing.assert_allclose(cp.patch_edges(experiment, ["m0"]).effect(per_pair=True), node, atol=1e-9)
    row = cp.attribute_edges(experiment, "eap").score().sel(sender="m0")
    assert float(row.sum()) == pytest.approx(float(cp.attribute(experiment, "mlp_out.0", over="layer").score()[0]))


def test_float32_keeps_the_laws():
    model = cp.open_model(tiny_model("llama", kv_heads=2, dtype=torch.float32))
    experiment = cp.Experiment(model, prompts(*PROMPTS))
    graph = cp.graph_of(model)
    found = cp.patch_edges(experiment, np.stack([graph.exists, graph.mask(nodes=["m0"])])).to_xarray()["metric"].values
    np.testing.assert_allclose(found.reshape(2, -1)[0], experiment.baseline.clean[0], atol=1e-5)
    node = experiment.run(["mlp_out.0"]).to_xarray()["metric"].values
    np.testing.assert_allclose(found.reshape(2, -1)[1], node.reshape(-1), atol=1e-5)


def test_several_metrics_cost_once_and_names_are_kept():
    experiment = experiment_of("gpt2", metric=["logit_difference", "kl_divergence"])
    effects = cp.patch_edges(experiment, ["m0 -> logits", ["m0", "a0.h1 -> m1"]])
    assert effects.metrics == ["logit_difference", "kl_divergence"]
    assert list(effects.effect().coords["intervention"].values) == ["m0 -> logits", "m0, a0.h1 -> m1"]
    assert "from the first layer" in effects.provenance["engine"]["reason"]
    named = cp.patch_edges(experiment, ["m0"], labels=["the first MLP"])
    assert list(named.effect().coords["intervention"].values) == ["the first MLP"]
