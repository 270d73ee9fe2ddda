"""Captured tensors that are kept on disk or in the host's memory."""

import os
import resource
import tempfile

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import MemoryExhausted
from causalpatch.engine import shares, shelf as shelves
from causalpatch.engine.shelf import NEAR, OnShelf, Shelf, place_for
from causalpatch.testing.tiny import tiny_model
from tiers import assert_agree, quickly, run_model, tier_of
from worlds import ON_WAVEFRONT, random_pairs, tiny_world

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
SITES = ["resid_pre.0@1", "resid_pre.1", "q.1.0@0", "k.0.1", "v.1.0@2", "z.1.2", "head_out.0.1", "attn_out.1@1"]
SITES += ["mlp_post.0.3@-1", "mlp_out.1", "resid_post.1@1", "final_norm@-1", ["z.0.1", "mlp_out.1@2"]]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Let files without a name stand in a folder of the test's own."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["device", "host", "disk"])
def test_a_private_copy_is_kept_bit_for_bit(where, dtype, folder):
    tensor = torch.randn(3, 5, 7).to(dtype).transpose(0, 1)
    before, kept = tensor.clone(), Shelf(CPU, where).keep(tensor)
    tensor.zero_()
    assert kept.dtype == dtype
    assert torch.equal(kept, before)
    assert not list(folder.iterdir())  # the file has lost its name


def test_what_nothing_will_change_is_not_copied_on_the_device():
    tensor = torch.ones(3)
    assert Shelf(CPU).keep(tensor, is_private=True).data_ptr() == tensor.data_ptr()
    assert Shelf(CPU, "disk").keep(tensor, is_private=True).data_ptr() != tensor.data_ptr()


def test_empty_tensors_are_kept():
    assert Shelf(CPU, "disk").keep(torch.ones(0, 4)).shape == (0, 4)


def test_the_tensors_of_a_layer_stay_on_the_device_and_others_leave_it():
    shelf = Shelf(torch.device("meta"))  # a device that is not where the tensors are
    kept = [torch.ones(2) for _ in range(NEAR + 1)]
    first = shelf.on_device(kept[0])
    assert first.device.type == "meta"
    assert shelf.on_device(kept[0]) is first
    for tensor in kept[1:]:
        shelf.on_device(tensor)
    assert shelf.on_device(kept[0]) is not first
    assert shelf.on_device(kept[-1]) is shelf.on_device(kept[-1])


def test_tensors_are_handed_out_by_their_keys():
    held = OnShelf(Shelf(CPU), {"a": torch.ones(1), "b": torch.zeros(1)})
    assert list(held) == ["a", "b"]
    assert len(held) == 2
    assert float(held["b"]) == 0


def test_where_tensors_are_kept_follows_from_what_is_free(monkeypatch):
    monkeypatch.setattr(shelves, "_free_host_bytes", lambda: 1000)
    assert place_for(10, 10, CPU) == place_for(10, 10, CUDA) == "device"
    assert place_for(11, 10, CPU) == "disk"
    assert place_for(500, 10, CUDA) == "host"
    assert place_for(501, 10, CUDA) == "disk"
    monkeypatch.setattr(shelves, "_free_host_bytes", lambda: None)
    assert place_for(501, 10, CUDA) == "host"


def test_the_hosts_free_memory_is_known_here():
    assert shelves._free_host_bytes() > 2**20


# gpt_bigcode has one kv_head.
@pytest.mark.parametrize("family", quickly([f for f in ON_WAVEFRONT if f != "gpt_bigcode"], "gpt2", "gemma2"))
def test_runs_kept_on_disk_give_the_same_numbers(family, folder, monkeypatch):
    model, _ = tiny_world(family, (3, 4, 2, 0))
    pairs = random_pairs(1, 4)
    metrics = [cp.logit_difference, cp.log_probability]
    wanted = run_model("wavefront", model, pairs, SITES, metric=metrics)
    kept = []
    real = shelves._mapped
    monkeypatch.setattr(shares, "place_for", lambda *_: "disk")
    monkeypatch.setattr(shelves, "_mapped", lambda tensor: kept.append(tensor.numel()) or real(tensor))
    got = run_model("wavefront", model, pairs, SITES, metric=metrics)
    assert len(kept) > 3 * model.shape.n_layers  # inputs, keys and values of every layer
    assert np.array_equal(got.to_xarray()["metric"], wanted.to_xarray()["metric"], equal_nan=True)
    assert not list(folder.iterdir())


def test_a_budget_that_is_too_small_for_one_pair_puts_its_runs_on_disk(monkeypatch):
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    pairs = random_pairs(1, 3)
    places = []
    real = shares.place_for
    monkeypatch.setattr(shares, "place_for", lambda *given: places.append(real(*given)) or places[-1])
    wanted = run_model("reference", model, pairs, SITES)
    assert_agree(run_model("wavefront", model, pairs, SITES), wanted)
    assert set(places) == {"device"}
    places.clear()
    assert_agree(run_model("wavefront", model, pairs, SITES, budget_gib=1e-6), wanted)
    assert "disk" in places


def test_a_full_disk_is_said_in_words(folder):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))  # as if the disk were full
    try:
        with pytest.raises(MemoryExhausted, match="neither into memory nor on the disk") as caught:
            Shelf(CPU, "disk").keep(torch.ones(100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert dict(caught.value.facts)["folder"] == str(folder)
    assert "TMPDIR" in caught.value.fix
    assert not os.listdir(folder)


def test_a_folder_that_is_not_there_is_said_in_words_and_not_held_against_the_model(monkeypatch, tmp_path):
    monkeypatch.setattr(shares, "place_for", lambda *_: "disk")
    model = cp.open_model(tiny_model("llama", kv_heads=2, seed=4))
    pairs = random_pairs(3, 3)
    with monkeypatch.context() as there:
        there.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
        with pytest.raises(MemoryExhausted, match="neither into memory nor on the disk"):
            run_model("auto", model, pairs, SITES)
    assert tier_of(run_model("auto", model, pairs, SITES)) == "wavefront"
