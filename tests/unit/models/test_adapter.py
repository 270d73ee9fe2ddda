import numpy as np
import pytest
import torch
from torch import nn

from causalpatch.base.errors import ModelUnsupported, SiteNotFound, SiteUnsupported
from causalpatch.models import open_model
from causalpatch.sites import NAMES, parse
from causalpatch.sites.names import CROSS_SITES
from causalpatch.testing.tiny import tiny_model

IDS = np.array([[3, 4, 5], [6, 7, 0]])
MASK = np.array([[True, True, True], [True, True, False]])
PLACES = np.array([[0, 1, 2], [0, 1, 0]])


class Words(nn.Module):
    """A small custom model of tokens whose forward knows ids alone."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.out = nn.Linear(4, 9)

    def forward(self, idx):
        return {"logits": self.out(self.embedding(idx))}


def test_the_counts_of_a_model_are_those_of_its_modules():
    model = open_model(tiny_model("qwen2", layers=3, heads=4, kv_heads=1))
    assert model.shape.n_layers == 3
    assert dict(model.shape.units) == {"head": 4, "kv_head": 1, "neuron": 96}
    assert (model.width, model.head_width, model.vocab_size) == (32, 8, 40)
    assert (model.dtype, model.device, model.attention) == (torch.float64, torch.device("cpu"), "sdpa")
    assert (model.kind, model.tokenizer, model.name) == ("tokens", None, "Qwen2ForCausalLM")
    assert repr(model) == "Model('Qwen2ForCausalLM', qwen2, 3 layers, torch.float64, cpu)"


def test_a_layer_a_head_or_a_kv_head_that_is_not_there_is_refused():
    model = open_model(tiny_model("llama", heads=4, kv_heads=2))
    with pytest.raises(SiteNotFound, match="this model has heads 0 to 3"):
        model.tap(parse("z.0.4"))
    with pytest.raises(SiteNotFound, match="3 is served by kv_head 1"):
        model.tap(parse("k.0.3"))
    with pytest.raises(SiteNotFound, match="this model has layers 0 to 1"):
        model.tap(parse("resid_pre.2"))
    with pytest.raises(SiteUnsupported, match="encoder"):
        model.tap(parse("encoder/resid_pre.0"))


def test_the_inputs_of_a_known_family_carry_mask_and_position_ids():
    called = open_model(tiny_model("llama")).inputs(IDS, MASK, PLACES)
    assert sorted(called) == ["attention_mask", "input_ids", "position_ids", "use_cache"]
    assert called["use_cache"] is False
    assert called["attention_mask"].tolist() == MASK.astype(int).tolist()
    assert called["position_ids"].tolist() == PLACES.tolist()
    assert called["input_ids"].dtype == torch.int64


def test_padding_on_either_side_changes_nothing():
    model = open_model(tiny_model("llama", seed=1))
    alone = model.logits(model.module(**model.inputs(IDS[1:, :2])))
    right = model.logits(model.module(**model.inputs(IDS, MASK, PLACES)))[1:, :2]
    left = model.inputs(np.array([[3, 4, 5], [0, 6, 7]]), MASK[:, ::-1].copy(), np.array([[0, 1, 2], [0, 0, 1]]))
    left = model.logits(model.module(**left))[1:, 1:]
    assert (alone - right).abs().max() < 1e-12
    assert (alone - left).abs().max() < 1e-12


def test_a_forward_that_takes_no_mask_is_called_with_ids_alone():
    model = open_model(Words())
    called = model.inputs(IDS, np.ones_like(MASK), np.arange(3)[None].repeat(2, 0))
    assert list(called) == ["idx"]
    assert model.logits(model.module(**called)).shape == (2, 3, 9)


def test_padded_rows_are_refused_where_the_forward_takes_no_mask():
    with pytest.raises(ModelUnsupported) as refusal:
        open_model(Words()).inputs(IDS, MASK, PLACES)
    assert str(refusal.value) == (
        "'Words' cannot run prompts of unequal length together\n"
        "  forward  takes idx\n"
        "  padding  needs attention_mask\n"
        "  fix: give prompts of one length, or wrap the model in a forward that takes attention_mask"
    )


def test_arrays_become_the_models_dtype_unless_the_model_embeds_whole_numbers():
    model = open_model(nn.Linear(3, 2).double())
    assert model.inputs_of_arrays(IDS.astype(np.uint8))["input"].dtype == torch.float64
    assert open_model(Words()).inputs_of_arrays(IDS)["idx"].dtype == torch.int64


def test_a_forward_without_a_named_input_is_refused():
    class Anything(nn.Module):
        def forward(self, *parts):
            return parts[0]

    with pytest.raises(ModelUnsupported, match="names no argument for the input"):
        open_model(Anything()).inputs_of_arrays(np.zeros((1, 2)))


def test_the_answer_is_found_in_every_kind_of_output():
    model = open_model(Words())
    tensor = torch.ones(1, 2)
    outputs = (tensor, (tensor, None), [tensor], {"logits": tensor, "loss": None}, {"last_hidden_state": tensor})
    assert all(model.logits(output) is tensor for output in outputs)
    with pytest.raises(ModelUnsupported, match="holds no logits"):
        model.logits({"loss": tensor})


def test_the_hash_follows_the_weights_and_nothing_else():
    first, second = (open_model(tiny_model("llama", seed=2)) for _ in range(2))
    assert first.content_hash == second.content_hash
    assert first.content_hash != open_model(tiny_model("llama", seed=3)).content_hash
    before = second.content_hash
    with torch.no_grad():
        second.module.model.norm.weight[0] += 1
    assert second.content_hash != before
    with torch.no_grad():
        second.module.model.norm.weight.copy_(first.module.model.norm.weight)
    assert second.content_hash == before


def test_the_table_of_sites_has_a_row_for_every_name():
    rows = {row.name: row for row in open_model(tiny_model("gpt_neox")).site_rows()}
    assert list(rows) == [*(name for name in list(NAMES)[:-1] if name not in CROSS_SITES), "module(PATH)"]
    assert rows["z"] == ("z", "layer head position head_width", "2 x 4 x position x 8", None)
    assert rows["logits"].shape == "position x 40"
    assert rows["resid_mid"].shape == ""
    assert "parallel" in rows["resid_mid"].refused


def test_opening_a_module_changes_neither_its_mode_nor_its_hooks():
    module = tiny_model("gpt2").train()
    module.transformer.register_forward_hook(lambda *_: None)
    open_model(module)
    assert all(part.training for part in module.modules())
    assert [len(part._forward_hooks) for part in module.modules() if part._forward_hooks] == [1]
