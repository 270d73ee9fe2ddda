"""Channels, rows and columns of images inside convolutional networks, against raw hooks."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import SettingError, SiteSyntaxError
from toys import vectors

AXES = "axes=(channel,height,column)"
NETWORKS = {
    "resnet20-cifar10": ("layer2.0.conv1", (3, 32, 32), {"channel": 32, "height": 16, "column": 16}),
    "mnist-cnn-burn": ("conv2", (1, 28, 28), {"channel": 16, "height": 24, "column": 24}),
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))).amax((2, 3)))


def trained(shared, name):
    folder = shared / "models" / name
    if not folder.is_dir():
        pytest.skip(f"the model is not there: {folder}")
    spec = importlib.util.spec_from_file_location(name.replace("-", "_"), folder / "model.py")
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    return code.load(folder).eval()


def raw(module, path, pairs, axis, size):
    """Patch each entry of an axis of a module's output by a plain hook; ``(entry, pair)`` of the answer's logit."""
    place = module.get_submodule(path)
    dtype = next(module.parameters()).dtype

    def run(array, hook=None):
        handle = place.register_forward_hook(hook) if hook else None
        with torch.no_grad():
            logits = module(torch.as_tensor(array[None]).to(dtype))[0]
        if handle:
            handle.remove()
        return logits

    found = np.zeros((size, len(pairs)))
    for number, pair in enumerate(pairs):
        kept = []
        run(pair.clean, lambda part, args, output, kept=kept: kept.append(output.clone()))
        for entry in range(size):

            def write(part, args, output, entry=entry, kept=kept):
                changed = output.clone()
                changed.select(axis, entry).copy_(kept[0].select(axis, entry))
                return changed

            found[entry, number] = run(pair.corrupt, write)[pair.answer[0][0]]
    return found


@pytest.fixture
def small():
    torch.manual_seed(0)
    return Small().double().eval()


@pytest.mark.parametrize("engine", ["auto", "graph", "rows", "reference"])
@pytest.mark.parametrize(("axis", "size"), [("channel", 4), ("height", 4), ("column", 4)])
def test_each_entry_of_an_axis_is_patched_as_a_raw_hook_patches_it(small, axis, size, engine):
    pairs = vectors(3, shape=(1, 8, 8), n_classes=5)
    experiment = cp.Experiment(cp.open_model(small), pairs, "answer_logit", engine=engine)
    effects = cp.sweep(experiment, f"module(second).output {AXES}", over=axis)
    assert effects.dims == (axis, "pair")
    number = ["channel", "height", "column"].index(axis) + 1
    wanted = raw(small, "second", pairs, number, size)
    np.testing.assert_allclose(effects.to_xarray()["metric"].values, wanted, atol=1e-10)
    starred = cp.sweep(experiment, f"module(second).output {AXES}#{axis}=*")
    assert starred.dims == ("intervention", axis, "pair")
    assert np.array_equal(starred.to_xarray()["metric"].values[0], effects.to_xarray()["metric"].values)


@pytest.mark.parametrize("axis", ["channel", "height"])
@pytest.mark.parametrize("name", NETWORKS)
def test_channels_and_rows_of_trained_networks(shared, name, axis):
    path, shape, sizes = NETWORKS[name]
    module = trained(shared, name).double()
    pairs = vectors(2, shape=shape, n_classes=10)
    experiment = cp.Experiment(cp.open_model(module), pairs, "answer_logit")
    effects = cp.sweep(experiment, f"module({path}).output {AXES}", over=axis)
    wanted = raw(module, path, pairs, 1 + ["channel", "height", "column"].index(axis), sizes[axis])
    np.testing.assert_allclose(effects.to_xarray()["metric"].values, wanted, rtol=1e-9, atol=1e-9)
    assert np.ptp(effects.effect().values) > 1e-6


def test_rows_of_several_may_be_patched_together(small):
    pairs = vectors(2, shape=(1, 8, 8), n_classes=5)
    experiment = cp.Experiment(cp.open_model(small), pairs, "answer_logit")
    all_rows = experiment.run([f"module(second).output {AXES}#height=0:4", "module(second).output"])
    patched = all_rows.to_xarray()["metric"].values
    np.testing.assert_allclose(patched[0], patched[1], rtol=1e-12)


def test_an_axis_that_is_not_named_is_refused(small):
    experiment = cp.Experiment(cp.open_model(small), vectors(2, shape=(1, 8, 8), n_classes=5), "answer_logit")
    with pytest.raises(SiteSyntaxError, match="no unit of module"):
        experiment.run([f"module(second).output {AXES}#width=1"])
    with pytest.raises(SettingError, match="cannot be swept over 'width'"):
        cp.sweep(experiment, f"module(second).output {AXES}", over="width")
