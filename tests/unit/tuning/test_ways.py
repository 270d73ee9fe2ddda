"""Changes run as they do when they are written into weights, and no other weight moves by a bit."""

import numpy as np
import peft
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import causalpatch as cp
from causalpatch.base.errors import IntegrityError, ModelUnsupported
from causalpatch.models import Model
from causalpatch.sites import Site
from causalpatch.testing.tiny import tiny_model
from causalpatch.tuning.low_rank import LowRank
from causalpatch.tuning.parts import parts_of
from causalpatch.tuning.train import Schedule, train
from causalpatch.tuning.tuned import Tuned, digests_outside, load_change, merged_module, require_untouched
from causalpatch.tuning.ways import Offsets, Slices
from causalpatch.tuning.whole import Full
from tunings import prompts, stirred, tiny, tiny_data

IDS = torch.as_tensor(prompts(3, 5))
SITES = [Site("z", 0, 1), Site("z", 1, 2), Site("mlp_post", 0, 3)]
FAMILIES = ("gpt2", "llama", "gpt_neox", "falcon_grouped", "phi3", "bloom", "gemma2")


def logits_of(module):
    with torch.no_grad():
        return module(input_ids=IDS, use_cache=False).logits


def logits_with(way):
    with torch.no_grad(), way.running() as module:
        return logits_of(module)


def slices(model):
    return Slices(model, parts_of(SITES, model))


def offsets(model):
    return Offsets(model, parts_of(SITES, model, outputs_alone=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_slices_run_as_the_merged_weights_do_and_touch_nothing_else(family):
    model = tiny(family, dtype=torch.float64)
    before = {name: each.clone() for name, each in model.module.state_dict().items()}
    way = stirred(slices(model))
    merged = merged_module(way)
    torch.testing.assert_close(logits_with(way), logits_of(merged), rtol=0, atol=1e-9)
    assert (logits_with(way) - logits_of(model.module)).abs().max() > 1e-3
    for name, each in model.module.state_dict().items():
        assert torch.equal(each, before[name])
    assert digests_outside(way, merged) == digests_outside(way, model.module)
    moved = {name for name, each in merged.state_dict().items() if not torch.equal(each, before[name])}
    assert {name.rpartition(".")[0] for name in moved} == set(way.parts.modules)


def test_slices_change_the_rows_and_columns_that_were_written_out_by_hand():
    model = tiny("gpt2")
    way = stirred(Slices(model, parts_of([Site("z", 0, 1)], model)))
    merged = merged_module(way)
    width = 8
    for name, axis, own in (
        ("transformer.h.0.attn.c_attn", 1, [*range(8, 16), *range(40, 48), *range(72, 80)]),
        ("transformer.h.0.attn.c_proj", 0, list(range(width, 2 * width))),
    ):
        changed = merged.get_submodule(name).weight != model.module.get_submodule(name).weight
        places = changed.any(1 - axis).nonzero()[:, 0].tolist()
        assert places == own


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "phi", "opt"])
def test_offsets_folded_into_biases_do_what_they_did(family):
    model = tiny(family, dtype=torch.float64)
    way = stirred(offsets(model))
    merged = merged_module(way)
    torch.testing.assert_close(logits_with(way), logits_of(merged), rtol=0, atol=1e-9)
    assert digests_outside(way, merged) == digests_outside(way, model.module)


def test_offsets_of_a_model_without_biases_get_them_by_its_configuration_or_are_kept_beside_it(tmp_path):
    llama = tiny("llama", dtype=torch.float64)
    way = stirred(offsets(llama))
    merged = merged_module(way)
    assert merged.config.attention_bias
    assert merged.config.mlp_bias
    # The tiny model's norms compute in float64, those of a model made anew in float32.
    torch.testing.assert_close(logits_with(way), logits_of(merged), rtol=1e-5, atol=1e-5)
    qwen = tiny("qwen2")
    way = stirred(offsets(qwen))
    with pytest.raises(ModelUnsupported, match="cannot be folded into weights"):
        merged_module(way)
    tuned = Tuned(qwen, way, trained(way), ())
    again = load_change(tuned.save_change(tmp_path), qwen)
    assert torch.equal(logits_with(again), logits_with(way))


def trained(way, **how):
    return train(way, tiny_data(), Schedule(steps=2, every=1, **how), rate=0.01, seed=0)


def test_all_weights_stand_in_for_the_models_own_ones_and_leave():
    model = tiny("gpt2")
    assert model.module.lm_head.weight is model.module.transformer.wte.weight
    before, own = logits_of(model.module), dict(model.module.named_parameters())
    way = stirred(Full(model))
    with way.running() as module:
        assert module.lm_head.weight is module.transformer.wte.weight
    assert not torch.equal(logits_with(way), before)
    assert torch.equal(logits_of(model.module), before)
    assert dict(model.module.named_parameters()).items() == own.items()
    torch.testing.assert_close(logits_with(way), logits_of(merged_module(way)))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_saved_adapter_is_read_by_peft_and_a_merged_model_by_transformers(family, tmp_path):
    model = tiny(family)
    parts = parts_of([*SITES, Site("z", 1, 3)], model)
    way = stirred(LowRank(model, parts, rank=4), size=0.05)
    assert set(way.ranks) == set(parts.modules)
    assert min(way.ranks.values()) == 1
    assert max(way.ranks.values()) == 4
    wanted = logits_with(way)
    assert (wanted - logits_of(model.module)).abs().max() > 1e-3
    tuned = Tuned(model, way, trained(stirred(slices(model))), ())
    tuned.save_adapter(tmp_path / "adapter")
    stock = peft.PeftModel.from_pretrained(tiny(family).module, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits_of(stock), wanted, rtol=1e-5, atol=1e-5)
    tuned.save(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(read), wanted, rtol=1e-5, atol=1e-5)
    assert all(each.requires_grad for each in model.module.parameters())
    assert not any("lora" in name for name, _ in model.module.named_modules())


