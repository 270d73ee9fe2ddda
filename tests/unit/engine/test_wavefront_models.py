"""Models that are not what they seem: refused with a reason, and measured rightly in another way."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, SettingError
from doctored import ODD, REFUSED, doctored, llama
from oracle import Plain
from tiers import METRICS, assert_agree, by_raw_hooks, laid_at, quickly, run_model, run_unless_refused, tier_of
from worlds import World, assert_same, numbers, random_pairs

PAIRS = random_pairs(11, 3, "equal", prefix=1 / 3)
SAME_LENGTH = PAIRS.take([0])
SITES = ("resid_pre.0@1", "resid_pre.2@-1", "k.1.0@0", "z.0.3@-2", "z.2.1@-1", "mlp_out.1@1", "mlp_post.0.5@-1")
PATCHES = [*SITES, cp.Patch("attn_out.1@0", "zero"), ["q.1.2@-1", "z.1.2@-1"], cp.Patch("v.0.1", 0.3), "logits@-1"]
SETTINGS = {"metric": list(METRICS)}


def assert_raw_hooks_agree(got, name, module, pairs=PAIRS):
    world = World("llama", cp.open_model(module), Plain(module, "llama"), pairs, "left")
    sites = [text for text in SITES if name not in LEAKY or "resid" not in text]
    for number, text in enumerate(sites):
        assert_same(numbers(got)[:, number], by_raw_hooks(world, [laid_at(pairs, text)], "corrupt"))


# Models in which a whole stream does not decide what follows, so that its sites fail their proofs.
LEAKY = ("a dictionary that layers share", "a tensor for each token")


def patches_for(name):
    """Return the patches whose sites the model has."""
    return [p for p in PATCHES if name not in LEAKY or "resid" not in str(p)]


def pairs_for(name):
    """Return prompts of one length where the model counts tokens, which padding would change."""
    return SAME_LENGTH if name == "an MLP that counts tokens" else PAIRS


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_layers_on_rows_get_wrong_falls_back_with_a_reason_and_right_numbers(name):
    module, pairs = doctored(name), pairs_for(name)
    model = cp.open_model(module)
    got = run_model("auto", model, pairs, patches_for(name), **SETTINGS)
    assert tier_of(got) != "wavefront"
    assert len(got.provenance["engine"]["reason"]) > 10
    assert_agree(got, run_model("reference", model, pairs, patches_for(name), **SETTINGS))
    assert_raw_hooks_agree(got, name, module, pairs)


@pytest.mark.parametrize("name", REFUSED)
def test_the_wavefront_says_why_it_cannot_run_a_model_that_it_would_get_wrong(name):
    model = cp.open_model(doctored(name))
    with pytest.raises((ModelUnsupported, SettingError)) as caught:
        run_model("wavefront", model, pairs_for(name), patches_for(name), **SETTINGS)
    assert caught.value.facts
    assert caught.value.fix


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("features between its layers", "the stream changes between layers 0 and 1"),
        ("a factor between its layers", "the stream changes between layers 0 and 1"),
        ("a prefix that sees itself", "its tokens see later ones"),
        ("no causal mask", "its tokens see later ones"),
    ],
)
def test_what_a_look_at_one_run_shows_is_said_and_does_not_wait_for_wrong_numbers(name, why):
    with pytest.raises(SettingError, match=f"wavefront  {why}"):
        run_model("wavefront", cp.open_model(doctored(name)), PAIRS, PATCHES, **SETTINGS)


@pytest.mark.parametrize("name", [*REFUSED, *ODD])
@pytest.mark.parametrize("engine", quickly(["wavefront", "restart", "rows"], "restart"))
def test_an_engine_refuses_an_odd_model_or_measures_what_the_reference_measures(name, engine):
    model, pairs = doctored(name), pairs_for(name)
    model = cp.open_model(model)
    got = run_unless_refused(engine, model, pairs, patches_for(name), **SETTINGS)
    assert got is not None or engine != "rows"
    if got is None:
        return
    assert_agree(got, run_model("reference", model, pairs, patches_for(name), **SETTINGS))


@pytest.mark.parametrize("name", ODD)
def test_an_odd_model_is_measured_rightly_by_whatever_engine_takes_it(name):
    module = doctored(name)
    model = cp.open_model(module)
    got = run_model("auto", model, PAIRS, patches_for(name), **SETTINGS)
    assert_agree(got, run_model("reference", model, PAIRS, patches_for(name), **SETTINGS))
    assert_raw_hooks_agree(got, name, module)


def test_an_ordinary_model_is_not_refused():
    effects = run_model("auto", cp.open_model(llama()), PAIRS, PATCHES, **SETTINGS)
    assert tier_of(effects) == "wavefront"


def test_a_prefix_that_sees_itself_goes_to_the_engine_that_restarts_layers():
    effects = run_model("auto", cp.open_model(doctored("a prefix that sees itself")), PAIRS, PATCHES, **SETTINGS)
    assert tier_of(effects) == "restart"


def test_weights_that_change_between_two_runs_change_the_numbers():
    module = llama()
    model = cp.open_model(module)
    first = run_model("auto", model, PAIRS, SITES)
    with torch.no_grad():
        module.model.layers[1].mlp.down_proj.weight.mul_(-1)
    again = run_model("auto", model, PAIRS, SITES)
    assert_agree(again, run_model("reference", model, PAIRS, SITES))
    assert not np.allclose(numbers(again), numbers(first))
