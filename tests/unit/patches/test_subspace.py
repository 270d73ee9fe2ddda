"""A subspace is what its directions span, whatever their lengths and angles, and plain data."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PatchError
from causalpatch.patches.value import as_value
from toys import Chain, opened, vectors

RNG = np.random.default_rng(0)
BASIS = RNG.normal(size=(2, 4))
SITE = "module(first).output axes=(width)"


def projection(basis):
    return np.linalg.pinv(basis) @ basis


@pytest.mark.parametrize("mix", [np.eye(2), [[3.0, 1.0], [-2.0, 5.0]], [[1e-9, 0.0], [1e9, 1e9]]])
def test_other_directions_of_the_same_span_are_the_same_projection(mix):
    rows = cp.Subspace(np.array(mix) @ BASIS).rows
    assert np.abs(rows @ rows.T - np.eye(2)).max() < 1e-12
    assert np.abs(rows.T @ rows - projection(BASIS)).max() < 1e-6


def test_one_direction_keeps_its_sign():
    assert np.allclose(cp.Subspace(-3.0 * BASIS[0]).rows[0], -BASIS[0] / np.linalg.norm(BASIS[0]))


def test_an_orthonormal_basis_is_kept_to_the_last_bit():
    once = cp.Subspace(BASIS)
    assert np.array_equal(cp.Subspace(once.basis).basis, once.basis)
    assert cp.Subspace(once.basis) == once


def test_subspaces_compare_by_basis_value_and_pairs():
    on = cp.FittedOn("some", "0123", 3, "corrupt")
    made = [cp.Subspace(BASIS), cp.Subspace(BASIS, cp.Zero()), cp.Subspace(BASIS, on=on), cp.Subspace(BASIS[:1])]
    assert len({*made, *[cp.Subspace(BASIS.copy())]}) == 4
    assert str(made[1]) == f"zero inside subspace {made[0].hash[:8]} of dimension 2"
    assert str(made[2]).endswith("learnt on 'some'")


@pytest.mark.parametrize("basis", [np.zeros(4), np.stack([BASIS[0], 2 * BASIS[0]]), np.ones((5, 4)), np.zeros((0, 4))])
def test_directions_that_span_less_are_refused(basis):
    with pytest.raises(PatchError):
        cp.Subspace(basis)


def test_a_subspace_is_read_from_text(tmp_path):
    path = tmp_path / "found.npz"
    np.savez(path, basis=BASIS)
    assert as_value(f"subspace({path}:basis)") == cp.Subspace(BASIS)
    assert as_value(f"subspace({path}:basis, of=zero)") == cp.Subspace(BASIS, cp.Zero())


@pytest.mark.parametrize("engine", ["graph", "rows", "reference"])
@pytest.mark.parametrize("of", [cp.Source(), cp.Zero(), cp.Mean(), cp.Interpolate(0.5)])
def test_the_part_inside_is_replaced_and_the_rest_is_kept(engine, of):
    model, pairs = opened(Chain()), vectors(6)
    metric = cp.metric(lambda outputs, pairs: outputs.logits[:, 1], name="second")
    experiment = cp.Experiment(model, pairs, metric=metric, engine=engine, show_progress=False)
    got = experiment.run([cp.Patch(SITE, cp.Subspace(BASIS, of))]).to_xarray()["metric"].values[0]
    weight, bias = (p.detach().numpy() for p in (model.module.first.weight, model.module.first.bias))
    second, head = model.module.second, model.module.head
    base, source = (np.stack([pair.input(side) for pair in pairs]) @ weight.T + bias for side in ("corrupt", "clean"))
    put = {"Source": source, "Zero": 0 * base, "Mean": base.mean(0), "Interpolate": (base + source) / 2}
    new = base + (put[type(of).__name__] - base) @ projection(BASIS)
    stream = new + np.tanh(new @ second.weight.detach().numpy().T + second.bias.detach().numpy())
    wanted = (stream @ head.weight.detach().numpy().T + head.bias.detach().numpy())[:, 1]
    assert np.abs(got - wanted).max() < 1e-10


def test_what_is_fitted_stays_inside_its_subspace():
    pairs = vectors(6)
    experiment = cp.Experiment(opened(Chain()), pairs, show_progress=False)
    (fitted,) = experiment.fit([cp.Patch(SITE, cp.Subspace(BASIS, cp.Mean()))])
    value = fitted.patches[0].value
    assert isinstance(value, cp.Subspace)
    assert isinstance(value.of, cp.Fitted)
    asked = [cp.Patch(SITE, cp.Subspace(BASIS, cp.Mean())), fitted]
    one, other = experiment.run(asked, axes={"intervention": [0, 1]}).effect().values
    assert one == pytest.approx(other, abs=1e-12)
