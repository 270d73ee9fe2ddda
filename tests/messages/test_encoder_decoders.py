"""Refusals by models with an encoder and a decoder."""

import functools

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, PairError, PatchError, SiteNotFound, SiteUnsupported
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import tiny_model

ROWS = [{"clean": [5, 6, 7], "corrupt": [5, 8, 7], "answer_id": 9, "wrong_answer_id": 4}]


@functools.cache
def opened(family="t5"):
    return cp.open_model(tiny_model(family, layers=1, heads=2))


@pytest.fixture
def both():
    """An experiment on a model with two streams."""
    return cp.Experiment(opened(), cp.load_pairs(ROWS, opened()), show_progress=False)


def test_a_site_without_its_stream_is_answered_with_both(refuses, both):
    with refuses(
        SiteNotFound,
        """
        no site named 'resid_pre.0@-1' in 'T5ForConditionalGeneration'
          streams    encoder decoder
          positions  each stream counts its own tokens
          fix: write 'encoder/resid_pre.0@-1' or 'decoder/resid_pre.0@-1'
        """,
    ):
        both.run("resid_pre.0@-1")


def test_cross_attention_stands_in_the_decoder(refuses, both):
    with refuses(
        SiteUnsupported,
        """
        'T5ForConditionalGeneration' does not have the site 'encoder/cross_z.0.1'
          reason  only the decoder has cross-attention
          fix: write 'cross_z.0.1'
        """,
    ):
        both.run("encoder/cross_z.0.1")


def test_a_model_of_one_stream_has_no_cross_attention(refuses, experiment):
    with refuses(
        SiteUnsupported,
        """
        'LlamaForCausalLM' does not have the site 'cross_z.0.1'
          reason  it reads no encoder, so that it has no cross-attention; use z
          fix: list the sites with: model.site_rows()
        """,
    ):
        experiment.run("cross_z.0.1")


def test_a_model_of_one_stream_has_no_encoder(refuses, experiment):
    with refuses(
        SiteUnsupported,
        """
        'LlamaForCausalLM' does not have the site 'encoder/resid_pre.0'
          reason  the model has no stream 'encoder'
          fix: list the sites with: model.site_rows()
        """,
    ):
        experiment.run("encoder/resid_pre.0")


def test_a_position_counts_the_tokens_of_its_stream(refuses, both):
    with refuses(
        PairError,
        """
        @3 lies outside the corrupted prompt of pair 0 of 'rows'
          corrupted  3 tokens: @0 to @2, or @-3 to @-1
          fix: name a position that every prompt has, such as @-1, or a span
        """,
    ):
        both.run("encoder/resid_pre.0@3")
    with refuses(
        PairError,
        """
        @1 lies outside the corrupted prompt of pair 0 of 'rows'
          corrupted  1 tokens: @0 to @0, or @-1 to @-1
          fix: name a position that every prompt has, such as @-1, or a span
        """,
    ):
        both.run("decoder/resid_pre.0@1")


def test_a_model_that_names_no_beginning_needs_the_decoders_prompt(refuses):
    module = tiny_model("t5", layers=1, heads=2)
    module.config.decoder_start_token_id = module.generation_config.decoder_start_token_id = None
    with refuses(
        PairError,
        """
        row 0 of 'rows' has no prompt for the decoder to begin with
          model  its settings name no decoder_start_token_id
          fix: give its token ids in a column decoder, the first token included
        """,
    ):
        cp.load_pairs(ROWS, cp.open_model(module))
    assert cp.load_pairs([{**ROWS[0], "decoder": [0, 7]}], cp.open_model(module))[0].clean.tolist() == [0, 7]


def test_a_text_for_the_decoder_needs_a_tokenizer(refuses):
    with refuses(
        PairError,
        """
        the decoder's prompt of row 0 of 'rows' is a text, but the model has no tokenizer
          text  'It is'
          fix: open_model(…, tokenizer=…), or give token ids
        """,
    ):
        cp.load_pairs([{**ROWS[0], "decoder": "It is"}], opened())


def test_pairs_of_one_prompt_do_not_fit_two_streams(refuses):
    ids = np.array([5, 6])
    with refuses(
        PairError,
        """
        'one' does not fit 'T5ForConditionalGeneration', which has an encoder and a decoder
          each pair holds  one prompt
          fix: read the pairs for this model: load_pairs(…, model)
        """,
    ):
        cp.Experiment(opened(), Pairs([Pair(ids, ids, ((3,),), ((4,),))], name="one"))


