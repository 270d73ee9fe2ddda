"""What was learnt prints, saves and comes back, and cannot be changed on the way unseen."""

import dataclasses
import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import causalpatch as cp
from causalpatch.base.errors import StoreCorrupt
from planted import SITE, Planted, planted_pairs

LEARNING, HELD_OUT = planted_pairs(60, 0, name="some"), planted_pairs(40, 1, name="others")


@pytest.fixture(scope="module")
def found():
    experiment = cp.Experiment(cp.open_model(Planted()), LEARNING, "answer_logit", show_progress=False)
    return cp.learn_subspace(
        experiment,
        SITE,
        HELD_OUT,
        dimension=2,
        wanted="swapped",
        search=cp.RotationSearch(epochs=2),
        controls=cp.SubspaceControls(n_random=2),
    )


def test_a_subspace_comes_back_as_it_was_to_the_last_bit(found, tmp_path):
    path = found.save(tmp_path / "deep" / "found.safetensors")
    back = cp.load_subspace(path)
    assert str(back) == str(found)
    assert back.value == found.value
    assert back.patch == found.patch
    assert np.array_equal(back.marks, found.marks)
    for field in dataclasses.fields(found):
        if field.name not in ("value", "marks", "parts"):
            assert getattr(back, field.name) == getattr(found, field.name)
    assert back.parts.of.keys() == found.parts.of.keys()
    assert back.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_a_loaded_subspace_is_a_value_like_any_other(found, tmp_path):
    back = cp.load_subspace(found.save(tmp_path / "found.safetensors"))
    experiment = cp.Experiment(cp.open_model(Planted()), HELD_OUT, "answer_logit", show_progress=False)
    one, other = (experiment.run([cp.Patch(SITE, each.value)]).effect().values for each in (found, back))
    assert np.array_equal(one, other)
    saved = cp.save_interventions(tmp_path / "asked.json", [back.patch])
    assert cp.load_interventions(saved)[0].patches[0].value == found.value


def test_a_loaded_subspace_still_knows_what_it_was_learnt_on(found, tmp_path):
    back = cp.load_subspace(found.save(tmp_path / "found.safetensors"))
    with pytest.raises(cp.RequestError, match="shares a prompt"):
        back.confirm(cp.Experiment(cp.open_model(Planted()), LEARNING, "answer_logit"))


def test_the_print_always_names_the_parts_and_the_controls(found):
    lines = str(found).splitlines()
    for word in ("chance", "unpatched", "whole site", "random subspaces", "best random", "shuffled"):
        assert any(line.startswith(f"  {word}") for line in lines)
    assert any(line.startswith("its part in the row space") for line in lines)
    assert any(line.startswith("its part in the null space") for line in lines)
    assert any(line.startswith("illusion: ") for line in lines)


@pytest.mark.parametrize("change", ["basis", "content", "format", "marks", "bytes"])
def test_what_was_changed_is_refused(found, tmp_path, change):
    path = found.save(tmp_path / "found.safetensors")
    with safe_open(path, framework="numpy") as file:
        about = json.loads(file.metadata()["causalpatch"])
        tensors = {name: file.get_tensor(name).copy() for name in ("basis", "marks")}
    if change == "bytes":
        path.write_bytes(b"no safetensors")
    else:
        if change == "content":
            about["content"] = about["content"].replace("denoise", "noise")
        if change == "format":
            about["format"] = "something else"
        if change in tensors:
            tensors[change].flat[0] += 1
        save_file(tensors, path, metadata={"causalpatch": json.dumps(about)})
    with pytest.raises(StoreCorrupt):
        cp.load_subspace(path)
