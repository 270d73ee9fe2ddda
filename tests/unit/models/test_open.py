import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import LlamaForCausalLM

from causalpatch.base.errors import CausalPatchWarning, ModelNotFound, ModelUnsupported, SettingError
from causalpatch.models import open_model, sources, zoo
from causalpatch.sites import parse
from causalpatch.testing.tiny import tiny_model


@pytest.fixture
def folder(tmp_path):
    """A saved tiny model in float32, without tokenizer."""
    tiny_model("llama", dtype=torch.float32).save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_folder_opens_in_the_dtype_of_its_checkpoint_without_tokenizer(folder):
    model = open_model(folder)
    assert model.name == str(folder)
    assert model.dtype == torch.float32
    assert model.tokenizer is None
    assert model.family.name == "llama"
    saved = load_file(folder / "model.safetensors")
    assert torch.equal(model.module.model.norm.weight.cpu(), saved["model.norm.weight"])


def test_a_checkpoint_in_half_precision_stays_so_unless_told_otherwise(tmp_path):
    tiny_model("gpt2", dtype=torch.bfloat16).save_pretrained(tmp_path)
    assert open_model(tmp_path).dtype == torch.bfloat16
    assert open_model(tmp_path, dtype="float32").dtype == torch.float32
    assert open_model(tmp_path, dtype=torch.float64, device="cpu").dtype == torch.float64


def test_opening_a_folder_prints_nothing(folder, capfd):
    open_model(folder)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_bare_tokenizer_file_is_read_as_it_stands(folder):
    inner = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "Anna": 2}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 0)])
    inner.save(str(folder / "tokenizer.json"))
    assert open_model(folder).tokenizer.encode("Anna Anna") == [0, 2, 2]


def test_a_broken_tokenizer_is_said_and_the_model_takes_ids(folder):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.warns(CausalPatchWarning, match="takes ids only"):
        model = open_model(folder)
    assert model.tokenizer is None


def test_a_folder_that_is_not_a_model_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with pytest.raises(ModelNotFound) as refusal:
        open_model(tmp_path)
    assert str(refusal.value) == (
        f"the folder '{tmp_path}' does not hold a model\n"
        "  missing  config.json  model.safetensors\n"
        "  there    notes.txt\n"
        "  fix: give a folder written by save_pretrained, or build the module yourself and open_model(module)"
    )


def test_a_folder_without_weights_is_not_a_model(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFound, match=r"missing  model\.safetensors"):
        open_model(folder)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        ("./nowhere", "does not exist"),
        ("/nowhere/at/all", "does not exist"),
        ("a/b/c", "does not exist"),
        ("my model", "does not exist"),
        ("~/nowhere", "does not exist"),
        (Path("nowhere"), "does not exist"),
        (__file__, "is a file, not a folder"),
    ],
)
def test_a_path_that_is_not_there_is_not_taken_for_a_name_on_the_hub(x, what, hub):
    with pytest.raises(ModelNotFound, match=what) as refusal:
        open_model(x)
    assert [fact for fact, _ in refusal.value.facts] == ["looked for", "at"]
    assert refusal.value.facts[1][1] == Path(x).expanduser().absolute()
    assert hub.asked == []


def test_a_folder_may_be_given_from_the_home_folder(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder.parent))
    assert open_model("~/tiny").family.name == "llama"


class Hub:
    """A hub that answers or is out of reach, and keeps what it was asked for."""

    def __init__(self):
        self.asked = []
        self.error = None

    def head(self, url, timeout):
        self.asked.append((url, timeout))
        if self.error:
            raise self.error


@pytest.fixture
def hub(monkeypatch):
    """The hub, whatever this machine says about being offline."""
    hub = Hub()
    monkeypatch.setattr(sources, "get_session", lambda: hub)
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", False)
    return hub


# huggingface_hub 2.4 looks a list of user agents up when it is first used, whatever it was told about the network.
@pytest.mark.filterwarnings("ignore:A test tried to use socket")
def test_a_name_is_looked_for_in_the_cache_alone_where_the_hub_is_out_of_reach(hub, capfd, caplog):
    hub.error = RuntimeError("Name or service not known")
    with pytest.raises(ModelNotFound) as refusal:
        open_model("no-such-model-anywhere")
    assert refusal.value.facts[1] == ("hub", "https://huggingface.co cannot be reached; nothing in its cache")
    assert (len(hub.asked), hub.asked[0][1] <= 5) == (1, True)
    assert (*capfd.readouterr(), caplog.records) == ("", "", [])


def test_a_hub_that_is_switched_off_is_not_asked(hub, monkeypatch):
    monkeypatch.setattr(sources.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFound, match="not asked, because HF_HUB_OFFLINE is set; nothing in its cache"):
        open_model("no-such-model-anywhere")
    assert hub.asked == []


def test_a_hub_that_answers_is_asked_for_the_model(hub, monkeypatch):
    calls = []

    def answer(place, **options):
        calls.append((place, options))
        raise OSError("nope is not a valid model identifier")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", answer)
    with pytest.raises(ModelNotFound, match="hub       nope is not a valid model identifier"):
        open_model("nope")
    assert calls == [("nope", {"local_files_only": False})]


def test_a_configuration_of_the_hub_that_transformers_cannot_use_is_not_called_missing(hub, monkeypatch):
    def answer(place, **options):
        raise ValueError("Unrecognized model")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", answer)
    with pytest.raises(ModelUnsupported, match="the configuration in 'odd' cannot be used"):
        open_model("odd")


def test_a_folder_is_read_without_asking_the_hub(folder, hub):
    open_model(folder)
    assert hub.asked == []


