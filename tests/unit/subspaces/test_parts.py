"""The illusion of Makelov et al. is flagged, honest directions are not, and parts add up."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import IllusionWarning, SettingError
from causalpatch.testing.tiny import tiny_model
from planted import hidden_experiment
from toys import prompts
from worlds import unchecked

HIDDEN = "module(into).output axes=(width)"
# The first hidden number follows the input and goes nowhere, the second goes out and never moves, the third does both.
PAPER = ([1.0, 0.0, 1.0], [[0.0, 2.0, 1.0]])
TWO_OUTPUTS = ([1.0, 0.0, 1.0], [[0.0, 2.0, 0.0], [0.0, 0.0, 1.0]])
ILLUSORY = np.array([1.0, 1.0, 0.0])


@pytest.mark.parametrize("network", [PAPER, TWO_OUTPUTS])
def test_the_example_of_makelov_is_flagged(network):
    experiment = hidden_experiment(*network)
    with pytest.warns(IllusionWarning, match="dormant pathway"):
        parts = cp.subspace_parts(experiment, HIDDEN, cp.Subspace(ILLUSORY))
    assert parts.is_illusion
    # The whole subspace does all that the source does, though no number in it takes part.
    assert parts.of["subspace"].effect == pytest.approx(parts.gap, rel=1e-5)
    assert parts.of["connected"].effect == pytest.approx(0, abs=1e-6)
    assert parts.of["null"].effect == pytest.approx(0, abs=1e-6)
    assert parts.reader == "out"
    assert "illusion: YES" in str(parts)


def test_the_row_space_part_of_the_example_is_dormant():
    experiment = hidden_experiment(*TWO_OUTPUTS)
    with pytest.warns(IllusionWarning, match="its part in the row space alone has 0%"):
        parts = cp.subspace_parts(experiment, HIDDEN, cp.Subspace(ILLUSORY))
    row, null = parts.of["row"], parts.of["null"]
    assert (row.share, null.share) == pytest.approx((0.5, 0.5))
    assert row.effect == pytest.approx(0, abs=1e-6)
    assert row.moves == pytest.approx(0, abs=1e-6)
    assert null.moves > 1


@pytest.mark.parametrize("network", [PAPER, TWO_OUTPUTS])
@pytest.mark.parametrize("direction", [(0, 0, 1), (1, 0, 1), (0.2, 0, -1)])
def test_an_honest_direction_is_not_flagged(network, direction):
    experiment = hidden_experiment(*network)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        parts = cp.subspace_parts(experiment, HIDDEN, cp.Subspace(np.array(direction, dtype=float)))
    assert not parts.is_illusion
    assert "none seen" in str(parts)


@pytest.mark.parametrize("direction", [(1, 0, 0), (0, 1, 0)])
def test_without_an_effect_there_is_nothing_to_flag(direction):
    parts = cp.subspace_parts(hidden_experiment(*TWO_OUTPUTS), HIDDEN, cp.Subspace(np.array(direction, dtype=float)))
    assert not parts.is_illusion
    assert "nothing to test" in str(parts)


def test_an_illusion_is_flagged_in_either_direction_of_patching():
    experiment = hidden_experiment(*TWO_OUTPUTS).turned("noise")
    with pytest.warns(IllusionWarning):
        parts = cp.subspace_parts(experiment, HIDDEN, cp.Subspace(ILLUSORY))
    assert parts.gap < 0
    assert parts.of["subspace"].effect == pytest.approx(parts.gap, rel=1e-5)


def test_an_illusion_among_several_dimensions_is_flagged():
    into, out = [1.0, 0.0, 0.0, 0.0], [[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
    basis = np.array([[1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]])
    experiment = hidden_experiment(into, out)
    # The network ignores its input, so that there is no gap at all: whatever the subspace does is an illusion.
    with pytest.warns(IllusionWarning):
        parts = cp.subspace_parts(experiment, HIDDEN, cp.Subspace(basis))
    assert parts.gap == pytest.approx(0, abs=1e-6)
    assert parts.rank == 2


@pytest.fixture(scope="module")
def model():
    return cp.open_model(tiny_model("llama"))


@pytest.fixture
def experiment(model):
    pairs = prompts(([3, 4, 5, 6], [3, 7, 5, 6]), ([8, 9, 3, 4], [8, 6, 3, 4]), ([5, 5, 8, 9], [5, 7, 8, 9]))
    return cp.Experiment(model, pairs, show_progress=False)


def quiet_parts(experiment, site, basis, **more):
    with warnings.catch_warnings(), unchecked():
        warnings.simplefilter("ignore", IllusionWarning)
        return cp.subspace_parts(experiment, site, cp.Subspace(basis), **more)


def weight_of(model, path):
    return model.module.get_submodule(path).weight.detach().double().numpy()


@pytest.mark.parametrize(
    ("site", "paths"),
    [
        ("resid_pre.1@-1", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("resid_mid.1@-1", ["mlp.up_proj", "mlp.gate_proj"]),
        ("attn_out.1@-1", ["mlp.up_proj", "mlp.gate_proj"]),
        ("z.1.2@-1", ["self_attn.o_proj"]),
        ("mlp_post.1@-1", ["mlp.down_proj"]),
    ],
)
def test_the_reader_of_a_site_is_the_map_behind_it(experiment, model, site, paths):
    maps = [weight_of(model, f"model.layers.1.{path}") for path in paths]
    seen = np.concatenate(maps)  # (read, width)
    shape: tuple[int, ...] = (model.width,)
    if site.startswith("z"):
        shape = (model.head_width,)
        seen = seen[:, 2 * model.head_width : 3 * model.head_width]
    if site.startswith("mlp_post"):
        shape = (model.shape.units["neuron"],)
    basis = np.random.default_rng(0).normal(size=(2, *shape))
    parts = quiet_parts(experiment, site, basis)
    orthonormal = cp.Subspace(basis).rows
    inside = np.linalg.pinv(seen) @ seen  # the projection on the row space, by another formula
    share = ((orthonormal @ inside) ** 2).sum() / 2
    assert parts.of["row"].share == pytest.approx(share, abs=1e-9)
    assert parts.of["row"].share + parts.of["null"].share == pytest.approx(1)
    assert parts.rank == np.linalg.matrix_rank(seen)
    assert all(path.rpartition(".")[2] in parts.reader for path in paths)


@pytest.mark.parametrize("site", ["resid_post.1@-1", "mlp_out.1@-1", "final_norm@-1"])
def test_the_unembedding_reads_the_end_of_the_stream(experiment, model, site):
    parts = quiet_parts(experiment, site, np.ones(model.width))
    assert parts.reader.startswith("the unembedding")


def test_the_null_part_of_neurons_does_nothing(experiment, model):
    n = model.shape.units["neuron"]
    basis = np.random.default_rng(1).normal(size=(1, n))
    parts = quiet_parts(experiment, "mlp_post.1@-1", basis)
    assert 0 < parts.of["null"].share < 1
    assert abs(parts.of["null"].effect) < 1e-10
    assert parts.of["site"].effect == pytest.approx(
        float(experiment.run([cp.Patch("mlp_post.1@-1")]).effect()[0]), rel=1e-9
    )


def test_a_subspace_of_a_site_that_nothing_linear_reads_cannot_be_tested(experiment, model):
    parts = quiet_parts(experiment, "q.0.1@-1", np.ones(model.head_width))
    assert set(parts.of) == {"subspace", "site"}
    assert "name it with reader=" in str(parts)


def test_a_reader_can_be_named(experiment, model):
    parts = quiet_parts(experiment, "resid_pre.1@-1", np.ones(model.width), reader="model.layers.1.mlp.up_proj")
    assert parts.reader == "model.layers.1.mlp.up_proj"
    with pytest.raises(SettingError, match="is not a linear map"):
        quiet_parts(experiment, "resid_pre.1@-1", np.ones(model.width), reader="model.layers.1")


def test_several_readers_of_one_tensor_are_all_found():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.left, self.right, self.other = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x):
            stream = self.first(x)
            return self.left(stream) + self.right(stream) + self.other(torch.relu(stream))

    rng = np.random.default_rng(0)
    pairs = cp.Pairs.from_arrays(rng.normal(size=(5, 4)), rng.normal(size=(5, 4)), [0, 1, 2, 3, 0], [1, 2, 3, 0, 1])
    experiment = cp.Experiment(cp.open_model(Two()), pairs, show_progress=False)
    assert quiet_parts(experiment, "module(first).output axes=(width)", np.ones(4)).reader == "left and right"


def test_a_set_of_sites_has_no_subspace_in_common(experiment, model):
    with pytest.raises(SettingError, match="names 2 sites"):
        quiet_parts(experiment, "resid_pre@-1", np.ones(model.width))
