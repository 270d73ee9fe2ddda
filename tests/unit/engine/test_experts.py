"""Routers and experts, held against raw hooks that add up what the experts make one by one; and frozen routing."""

import functools

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PatchError, SiteUnsupported
from causalpatch.engine import capture
from causalpatch.engine.ports import pick_output, put_output
from causalpatch.models import Port
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import Site
from causalpatch.testing.tiny import tiny_model
from oracle import Edit, Plain
from worlds import assert_same

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v3", "gpt_oss", "jamba")
# Layers with experts, of three; experts that nothing else is added to.
LAYERS = {"mixtral": (0, 1, 2), "gpt_oss": (0, 1, 2), "deepseek_v3": (1, 2), "jamba": (1,)} | dict.fromkeys(
    ["qwen2_moe", "qwen3_moe"], (0, 2)
)
TIERS = ("restart", "rows", "reference")
EXPERTS = 4


@functools.lru_cache
def tiny(family):
    module = tiny_model(family, layers=3, seed=1)
    return cp.open_model(module), Plain(module, family)


def prompts(n=4):
    draw = np.random.default_rng(5)
    made = []
    for number in range(n):
        clean = draw.integers(3, 40, 4 + number)
        corrupt = draw.permutation(clean)
        corrupt[number % len(corrupt)] = 2
        made.append(Pair(clean, corrupt, ((4,),), ((5,),), id=str(number)))
    return Pairs(made, name="made")


def measured(model, interventions, engine, pairs):
    experiment = cp.Experiment(model, pairs, engine=engine, show_progress=False)
    effects = experiment.run(interventions)
    return effects, effects.to_xarray()["metric"].values.reshape(len(interventions), len(pairs))


