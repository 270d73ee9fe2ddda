"""Layouts that no family of the tables has yet, in models of transformers: fused gate and up, and no module at all."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Phi3Config

import causalpatch as cp
from causalpatch.engine import capture, prove
from causalpatch.models import detect
from causalpatch.models.families import Absent, Parted
from causalpatch.models.families.llama import LLAMA
from causalpatch.sites import Site
from causalpatch.testing.tiny import tiny_model
from worlds import random_pairs

SITES = {**LLAMA.sites, **dict.fromkeys("qkv", Absent("fused"))}
FUSED = replace(
    LLAMA,
    name="phi3",
    model_types=("phi3",),
    sites={
        **SITES,
        **{name: Parted("self_attn.o_proj", "input") for name in "qkv"},  # not asked for here
        "mlp_gate": Parted("mlp.gate_up_proj", "output", part=0, parts=2),
        "mlp_pre": Parted("mlp.gate_up_proj", "output", part=1, parts=2),
    },
)


@pytest.fixture
def phi3(monkeypatch):
    monkeypatch.setattr(detect, "FAMILIES", (FUSED, *detect.FAMILIES))
    config = Phi3Config(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, pad_token_id=0
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return cp.open_model(AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval())


def test_gate_and_up_that_are_fused_are_told_apart(phi3):
    assert phi3.family.name == "phi3"
    for name in ("mlp_pre", "mlp_gate", "mlp_post"):
        assert prove(phi3, name).failure is None
    batch = random_pairs(0).batch("clean", [0])
    sites = [Site(name, 1, 7) for name in ("mlp_pre", "mlp_gate", "mlp_post")]
    run = capture(phi3, batch, sites)
    pre, gate, post = map(run.value, sites)
    torch.testing.assert_close(torch.nn.functional.silu(gate) * pre, post)
    fused = run.tensors[phi3.tap(sites[0]).port]
    assert torch.equal(gate, fused[..., 7])
    assert torch.equal(pre, fused[..., 48 + 7])


def test_a_table_that_has_gate_and_up_the_wrong_way_round_is_refused(monkeypatch, phi3):
    module = phi3.module
    turned = {"mlp_pre": FUSED.sites["mlp_gate"], "mlp_gate": FUSED.sites["mlp_pre"]}
    monkeypatch.setattr(detect, "FAMILIES", (replace(FUSED, sites={**FUSED.sites, **turned}),))
    model = cp.open_model(module)
    assert prove(model, "mlp_gate").failure.startswith("algebra: mlp_post.0.0 from mlp_gate and mlp_pre is off by")


def test_sites_whose_modules_are_not_there_are_refused_and_the_rest_of_the_family_stays():
    module = tiny_model("llama")
    for layer in module.model.layers:
        layer.mlp.both = torch.nn.Linear(2, 2)
    mlp = type(module.model.layers[1].mlp)

    class Renamed(mlp):
        def forward(self, x):
            return self.down_proj(self.act_fn(self.w1(x)) * self.w3(x))

    one = module.model.layers[1].mlp
    one.w1, one.w3 = one.gate_proj, one.up_proj
    del one.gate_proj, one.up_proj
    one.__class__ = Renamed
    model = cp.open_model(module)
    assert model.family.name == "llama"
    assert model.shape.refused["mlp_pre"] == "there is no module model.layers.1.mlp.up_proj"
    assert model.shape.refused["mlp_gate"] == "there is no module model.layers.1.mlp.gate_proj"
    assert np.isfinite(cp.Experiment(model, random_pairs(1), show_progress=False).run(["mlp_post.1.3"]).effect()).all()
