"""A second model of the same shape makes the source runs; what differs in shape is refused by name."""

import copy

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, SettingError
from toys import prompts
from worlds import tiny_world, unchecked

PAIRS = prompts(([3, 4, 5], [3, 9, 5]), ([8, 4, 1, 2], [2, 4, 6, 2]))


def damaged(model, layer):
    module = copy.deepcopy(model.module)
    module.model.layers[layer].mlp.down_proj.weight.data.mul_(-2.0)
    return cp.open_model(module)


@pytest.mark.parametrize("layer", [0, 1])
def test_a_sweep_finds_the_layer_whose_weights_were_changed(layer):
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    hunt = cp.Experiment(damaged(model, layer), PAIRS.one_sided("clean"), source_model=model)
    effects = cp.sweep(hunt, "mlp_out", "layer")
    share = effects.recovered()
    assert int(share.values.argmax()) == layer
    assert abs(float(share[layer]) - 1) < 1e-9 or layer == 0  # behind layer 0 the other MLP still has its own input
    stream = cp.sweep(hunt, "resid_post@-1", "layer").effect(per_pair=True)
    for number in range(layer):
        assert np.abs(stream[number]).max() < 1e-12


def test_the_record_and_the_baseline_say_whose_run_is_whose():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    other = damaged(model, 1)
    other.name = "older"
    denoise = cp.Experiment(model, PAIRS, source_model=other)
    assert denoise.baseline.models == ("older", model.name)
    assert str(denoise.baseline).splitlines()[0] == f"clean runs of 'older', corrupted runs of '{model.name}'"
    assert denoise.turned("noise").baseline.models == (model.name, "older")
    record = denoise.run(["z.0.1"]).provenance
    assert record["source_model"] == {"name": "older", "hash": other.content_hash}
    assert cp.Experiment(model, PAIRS).baseline.models == ()


def test_paths_begin_at_the_other_model_s_senders():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    other = damaged(model, 0)
    same = PAIRS.one_sided("clean")
    direct = cp.direct_effect(cp.Experiment(model, same, source_model=other), ["mlp_out.0", "head_out.0"])
    effect = direct.effect(per_pair=True).values
    assert np.abs(effect[0]).max() > 1e-6
    assert np.abs(effect[1:]).max() < 1e-12  # heads of layer 0 come before what was changed


def test_other_shapes_are_refused_by_name():
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    for shape, text in [((3, 4, 2, 0), "layers"), ((2, 2, 2, 0), "weight")]:
        with pytest.raises(ModelUnsupported, match=text):
            cp.Experiment(model, PAIRS, source_model=tiny_world("llama", shape)[0])
    with pytest.raises(ModelUnsupported, match="family"):
        cp.Experiment(model, PAIRS, source_model=tiny_world("gpt2", (2, 4, 2, 0))[0])
    with pytest.raises(SettingError, match="dtype"):
        cp.Experiment(model, PAIRS, source_model=cp.open_model(copy.deepcopy(model.module).float()))
    with unchecked(), pytest.raises(SettingError, match="no opened model"):
        cp.Experiment(model, PAIRS, source_model=model.module)