def test_pairs_of_two_streams_do_not_fit_one(refuses, experiment):
    with refuses(
        PairError,
        """
        'rows' does not fit 'LlamaForCausalLM', which takes one prompt
          each pair holds  a prompt for an encoder and one for a decoder
          fix: read the pairs for this model: load_pairs(…, model)
        """,
    ):
        cp.Experiment(experiment.model, cp.load_pairs(ROWS, opened()))


def test_pairs_have_an_encoders_prompt_all_or_none(refuses):
    ids = np.array([5, 6])
    with refuses(
        PairError,
        """
        pair 1 of 'half' has no prompt for an encoder, and others have
          without  1 of 2
          fix: give all of them one: Pair(…, encoder=Pair(clean, corrupt))
        """,
    ):
        Pairs([Pair(ids, ids, encoder=Pair(ids, ids)), Pair(ids, ids)], name="half")


def test_an_encoder_is_not_run_on_a_decoders_prompt(refuses):
    with refuses(
        ModelUnsupported,
        """
        'T5ForConditionalGeneration' needs a prompt for its encoder beside that of its decoder
          given  one prompt
          fix: read the pairs for this model: load_pairs(…, model)
        """,
    ):
        opened().inputs(np.array([[5, 6]]))


def test_models_that_number_columns_are_padded_on_the_right(refuses):
    model = opened("bart")
    rows = [*ROWS, {**ROWS[0], "clean": [5, 6], "corrupt": [7, 8]}]
    experiment = cp.Experiment(model, cp.load_pairs(rows, model), padding_side="left", engine="rows")
    with refuses(
        ModelUnsupported,
        """
        'BartModel' cannot run prompts that are padded on the left
          positions  it numbers the columns of a batch, padding included
          fix: pad on the right: Experiment(…, padding_side="right")
        """,
    ):
        experiment.run("encoder/resid_pre.0@-1")


def test_a_value_is_not_read_in_the_other_stream(refuses, both):
    with refuses(
        PatchError,
        """
        'decoder/resid_pre.0' cannot be given 'encoder/resid_pre.0'
          why not  one has the encoder's tokens, the other the decoder's
          fix: read a site of the same stream
        """,
    ):
        both.run(cp.Patch("decoder/resid_pre.0", cp.From("encoder/resid_pre.0")))


def test_rows_over_the_encoders_tokens_need_as_many_of_them(refuses):
    rows = [{**ROWS[0], "corrupt": [5, 8, 7, 9]}]
    experiment = cp.Experiment(opened(), cp.load_pairs(rows, opened()), show_progress=False)
    with refuses(
        PairError,
        """
        the keys of 'cross_pattern.0.1' in pair 0 of 'rows' are not those of its source
          why        a row over 4 keys cannot take one over 3
          rule       key by key: both prompts must have the same tokens in the same places from first to last
          clean      3 tokens
          corrupted  4 tokens
          fix: drop it (pairs.drop(0)), patch earlier queries, or patch z.0: it has no keys
        """,
    ):
        experiment.run("cross_pattern.0.1@0")


def test_dictionaries_and_paths_are_of_single_streams(refuses, both):
    with refuses(
        ModelUnsupported,
        """
        'T5ForConditionalGeneration' takes no dictionaries
          reason  it has an encoder and a decoder
          fix: patch its modules: module(PATH).output
        """,
    ):
        both.model.add_dictionary("sae", "nowhere")
    with refuses(
        ModelUnsupported,
        """
        paths of 'T5ForConditionalGeneration' cannot be patched
          why  it has an encoder and a decoder, and only single streams are followed
          fix: patch whole sites, such as sweep(experiment, 'cross_z')
        """,
    ):
        cp.direct_effect(both)


def test_an_encoder_of_sound_takes_arrays_of_its_shape(refuses):
    rows = [{"clean": np.zeros((5, 4)), "corrupt": np.zeros((5, 4)), "answer_id": 3}]
    with refuses(
        PairError,
        """
        the model's encoder cannot be given what row 0 of 'rows' holds
          given  an array of shape (5, 4)
          takes  arrays of shape (5, 12)
          fix: make it by the model's own processor
        """,
    ):
        cp.load_pairs(rows, opened("whisper"))
    with refuses(
        PairError,
        """
        the model's encoder cannot be given what row 0 of 'rows' holds
          given  an array of shape (5, 4)
          takes  token ids or text
          fix: make it by the model's own processor
        """,
    ):
        cp.load_pairs(rows, opened())
