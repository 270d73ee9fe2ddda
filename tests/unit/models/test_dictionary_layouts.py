"""Published dictionaries: each layout and architecture computes what its formula says."""

import json

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.models.dictionaries.weights import TensorFile
from causalpatch.testing.tiny import tiny_model
from dictionaries import (
    Coder,
    K,
    decoded,
    encoded,
    weights,
    write_saelens,
    write_saelens_5,
    write_scope,
    write_sparsify,
    write_traced,
)

AUTOENCODERS = ("standard", "gated", "jumprelu", "topk")
TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")


@pytest.fixture
def model():
    return cp.open_model(tiny_model("llama"))


def vectors(width=32, n=40, seed=5):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(coder, x, features, description):
    """Hold all that a coder can do against features and descriptions."""
    n, n_features = features.shape
    assert 0 < (features != 0).double().mean() < 1
    torch.testing.assert_close(coder.encode(x), features)
    torch.testing.assert_close(coder.decode(features, x), description)
    which, units = torch.arange(n).repeat_interleave(n_features), torch.arange(n_features).repeat(n)
    torch.testing.assert_close(coder.at(x, which, units).reshape(n, n_features), features)
    nothing = coder.decode(torch.zeros_like(features), x)
    ones = torch.eye(n_features, dtype=x.dtype)
    few = torch.arange(n_features) % n
    torch.testing.assert_close(
        coder.directions(x, few, torch.arange(n_features)), coder.decode(ones, x[few]) - nothing[few]
    )


@pytest.mark.parametrize("architecture", AUTOENCODERS)
def test_an_autoencoder_of_saelens_computes_its_formula(model, tmp_path, architecture):
    w, x = weights(architecture), vectors()
    (added,) = model.add_dictionary("sae", write_saelens(tmp_path, architecture, w))
    assert (added.layer, added.writes, added.reads, added.n_features) == (1, "resid_pre", "resid_pre", 24)
    features = encoded(architecture, w, x)
    check(added.coder, x, features, decoded(w, features))


@pytest.mark.parametrize("architecture", TRANSCODERS)
def test_a_transcoder_of_saelens_reads_the_mlps_input_and_describes_its_output(model, tmp_path, architecture):
    w, x = weights(architecture), vectors()
    hooks = {"hook": "blocks.1.mlp.hook_in", "hook_out": "blocks.1.hook_mlp_out"}
    (added,) = model.add_dictionary("sae", write_saelens(tmp_path, architecture, w, **hooks))
    assert (added.layer, added.writes, added.reads) == (1, "mlp_out", "mlp_in")
    features = encoded(architecture, w, x, bias=False)
    check(added.coder, x, features, decoded(w, features, x))


def test_the_bias_is_taken_from_the_input_only_where_the_configuration_says_so(model, tmp_path):
    w, x = weights(), vectors()
    (added,) = model.add_dictionary("sae", write_saelens(tmp_path, "standard", w, apply_b_dec_to_input=False))
    features = encoded("standard", w, x, bias=False)
    check(added.coder, x, features, decoded(w, features))


def test_a_vector_is_normalised_by_its_layer_norm_and_brought_back(model, tmp_path):
    w, x = weights(), vectors()
    (added,) = model.add_dictionary("sae", write_saelens(tmp_path, "standard", w, normalize_activations="layer_norm"))
    mean, size = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    features = encoded("standard", w, (x - mean) / (size + 1e-5))
    check(added.coder, x, features, decoded(w, features) * size + mean)


def test_a_vector_is_rescaled_to_a_constant_norm_and_brought_back(model, tmp_path):
    w, x = weights("topk"), vectors()
    folder = write_saelens(tmp_path, "topk", w, normalize_activations="constant_norm_rescale")
    (added,) = model.add_dictionary("sae", folder)
    factor = 32**0.5 / x.norm(dim=-1, keepdim=True)
    features = encoded("topk", w, x * factor)
    check(added.coder, x, features, decoded(w, features) / factor)


def test_a_scale_that_files_do_not_hold_is_given_apart_and_folded_as_saelens_does(model, tmp_path):
    w, x = weights(), vectors()
    folder = write_saelens(tmp_path, "standard", w, normalize_activations="expected_average_only_in")
    (added,) = model.add_dictionary("sae", folder, scale=0.5)
    folded = {**w, "W_enc": w["W_enc"] * 0.5, "W_dec": w["W_dec"] / 0.5, "b_dec": w["b_dec"] / 0.5}
    features = encoded("standard", folded, x)
    check(added.coder, x, features, decoded(folded, features))