def difference(logits, pair):
    return float(logits[-1, pair.answer[0][0]] - logits[-1, pair.wrong_answer[0][0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_and_experts_hold_what_raw_hooks_see(family):
    model, plain = tiny(family)
    layer, pair = LAYERS[family][-1], prompts()[2]
    sites = [Site("router", layer), *(Site("expert_out", layer, expert) for expert in range(EXPERTS))]
    batch = prompts().batch("clean", np.array([2]), padding_side="right")
    run = capture(model, batch, sites)
    for site in sites:
        wanted = plain.value(pair.clean, (site.name, site.layer, site.unit))
        assert torch.allclose(run.value(site)[0], wanted, rtol=0, atol=1e-12), site
    weights = run.value(sites[0])[0]
    assert ((weights != 0).sum(1) == 2).all()
    assert weights.shape == (len(pair.clean), EXPERTS)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", TIERS)
def test_patched_routers_and_experts_measure_what_raw_hooks_measure(family, engine):
    (model, plain), pairs, layer = tiny(family), prompts(), LAYERS[family][0]
    dense = np.array([0.4, -0.1, 0.2, 0.3])
    asked = [
        cp.Patch(f"router.{layer}@-1"),
        cp.Patch(f"router.{layer}"),
        cp.Patch(f"router.{layer}@1", cp.Constant(dense)),
        cp.Patch(f"router.{layer}", "zero"),
        cp.Patch(f"expert_out.{layer}.1"),
        cp.Patch(f"expert_out.{layer}.3@-1", "zero"),
        [cp.Patch(f"router.{layer}"), cp.Patch(f"expert_out.{layer}.2")],
    ]
    effects, got = measured(model, asked, engine, pairs)
    assert effects.provenance["engine"]["tier"] == engine
    for number, pair in enumerate(pairs):
        last, every = [len(pair.clean) - 1], range(len(pair.clean))
        router, one, two, three = (("router", layer, None), *(("expert_out", layer, n) for n in (1, 2, 3)))
        source = {site: plain.value(pair.clean, site) for site in (router, one, two, three)}
        edits = [
            [Edit(router, last, source[router][last])],
            [Edit(router, every, source[router])],
            [Edit(router, [1], torch.as_tensor(dense)[None])],
            [Edit(router, every, torch.zeros_like)],
            [Edit(one, every, source[one])],
            [Edit(three, last, torch.zeros_like)],
        ]
        wanted = [difference(plain.logits(pair.corrupt, each), pair) for each in edits]
        assert np.abs(got[:6, number] - wanted).max() < 1e-10
    assert np.ptp(got, axis=0).min() > 1e-6  # each of them changes something else


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "jamba"])
def test_all_experts_from_the_source_are_the_whole_mixture_from_the_source(family):
    model, _ = tiny(family)
    layer = LAYERS[family][0]
    _, got = measured(model, [f"expert_out.{layer}", f"mlp_out.{layer}"], "reference", prompts())
    assert np.abs(got[0] - got[1]).max() < 1e-10


@pytest.mark.parametrize("family", FAMILIES)
def test_writing_routes_and_terms_back_changes_no_bit_of_one_prompt(family):
    model, _ = tiny(family)
    sites = [("router",), ("expert_out",)]
    runs = [[cp.Patch(*site, "identity")] for site in sites]
    effects, _ = measured(model, runs, "reference", Pairs([prompts()[2]]))
    assert (effects.effect().values == 0).all()


def chosen_in(model, layer, run):
    """Return which experts the tokens have in each forward of a run, as their own module is told."""
    seen = []
    experts = model.module.get_submodule(model.tap(Site("expert_out", layer, 0)).port.path)
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[1].sort(1).values))
    try:
        run()
    finally:
        handle.remove()
    return seen


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("engine", TIERS)
def test_frozen_routing_keeps_the_weights_of_the_base_run_wherever_the_patch_stands(family, engine):
    (model, plain), pairs, late = tiny(family), prompts(), LAYERS[family][-1]
    frozen = cp.Patch("router", "identity")
    asked = [[cp.Patch(f"resid_pre.{layer}@1"), frozen] for layer in (0, late)]
    effects, got = measured(model, [*asked, "resid_pre.0@1"], engine, pairs)
    assert effects.provenance["engine"]["tier"] == engine
    moved = []
    for number, pair in enumerate(pairs):
        routes = [("router", layer, None) for layer in LAYERS[family]]
        keep = [Edit(site, range(len(pair.corrupt)), plain.value(pair.corrupt, site)) for site in routes]
        for place, layer in enumerate((0, late)):
            site = ("resid_pre", layer, None)
            edit = Edit(site, [1], plain.value(pair.clean, site)[[1]])
            assert abs(got[place, number] - difference(plain.logits(pair.corrupt, [edit, *keep]), pair)) < 1e-10
        moved.append(abs(got[0, number] - got[2, number]))
    assert max(moved) > 1e-6  # free routers change their weights


def test_frozen_tokens_keep_their_experts_where_free_ones_take_others():
    model, _ = tiny("mixtral")
    pair = Pairs([prompts()[3]])
    big = cp.Patch("resid_pre.0@1", cp.Function(lambda current, source: 30 * source - 7 * current))

    def last_of(patches):
        return chosen_in(model, 2, lambda: measured(model, [patches], "reference", pair))

    # Forwards: base and source, the control, the run that is asked for.
    base, _, control, patched = last_of([big])[-4:]
    assert not torch.equal(patched, base)
    assert torch.equal(control, base)
    base, *_, patched = last_of([big, cp.Patch("router", "identity")])[-4:]
    assert torch.equal(patched, base)


def test_a_sweep_walks_along_layers_with_experts_and_can_freeze_the_routing():
    model, _ = tiny("deepseek_v3")
    experiment = cp.Experiment(model, prompts(), show_progress=False)
    routers, experts = cp.sweep(experiment, "router@-1"), cp.sweep(experiment, "expert_out")
    assert (routers.dims, experts.dims) == (("layer", "pair"), ("layer", "expert", "pair"))
    assert routers.to_xarray()["layer"].values.tolist() == [1, 2]
    assert experts.to_xarray()["layer"].values.tolist() == [1, 2]
    assert experts.to_xarray()["expert"].values.tolist() == [0, 1, 2, 3]
    got = cp.sweep(experiment, "attn_out@-1", frozen="router")
    runs = [[cp.Patch("router", "identity"), f"attn_out.{layer}@-1"] for layer in range(3)]
    assert_same(got.to_xarray()["metric"].values, experiment.run(runs).to_xarray()["metric"].values)
    free = cp.sweep(experiment, "attn_out@-1")
    assert np.abs(got.effect().values - free.effect().values).max() > 1e-8
    assert got.provenance["value"] == "identity, source"
    assert cp.plan_sweep(experiment, "attn_out@-1", frozen="router").tier == "restart"
    with pytest.raises(PatchError, match=r"writes 'router\.1' twice"):
        cp.sweep(experiment, "router", over="layer", frozen="router")


