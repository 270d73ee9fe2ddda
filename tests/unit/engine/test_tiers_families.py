"""Families that have no table of their own yet: whatever tier takes them, the numbers are the reference's."""

import numpy as np
import pytest
import torch
import transformers as hf

import causalpatch as cp
from causalpatch.testing.tiny import VOCAB
from tiers import assert_agree, quickly, run_model, run_unless_refused, tier_of
from worlds import random_pairs

SIZE = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SIZE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0}
SIZE |= {"bos_token_id": 1, "eos_token_id": 2}
OLD = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "rotary_dim": 4}
OLD |= {"bos_token_id": 1, "eos_token_id": 2}
# Traits: multipliers, norms on both sides, one key for all heads, parallel blocks, learned positions, experts.
CONFIGS = {
    "granitemoe": lambda: hf.GraniteMoeConfig(
        **SIZE, residual_multiplier=0.6, embedding_multiplier=2.0, logits_scaling=3.0, num_local_experts=4
    ),
    "glm4": lambda: hf.Glm4Config(**SIZE, head_dim=8),
    "diffllama": lambda: hf.DiffLlamaConfig(**SIZE),
    "codegen": lambda: hf.CodeGenConfig(**OLD),
    "gpt_bigcode": lambda: hf.GPTBigCodeConfig(**OLD, multi_query=False),
    "persimmon": lambda: hf.PersimmonConfig(**(SIZE | {"num_key_value_heads": 4})),
    "biogpt": lambda: hf.BioGptConfig(**SIZE),
    "lfm2": lambda: hf.Lfm2Config(**SIZE),
    "bloom": lambda: hf.BloomConfig(**OLD, hidden_size=32, apply_residual_connection_post_layernorm=True),
}
PAIRS = random_pairs(51, 3, "equal", prefix=1 / 3)


def pairs_for(name):
    """Return prompts of one length where a model cannot be told of padding."""
    return PAIRS.take([0]) if name == "bloom" else PAIRS


def build(name):
    """Build a random model on which a patch has a real effect."""
    module = hf.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.3 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            parameter.add_(3 * scale * torch.randn(parameter.shape, generator=draw))
    return module


def layers_of(module):
    """Return the paths of the layers."""
    stacks = [path for path, part in module.named_modules() if isinstance(part, torch.nn.ModuleList) and len(part) == 2]
    return [f"{stacks[0]}.{number}" for number in range(2)]


def patches_of(module):
    first, second = layers_of(module)
    sites = [f"module({second}).input@-1", f"module({first}).output@1", f"module({first}).output"]
    return [*sites, cp.Patch(sites[0], "zero"), cp.Patch(sites[1], 0.5), [sites[1], sites[0]]]


@pytest.mark.parametrize("name", quickly(list(CONFIGS), "codegen"))
def test_a_family_without_a_table_is_measured_as_the_reference_measures_it(name):
    module = build(name)
    model = cp.open_model(module)
    patches = patches_of(module)
    wanted = run_model("reference", model, pairs_for(name), patches, metric=[cp.logit_difference, cp.log_probability])
    assert np.abs(wanted.metric("logit_difference").effect(per_pair=True).values).max() > 1e-2
    got = run_model("auto", model, pairs_for(name), patches, metric=[cp.logit_difference, cp.log_probability])
    assert_agree(got, wanted, tolerance=1e-4)
    assert got.provenance["engine"]["reason"] or tier_of(got) == "wavefront"


@pytest.mark.parametrize("engine", ["wavefront", "restart", "rows"])
@pytest.mark.parametrize("name", quickly(list(CONFIGS), "granitemoe", "codegen", "glm4"))
def test_an_engine_takes_a_family_without_a_table_and_is_right_or_refuses_it(name, engine):
    module = build(name)
    model = cp.open_model(module)
    patches = patches_of(module)
    got = run_unless_refused(engine, model, pairs_for(name), patches)
    assert got is not None or engine != "rows"
    if got is None:
        return
    assert tier_of(got) == engine
    assert_agree(got, run_model("reference", model, pairs_for(name), patches), tolerance=1e-4)
