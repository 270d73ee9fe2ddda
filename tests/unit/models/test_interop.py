"""Other libraries' models: the module inside is taken, its weights are shared, and nothing of theirs is imported."""

import copy
import importlib.util
import sys

import numpy as np
import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import CausalPatchWarning, ModelUnsupported
from causalpatch.testing.tiny import tiny_model
from toys import prompts

PAIRS = prompts(([3, 4, 5], [3, 9, 5]), ([8, 4, 1, 2], [2, 4, 6, 2]))


def of(package, name, bases=(object,), **attributes):
    """Make an object whose class says that it comes from a package."""
    made = type(name, bases, {"__module__": f"{package}.models"})()
    vars(made).update(attributes)
    return made


def effects(model):
    return cp.sweep(cp.Experiment(model, PAIRS), "z").effect().values


class Wrapper(nn.Module):
    """What a bridge puts around a part: hook points beside it, the part inside."""

    def __init__(self, part):
        super().__init__()
        self.hook_in, self.hook_out = nn.Identity(), nn.Identity()
        self.add_module("_original_component", part)

    def forward(self, *args, **kwargs):
        return self.hook_out(self._original_component(*args, **kwargs))


def wrap(module):
    """Put wrappers around parts in place, in several depths, as a bridge does."""
    for layer in range(len(module.transformer.h)):
        block = module.transformer.h[layer]
        block.attn.c_proj = Wrapper(block.attn.c_proj)
        block.attn, block.mlp = Wrapper(block.attn), Wrapper(block.mlp)
        module.transformer.h[layer] = Wrapper(block)
    module.transformer.ln_f = Wrapper(module.transformer.ln_f)
    return module


def test_the_module_inside_is_opened_with_its_tokenizer():
    module = tiny_model("gpt2")
    wanted = effects(cp.open_model(module))
    inside = [of("nnsight", "NNsight", _module=module), of("pyvene", "IntervenableModel", model=module)]
    for each in inside:
        model = cp.open_model(each)
        assert model.module is module
        assert model.family.name == "gpt2"
        assert np.array_equal(effects(model), wanted)
    with pytest.raises(cp.RequestError, match="not a tokenizer"):
        cp.open_model(of("nnsight", "LanguageModel", _module=module, tokenizer=3))


def test_parts_are_taken_out_of_a_bridge_s_wrappers_and_the_bridge_stays_as_it_was():
    module = tiny_model("gpt2")
    names = [name for name, _ in module.named_modules()]
    wanted = effects(cp.open_model(copy.deepcopy(module)))
    bridge = of("transformer_lens", "TransformerBridge", original_model=wrap(module))
    before = [name for name, _ in module.named_modules()]
    model = cp.open_model(bridge)
    assert [name for name, _ in model.module.named_modules()] == names
    assert model.family.name == "gpt2"
    assert np.array_equal(effects(model), wanted)
    assert [name for name, _ in module.named_modules()] == before
    assert not any(part._forward_hooks for part in module.modules())
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        module.lm_head.weight.mul_(2.0)  # weights are one, whoever changes them
        assert torch.equal(model.module(ids).logits, module(ids).logits)


def test_weights_that_were_folded_or_not_loaded_are_refused():
    bridge = of("transformer_lens", "TransformerBridge", original_model=tiny_model("gpt2"), _weights_processed=True)
    with pytest.raises(ModelUnsupported, match="were processed"):
        cp.open_model(bridge)
    with torch.device("meta"):
        empty = nn.Linear(2, 2)
    with pytest.raises(ModelUnsupported, match="no weights yet"):
        cp.open_model(of("nnsight", "LanguageModel", _module=empty))
    with pytest.raises(ModelUnsupported, match="holds no module"):
        cp.open_model(of("nnsight", "Envoy"))


def test_a_model_that_computes_by_itself_opens_as_generic_and_says_so():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.unembed = nn.Embedding(40, 4), nn.Linear(4, 40)

        def forward(self, tokens):
            return self.unembed(self.embed(tokens))

    Hooked.__module__ = "transformer_lens.HookedTransformer"
    with pytest.warns(CausalPatchWarning, match="holds no Hugging Face module"):
        model = cp.open_model(Hooked())
    assert model.family is None


def test_nothing_of_theirs_is_imported():
    cp.open_model(of("nnsight", "NNsight", _module=tiny_model("gpt2")))
    assert not {"nnsight", "pyvene", "transformer_lens"} & set(sys.modules)


@pytest.mark.skipif(importlib.util.find_spec("nnsight") is None, reason="nnsight is not installed")
def test_a_model_of_nnsight_itself():
    nnsight = pytest.importorskip("nnsight")
    module = tiny_model("gpt2")
    wanted = effects(cp.open_model(copy.deepcopy(module)))
    assert np.array_equal(effects(cp.open_model(nnsight.NNsight(module))), wanted)


@pytest.mark.skipif(importlib.util.find_spec("pyvene") is None, reason="pyvene is not installed")
def test_a_model_of_pyvene_itself():
    pyvene = pytest.importorskip("pyvene")
    module = tiny_model("gpt2")
    wanted = effects(cp.open_model(copy.deepcopy(module)))
    config = pyvene.IntervenableConfig(
        [pyvene.RepresentationConfig(0, "block_output")], intervention_types=pyvene.VanillaIntervention
    )
    assert np.array_equal(effects(cp.open_model(pyvene.IntervenableModel(config, module))), wanted)
