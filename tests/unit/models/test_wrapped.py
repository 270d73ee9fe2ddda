"""Models as they stand in practice: with adapters, spread over devices, in few bits."""

import numpy as np
import pytest
import torch
from accelerate import dispatch_model
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, SiteUnsupported
from causalpatch.testing.tiny import tiny_model
from tiers import TIERS, assert_agree, quickly, run_model
from worlds import numbers, random_pairs

PAIRS = random_pairs(3, 4)
SITES = ["embed@1", "resid_pre.1@-1", "z.1.1", "mlp_post.1.3@-1", "v.1.0", "pattern.1.2", "mlp_pre.0.3"]
ADAPTED = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "v_proj", "o_proj", "down_proj"],
    "gemma2": ["q_proj", "o_proj", "down_proj"],
    "gpt_neox": ["query_key_value", "dense", "dense_4h_to_h"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj"],
}
METRICS = [cp.log_probability, cp.logit_difference]


def lora(family: str = "llama", **settings: object) -> nn.Module:
    config = LoraConfig(r=2, target_modules=ADAPTED[family], init_lora_weights=False, **settings)
    return get_peft_model(tiny_model(family, layers=3), config).double().eval()


def agree(model, sites=SITES):
    wanted = run_model("reference", model, PAIRS, sites, metric=METRICS)
    for tier in (*TIERS, "auto"):
        assert_agree(run_model(tier, model, PAIRS, sites, metric=METRICS), wanted)
    return numbers(wanted)


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
@pytest.mark.parametrize("family", quickly(list(ADAPTED), "gpt2", "llama"))
def test_a_model_with_adapters_is_patched_as_it_runs(family):
    adapted = lora(family)
    model = cp.open_model(adapted)
    assert model.family.name == family
    got = agree(model)
    merged = cp.open_model(adapted.merge_and_unload())
    np.testing.assert_allclose(numbers(run_model("reference", merged, PAIRS, SITES, metric=METRICS)), got, atol=1e-9)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "v_proj"], init_lora_weights=False),
        LoraConfig(r=2, target_modules=["embed_tokens", "lm_head"], init_lora_weights=False),
        LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], init_lora_weights=False),
    ],
    ids=["ia3", "dora", "embedding and head", "head of its own"],
)
@pytest.mark.filterwarnings("ignore")
def test_adapters_of_other_kinds_are_patched_as_they_run(config):
    model = cp.open_model(get_peft_model(tiny_model("llama", layers=3), config).double().eval())
    agree(model, ["embed@1", "resid_pre.1@-1", "z.1.1", "v.1.0"])


def test_an_adapter_that_is_switched_off_between_runs_is_noticed():
    adapted = lora()
    model = cp.open_model(adapted)
    before = numbers(run_model("auto", model, PAIRS, SITES))
    with adapted.disable_adapter():
        without = run_model("auto", model, PAIRS, SITES)
        assert_agree(without, run_model("reference", model, PAIRS, SITES))
    assert np.abs(numbers(without) - before).max() > 1e-3
    assert np.array_equal(numbers(run_model("auto", model, PAIRS, SITES)), before)


def test_head_by_head_an_adapted_projection_is_refused_by_its_kind():
    with pytest.raises(SiteUnsupported, match=r"peft\.tuners\.lora\.layer\.Linear, not a plain linear map"):
        run_model("auto", cp.open_model(lora()), PAIRS, ["head_out.1.1"])


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_adapters_that_put_tokens_before_a_prompt_are_refused(config):
    adapted = get_peft_model(tiny_model("llama"), config(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ModelUnsupported, match="virtual tokens") as error:
        cp.open_model(adapted)
    assert ("tokens", 3) in error.value.facts


def spread(folder, *elsewhere: str) -> nn.Module:
    """Return a model some parts of which lie on disk between runs."""
    parts = ["model.embed_tokens", *(f"model.layers.{layer}" for layer in range(3))]
    parts += ["model.norm", "model.rotary_emb", "lm_head"]
    places = {part: "disk" if part in elsewhere or "all" in elsewhere else "cpu" for part in parts}
    return dispatch_model(
        tiny_model("llama", layers=3), places, main_device="cpu", offload_dir=str(folder), force_hooks=True
    )


@pytest.mark.parametrize("elsewhere", [(), ("model.layers.1", "lm_head"), ("all",)], ids=["none", "some", "all"])
def test_a_model_spread_by_a_device_map_is_the_model(tmp_path, elsewhere):
    whole = cp.open_model(tiny_model("llama", layers=3))
    model = cp.open_model(spread(tmp_path, *elsewhere))
    wanted = run_model("reference", whole, PAIRS, SITES, metric=METRICS)
    for tier in ("wavefront", "restart", "rows", "reference", "auto"):
        assert_agree(run_model(tier, model, PAIRS, SITES, metric=METRICS), wanted)
    assert (model.device, model.dtype) == (whole.device, whole.dtype)
    assert model.content_hash == whole.content_hash


def test_heads_are_refused_where_a_projections_weights_are_elsewhere(tmp_path):
    model = cp.open_model(spread(tmp_path, "model.layers.1"))
    with pytest.raises(SiteUnsupported, match="has its weights elsewhere between runs; use z"):
        run_model("auto", model, PAIRS, ["head_out.0.1"])


class Coded(torch.Tensor):
    """Weights kept as whole numbers and a scale for each row, as libraries of few bits keep them."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.codes.to(x.dtype) * weight.scale, *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes, args[0].scale)
        raise NotImplementedError(f"no {func} of coded weights")


def coded(seed: int = 0) -> nn.Module:
    module = tiny_model("llama", layers=3, seed=seed)
    for part in module.modules():
        if isinstance(part, nn.Linear):
            scale = part.weight.detach().abs().amax(1, keepdim=True) / 127
            codes = (part.weight.detach() / scale).round().to(torch.int8)
            part.weight = nn.Parameter(Coded(codes, scale), requires_grad=False)
    return module


def test_weights_kept_as_codes_are_patched_as_they_run():
    model = cp.open_model(coded())
    wanted = run_model("reference", model, PAIRS, SITES, metric=METRICS)
    for tier in ("wavefront", "restart", "rows", "auto"):
        assert_agree(run_model(tier, model, PAIRS, SITES, metric=METRICS), wanted)
    with pytest.raises(SiteUnsupported, match="weights of a kind of their own, Coded"):
        run_model("auto", model, PAIRS, ["head_out.1.1"])


def test_codes_and_scales_tell_models_apart():
    one, same, other = (cp.open_model(coded(seed)).content_hash for seed in (0, 0, 1))
    assert one == same != other
    model = cp.open_model(coded())
    model.module.lm_head.weight.scale[3] *= 2
    assert cp.open_model(model.module).content_hash != one