def test_features_may_count_in_lengths_of_their_direction(model, tmp_path):
    w, x = weights("topk"), vectors()
    w["W_dec"] *= torch.linspace(0.2, 3.0, 24)[:, None]
    (added,) = model.add_dictionary("sae", write_saelens(tmp_path, "topk", w, rescale_acts_by_decoder_norm=True))
    norms = w["W_dec"].norm(dim=-1)
    pre = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]) * norms
    features = torch.relu(pre) * (pre >= pre.sort(-1, descending=True).values[:, K - 1 : K])
    check(added.coder, x, features, (features / norms) @ w["W_dec"] + w["b_dec"])


@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu"])
def test_configurations_from_before_version_6_are_read(model, tmp_path, architecture):
    w, x = weights(architecture), vectors()
    (added,) = model.add_dictionary("sae", write_saelens_5(tmp_path, w, architecture=architecture))
    features = encoded(architecture, w, x)
    check(added.coder, x, features, decoded(w, features))


def test_top_k_was_an_activation_of_standard_ones_before_version_6(model, tmp_path):
    w, x = weights("topk"), vectors()
    folder = write_saelens_5(tmp_path, w, activation_fn_str="topk", activation_fn_kwargs={"k": 6})
    (added,) = model.add_dictionary("sae", folder)
    features = encoded("topk", w, x, k=6)
    check(added.coder, x, features, decoded(w, features))


def test_tanh_relu_was_an_activation_before_version_6(model, tmp_path):
    w, x = weights(), vectors()
    (added,) = model.add_dictionary("sae", write_saelens_5(tmp_path, w, activation_fn_str="tanh-relu"))
    features = torch.tanh(encoded("standard", w, x))
    check(added.coder, x, features, decoded(w, features))


@pytest.mark.parametrize("name", ["scaling_factor", "finetuning_scaling_factor"])
def test_finetuned_factors_scale_features_when_they_are_decoded(model, tmp_path, name):
    w, x = weights(), vectors()
    factors = torch.linspace(0.5, 2.0, 24, dtype=torch.float64)
    (added,) = model.add_dictionary(
        "sae", write_saelens_5(tmp_path, w | {name: factors}, finetuning_scaling_factor=True)
    )
    features = encoded("standard", w, x)
    check(added.coder, x, features, decoded(w, features * factors))


def test_finetuned_factors_of_one_are_nothing(model, tmp_path):
    w, x = weights(), vectors()
    folder = write_saelens_5(tmp_path, w | {"scaling_factor": torch.ones(24)})
    (added,) = model.add_dictionary("sae", folder)
    features = encoded("standard", w, x)
    check(added.coder, x, features, decoded(w, features))


def test_a_coder_of_sparsify_stands_where_its_folder_is_named_for(model, tmp_path):
    w, x = weights("topk"), vectors()
    (added,) = model.add_dictionary("sae", write_sparsify(tmp_path / "layers.0", w))
    assert (added.layer, added.writes, added.reads) == (0, "resid_post", "resid_post")
    features = encoded("topk", w, x)
    check(added.coder, x, features, decoded(w, features))


def test_a_skip_transcoder_of_sparsify_takes_no_bias_from_its_input(model, tmp_path):
    w, x = weights("topk_skip"), vectors()
    (added,) = model.add_dictionary("sae", write_sparsify(tmp_path / "layers.1.mlp", w, transcode=True))
    assert (added.layer, added.writes, added.reads) == (1, "mlp_out", "mlp_in")
    features = encoded("topk", w, x, bias=False)
    check(added.coder, x, features, decoded(w, features, x))


@pytest.mark.parametrize("architecture", ["transcoder", "jumprelu_skip_transcoder"])
def test_transcoders_of_circuit_tracer_cover_a_layer_each(model, tmp_path, architecture):
    layers, x = {n: weights(architecture, seed=n) for n in (0, 1)}, vectors()
    added = model.add_dictionary("sae", write_traced(tmp_path, layers, feature_input_hook="hook_resid_mid"))
    assert [(one.layer, one.writes, one.reads) for one in added] == [
        (0, "mlp_out", "resid_mid"),
        (1, "mlp_out", "resid_mid"),
    ]
    for one in added:
        w = layers[one.layer]
        features = encoded(architecture, w, x, bias=False)
        check(one.coder, x, features, decoded(w, features, x))