def test_ablations_with_frozen_routing_are_shares_of_an_ablation_with_frozen_routing():
    model, plain = tiny("mixtral")
    pairs = prompts()
    experiment = cp.Experiment(model, pairs, direction="noise", show_progress=False)
    effects = cp.sweep(experiment, "attn_out", over="layer", value="zero", frozen="router")
    reference = effects.to_xarray()["baseline_reference"].values.reshape(-1)
    for number, pair in enumerate(pairs):
        every = range(len(pair.clean))
        routes = [("router", layer, None) for layer in range(3)]
        keep = [Edit(site, every, plain.value(pair.clean, site)) for site in routes]
        gone = [Edit(("attn_out", layer, None), every, torch.zeros_like) for layer in range(3)]
        assert abs(reference[number] - difference(plain.logits(pair.clean, [*gone, *keep]), pair)) < 1e-10


def routed():
    """Return what a router gives for two tokens, with two of four experts each."""
    weights, numbers = torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[2, 0], [3, 1]])
    return torch.zeros(2, 4), weights, numbers


def test_routes_hold_the_weights_of_all_experts():
    routes = pick_output(Port("gate", "routes"), routed())
    assert routes.tolist() == [[0.75, 0.0, 0.25, 0.0], [0.0, 0.5, 0.0, 0.5]]


def test_tokens_that_keep_their_weights_keep_the_order_of_their_experts():
    value = torch.tensor([[0.75, 0.0, 0.25, 0.0], [0.1, 0.0, 0.0, 0.9]])
    logits, weights, numbers = put_output(Port("gate", "routes"), routed(), value)
    assert torch.equal(logits, routed()[0])
    assert weights.tolist() == [[0.25, 0.75], [pytest.approx(0.9), pytest.approx(0.1)]]
    assert numbers.tolist() == [[2, 0], [3, 0]]


def test_more_experts_go_on_than_a_router_chooses_and_others_stay_as_they_were():
    value = torch.tensor([[0.75, 0.0, 0.25, 0.0], [0.1, -0.2, 0.3, 0.4]])
    port = Port("gate", "routes")
    output = put_output(port, routed(), value)
    assert output[1].shape == (2, 4)
    assert output[1][0].tolist() == [0.25, 0.75, 0.0, 0.0]
    assert torch.equal(pick_output(port, output), value)


@pytest.mark.parametrize("output", [torch.zeros(2, 4), routed()[:2], [*routed()], (*routed()[:2], torch.zeros(2, 2))])
def test_what_is_no_routers_output_is_refused(output):
    with pytest.raises(SiteUnsupported, match=r"what the router 'gate' returns is not known"):
        pick_output(Port("gate", "routes"), output)


@pytest.mark.parametrize("engine", ["auto", "rows"])
def test_any_sites_can_be_frozen_in_a_sweep(engine):
    module = tiny_model("llama", seed=1)
    model, plain, pairs = cp.open_model(module), Plain(module, "llama"), prompts()
    experiment = cp.Experiment(model, pairs, engine=engine, show_progress=False)
    got = cp.sweep(experiment, "resid_pre@1", frozen="pattern").to_xarray()["metric"].values
    patterns = [("pattern", layer, head) for layer in range(2) for head in range(4)]
    for number, pair in enumerate(pairs):
        keep = [Edit(site, range(len(pair.corrupt)), plain.value(pair.corrupt, site)) for site in patterns]
        for layer in range(2):
            site = ("resid_pre", layer, None)
            edit = Edit(site, [1], plain.value(pair.clean, site)[[1]])
            assert abs(got[layer, number] - difference(plain.logits(pair.corrupt, [edit, *keep]), pair)) < 1e-10
