"""Refusals of models: folders, names, checkpoints, devices, and forwards that cannot take what they are given."""

import json

import pytest
import torch
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

import causalpatch as cp
from causalpatch.base.errors import ModelNotFound, ModelUnsupported, SettingError
from causalpatch.testing.tiny import tiny_model


def test_a_folder_without_a_model_is_answered_with_what_was_looked_for(refuses, tmp_path):
    (tmp_path / "notes.txt").write_text("not a model")
    with refuses(
        ModelNotFound,
        """
        the folder 'TMP' does not hold a model
          missing  config.json  model.safetensors
          there    notes.txt
          fix: give a folder written by save_pretrained, or build the module yourself and open_model(module)
        """,
    ):
        cp.open_model(tmp_path)


def test_a_folder_that_does_not_exist_is_no_model(refuses, tmp_path):
    with refuses(
        ModelNotFound,
        """
        the folder 'TMP/gone' does not exist
          looked for  a folder with config.json and model.safetensors
          at          TMP/gone
          fix: give the folder that holds the model
        """,
    ):
        cp.open_model(tmp_path / "gone")


def test_a_file_is_no_model(refuses, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with refuses(
        ModelNotFound,
        """
        the folder 'TMP/model.safetensors' is a file, not a folder
          looked for  a folder with config.json and model.safetensors
          at          TMP/model.safetensors
          fix: give the folder that holds the model
        """,
    ):
        cp.open_model(tmp_path / "model.safetensors")


@pytest.fixture
def zoo(monkeypatch, tmp_path):
    """One embedded model, called stories."""
    (tmp_path / "stories").mkdir()
    (tmp_path / "stories" / "config.json").write_text("{}")
    monkeypatch.setattr("causalpatch.models.zoo._HERE", tmp_path)


def test_a_name_on_the_hub_cannot_be_reached_without_network(refuses, zoo):
    with refuses(
        ModelNotFound,
        """
        no model named 'nobody/no-such-model'
          folder    none at HERE/nobody/no-such-model
          hub       (what transformers says)
          embedded  zoo:stories
          fix: check the name, or give the path of a folder that holds the model
        """,
    ):
        cp.open_model("nobody/no-such-model")


def test_an_embedded_model_that_does_not_exist_is_answered_with_those_that_do(refuses, zoo):
    with refuses(
        ModelNotFound,
        """
        no model named 'storys' comes with the library
          zoo  stories
          fix: use 'zoo:stories'
        """,
    ):
        cp.open_model("zoo:storys")


def test_a_checkpoint_without_some_of_its_weights_is_not_filled_by_chance(refuses, tmp_path):
    module = tiny_model("llama", dtype=torch.float32)
    module.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with refuses(
        ModelUnsupported,
        """
        the checkpoint 'TMP' lacks weights of LlamaForCausalLM
          missing  9 tensors, the first is model.layers.2.input_layernorm.weight
          else     they would be random
          fix: give the complete checkpoint
        """,
    ):
        cp.open_model(tmp_path)


def test_a_dtype_that_models_do_not_have_is_refused(refuses):
    with refuses(
        SettingError,
        """
        'int8' is not a dtype of models
          allowed  float64 float32 bfloat16 float16
          fix: dtype="float32"
        """,
    ):
        cp.open_model(nn.Linear(2, 2), dtype="int8")


def test_a_device_that_is_not_there_is_refused(refuses, no_gpu):
    with refuses(
        SettingError,
        """
        'tpu' is not a device
          there  cpu
          fix: device="cpu"
        """,
    ):
        cp.open_model(nn.Linear(2, 2), device="tpu")


def test_a_forward_without_a_mask_cannot_take_padded_prompts(refuses, tagger):
    rows = [
        {"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7},
        {"clean": [3, 4, 8], "corrupt": [3, 5, 8], "answer_id": 6, "wrong_answer_id": 7},
    ]
    experiment = cp.Experiment(tagger, cp.load_pairs(rows, tagger))
    with refuses(
        ModelUnsupported,
        """
        'Tagger' cannot run prompts of unequal length together
          forward  takes ids
          padding  needs attention_mask
          fix: give prompts of one length, or wrap the model in a forward that takes attention_mask
        """,
    ):
        experiment.run(["module(head).output"])


def test_a_forward_that_fails_says_what_it_was_given(refuses, classifier):
    pairs = cp.Pairs.from_arrays([[0.0] * 3], [[1.0] * 3], [0], [1])
    with refuses(
        ModelUnsupported,
        """
        the forward of 'Sequential' failed
          inputs  input (1, 3) torch.float32
          error   RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x3 and 4x5)
          fix: check that the inputs have the shape and range that the model was made for
        """,
    ):
        cp.Experiment(classifier, pairs).run(["module(0).output"])


def test_a_compiled_model_is_refused_in_words(refuses):
    module = tiny_model("llama", layers=2)
    for layer in module.model.layers:
        layer.compile(backend="eager")
    with refuses(
        ModelUnsupported,
        """
        'LlamaForCausalLM' is compiled: its part 'model.layers.0'
          compiled  code of torch.compile passes by the modules within, where patches are made
          fix: open the module as it was before .compile()
        """,
    ):
        cp.open_model(module)


def test_weights_that_cannot_be_read_layer_by_layer_are_told_how_to_be_written(refuses, tmp_path):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with refuses(
        ModelUnsupported,
        """
        the weights of 'TMP' cannot be read layer by layer
          there  pytorch_model.bin, where model.safetensors is needed
          fix: write it anew, once: open_model(…).module.save_pretrained(FOLDER)
        """,
    ):
        cp.open_model(tmp_path, weights="disk")


def test_memory_that_does_not_hold_the_largest_layer_is_told_what_it_takes(refuses, tmp_path):
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path)
    with refuses(
        SettingError,
        """
        memory_gib=1e-05 does not hold the largest part of 'TMP'
          part     model.layers.0
          weights  4.6e-05 GiB
          needed   more than that: about 9.2e-05 GiB with activations beside it
          fix: memory_gib=9.2e-05
        """,
    ):
        cp.open_model(tmp_path, device="cpu", memory_gib=1e-5)


def test_a_model_that_is_no_stack_of_layers_is_not_fetched_layer_by_layer(refuses, tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 4], depths=[1, 1])
    ResNetForImageClassification(config).save_pretrained(tmp_path)
    with refuses(
        ModelUnsupported,
        """
        'TMP' cannot be run layer by layer: it is no stack of layers that are known by name
          reason  no known family; 1 of 10 names match gpt_neox
          fix: open it whole: leave out weights= and memory_gib=
        """,
    ):
        cp.open_model(tmp_path, device="cpu", weights="disk")


def test_a_place_of_weights_that_does_not_exist_is_answered_with_those_that_do(refuses, tmp_path):
    with refuses(
        SettingError,
        """
        weights cannot be 'disc'
          known  host (CPU memory), disk (safetensors files); leave it out to hold them all
          fix: weights="disk"
        """,
    ):
        cp.open_model(tmp_path, weights="disc")


def test_a_module_has_its_weights_already(refuses):
    with refuses(
        SettingError,
        """
        the weights of a Linear are there already
          weights, memory_gib  are for a folder or a name on the hub, whose weights can stay there
          fix: write it and open that: module.save_pretrained(FOLDER), open_model(FOLDER, …)
        """,
    ):
        cp.open_model(nn.Linear(2, 2), memory_gib=1)
