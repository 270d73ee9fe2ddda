"""The engines for any module at all, on small modules with one trait each."""

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, SettingError, SiteUnsupported
from tiers import assert_agree, bent, mixed, run_model, tier_of
from toys import (
    Both,
    ByKeyword,
    Chain,
    InPlace,
    Narrow,
    Pictures,
    Pipe,
    Pooled,
    Twice,
    hooks_of,
    opened,
    prompts,
    vectors,
)
from worlds import MANY

GENERIC = ("graph", "rows", "auto")
SUMMED = cp.metric(lambda outputs, pairs: torch.sin(outputs.logits).flatten(1).sum(1), name="summed")
PIPES = {
    "tuple": (lambda left, right: (left, right), lambda both: both),
    "dictionary": (lambda left, right: {"left": left, "right": right}, lambda both: (both["left"], both["right"])),
    "named tuple": (Both, lambda both: (both.left, both.right)),
}
TOYS = {
    "Chain": (Chain, ("first", "second", "head", "drop"), (4,), 3),
    "InPlace": (InPlace, ("first", "second", "head"), (4,), 3),
    "ByKeyword": (ByKeyword, ("first", "second", "head"), (4,), 3),
    "Pictures": (Pictures, ("conv1", "conv2", "head"), (1, 6, 6), 4),
}


def sites_of(name, parts):
    """Return sites of a toy's modules; for pictures one channel of them too."""
    sites = [f"module({part}).{side}" for part in parts for side in ("output", "input")]
    if name == "Pictures":
        sites += [f"module({part}).output axes=(channel,height,column)#{unit}" for part in parts[:2] for unit in (0, 2)]
    return sites


def some_interventions(draw, sites, n, *, can_donate=True):
    """Draw interventions of one or two patches at different sites."""
    values = [None, None, "zero", 0.7, "mean", cp.Function(mixed), cp.Function(bent, needs_source=False), "identity"]
    values += ["interpolate(0.4)", "noise(0.3)", "noise", cp.Steer(0.5, -1.5), *["resample"] * can_donate]
    interventions = []
    for _ in range(n):
        chosen = draw(st.lists(st.sampled_from(sites), min_size=1, max_size=2, unique=True))
        interventions.append([cp.Patch(site, draw(st.sampled_from(values))) for site in chosen])
    return interventions


