"""Interventions come back from disk as they were, arrays to the last bit, and what was changed is refused."""

import json

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PatchError, ResultsNotFound, StoreCorrupt

RNG = np.random.default_rng(0)
ON = cp.FittedOn("ioi", "0123456789abcdef", 12, "corrupt")
BY_POSITION = np.where(np.arange(3)[:, None] == 2, np.nan, RNG.normal(size=(3, 8)))
EVERY = [
    cp.Source(),
    cp.Identity(),
    cp.Interpolate(0.25),
    cp.Zero(),
    cp.Constant(1.5),
    cp.Constant(RNG.normal(size=8)),
    cp.Mean("positions", "clean", per_group=True),
    cp.Resample(3, 1, "clean"),
    cp.Noise(draw=2),
    cp.Noise(0.125, seed=7),
    cp.Optimal(steps=7),
    cp.Fitted(BY_POSITION, "mean", ON, by_position=True),
    cp.Fitted(RNG.normal(size=(2, 8)), "mean", ON, groups=("a", "b")),
    cp.Given(RNG.normal(size=(3, 8)), np.array([0, 2, 1]), np.array([0, 2, 3]), ("one", "other"), "read before"),
    cp.From("resid_post.1@-1"),
    cp.Steer(RNG.normal(size=8), -2.0),
    cp.ProjectOut(RNG.normal(size=8)),
    cp.Subspace(RNG.normal(size=(3, 8)), cp.Steer(RNG.normal(size=8)), ON),
]


@pytest.fixture
def asked():
    single = [cp.Patch("z.1.*@-1", value) for value in EVERY]
    return [
        *single,
        "module(layer3.conv1).output axes=(channel,height,column)#7",
        cp.Intervention(
            (cp.Patch("resid_pre.0@subject", align="mean"), cp.Patch("mlp_out.1", "zero", column=3)), "two"
        ),
    ]


def test_every_value_comes_back_as_it_was(asked, tmp_path):
    path = cp.save_interventions(tmp_path / "deep" / "set.json", asked)
    assert cp.load_interventions(path) == [cp.Intervention.of(one) for one in asked]
    again = cp.save_interventions(tmp_path / "again.json", cp.load_interventions(path))
    assert again.read_bytes() == path.read_bytes()


def test_all_kinds_of_values_are_tried():
    kinds = {type(value) for value in EVERY} | {cp.Function}
    assert kinds == set(cp.patches.Value.__args__)


def test_equal_arrays_are_stored_once(tmp_path):
    vector = np.arange(8.0)
    path = cp.save_interventions(tmp_path / "set.json", [cp.Patch(f"z.0.{h}", cp.Steer(vector, h)) for h in range(4)])
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as file:
        assert len(file.files) == 1


def test_without_arrays_there_is_one_file(tmp_path):
    cp.save_interventions(tmp_path / "set.json", ["z.0.1", cp.Patch("z.0.2", "zero")])
    assert [path.name for path in tmp_path.iterdir()] == ["set.json"]


def test_a_function_cannot_be_saved(tmp_path):
    function = cp.Function(lambda current, source: current, "same")
    with pytest.raises(PatchError, match="function same cannot be saved"):
        cp.save_interventions(tmp_path / "set.json", [cp.Patch("z.0.1", function)])
    assert not list(tmp_path.iterdir())


def test_another_ending_is_refused(tmp_path):
    with pytest.raises(PatchError, match=r"not as 'set.pkl'"):
        cp.save_interventions(tmp_path / "set.pkl", ["z.0.1"])


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ResultsNotFound, match=r"nothing.json"):
        cp.load_interventions(tmp_path / "nothing.json")


def changed_array(path):
    with np.load(path.with_suffix(".npz")) as file:
        arrays = {name: file[name] for name in file.files}
    arrays[next(iter(arrays))] = np.ones(8)
    np.savez(path.with_suffix(".npz"), **arrays)


def lost_array(path):
    path.with_suffix(".npz").unlink()


def broken_arrays(path):
    path.with_suffix(".npz").write_bytes(b"PK\x03\x04 nothing")


def broken_text(path):
    path.write_text(path.read_text()[:-20])


def other_format(path):
    path.write_text(json.dumps({"format": "something else"}))


def unknown_kind(path):
    path.write_text(path.read_text().replace('"Steer"', '"Steering"'))


@pytest.mark.parametrize("harm", [changed_array, lost_array, broken_arrays, broken_text, other_format, unknown_kind])
def test_what_was_changed_is_refused(harm, tmp_path):
    path = cp.save_interventions(tmp_path / "set.json", [cp.Patch("z.0.1", cp.Steer(np.arange(8.0)))])
    harm(path)
    with pytest.raises(StoreCorrupt, match="cannot be read"):
        cp.load_interventions(path)