@pytest.mark.parametrize("kind", [slices, offsets])
def test_a_merged_checkpoint_and_a_kept_change_give_the_tuned_outputs(kind, tmp_path):
    model = tiny("gpt2")
    way = stirred(kind(model))
    tuned = Tuned(model, way, trained(kind(model)), ())
    tuned.save(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits_of(read), logits_with(way), rtol=1e-5, atol=1e-5)
    opened = cp.open_model(tmp_path / "merged")
    torch.testing.assert_close(logits_of(opened.module), logits_with(way), rtol=1e-5, atol=1e-5)
    again = load_change(tuned.save_change(tmp_path / "change"), model)
    assert torch.equal(logits_with(again), logits_with(way))
    with pytest.raises(ModelUnsupported, match="is of another model"):
        load_change(tmp_path / "change", tiny("gpt2", seed=3))


def test_quantised_weights_take_offsets_and_no_slices():
    module = tiny_model("gpt2", dtype=torch.float32)
    module.transformer.h[0].attn.c_proj = InEightBits(module.transformer.h[0].attn.c_proj)
    model = Model(module, name="quantised")
    with pytest.raises(ModelUnsupported) as caught:
        Slices(model, parts_of([Site("z", 0, 1)], model))
    assert "cannot change the weights of 'transformer.h.0.attn.c_proj'" in str(caught.value)
    assert "not a plain linear map" in str(caught.value)
    way = stirred(Offsets(model, parts_of([Site("z", 0, 1)], model, outputs_alone=True)))
    assert (logits_with(way) - logits_of(module)).abs().max() > 1e-4


class InEightBits(nn.Module):
    """A projection whose weights are whole numbers times a scale, as quantisation leaves them."""

    def __init__(self, projection):
        super().__init__()
        weight = projection.weight.detach().T
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))
        self.bias = projection.bias
        self.in_features, self.out_features = weight.shape[1], weight.shape[0]

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


def test_a_weight_that_moved_outside_the_parts_is_found_by_its_hash():
    model = tiny("llama")
    way = stirred(slices(model))
    merged = merged_module(way)
    with torch.no_grad():
        merged.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    with pytest.raises(IntegrityError, match=r"outside the located parts changed, the first is 'model\.layers\.1"):
        require_untouched(way, merged)


def test_the_optimizer_holds_a_state_for_what_is_trained_alone():
    model = tiny("gpt2")
    way = slices(model)
    assert way.n_trained == way.parts.n_weights(model.module)
    assert way.n_trained < 0.2 * sum(each.numel() for each in model.module.parameters())
    assert np.isclose(sum(each.numel() for each in way.trained().values()), way.n_trained)


def test_all_weights_are_trained_in_float32_where_the_model_has_fewer_bits():
    model = tiny("gpt2", dtype=torch.bfloat16)
    way = Full(model)
    assert {each.dtype for each in way.trained().values()} == {torch.float32}
    assert torch.equal(logits_with(way), logits_of(model.module))
    small = 2**-12  # too little for one weight of bfloat16, and not for the sum of sixteen steps
    name = "transformer.h.0.attn.c_attn.weight"
    with torch.no_grad():
        for _ in range(16):
            way.trained()[name].mul_(1 + small)
    assert not torch.equal(logits_with(way), logits_of(model.module))
    with way.running() as module:
        loss = module(input_ids=IDS, use_cache=False).logits.float().square().mean()
    (grad,) = torch.autograd.grad(loss, [way.trained()[name]])
    assert grad.dtype == torch.float32
    assert float(grad.abs().max()) > 0
    merged = merged_module(way)
    assert {each.dtype for each in merged.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(merged), logits_with(way))


def test_a_bias_of_zeros_moves_by_its_weights_size():
    model = tiny("gpt2")
    with torch.no_grad():
        model.module.transformer.h[0].mlp.c_fc.bias.zero_()
        model.module.transformer.h[0].ln_1.bias.zero_()
    sizes = Full(model).sizes()
    of = "transformer.h.0"
    assert sizes[f"{of}.mlp.c_fc.bias"] == sizes[f"{of}.mlp.c_fc.weight"]
    assert sizes[f"{of}.ln_1.bias"] == sizes[f"{of}.ln_1.weight"]
    assert sizes[f"{of}.mlp.c_proj.bias"] != sizes[f"{of}.mlp.c_proj.weight"]


def test_a_merged_model_draws_no_random_numbers():
    model, data = tiny("llama"), tiny_data()
    tuned = cp.tune(model, ["z.0.1"], data, way="offset", schedule=Schedule(steps=2, rates=(0.03,)))
    before = torch.random.get_rng_state()
    tuned.model()
    assert torch.equal(torch.random.get_rng_state(), before)
