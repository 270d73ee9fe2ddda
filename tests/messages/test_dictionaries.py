"""Refusals of dictionaries: files, widths, sites, features out of range."""

import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import (
    ModelNotFound,
    ModelUnsupported,
    SettingError,
    SiteNotFound,
    SiteSyntaxError,
    SiteUnsupported,
)
from causalpatch.testing.tiny import tiny_model
from dictionaries import Coder, weights, write_saelens, write_scope


@pytest.fixture
def model():
    return cp.open_model(tiny_model("llama"))


@pytest.fixture
def with_sae(model, tmp_path):
    model.add_dictionary("sae", write_saelens(tmp_path, "standard", weights()))
    return model


def test_a_feature_without_a_dictionary_is_answered_with_how_to_add_one(refuses, experiment):
    with refuses(
        SiteUnsupported,
        """
        'LlamaForCausalLM' does not have the site 'feature(sae).1.7'
          reason  no dictionary was added to the model
          fix: model.add_dictionary("sae", FOLDER)
        """,
    ):
        experiment.run(["feature(sae).1.7"])


def test_a_feature_out_of_range_is_answered_with_the_features_there_are(refuses, with_sae, pairs):
    with refuses(
        SiteNotFound,
        """
        no site named 'feature(sae).1.24' in 'LlamaForCausalLM'
          feature  24 was asked for; 'sae' has features 0 to 23 in layer 1
          fix: write feature(sae).1.23 or below
        """,
    ):
        cp.Experiment(with_sae, pairs).run(["feature(sae).1.24"])


def test_a_layer_without_a_file_is_answered_with_the_layers_there_are(refuses, with_sae, pairs):
    with refuses(
        SiteNotFound,
        """
        no site named 'feature_error(sae).0' in 'LlamaForCausalLM'
          layer  0 was asked for; 'sae' covers 1
          fix: model.add_dictionary("sae", FOLDER) with the file of that layer
        """,
    ):
        cp.Experiment(with_sae, pairs).run(["feature_error(sae).0"])


def test_a_misspelt_dictionary_is_answered_with_the_closest(refuses, with_sae, pairs):
    with refuses(
        SiteNotFound,
        """
        no site named 'feature(sea).1.3' in 'LlamaForCausalLM'
          dictionary  none is named 'sea'
          known       sae
          fix: did you mean feature(sae)?
        """,
    ):
        cp.Experiment(with_sae, pairs).run(["feature(sea).1.3"])


def test_a_feature_names_its_dictionary(refuses):
    with refuses(
        SiteSyntaxError,
        """
        'feature.3.9' is not a site
          problem  feature takes the name of a dictionary in parentheses
          grammar  [STREAM/]NAME[.LAYER[.UNIT]][@POSITION]
          fix: write feature(NAME).LAYER.FEATURE
        """,
    ):
        cp.parse("feature.3.9")


def test_a_dictionary_of_the_wrong_width_says_both(refuses, model, tmp_path):
    with refuses(
        SettingError,
        """
        the dictionary 'TMP/sae_weights.safetensors' does not fit 'LlamaForCausalLM'
          dictionary   encodes vectors of width 48, of tiny
          resid_pre.1  has width 32
          fix: give a dictionary of this model and this site
        """,
    ):
        model.add_dictionary("sae", write_saelens(tmp_path, "standard", weights(width=48)))


def test_a_dictionary_of_another_site_is_answered_with_its_own(refuses, model, tmp_path):
    with refuses(
        SettingError,
        """
        the dictionary 'TMP/sae_weights.safetensors' belongs to 'resid_pre.1', not to 'mlp_out.1'
          its files  name resid_pre.1 of tiny
          fix: leave site= out, or give the dictionary of that site
        """,
    ):
        model.add_dictionary("sae", write_saelens(tmp_path, "standard", weights()), site="mlp_out.1")


def test_arrays_without_a_site_ask_for_one(refuses, model, tmp_path):
    with refuses(
        SettingError,
        """
        it is not known to which site the dictionary 'TMP/params.npz' belongs
          layout  Gemma Scope: its files name no site of ours
          fix: say it: add_dictionary(…, site="resid_post.3")
        """,
    ):
        model.add_dictionary("sae", write_scope(tmp_path, weights("jumprelu")))


