"""Folders that hold an adapter: the model that it names is opened with the adapter on it."""

import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model

import causalpatch as cp
from causalpatch.base.errors import ModelNotFound, ModelUnsupported
from causalpatch.testing.tiny import tiny_model


@pytest.fixture
def folders(tmp_path):
    """A saved model, and an adapter of it that was saved beside it, with the adapted model."""
    base = tmp_path / "base"
    tiny_model("llama", dtype=torch.float32).save_pretrained(base)
    module = cp.open_model(str(base), device="cpu").module
    adapted = get_peft_model(module, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    return base, tmp_path / "adapter", adapted


def logits(module):
    with torch.no_grad():
        return module(input_ids=torch.tensor([[3, 9, 5, 7]])).logits.numpy()


def named(adapter, base):
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_opened_on_the_model_that_it_names(folders):
    base, adapter, adapted = folders
    wanted = logits(adapted)
    for name in (str(base), "../base"):
        named(adapter, name)
        model = cp.open_model(str(adapter), device="cpu")
        assert model.name == str(adapter)
        assert model.family.name == "llama"
        np.testing.assert_array_equal(logits(model.module), wanted)
    assert np.abs(logits(cp.open_model(str(base), device="cpu").module) - wanted).max() > 1e-3
    assert cp.open_model(str(adapter), dtype="float64", device="cpu").dtype == torch.float64


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_without_its_model_is_refused(folders, tmp_path):
    _, adapter, _ = folders
    named(adapter, None)
    with pytest.raises(ModelNotFound, match="does not say which model it belongs to"):
        cp.open_model(str(adapter))
    named(adapter, str(tmp_path / "nowhere" / "at" / "all"))
    with pytest.raises(ModelNotFound, match="does not exist"):
        cp.open_model(str(adapter))
    other = tmp_path / "other"
    tiny_model("llama", heads=2, dtype=torch.float32).save_pretrained(other)
    named(adapter, str(other))
    with pytest.raises(ModelNotFound, match="cannot be put on its model"):
        cp.open_model(str(adapter))


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_folder_of_virtual_tokens_is_refused(folders, tmp_path):
    base = folders[0]
    module = cp.open_model(str(base), device="cpu").module
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(module, config).save_pretrained(tmp_path / "tokens")
    named(tmp_path / "tokens", str(base))
    with pytest.raises(ModelUnsupported, match="virtual tokens"):
        cp.open_model(str(tmp_path / "tokens"))