def test_gemma_scopes_arrays_are_read_as_jumprelu_at_the_site_that_is_given(model, tmp_path):
    w, x = weights("jumprelu"), vectors()
    (added,) = model.add_dictionary("sae", write_scope(tmp_path, w), site="resid_post.0")
    features = encoded("jumprelu", w, x, bias=False)
    check(added.coder, x, features, decoded(w, features))
    (other,) = model.add_dictionary("mlp", tmp_path / "params.npz", site="mlp_out.1", reads="mlp_in")
    assert (other.layer, other.writes, other.reads) == (1, "mlp_out", "mlp_in")
    check(other.coder, x, features, decoded(w, features))


def test_a_module_of_ones_own_is_taken_as_it_is(model):
    w, x = weights(), vectors()
    (added,) = model.add_dictionary("mine", Coder(w), site="attn_out.1")
    features = encoded("standard", w, x)
    check(added.coder, x, features, decoded(w, features))


def test_a_dictionary_of_all_heads_or_all_neurons_stands_at_their_whole_tensor(model, tmp_path):
    (heads,) = model.add_dictionary("z", write_saelens(tmp_path / "z", "topk", weights("topk"), "blocks.1.attn.hook_z"))
    assert (heads.writes, heads.layer) == ("z", 1)
    n_neurons = model.shape.units["neuron"]
    w = weights("standard", width=n_neurons)
    (neurons,) = model.add_dictionary("n", write_saelens(tmp_path / "n", "standard", w, "blocks.0.mlp.hook_post"))
    assert (neurons.writes, neurons.layer, neurons.coder.width_in) == ("mlp_post", 0, n_neurons)


def test_a_folder_of_folders_is_a_dictionary_of_several_layers(model, tmp_path):
    for layer in (0, 1):
        write_saelens(tmp_path / f"l{layer}", "standard", weights(seed=layer), f"blocks.{layer}.hook_resid_pre")
    assert [one.layer for one in model.add_dictionary("res", tmp_path)] == [0, 1]
    assert model.shape.dictionaries == {"res": {0: 24, 1: 24}}
    model.remove_dictionary("res")
    assert model.shape.dictionaries == {}


def test_the_same_layer_may_be_added_again_but_no_other_one_in_its_place(model, tmp_path):
    folder = write_saelens(tmp_path / "a", "standard", weights())
    model.add_dictionary("res", folder)
    model.add_dictionary("res", folder)
    with pytest.raises(cp.RequestError, match="has layer 1 already"):
        model.add_dictionary("res", write_saelens(tmp_path / "b", "standard", weights(seed=3)))


def test_weights_are_read_when_they_are_first_used(model, tmp_path, monkeypatch):
    read = []
    load = TensorFile.load
    monkeypatch.setattr(TensorFile, "load", lambda self, name: read.append(name) or load(self, name))
    (added,) = model.add_dictionary("sae", write_saelens(tmp_path, "standard", weights()))
    assert read == []
    added.coder.at(vectors(n=2), torch.tensor([0, 1]), torch.tensor([3, 5]))
    assert sorted(read) == ["W_enc", "b_dec", "b_enc"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_features_are_computed_in_the_models_numbers_but_in_float32_at_least(tmp_path, dtype):
    model = cp.open_model(tiny_model("llama", dtype=dtype))
    w = weights(dtype=torch.float32)
    (added,) = model.add_dictionary("sae", write_saelens(tmp_path, "standard", w))
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert added.coder.encode(vectors(n=2).to(dtype)).dtype == wanted


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"architecture": "temporal"}, "the architecture 'temporal'"),
        ({"architecture": "batchtopk"}, "the architecture 'batchtopk'"),
        ({"normalize_activations": "tanh"}, "normalize_activations 'tanh'"),
        ({"normalize_decoder": True}, "the settings normalize_decoder"),
        ({"metadata": {"hook_head_index": 3}}, "hook_head_index 3"),
    ],
)
def test_a_setting_that_is_not_applied_is_refused(model, tmp_path, settings, why):
    folder = write_saelens(tmp_path, "standard", weights(), **settings)
    with pytest.raises(cp.UnsupportedError, match=why):
        model.add_dictionary("sae", folder)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"activation_fn_str": "gelu"}, "the activation 'gelu'"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 3, "postact_fn": "id"}}, "postact_fn"),
        ({"activation_fn_str": "topk"}, "k = None"),
    ],
)
def test_an_activation_that_is_not_known_is_refused(model, tmp_path, settings, why):
    with pytest.raises(cp.UnsupportedError, match=why):
        model.add_dictionary("sae", write_saelens_5(tmp_path, weights(), **settings))