def test_a_site_that_takes_no_dictionary_is_answered_with_those_that_do(refuses, model):
    with refuses(
        SettingError,
        """
        a dictionary cannot belong to 'q.1.3'
          allowed  resid_pre.LAYER resid_mid.LAYER resid_post.LAYER attn_out.LAYER mlp_out.LAYER z.LAYER
                   mlp_post.LAYER
          fix: name one of these, such as site="resid_post.3"
        """,
    ):
        model.add_dictionary("sae", Coder(weights()), site="q.1.3")


def test_a_folder_without_a_dictionary_says_what_was_looked_for(refuses, model, tmp_path):
    (tmp_path / "notes.txt").write_text("nothing")
    with refuses(
        ModelNotFound,
        """
        there is no dictionary in 'TMP'
          holds  notes.txt
          known  cfg.json and sae_weights.safetensors or sae.safetensors; params.npz; config.yaml and
                 layer_0.safetensors
          fix: give the folder that holds them; from the hub, download it first
        """,
    ):
        model.add_dictionary("sae", tmp_path)


def test_an_architecture_that_is_not_known_is_refused(refuses, model, tmp_path):
    with refuses(
        ModelUnsupported,
        """
        the dictionary 'TMP/sae_weights.safetensors' cannot be used: the architecture 'temporal'
          why   known are standard, gated, jumprelu, topk, transcoder, skip_transcoder,
                jumprelu_transcoder, jumprelu_skip_transcoder; batchtopk is saved as jumprelu
          else  its features would be other numbers than those that were published
          fix: add a torch module with encode and decode that computes it
        """,
    ):
        model.add_dictionary("sae", write_saelens(tmp_path, "standard", weights(), architecture="temporal"))


def test_a_scale_that_is_not_in_the_files_is_asked_for(refuses, model, tmp_path):
    folder = write_saelens(tmp_path, "standard", weights(), normalize_activations="expected_average_only_in")
    with refuses(
        SettingError,
        """
        the dictionary 'TMP/sae_weights.safetensors' needs the scale of its activations
          its files  say normalize_activations expected_average_only_in, but not by which number
          fix: add_dictionary(…, scale=sqrt(width) / mean norm in training); SAELens lists it with its releases
        """,
    ):
        model.add_dictionary("sae", folder)


def test_processed_weights_are_asked_for_where_they_matter(refuses, tmp_path):
    folder = write_saelens(tmp_path, "standard", weights(), metadata={"model_from_pretrained_kwargs": {}})
    with refuses(
        SettingError,
        """
        it is not known whether 'TMP/sae_weights.safetensors' was trained on processed weights
          matters    TransformerLens took the mean from the stream of 'GPT2LMHeadModel' unless it was told
                     not to
          its files  do not say so
          fix: add_dictionary(…, processed=True) for TransformerLens' default, False for the model as it is
        """,
    ):
        cp.open_model(tiny_model("gpt2")).add_dictionary("sae", folder)


def test_a_module_that_is_no_dictionary_is_refused(refuses, model):
    with refuses(
        SettingError,
        """
        a Linear is no dictionary
          needed  encode(x) gives the features, decode(features) describes x
          fix: give it these two methods, or give the folder of a published dictionary
        """,
    ):
        model.add_dictionary("sae", torch.nn.Linear(2, 2), site="resid_pre.0")


def test_a_model_without_named_layers_takes_no_dictionaries(refuses, tagger, tmp_path):
    with refuses(
        ModelUnsupported,
        """
        'Tagger' takes no dictionaries
          reason  no known family
          fix: patch its modules: module(PATH).output
        """,
    ):
        tagger.add_dictionary("sae", tmp_path)


def test_a_name_that_cannot_stand_in_a_site_is_refused(refuses, model, tmp_path):
    with refuses(
        SettingError,
        """
        'my sae' cannot name a dictionary
          allowed  no spaces, no parentheses, no / and @
          fix: name it "res"
        """,
    ):
        model.add_dictionary("my sae", write_saelens(tmp_path, "standard", weights()))