def test_a_tokenizer_that_is_not_there_is_not_called_a_model():
    with pytest.raises(ModelNotFound, match=re.escape("looked for  a folder with tokenizer.json")) as refusal:
        open_model(nn.Linear(1, 1), tokenizer="./nowhere")
    assert refusal.value.fix == "give the folder that holds the tokenizer"


def test_an_unknown_name_says_where_it_was_looked_for():
    with pytest.raises(ModelNotFound) as refusal:
        open_model("no-such-model-anywhere")
    lines = str(refusal.value).splitlines()
    assert lines[0] == "no model named 'no-such-model-anywhere'"
    assert [name for name, _ in refusal.value.facts] == ["folder", "hub", "embedded"]
    assert lines[-1].startswith("  fix: ")


def test_an_unknown_embedded_model_lists_those_that_exist():
    with pytest.raises(ModelNotFound, match="no model named 'storys' comes with the library") as refusal:
        open_model("zoo:storys")
    assert refusal.value.facts[0][0] == "zoo"


def test_an_embedded_model_opens_by_its_short_name(folder, monkeypatch):
    monkeypatch.setattr(zoo, "_HERE", folder.parent)
    model = open_model("zoo:tiny")
    assert (model.name, model.family.name) == ("zoo:tiny", "llama")
    with pytest.raises(ModelNotFound, match="embedded  zoo:tiny"):
        open_model("no-such-model-anywhere")
    with pytest.raises(ModelNotFound, match="fix: use 'zoo:tiny'"):
        open_model("tiny")


def test_a_configuration_of_unknown_kind_is_refused_with_what_transformers_says(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such-type"}))
    with pytest.raises(ModelUnsupported, match=r"the configuration in .* cannot be used"):
        open_model(folder)


def test_weights_that_are_missing_are_not_left_to_chance(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnsupported, match=r"1 tensors, the first is model\.layers\.1\.mlp\.up_proj\.weight"):
        open_model(folder)


def test_weights_of_another_shape_are_refused(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelUnsupported, match="cannot be read"):
        open_model(folder)


def test_a_module_is_used_as_it_is():
    module = nn.Sequential(nn.Linear(2, 2))
    model = open_model(module)
    assert model.module is module
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert open_model(module, dtype="float64").dtype == torch.float64


@pytest.mark.parametrize("dtype", ["int64", "float31", torch.int32])
def test_a_dtype_that_no_model_has_is_refused(dtype):
    with pytest.raises(SettingError, match="is not a dtype of models"):
        open_model(nn.Linear(1, 1), dtype=dtype)


@pytest.mark.parametrize("device", ["graphics", "cuda:77"])
def test_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(SettingError, match="device"):
        open_model(nn.Linear(1, 1), device=device)


def test_something_that_is_no_tokenizer_is_refused(tmp_path):
    with pytest.raises(SettingError, match="3 is not a tokenizer"):
        open_model(nn.Linear(1, 1), tokenizer=3)
    with pytest.raises(ModelNotFound, match="does not hold a tokenizer"):
        open_model(nn.Linear(1, 1), tokenizer=tmp_path)


@pytest.mark.parametrize(
    ("name", "family", "layers", "heads", "kv_heads", "text", "ids"),
    [
        ("stories260k", "llama", 5, 8, 4, "Lily had", [1, 317, 381]),
        ("babyllama-105", "llama", 5, 8, 4, "L", [1, 3, 31]),
        ("nano-sort-gpt2", "gpt2", 3, 3, 3, "C A B", [2, 0, 1]),
    ],
)
def test_trained_models_open_with_their_tokenizers(shared, name, family, layers, heads, kv_heads, text, ids):
    model = open_model(shared / "models" / name, device="cpu")
    assert model.family.name == family
    assert (model.shape.n_layers, model.n_heads, model.n_kv_heads) == (layers, heads, kv_heads)
    assert model.tokenizer.encode(text) == ids
    assert model.tap(parse(f"z.{layers - 1}.{heads - 1}")).has_position


@pytest.mark.parametrize("part", ["", "model.layers.1", "model.layers.0.mlp"])
def test_a_model_of_which_a_part_is_compiled_is_refused_in_words(part):
    module = tiny_model("llama", layers=2)
    module.get_submodule(part).compile(backend="eager")
    where = f"its part '{part}'" if part else "the module"
    with pytest.raises(ModelUnsupported, match=f"'LlamaForCausalLM' is compiled: {where}"):
        open_model(module)


def test_what_torch_compile_returns_is_refused_and_what_is_within_it_opens():
    compiled = torch.compile(tiny_model("gpt2"), backend="eager")
    with pytest.raises(ModelUnsupported, match="is compiled") as caught:
        open_model(compiled)
    assert caught.value.fix == "open model._orig_mod"
    assert open_model(compiled._orig_mod).family.name == "gpt2"


def test_a_device_map_reaches_the_loading_of_the_checkpoint(folder, monkeypatch):
    pytest.importorskip("accelerate")
    seen, load = {}, LlamaForCausalLM.from_pretrained
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", lambda *at, **how: seen.update(how) or load(*at, **how))
    model = open_model(folder, device_map="cpu")
    assert seen["device_map"] == "cpu"
    assert model.device.type == "cpu"
    with torch.no_grad():
        ids = torch.arange(1, 6)[None]
        assert torch.equal(model.module(ids).logits, open_model(folder, device="cpu").module(ids).logits)


def test_a_device_map_is_refused_beside_a_device_and_for_a_module(folder):
    with pytest.raises(SettingError, match="cannot be followed"):
        open_model(folder, device="cpu", device_map="auto")
    with pytest.raises(SettingError, match="cannot be followed"):
        open_model(nn.Linear(2, 2), device_map="auto")
