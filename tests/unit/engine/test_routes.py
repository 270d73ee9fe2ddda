"""Near ties of routers: cells in which rounding may have chosen the experts are measured by forwards of their own."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import capture
from causalpatch.engine.routes import router_layers
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import Site
from causalpatch.testing.tiny import tiny_model

TIED, TOKEN = 0, 1  # the pair and the token of its base prompt whose second and third expert are level
FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss")


def measured(model, interventions, engine, pairs):
    effects = cp.Experiment(model, pairs, engine=engine, show_progress=False).run(interventions)
    return effects, effects.effect(per_pair=True).values


def prompts():
    draw = np.random.default_rng(3)
    rows = [draw.permutation(np.arange(3, 39))[:6] for _ in range(3)]
    return Pairs([Pair(np.roll(ids, 1), ids, ((4,),), ((5,),), id=str(n)) for n, ids in enumerate(rows)], name="made")


def at_router(model, router, pairs):
    """Return what goes into a router in the base run of the pair, and what it gives."""
    seen = []
    hook = router.register_forward_hook(lambda _, args, out: seen.append((args[0].reshape(-1, args[0].shape[-1]), out)))
    with torch.no_grad():
        model.module(torch.tensor(pairs[TIED].corrupt)[None])
    hook.remove()
    return seen[0]


def tied(family, layer, gap=0.0):
    """Return a model in which one token is level between two experts in one layer, and the pairs."""
    module, pairs = tiny_model(family, layers=2, seed=2, dtype=torch.float32), prompts()
    model = cp.open_model(module)
    router = module.get_submodule(model.tap(Site("router", layer)).port.path)
    hidden, (logits, _, _) = at_router(model, router, pairs)
    hidden, logits = hidden[TOKEN], logits[TOKEN]
    with torch.no_grad():
        second, third = logits.argsort(descending=True)[1:3]
        router.weight[third] += (logits[second] - logits[third] - gap) * hidden / hidden.square().sum()
    return model, pairs


ASKED = [f"resid_pre.0@{TOKEN}", "z.0.1@-1", "mlp_out.1@-1", f"resid_pre.0@{TOKEN + 1}"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair_with_a_level_token_is_measured_alone_and_all_numbers_are_the_references(family):
    model, pairs = tied(family, 0)
    effects, got = measured(model, ASKED, "auto", pairs)
    _, wanted = measured(model, ASKED, "reference", pairs)
    record = effects.provenance["engine"]
    assert np.abs(got - wanted).max() < 1e-5
    assert record["interventions"]["restart"] == len(ASKED)
    assert record["routers"]["measured_alone"] == len(ASKED)
    assert record["routers"]["smallest_margin"] < 1e-5


def test_ties_are_found_where_experts_are_chosen_in_groups():
    module, pairs = tiny_model("deepseek_v3", layers=2, seed=2, dtype=torch.float32), prompts()
    weight = module.get_submodule("model.layers.1.mlp.gate").weight
    with torch.no_grad():
        half = weight[: len(weight) // 2]
        weight[len(weight) // 2 :] = half + 1e-7 * half.roll(1, 1)  # two groups of near equals
    record = measured(cp.open_model(module), ASKED, "auto", pairs)[0].provenance["engine"]
    assert record["routers"]["measured_alone"] == len(ASKED) * len(pairs)


def test_without_a_tie_nothing_is_measured_alone_and_the_margin_is_told():
    model, pairs = tied("mixtral", 0, gap=0.05)
    record = measured(model, ASKED, "auto", pairs)[0].provenance["engine"]
    assert record["routers"]["measured_alone"] == 0
    assert 0 < record["routers"]["smallest_margin"] <= 0.0501


@pytest.mark.parametrize("engine", ["restart", "rows"])
def test_an_engine_asked_for_by_name_leaves_ties_to_single_forwards_too(engine):
    model, pairs = tied("mixtral", 0)
    effects, _ = measured(model, ASKED, engine, pairs)
    assert effects.provenance["engine"]["routers"]["measured_alone"] == len(ASKED)
    assert effects.provenance["engine"]["interventions"] == {engine: len(ASKED), "reference": len(ASKED)}


def test_a_patch_that_brings_a_token_to_a_tie_is_measured_alone_unless_routing_is_frozen():
    model, pairs = tied("mixtral", 0)
    level = capture(model, pairs.batch("corrupt", [TIED]), [Site("resid_mid", 0)]).value(Site("resid_mid", 0))[0, TOKEN]
    patch = cp.Patch(f"resid_mid.0@{TOKEN}", cp.Constant(level.numpy()))
    keeps = [cp.Patch(f"router.{layer}", "identity") for layer in (0, 1)]
    asked, others = [[patch], [patch, *keeps], ["mlp_out.1@-1"]], pairs.take([1, 2])
    effects, got = measured(model, asked, "auto", others)
    _, wanted = measured(model, asked, "reference", others)
    assert np.abs(got - wanted).max() < 1e-5
    assert effects.provenance["engine"]["routers"]["measured_alone"] == 2  # on both pairs
    assert effects.provenance["engine"]["interventions"] == {"restart": 3, "reference": 1}


def test_answers_that_bring_a_tie_are_spelt_out_alone():
    model, pairs = tied("mixtral", 0)
    spelt = pairs.with_answers([((int(pair.corrupt[-1]), 9), (4, 9)) for pair in pairs])
    shorter = [Pair(p.clean[:-1], p.corrupt[:-1], p.answer, id=p.id) for p in spelt]
    settings = {"metric": cp.log_probability, "show_progress": False}
    auto, plain = (cp.Experiment(model, Pairs(shorter), engine=e, **settings).run(ASKED) for e in ("auto", "reference"))
    assert np.abs(auto.effect(per_pair=True).values - plain.effect(per_pair=True).values).max() < 1e-5
    assert auto.provenance["engine"]["routers"]["measured_alone"] == len(ASKED)


def test_without_the_guard_a_flip_would_be_taken_for_an_effect(monkeypatch):
    model, pairs = tied("mixtral", 0, gap=1e-6)
    router = model.module.get_submodule(model.tap(Site("router", 0)).port.path)
    own = router.forward
    _, (logits, _, _) = at_router(model, router, pairs)
    second, third = router.weight[logits[TOKEN].argsort(descending=True)[1:3]].detach()

    def rounded(given):
        """Round towards the other expert in forwards of several prompts."""
        is_alone = given.shape[:-1].numel() <= len(pairs[TIED].corrupt)
        return own(given if is_alone else given + 4e-6 * (third - second) / (third - second).square().sum())

    monkeypatch.setattr(router, "forward", rounded)
    _, wanted = measured(model, ASKED, "reference", pairs)
    _, guarded = measured(model, ASKED, "rows", pairs)
    monkeypatch.setattr("causalpatch.engine.routes.router_layers", lambda model: [])
    _, bare = measured(model, ASKED, "rows", pairs)
    assert np.abs(guarded - wanted).max() < 1e-4
    assert np.abs(bare - wanted).max() > 1e-2


def test_models_without_experts_have_no_routers():
    assert router_layers(cp.open_model(tiny_model("llama", layers=2))) == []
    assert router_layers(cp.open_model(tiny_model("deepseek_v3", layers=2))) == [1]
