"""The source runs of a model whose weights go by other names: behind an adapter, or behind a module of one's own."""

import copy

import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, SettingError, SiteNotFound
from causalpatch.testing.tiny import tiny_classifier, tiny_model
from tiers import METRICS, assert_agree, run_model
from toys import Chain, opened, vectors
from worlds import random_pairs

PAIRS = random_pairs(3, 3)
SITES = [
    *("embed", "resid_pre.1@-1", "z.1.1", "mlp_post.1.3@-1", "v.1.0", "q_rot.0.1", "mlp_out.0", "final_norm@-1"),
    cp.Patch("resid_mid.0", "interpolate(0.4)"),
    cp.Patch("resid_post.0@-1", cp.From("resid_post.1@0")),
    cp.Patch("attn_out.1", cp.Function(lambda current, source: 2 * source - current, "beyond")),
]


def base():
    return cp.open_model(tiny_model("llama"))


def lora(family="llama"):
    """Return a model like the base with an adapter that changes what it does."""
    targets = ["q_proj", "v_proj", "down_proj"] if family == "llama" else ["c_attn"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
    return get_peft_model(tiny_model(family), config).double().eval()


@pytest.mark.parametrize(
    "engine", ["auto", *(pytest.param(e, marks=pytest.mark.slow) for e in ("reference", "restart"))]
)
def test_an_adapted_model_is_the_source_that_it_is_with_its_adapter_merged(engine):
    adapted = lora()
    model, wrapped = base(), cp.open_model(adapted)
    assert not set(dict(wrapped.module.named_parameters())) & set(dict(model.module.named_parameters()))
    settings = {"metric": list(METRICS), "direction": "noise"}
    got = run_model(engine, model, PAIRS, SITES, source_model=wrapped, **settings)
    # The other way round too: into the adapted model, from the plain one.
    back = run_model(engine, wrapped, PAIRS, SITES, source_model=model, **settings)
    merged = cp.open_model(adapted.merge_and_unload())
    assert_agree(got, run_model(engine, model, PAIRS, SITES, source_model=merged, **settings), 1e-9)
    assert_agree(back, run_model(engine, merged, PAIRS, SITES, source_model=model, **settings), 1e-9)
    alone = run_model(engine, model, PAIRS, SITES, **settings).to_xarray()["metric"].values
    assert np.nanmax(np.abs(got.to_xarray()["metric"].values - alone)) > 1e-3


@pytest.mark.slow
def test_paths_and_sweeps_read_an_adapted_source():
    adapted = lora()
    model, wrapped = base(), cp.open_model(adapted)
    same = PAIRS.one_sided("clean")
    measure = {
        "sweep": lambda source: cp.sweep(cp.Experiment(model, same, source_model=source), "resid_post@-1"),
        "paths": lambda source: cp.direct_effect(cp.Experiment(model, same, source_model=source), ["mlp_out"]),
    }
    got = {name: run(wrapped).effect(per_pair=True).values for name, run in measure.items()}
    merged = cp.open_model(adapted.merge_and_unload())
    for name, run in measure.items():
        np.testing.assert_allclose(got[name], run(merged).effect(per_pair=True).values, atol=1e-9)
        assert np.abs(got[name]).max() > 1e-3


def test_what_differs_is_refused_by_name():
    model = base()
    for other, text in [
        (get_peft_model(tiny_model("llama", heads=2), LoraConfig(target_modules=["q_proj"])).double(), "site embed"),
        (get_peft_model(tiny_model("llama", kv_heads=4), LoraConfig(target_modules=["q_proj"])).double(), "kv_head 2"),
        (lora("gpt2"), "family"),
    ]:
        with pytest.raises(ModelUnsupported, match=text):
            cp.Experiment(model, PAIRS, source_model=cp.open_model(other))
    encoder, classes = cp.open_model(tiny_model("bert")), cp.open_model(tiny_classifier("bert"))
    with pytest.raises(ModelUnsupported, match="what it answers to a prompt"):
        cp.Experiment(encoder, PAIRS, source_model=classes)
    plain, inside = opened(Chain()), opened(nn.Sequential(Chain()))
    with pytest.raises(ModelUnsupported, match=r"weight first.weight"):
        cp.Experiment(plain, vectors(3), source_model=inside)


def test_modules_that_stand_elsewhere_are_refused_and_named_sites_are_not():
    experiment = cp.Experiment(base(), PAIRS, source_model=cp.open_model(lora()))
    assert experiment.run(["mlp_out.1@-1"]).effect().notnull().all()
    with pytest.raises(SiteNotFound, match=r"stands elsewhere in the source model, 'PeftModel"):
        experiment.run(["module(model.layers.1.mlp).output@-1"])
    with pytest.raises(SiteNotFound, match="stands elsewhere"):
        experiment.run([cp.Patch("resid_pre.1@-1", cp.From("module(model.layers.1.mlp).output@-1"))])
    ablated = cp.Patch("module(model.layers.1.mlp).output@-1", cp.From("mlp_out.0@-1", run="base"))
    assert experiment.run([ablated]).effect().notnull().all()


def test_an_adapter_put_into_the_model_itself_is_no_second_model():
    module = tiny_model("llama")
    model = cp.open_model(module)
    wrapped = cp.open_model(get_peft_model(module, LoraConfig(target_modules=["q_proj"])).double().eval())
    for one, other in ((model, wrapped), (wrapped, model)):
        with pytest.raises(SettingError, match="are one model: the one stands around the other"):
            cp.Experiment(one, PAIRS, source_model=other)
    assert cp.Experiment(model, PAIRS, source_model=cp.open_model(copy.deepcopy(module)))