def test_tensors_that_are_not_applied_are_refused(model, tmp_path):
    folder = write_saelens(tmp_path, "standard", weights() | {"b_extra": torch.zeros(3)})
    with pytest.raises(cp.UnsupportedError, match="the tensor b_extra"):
        model.add_dictionary("sae", folder)
    with pytest.raises(cp.UnsupportedError, match="the tensor scaling_factor"):
        model.add_dictionary(
            "sae", write_saelens_5(tmp_path / "5", weights() | {"scaling_factor": torch.full((24,), 2.0)})
        )
    with pytest.raises(cp.UnsupportedError, match="activation"):
        model.add_dictionary("sae", write_sparsify(tmp_path / "layers.0", weights("topk"), activation="groupmax"))
    with pytest.raises(cp.UnsupportedError, match="model_kind 'cross_layer_transcoder'"):
        model.add_dictionary("t", write_traced(tmp_path / "t", {0: weights()}, model_kind="cross_layer_transcoder"))


def test_missing_tensors_and_broken_files_are_named(model, tmp_path):
    w = weights()
    del w["b_enc"]
    with pytest.raises(cp.RequestError, match="lacks the tensor b_enc"):
        model.add_dictionary("sae", write_saelens(tmp_path / "a", "standard", w))
    folder = write_saelens(tmp_path / "b", "standard", weights())
    (folder / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(cp.RequestError, match="cannot be read"):
        model.add_dictionary("sae", folder)
    (folder / "cfg.json").write_text("{")
    with pytest.raises(cp.RequestError, match="is no JSON"):
        model.add_dictionary("sae", folder)


def test_on_a_model_with_layer_norms_it_must_be_said_whether_the_stream_was_centred(tmp_path):
    model = cp.open_model(tiny_model("gpt2"))
    w, x = weights(), vectors()
    folder = write_saelens(tmp_path, "standard", w, metadata={"model_from_pretrained_kwargs": None})
    with pytest.raises(cp.RequestError, match=r"not known whether .* was trained on processed weights"):
        model.add_dictionary("sae", folder)
    (plain,) = model.add_dictionary("plain", folder, processed=False)
    features = encoded("standard", w, x)
    check(plain.coder, x, features, decoded(w, features))
    (centred,) = model.add_dictionary("centred", folder, processed=True)
    features = encoded("standard", w, x - x.mean(-1, keepdim=True))
    check(centred.coder, x, features, decoded(w, features))


def test_norms_without_a_mean_leave_nothing_to_be_said(model, tmp_path):
    folder = write_saelens(tmp_path, "standard", weights(), metadata={"model_from_pretrained_kwargs": None})
    (added,) = model.add_dictionary("sae", folder)
    assert not added.coder.recipe.centers


def test_what_processed_weights_fold_away_is_refused(tmp_path):
    model = cp.open_model(tiny_model("gpt2"))
    hooks = {"hook": "blocks.1.ln2.hook_normalized", "hook_out": "blocks.1.hook_mlp_out"}
    folder = write_saelens(tmp_path, "transcoder", weights("transcoder"), **hooks)
    model.add_dictionary("as-it-is", folder)
    with pytest.raises(cp.RequestError, match="reads what is not in"):
        model.add_dictionary("folded", folder, processed=True)


def test_records_name_the_file_by_its_hash(model, tmp_path):
    (added,) = model.add_dictionary("sae", write_saelens(tmp_path, "standard", weights()))
    told = added.describe()
    assert json.loads(json.dumps(told)) == told
    assert (told["name"], told["layer"], told["features"], len(told["hash"])) == ("sae", 1, 24, 64)
    (mine,) = model.add_dictionary("mine", Coder(weights()), site="attn_out.1")
    assert mine.describe()["architecture"] == "module"
    assert np.unique([one.content_hash for one in model.dictionaries]).size == 2
