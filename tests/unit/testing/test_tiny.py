import pytest
import torch

from causalpatch.base.errors import SettingError
from causalpatch.testing.tiny import FAMILY_NAMES, VOCAB, tiny_model
from parts import PARTS
from tiers import quickly
from worlds import FIRST

torch.set_num_threads(1)


def prompts(rows=3, length=6, seed=0):
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("family", quickly([name for name in FAMILY_NAMES if name != "gemma3n"], *FIRST))
# One narrow head may hardly look at the token.
@pytest.mark.parametrize(("layers", "heads", "seed", "least"), [(1, 1, 0, 1e-4), (2, 4, 1, 1e-2), (3, 6, 2, 1e-2)])
def test_replacing_one_layers_input_has_an_effect_that_is_not_small(family, layers, heads, seed, least):
    module = tiny_model(family, layers=layers, heads=heads, seed=seed)
    stack = module.get_submodule(PARTS[family].body).get_submodule(PARTS[family].layers)
    clean, corrupt = prompts(seed=1), prompts(seed=1)
    corrupt[:, 3] = (corrupt[:, 3] - 3 + 7) % (VOCAB - 3) + 3
    kept, effects = {}, []
    with torch.no_grad():
        hooks = [
            layer.register_forward_pre_hook(lambda part, args, n=n: kept.__setitem__(n, args[0].clone()))
            for n, layer in enumerate(stack)
        ]
        module(clean)
        for hook in hooks:
            hook.remove()
        base = module(corrupt).logits[:, -1]
        for number, layer in enumerate(stack):

            def put(part, args, n=number):
                changed = args[0].clone()
                changed[:, 3] = kept[n][:, 3]
                return (changed, *args[1:])

            hook = layer.register_forward_pre_hook(put)
            effects.append((module(corrupt).logits[:, -1] - base).abs())
            hook.remove()
    assert torch.stack(effects).median() > least * base.std()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_float64_is_float64_throughout(family):
    module, ids = tiny_model(family), prompts()
    with torch.no_grad():
        alone = module(ids[:1]).logits
        nudged = module.get_input_embeddings().weight
        nudged += 1e-11 * torch.randn(nudged.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        moved = (module(ids[:1]).logits - alone).abs().max()
    # In float32 such a nudge would be lost, or jump to 1e-8.
    assert 1e-13 < moved < 5e-9


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_float32_uses_the_unmodified_modules_of_transformers(family):
    module = tiny_model(family, dtype=torch.float32)
    ours = [part for part in module.modules() if type(part).__module__.startswith("causalpatch")]
    assert ours == []
    assert module.config._attn_implementation in ("sdpa", "eager")
    double = tiny_model(family)
    with torch.no_grad():
        a, b = module(prompts()).logits, double(prompts()).logits
    assert (a - b).abs().max() < 1e-3 * b.std()


def test_equal_arguments_give_equal_weights_whatever_was_drawn_before():
    first = tiny_model("llama", seed=4).state_dict()
    torch.rand(3)
    state = torch.random.get_rng_state()
    second = tiny_model("llama", seed=4).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first["model.norm.weight"], tiny_model("llama", seed=5).state_dict()["model.norm.weight"])


def test_heads_that_do_not_divide_and_unknown_families_are_refused():
    with pytest.raises(SettingError, match="3 kv_heads do not fit"):
        tiny_model("llama", heads=4, kv_heads=3)
    with pytest.raises(SettingError, match="2 kv_heads do not fit"):
        tiny_model("gpt2", heads=4, kv_heads=2)
    with pytest.raises(SettingError, match="no tiny model of family 'elmo'"):
        tiny_model("elmo")
