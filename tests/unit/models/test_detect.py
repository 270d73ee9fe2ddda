import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconConfig,
    FalconMambaConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForSequenceClassification,
    Olmo3Config,
    OlmoConfig,
    OlmoForCausalLM,
    OPTConfig,
    XGLMConfig,
    XGLMForCausalLM,
)

from causalpatch.base.errors import SiteUnsupported
from causalpatch.engine import prove
from causalpatch.models import open_model
from causalpatch.sites import NAMES, parse
from causalpatch.testing.tiny import tiny_model

NUMBERS = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_wrapped_model_keeps_its_family_below_the_wrapper():
    inner = tiny_model("llama")
    model = open_model(Wrapper(Wrapper(inner)))
    assert model.family.name == "llama"
    assert model.tap(parse("z.1.2")).port.path == "inner.inner.model.layers.1.self_attn.o_proj"
    assert model.tap(parse("logits")).port.path == "inner.inner"
    ids = torch.tensor([[3, 4, 5]])
    called = model.inputs(ids, torch.ones(1, 3).bool(), torch.arange(3)[None])
    assert sorted(called) == ["attention_mask", "input_ids", "position_ids", "use_cache"]
    with torch.no_grad():
        assert torch.equal(model.logits(model.module(**called)), inner(ids).logits)


def test_a_model_without_its_head_has_every_site_but_the_logits():
    model = open_model(tiny_model("gpt2").transformer)
    assert model.family.name == "gpt2"
    assert model.tap(parse("resid_pre.1")).port.path == "h.1"
    with pytest.raises(SiteUnsupported, match="no head"):
        model.tap(parse("logits"))


def test_a_classifier_on_top_has_no_logits_of_tokens():
    config = tiny_model("llama").config
    model = open_model(LlamaForSequenceClassification(config))
    assert model.family.name == "llama"
    assert "logits" in model.shape.refused
    assert "z" not in model.shape.refused


def test_a_model_in_which_all_names_match_is_taken_over_and_marked():
    model = open_model(OlmoForCausalLM(OlmoConfig(**NUMBERS)))
    assert model.is_assumed
    assert model.family_note == "llama: assumed, all 12 names match"


def test_a_scale_on_what_is_added_to_the_stream_stands_against_equal_names():
    module = GraniteForCausalLM(GraniteConfig(**NUMBERS, residual_multiplier=0.5))
    assert open_model(module).family.name == "granite"
    module.config.model_type = "marble"
    model = open_model(module)
    assert model.family is None
    with pytest.raises(SiteUnsupported, match=r"12 of 12 names match llama, but residual_multiplier is 0\.5"):
        model.tap(parse("attn_out.0"))


def test_a_weight_of_the_layers_own_stands_against_equal_names():
    module = OlmoForCausalLM(OlmoConfig(**NUMBERS))
    module.model.layers[0].scale = nn.Parameter(torch.ones(16))
    assert "a layer also has 'scale'" in open_model(module).family_note


def test_a_module_between_the_known_ones_stands_against_equal_names():
    module = OlmoForCausalLM(OlmoConfig(**NUMBERS))
    module.model.layers[0].adapter = nn.Linear(16, 16)
    assert "a layer also has 'adapter'" in open_model(module).family_note


def test_a_resembling_model_is_generic_and_the_closest_family_is_named():
    model = open_model(
        XGLMForCausalLM(XGLMConfig(vocab_size=40, d_model=16, ffn_dim=32, num_layers=2, attention_heads=4))
    )
    assert model.family is None
    assert model.family_note == "no known family; 6 of 11 names match phi"
    assert model.shape.n_layers == 0


def test_names_alone_do_not_make_a_mixture_of_experts_or_a_model_that_adds_the_stream_inside():
    for family in ("mixtral", "bloom", "opt"):
        module = tiny_model(family)
        module.config.model_type = "other"
        assert open_model(module).family is None


@pytest.mark.parametrize(
    ("config", "family"),
    [
        (Olmo3Config(**NUMBERS, sliding_window=4), "olmo2"),
        (FalconMambaConfig(vocab_size=40, hidden_size=16, state_size=4, num_hidden_layers=2), "mamba"),
        (
            BambaConfig(
                **NUMBERS,
                attn_layer_indices=[1],
                mamba_n_heads=4,
                mamba_d_head=8,
                mamba_d_state=4,
                num_key_value_heads=2,
            ),
            "jamba",
        ),
        (FalconConfig(**NUMBERS, new_decoder_architecture=True), "falcon_grouped"),
        (OPTConfig(**NUMBERS, ffn_dim=32, word_embed_proj_dim=8, do_layer_norm_before=False), "opt_post_norm"),
    ],
)
def test_models_of_one_table_with_another_have_all_its_sites(config, family):
    model = open_model(AutoModelForCausalLM.from_config(config).eval())
    assert model.family.name == family
    assert model.family_source == "config"
    for name in (name for name in NAMES if name != "module" and name not in model.shape.refused):
        assert prove(model, name).failure is None


def test_variants_that_no_table_covers_are_generic_and_say_which_comes_closest():
    falcon = FalconConfig(**NUMBERS, multi_query=True, parallel_attn=False)
    model = open_model(AutoModelForCausalLM.from_config(falcon))
    assert model.family is None
    assert "names match" in model.family_note


def test_names_without_a_configuration_do_not_say_how_many_heads_there_are():
    module = tiny_model("llama").model
    bare = nn.Module()
    for name, child in module.named_children():
        bare.add_module(name, child)
    for part in bare.modules():
        part.__dict__.pop("config", None)
    model = open_model(bare)
    assert model.family is None
    assert "no configuration gives hidden_size and num_attention_heads" in model.family_note


def test_a_configuration_that_does_not_fit_the_weights_is_not_believed():
    module = tiny_model("llama", heads=4, kv_heads=2)
    module.config.num_key_value_heads = 4
    model = open_model(module)
    assert model.family is None
    assert "k comes in 16 columns where 32 were expected" in model.family_note


def test_a_configuration_whose_modules_were_renamed_is_not_believed():
    module = tiny_model("llama")
    attention = module.model.layers[1].self_attn
    attention.out = attention.o_proj
    del attention.o_proj
    model = open_model(module)
    assert model.family is None
    assert "there is no module 'model.layers.1.self_attn.o_proj'" in model.family_note


def test_an_output_projection_of_another_kind_refuses_the_shares_of_heads_alone():
    class Adapted(nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base, self.in_features, self.out_features = base, base.in_features, base.out_features

        def forward(self, x):
            return self.base(x)

    module = tiny_model("llama")
    attention = module.model.layers[0].self_attn
    attention.o_proj = Adapted(attention.o_proj)
    model = open_model(module)
    assert model.tap(parse("z.0.1")).port.path == "model.layers.0.self_attn.o_proj"
    with pytest.raises(SiteUnsupported, match=r"is tests\.unit\.models\.test_detect\.Adapted, not a plain linear map;"):
        model.tap(parse("head_out.0.1"))