@pytest.mark.parametrize("n_cases", [3, pytest.param(30 * MANY, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TOYS)
def test_generic_tiers_measure_what_the_reference_measures_on_any_module(name, n_cases):
    kind, parts, shape, n_classes = TOYS[name]
    model = opened(kind())

    profile = settings.get_profile("test" if n_cases == 3 else "slow")

    @settings(profile, max_examples=n_cases, phases=[Phase.explicit, Phase.generate])
    @given(data=st.data())
    def run(data):
        draw = data.draw
        pairs = vectors(draw(st.integers(1, 6)), draw(st.integers(0, 10**6)), shape, n_classes)
        interventions = some_interventions(draw, sites_of(name, parts), 8, can_donate=len(pairs) > 1)
        given_settings = {
            "metric": [cp.logit_difference, cp.kl_divergence, SUMMED],
            "direction": draw(st.sampled_from(["denoise", "noise"])),
        }
        wanted = run_model("reference", model, pairs, interventions, **given_settings)
        for engine in GENERIC:
            got = run_model(engine, model, pairs, interventions, **given_settings)
            assert_agree(got, wanted)
            if engine != "auto":
                assert tier_of(got) == engine

    run()


@pytest.mark.parametrize("kind", PIPES)
@pytest.mark.parametrize("engine", GENERIC)
def test_generic_tiers_measure_what_the_reference_measures_in_containers(engine, kind):
    model, pairs = opened(Pipe(*PIPES[kind])), vectors(4)
    item = {"tuple": "[1]", "dictionary": '["right"]', "named tuple": "[1]"}[kind]
    sites = [f"module(split).output{item}", "module(join).output", "module(split).input"]
    patches = [*sites, [sites[0], cp.Patch(sites[1], cp.Function(mixed))], cp.Patch(sites[0], "zero")]
    wanted = run_model("reference", model, pairs, patches, metric=[cp.logit_difference, SUMMED])
    assert_agree(run_model(engine, model, pairs, patches, metric=[cp.logit_difference, SUMMED]), wanted)


@pytest.mark.parametrize("engine", GENERIC)
def test_generic_tiers_patch_tokens_of_modules_that_have_them(engine):
    pairs = prompts(([3, 4, 5, 6], [3, 9, 5, 7]), ([8, 4, 1], [2, 4, 6]), answer=1, wrong=2)
    model = opened(Pooled())
    sites = ["module(embed).output@1", "module(mix).output@-1", "module(mix).input@0", "module(mix).output"]
    patches = [
        *sites,
        *(cp.Patch(site, "zero") for site in sites),
        [sites[0], sites[1]],
        "module(pool).output axes=(width)",
    ]
    wanted = run_model("reference", model, pairs, patches, metric=SUMMED)
    assert_agree(run_model(engine, model, pairs, patches, metric=SUMMED), wanted)


@pytest.mark.parametrize("engine", ["wavefront", "restart"])
def test_engines_for_stacks_of_layers_refuse_other_modules_and_say_what_is_missing(engine):
    model, pairs = opened(Chain()), vectors(3)
    with pytest.raises((ModelUnsupported, SettingError)) as caught:
        run_model(engine, model, pairs, ["module(first).output"])
    assert caught.value.fix
    effects = run_model("auto", model, pairs, ["module(first).output"])
    assert tier_of(effects) in ("graph", "rows")
    assert effects.provenance["engine"]["reason"]


@pytest.mark.parametrize("engine", ["reference", *GENERIC])
def test_a_module_that_runs_twice_or_never_is_an_error_in_every_engine(engine):
    model, pairs = opened(Twice()), vectors(3)
    with pytest.raises((SiteUnsupported, ModelUnsupported), match="2 times"):
        run_model(engine, model, pairs, ["module(first).output"])
    with pytest.raises(cp.CausalPatchError):
        run_model(engine, model, pairs, ["module(second).output"])
    effects = run_model(engine, model, pairs, ["module(head).input"])
    assert_agree(effects, run_model("reference", model, pairs, ["module(head).input"]))


def test_memory_that_runs_out_is_answered_by_fewer_rows():
    patches = ["module(first).output", "module(second).output", cp.Patch("module(head).input", "zero")]
    wanted = run_model("reference", opened(Chain()), vectors(6), patches)
    assert_agree(run_model("rows", opened(Narrow(2)), vectors(6), patches), wanted)


@pytest.mark.parametrize("engine", GENERIC)
def test_generic_tiers_leave_modules_as_they_were(engine):
    model, pairs = opened(Chain()), vectors(4)
    model.module.train()
    seen = []
    # An exported graph does not call the user's hooks, so modules that have some are not for it.
    handle = None if engine == "graph" else model.module.second.register_forward_hook(lambda *_: seen.append(1))
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    n_hooks, state = hooks_of(model.module), torch.get_rng_state()
    effects = run_model(engine, model, pairs, ["module(first).output", cp.Patch("module(second).output", "zero")])
    assert seen or handle is None
    assert n_hooks == hooks_of(model.module)
    assert torch.equal(state, torch.get_rng_state())
    assert all(part.training for part in model.module.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.module.state_dict().items())
    if handle:
        handle.remove()
    wanted = run_model("reference", model, pairs, ["module(first).output", cp.Patch("module(second).output", "zero")])
    assert_agree(effects, wanted)


@pytest.mark.parametrize("engine", ["rows", "auto"])
def test_a_users_hook_that_changes_a_module_is_obeyed(engine):
    model, pairs = opened(Chain()), vectors(4)
    patches = ["module(first).output", cp.Patch("module(head).input", "zero"), "module(second).input"]
    before = run_model(engine, model, pairs, patches)
    handle = model.module.second.register_forward_hook(lambda module, args, output: torch.cos(output) - 1)
    got = run_model(engine, model, pairs, patches)
    assert_agree(got, run_model("reference", model, pairs, patches))
    assert not np.allclose(got.to_xarray()["metric"].values, before.to_xarray()["metric"].values)
    handle.remove()
    assert_agree(run_model(engine, model, pairs, patches), before)


def test_the_graph_refuses_a_module_with_hooks_which_it_would_not_call():
    model, pairs = opened(Chain()), vectors(4)
    run_model("graph", model, pairs, ["module(first).output"])
    model.module.second.register_forward_hook(lambda module, args, output: torch.cos(output) - 1)
    with pytest.raises((ModelUnsupported, SettingError), match="second"):
        run_model("graph", model, pairs, ["module(first).output"])
