import importlib.util

import pytest
import torch
from torch import nn

from causalpatch.base.errors import SiteNotFound, SiteUnsupported
from causalpatch.models import ModuleUnit, Port, PositionAt, Whole, open_model
from causalpatch.sites import NAMES, parse
from causalpatch.testing.tiny import tiny_model


def small():
    return open_model(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)))


def test_a_plain_module_takes_arrays_and_has_module_sites_only():
    model = small()
    assert (model.kind, model.name, model.family, model.width, model.vocab_size) == ("arrays", "Sequential", None, 0, 0)
    assert set(model.shape.refused) == set(NAMES) - {"module"}
    with pytest.raises(SiteUnsupported, match=r"no known family; use module\(PATH\)\.output, such as module\(0\)"):
        model.tap(parse("z.0.0"))


def test_a_channel_is_a_unit_on_the_first_named_axis():
    tap = small().tap(parse("module(0).output axes=(channel,height,column)#2"))
    assert tap.port == Port("0", "output")
    assert tap.view == ModuleUnit(axis=1, index=2)
    assert not tap.has_position


def test_items_of_an_input_or_output_are_passed_on():
    model = open_model(tiny_model("llama"))
    tap = model.tap(parse('module(model.layers.0.self_attn).input["hidden_states"]'))
    assert tap.port == Port("model.layers.0.self_attn", "input", ("hidden_states",))
    assert model.tap(parse("module(model.layers.0.self_attn).output[0]")).port.items == (0,)


def test_modules_of_a_known_family_count_positions_unless_their_axes_say_not():
    model = open_model(tiny_model("gpt2"))
    assert model.tap(parse("module(transformer.h.0.mlp.act).output")).has_position
    tap = model.tap(parse("module(transformer.h.0.mlp.act).output axes=(position,neuron)#3"))
    assert tap.has_position
    assert tap.view == ModuleUnit(axis=2, index=3)
    assert not model.tap(parse("module(transformer.h.0.mlp.act).output axes=(neuron)")).has_position


def test_positions_are_assumed_only_where_the_site_names_no_axes():
    model = open_model(tiny_model("gpt2"))
    assert model.tap(parse("module(transformer.h.0.attn).output[1]")).assumes_position
    assert not model.tap(parse("module(transformer.h.0.mlp.act).output axes=(position,neuron)")).assumes_position
    assert not model.tap(parse("module(transformer.h.0.mlp.act).output axes=(neuron)")).assumes_position
    assert not model.tap(parse("z.0.1")).assumes_position
    assert not small().tap(parse("module(0).output")).assumes_position


def test_positions_behind_other_axes_are_brought_forward():
    model = open_model(tiny_model("gpt2"))
    tap = model.tap(parse("module(transformer.h.0).output axes=(width,position)#1"))
    assert tap.view == PositionAt(axis=2, view=ModuleUnit(axis=2, index=1))
    x = torch.arange(24).reshape(1, 4, 6)  # axes (row, width, position)
    assert tap.view.read(x, ()).tolist() == [x[0, 1].tolist()]
    whole = model.tap(parse("module(transformer.h.0).output axes=(width,position)"))
    assert whole.view == PositionAt(axis=2, view=Whole())


def test_an_unknown_path_suggests_the_closest():
    with pytest.raises(SiteNotFound, match=r"transformer\.h\.0\.mlp"):
        open_model(tiny_model("gpt2")).tap(parse("module(transformer.h.0.mpl).output"))


def test_the_model_itself_is_a_module():
    assert open_model(tiny_model("gpt2")).tap(parse('module().output["logits"]')).port == Port(
        "", "output", ("logits",)
    )


def load(shared, name):
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), shared / "models" / name / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load(shared / "models" / name)


@pytest.mark.parametrize(
    ("name", "shape", "path", "value"),
    [
        ("mnist-cnn-burn", (1, 28, 28), "conv2", (2, 24, 24)),
        ("resnet20-cifar10", (3, 32, 32), "layer2.0.conv1", (2, 16, 16)),
    ],
)
def test_trained_image_models_open_as_plain_modules(shared, name, shape, path, value):
    model = open_model(load(shared, name))
    assert model.kind == "arrays"
    tap = model.tap(parse(f"module({path}).output axes=(channel,height,column)#5"))
    seen = []
    hook = model.module.get_submodule(path).register_forward_hook(lambda module, args, output: seen.append(output))
    images = (torch.rand(2, *shape) * 255).to(torch.uint8)
    with torch.no_grad():
        logits = model.logits(model.module(**model.inputs_of_arrays(images.numpy())))
    hook.remove()
    assert logits.shape == (2, 10)
    assert tap.view.read(seen[0], ()).shape == value
