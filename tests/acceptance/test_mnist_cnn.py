"""A custom convolutional network that knows nothing of this library, by ``module(…)`` sites on pairs of digits."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import causalpatch as cp

FOLDER = Path("models") / "mnist-cnn-burn"
LAYERS = ["conv1", "conv2", "conv3", "norm1", "fc1", "fc2", "norm2"]


@pytest.fixture(scope="module")
def code(shared: Path) -> ModuleType:
    """The network's own source, which stands beside its weights."""
    spec = importlib.util.spec_from_file_location("mnist_cnn_model", shared / FOLDER / "model.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def network(shared: Path, code: ModuleType) -> nn.Module:
    return code.load(shared / FOLDER)


@pytest.fixture(scope="module")
def experiment(shared: Path, code: ModuleType, network: nn.Module) -> cp.Experiment:
    model = cp.open_model(network)
    pairs = cp.load_pairs(shared / FOLDER / "pairs.jsonl", model)
    images = pairs.transformed(lambda image: code.preprocess(torch.tensor(image)))
    assert images[0].clean.shape == (1, 28, 28)
    return cp.Experiment(model, images)


def stacked(experiment: cp.Experiment, role: str) -> Tensor:
    return torch.tensor(experiment.pairs.batch(role).values)


def logit_difference(experiment: cp.Experiment, logits: Tensor) -> Tensor:
    rows = torch.arange(len(logits))
    answer, wrong = (
        torch.tensor([getattr(pair, side)[0][0] for pair in experiment.pairs]) for side in ("answer", "wrong_answer")
    )
    return logits[rows, answer] - logits[rows, wrong]


def by_plain_hooks(experiment: cp.Experiment, network: nn.Module, layer: str, put: Callable[..., Tensor]) -> np.ndarray:
    """Measure with nothing but torch: ``put(corrupt output, clean output)`` goes on from ``layer``."""
    module, kept = network.get_submodule(layer), {}
    with torch.no_grad():
        hook = module.register_forward_hook(lambda module, args, output: kept.update(clean=output.clone()))
        network(stacked(experiment, "clean"))
        hook.remove()
        hook = module.register_forward_hook(lambda module, args, output: put(output.clone(), kept["clean"]))
        patched = network(stacked(experiment, "corrupt"))
        hook.remove()
    return logit_difference(experiment, patched).numpy()


def test_the_network_opens_as_a_generic_model_of_arrays(experiment):
    assert experiment.model.kind == "arrays"
    assert experiment.model.family is None
    baseline = experiment.baseline
    assert baseline.right_clean.all()
    assert baseline.right_corrupt.all()
    assert baseline.clean.mean() == pytest.approx(7.5, abs=0.1)


def test_the_untouched_runs_are_those_of_the_network_itself(experiment, network):
    with torch.no_grad():
        wanted = logit_difference(experiment, network(stacked(experiment, "clean")))
    np.testing.assert_allclose(experiment.baseline.clean[0], wanted.numpy(), rtol=0, atol=1e-5)


def test_every_layer_patched_whole_brings_the_clean_answer_back(experiment):
    effects = cp.sweep(experiment, "module(*).output")
    assert effects.axes == ("intervention",)
    assert effects.to_xarray()["intervention"].values.tolist() == [f"module({layer}).output" for layer in LAYERS]
    np.testing.assert_allclose(effects.recovered().values, np.ones(len(LAYERS)), rtol=0, atol=1e-5)
    per_pair = effects.to_xarray()["metric"].values
    np.testing.assert_allclose(per_pair, np.tile(experiment.baseline.clean, (len(LAYERS), 1)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("layer", ["conv2", "conv3"])
def test_a_sweep_over_channels_equals_plain_hooks(layer, experiment, network):
    effects = cp.sweep(experiment, f"module({layer}).output axes=(channel,height,column)", over="channel")
    assert effects.dims == ("channel", "pair")
    measured = effects.to_xarray()["metric"].values
    n_channels = network.get_submodule(layer).out_channels
    assert measured.shape == (n_channels, 100)
    for channel in range(n_channels):

        def put(output: Tensor, clean: Tensor, channel: int = channel) -> Tensor:
            output[:, channel] = clean[:, channel]
            return output

        wanted = by_plain_hooks(experiment, network, layer, put)
        np.testing.assert_allclose(measured[channel], wanted, rtol=0, atol=1e-5)


def test_channels_differ_and_all_of_them_together_are_the_layer(experiment):
    site = "module(conv3).output axes=(channel,height,column)"
    single = cp.sweep(experiment, site, over="channel").recovered().values
    together = experiment.run([f"{site}#0:24"]).recovered().values
    assert together[0] == pytest.approx(1.0, abs=1e-5)
    assert single.max() - single.min() > 0.05
    assert 0.3 < single.sum() < 3.0  # the layers after it are not linear, but no other order of size
