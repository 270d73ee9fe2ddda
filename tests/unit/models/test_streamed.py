"""Models whose weights are fetched when they run: the same numbers, nothing held in between, and what is counted."""

import gc
import json
import os
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import causalpatch as cp
from causalpatch.models.stores import DiskStore, Stored, blocks_of
from checkpoints import FAMILIES, count_layers, opened, write

IDS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])


def logits(model):
    with torch.no_grad():
        return model.logits(model.module(**model.inputs(IDS)))


def is_empty(model):
    return all(parameter.is_meta for parameter in model.module.parameters())


@pytest.mark.parametrize("weights", ["disk", "host"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_forward_gives_the_same_numbers_bit_for_bit_and_leaves_nothing_behind(tmp_path, family, weights):
    place = write(tmp_path, family)
    whole, streamed = opened(place, is_streamed=False), opened(place, is_streamed=True, weights=weights)
    assert is_empty(streamed)
    assert torch.equal(logits(streamed), logits(whole))
    assert is_empty(streamed)
    assert count_layers(streamed) == [1, 1, 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_same_model_by_its_hash_dtype_device_and_shape(tmp_path, family):
    place = write(tmp_path, family)
    whole, streamed = opened(place, is_streamed=False), opened(place, is_streamed=True)
    assert streamed.content_hash == whole.content_hash
    assert (streamed.dtype, streamed.device) == (whole.dtype, whole.device)
    assert streamed.vocab_size == whole.vocab_size
    assert {n: r for n, r in streamed.shape.refused.items() if n not in whole.shape.refused}.keys() <= {
        "head_out",
        *(name for name in streamed.shape.refused if name.endswith("_bias")),
    }


def test_buffers_that_a_model_computes_for_itself_are_those_of_the_whole_model(tmp_path):
    place = write(tmp_path, "llama")
    whole, streamed = opened(place, is_streamed=False), opened(place, is_streamed=True)
    theirs = dict(whole.module.named_buffers())
    ours = dict(streamed.module.named_buffers())
    assert theirs.keys() == ours.keys()
    assert theirs
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


def test_another_dtype_is_that_of_the_whole_model(tmp_path):
    place = write(tmp_path, "gpt2")
    whole, streamed = (opened(place, is_streamed=is_streamed, dtype="float64") for is_streamed in (False, True))
    assert streamed.dtype == torch.float64
    assert torch.equal(logits(streamed), logits(whole))
    assert streamed.content_hash == whole.content_hash


def test_a_layer_that_is_held_is_fetched_once_however_often_it_runs(tmp_path):
    model = opened(write(tmp_path, "llama"), is_streamed=True)
    path = model.weights.layers[1]
    with model.weights.holding(path):
        assert not any(parameter.is_meta for parameter in model.module.get_submodule(path).parameters())
        logits(model), logits(model)
    assert count_layers(model) == [2, 1, 2]
    assert is_empty(model)


def test_what_is_read_ahead_is_what_is_fetched_next(tmp_path):
    model = opened(write(tmp_path, "llama"), is_streamed=True)
    weights, reads = model.weights, []
    real = weights.store.read
    weights.store.read = lambda name: (reads.append(name), real(name))[1]
    first, second, _ = weights.layers
    with weights.holding(first, ahead=second):
        pass
    with weights.holding(second):
        pass
    per_layer = len(weights.units[first].places)
    assert len(reads) == 2 * per_layer
    assert count_layers(model) == [1, 1, 0]


def test_an_embedding_reads_the_rows_of_the_ids_alone(tmp_path):
    model = opened(write(tmp_path, "gpt2"), is_streamed=True)
    table = model.module.get_input_embeddings()
    whole = opened(write(tmp_path, "gpt2"), is_streamed=False).module.get_input_embeddings()
    ids = torch.tensor([[7, 3, 7, 4]])
    assert torch.equal(table(ids), whole(ids))
    assert model.weights.bytes_loaded == 3 * table.weight.shape[1] * 4
    assert not model.weights.loads
    every = torch.arange(table.weight.shape[0])
    assert torch.equal(table(every), whole(every))
    assert sum(model.weights.loads.values()) == 1


def test_a_tied_head_is_fetched_as_the_embedding_that_it_is(tmp_path):
    model = opened(write(tmp_path, "gpt2"), is_streamed=True)
    head = model.module.get_output_embeddings()
    assert head.weight is model.module.get_input_embeddings().weight
    with model.weights.holding("lm_head"):
        stored = load_file(tmp_path / "gpt2" / "model.safetensors")
        assert torch.equal(head.weight, stored["transformer.wte.weight"])


def test_weights_in_several_files_are_found(tmp_path):
    module = opened(write(tmp_path, "llama"), is_streamed=False).module
    module.save_pretrained(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    parts, one = opened(tmp_path / "parts", is_streamed=True), opened(tmp_path / "llama", is_streamed=True)
    assert torch.equal(logits(parts), logits(one))


def test_names_of_the_body_alone_are_brought_to_those_of_the_model(tmp_path):
    place = write(tmp_path, "gpt2")
    file = place / "model.safetensors"
    wanted = logits(opened(place, is_streamed=False))
    kept = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(kept, file, metadata={"format": "pt"})
    assert torch.equal(logits(opened(place, is_streamed=True)), wanted)


def test_a_tensor_is_looked_through_in_blocks(tmp_path, monkeypatch):
    model = opened(write(tmp_path, "llama"), is_streamed=True)
    monkeypatch.setattr("causalpatch.models.stores.BLOCK_BYTES", 1000)
    name, _, _, stub = max(model.weights.units["lm_head"].places, key=lambda place: place[3].numel())
    parts = list(blocks_of(model.weights.store, name, stub))
    assert len(parts) > 3
    assert torch.equal(torch.cat(parts), model.weights.store.read(name))


def test_memory_decides_whether_weights_are_fetched(tmp_path):
    place = write(tmp_path, "llama")
    assert opened(place, is_streamed=False, memory_gib=1).weights is None
    n_bytes = opened(place, is_streamed=True).weights.n_bytes
    tight = opened(place, is_streamed=False, memory_gib=1.5 * n_bytes / 2**30)
    assert tight.weights.store.place == "disk"
    assert 0 < tight.weights.room_bytes < 1.5 * n_bytes


def test_the_module_is_collected_with_its_model(tmp_path):
    model = opened(write(tmp_path, "llama"), is_streamed=True)
    logits(model)
    seen = weakref.ref(model.module)
    del model
    gc.collect()
    assert seen() is None


def test_gradients_are_refused_and_few_bits_too(tmp_path):
    model = opened(write(tmp_path, "llama"), is_streamed=True)
    pair = cp.Pair(np.array([1, 2, 3]), np.array([1, 4, 3]), ((5,),), ((6,),), id="x")
    experiment = cp.Experiment(model, cp.Pairs([pair], name="one"))
    with pytest.raises(cp.UnsupportedError, match="weights of all its layers at once"):
        cp.attribute(experiment, "resid_pre")
    with pytest.raises(cp.RequestError, match="needs all weights in memory"):
        cp.Experiment(model, cp.Pairs([pair], name="one"), precision="screen")


def test_a_checkpoint_without_safetensors_is_told_how_to_be_converted(tmp_path):
    place = write(tmp_path, "llama")
    torch.save(load_file(place / "model.safetensors"), place / "pytorch_model.bin")
    (place / "model.safetensors").unlink()
    with pytest.raises(cp.UnsupportedError, match=r"save_pretrained\(FOLDER\)"):
        opened(place, is_streamed=True)


def test_experts_stored_one_by_one_are_refused_with_the_way_to_store_them_together(tmp_path):
    place = write(tmp_path, "mixtral")
    with pytest.raises(cp.UnsupportedError, match="save_original_format=False"):
        opened(place, is_streamed=True)
    whole = opened(place, is_streamed=False)
    whole.module.save_pretrained(tmp_path / "together", save_original_format=False)
    assert torch.equal(logits(opened(tmp_path / "together", is_streamed=True)), logits(whole))


def test_weights_that_are_missing_or_of_another_shape_are_refused(tmp_path):
    place = write(tmp_path, "llama")
    file = place / "model.safetensors"
    kept = load_file(file)
    name = "model.layers.1.mlp.down_proj.weight"
    save_file({**kept, name: kept[name][:, :5].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(cp.UnsupportedError, match="stored as"):
        opened(place, is_streamed=True)
    del kept[name]
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(cp.UnsupportedError, match="lacks weights"):
        opened(place, is_streamed=True)


def test_quantised_weights_are_refused(tmp_path):
    place = write(tmp_path, "llama")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(cp.UnsupportedError, match="quantised"):
        opened(place, is_streamed=True)


def test_a_module_is_not_taken_apart(tmp_path):
    with pytest.raises(cp.RequestError, match="there already"):
        cp.open_model(nn.Linear(2, 2), weights="disk")


def bytes_read():
    """Return how many bytes this process asked files for."""
    with open("/proc/self/io") as file:
        return int(next(line for line in file if line.startswith("rchar")).split()[1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_rows_of_a_tensor_on_disk_are_those_of_the_whole(tmp_path, dtype):
    file = str(tmp_path / "weights.safetensors")
    tensors = {name: torch.randn(3 * size, size).mul(100).to(dtype) for name, size in [("a", 5), ("table", 7)]}
    save_file(tensors, file, {"about": "this"})
    store = DiskStore({name: Stored(file, name, dtype) for name in tensors})
    for start, stop in [(0, 1), (4, 9), (20, 21), (18, 30)]:
        found = store.rows("table", start, stop)
        assert found.dtype == dtype
        assert torch.equal(found, tensors["table"][start:stop])
        assert torch.equal(found, store.read("table")[start:stop])


@pytest.mark.skipif(not os.path.exists("/proc/self/io"), reason="the system does not tell how much is read")
def test_of_a_large_table_its_rows_alone_are_read(tmp_path):
    file = str(tmp_path / "weights.safetensors")
    save_file({"table": torch.zeros(2**14, 2**8)}, file)  # 16 MiB
    store = DiskStore({"table": Stored(file, "table", torch.float32)})
    store.rows("table", 0, 1)  # the header
    before = bytes_read()
    for row in range(100, 110):
        store.rows("table", row, row + 1)
    assert bytes_read() - before < 2**20
