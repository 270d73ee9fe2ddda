"""Refusals of sites: names, indices, modules, and activations that a model does not have."""

import numpy as np

import causalpatch as cp
from causalpatch.base.errors import (
    PairError,
    PatchDidNotFire,
    PatchError,
    SiteNotFound,
    SiteSyntaxError,
    SiteUnsupported,
)
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.pictures import tiny_seer
from causalpatch.testing.tiny import tiny_model


def test_a_name_of_another_library_is_answered_with_ours(refuses):
    with refuses(
        SiteNotFound,
        """
        no site named 'hidden_states.3@-1'
          name   'hidden_states'
          names  resid_post embed pos_embed resid_pre resid_mid attn_out mlp_out q k v q_rot k_rot scores
                 pattern z head_out cross_q cross_k cross_v cross_scores cross_pattern cross_z
                 cross_head_out cross_attn_out mlp_pre mlp_gate mlp_post router expert_out q_bias k_bias
                 v_bias attn_bias mlp_bias final_norm logits feature feature_error module
          fix: did you mean 'resid_post'?
        """,
    ):
        cp.parse("hidden_states.3@-1")


def test_a_misspelt_name_is_answered_with_the_closest(refuses):
    with refuses(
        SiteNotFound,
        """
        no site named 'resid_per.3'
          name   'resid_per'
          names  resid_pre resid_post resid_mid embed pos_embed attn_out mlp_out q k v q_rot k_rot scores
                 pattern z head_out cross_q cross_k cross_v cross_scores cross_pattern cross_z
                 cross_head_out cross_attn_out mlp_pre mlp_gate mlp_post router expert_out q_bias k_bias
                 v_bias attn_bias mlp_bias final_norm logits feature feature_error module
          fix: did you mean 'resid_pre'?
        """,
    ):
        cp.parse("resid_per.3")


def test_a_path_of_a_module_is_no_site_by_itself(refuses):
    with refuses(
        SiteNotFound,
        """
        no site named 'layers.3.mlp'
          name   'layers'
          names  embed pos_embed resid_pre resid_mid resid_post attn_out mlp_out q k v q_rot k_rot scores
                 pattern z head_out cross_q cross_k cross_v cross_scores cross_pattern cross_z
                 cross_head_out cross_attn_out mlp_pre mlp_gate mlp_post router expert_out q_bias k_bias
                 v_bias attn_bias mlp_bias final_norm logits feature feature_error module
          fix: the output of a module of the model is written module(PATH).output
        """,
    ):
        cp.parse("layers.3.mlp")


def test_a_head_out_of_range_is_answered_with_the_heads_there_are(refuses, experiment):
    with refuses(
        SiteNotFound,
        """
        no site named 'z.1.14' in 'LlamaForCausalLM'
          head  14 was asked for; this model has heads 0 to 3
          fix: list the sites with: model.site_rows()
        """,
    ):
        experiment.run(["z.1.14"])


def test_a_layer_out_of_range_is_answered_with_the_layers_there_are(refuses, experiment):
    with refuses(
        SiteNotFound,
        """
        no site named 'resid_pre.2' in 'LlamaForCausalLM'
          layer  2 was asked for; this model has layers 0 to 1
          fix: list the sites with: model.site_rows()
        """,
    ):
        experiment.run(["resid_pre.2"])


def test_a_query_head_at_a_key_is_answered_with_the_kv_head_that_serves_it(refuses, experiment):
    with refuses(
        SiteNotFound,
        """
        no site named 'k.1.3' in 'LlamaForCausalLM'
          kv_head  3 was asked for; this model has kv_heads 0 to 1
          head     3 is served by kv_head 1
          fix: write k.1.1
        """,
    ):
        experiment.run(["k.1.3"])


def test_a_text_that_is_no_site_is_answered_with_the_grammar(refuses):
    with refuses(
        SiteSyntaxError,
        """
        'z.9.6.2' is not a site
          problem  3 indices follow the name; a site has at most a layer and a unit
          grammar  [STREAM/]NAME[.LAYER[.UNIT]][@POSITION]
          fix: write z.9.6
        """,
    ):
        cp.parse("z.9.6.2")


def test_a_negative_layer_is_answered_with_how_layers_count(refuses):
    with refuses(
        SiteSyntaxError,
        """
        'resid_pre.-1' is not a site
          problem  layer -1 is negative
          layers   count from 0; only positions may be negative
          fix: give the number of the layer
        """,
    ):
        cp.parse("resid_pre.-1")


def test_a_position_that_is_none_is_answered_with_the_forms_of_positions(refuses):
    with refuses(
        SiteSyntaxError,
        """
        'z.9.6@last token' is not a site
          problem  'last token' is not a position
          allowed  3   -1   2:5   :-1   subject   *
          fix: write one of these
        """,
    ):
        cp.parse("z.9.6@last token")


def test_several_sites_where_one_is_needed_are_named(refuses):
    with refuses(
        SiteSyntaxError,
        """
        'z.9' is not a site
          problem  it names several sites: z.9.*
          grammar  [STREAM/]NAME[.LAYER[.UNIT]][@POSITION]
          fix: give one number for each layer and unit
        """,
    ):
        cp.Site.parse("z.9")


def test_an_axis_of_a_module_must_have_a_known_name(refuses):
    with refuses(
        SiteSyntaxError,
        """
        'module(conv1).output axes=(chanel,height,column)' is not a site
          problem  'chanel' does not name an axis after the pair
          axes     channel layer source_layer position head kv_head neuron expert feature width head_width
                   query_position key_position vocab intervention sender receiver draw seed height column
          fix: did you mean 'channel'?
        """,
    ):
        cp.parse("module(conv1).output axes=(chanel,height,column)")


def test_neurons_of_fused_experts_are_refused(refuses):
    model = cp.open_model(tiny_model("mixtral"))
    with refuses(
        SiteUnsupported,
        """
        'MixtralForCausalLM' does not have the site 'mlp_post.1.3'
          reason  the weights of the experts are fused, and no module holds a token's neurons; use
                  expert_out or mlp_out
          fix: list the sites with: model.site_rows()
        """,
    ):
        model.tap(cp.parse("mlp_post.1.3"))


def test_a_layer_without_experts_has_no_router(refuses):
    model = cp.open_model(tiny_model("jamba", layers=3))
    for site in ("router.0", "expert_out.2.1"):
        with refuses(
            SiteUnsupported,
            f"""
            'JambaForCausalLM' does not have the site '{site}'
              reason  layer {site[-1] if site[0] == "r" else 2} has one MLP and no experts: there is no module
                      model.layers.{site[-1] if site[0] == "r" else 2}.feed_forward.router
              fix: take one of the layers 1
            """,
        ):
            model.tap(cp.parse(site))


def test_a_family_without_experts_has_no_router(refuses):
    with refuses(
        SiteUnsupported,
        """
        'LlamaForCausalLM' does not have the site 'router.0'
          reason  its layers have no experts
          fix: list the sites with: model.site_rows()
        """,
    ):
        cp.open_model(tiny_model("llama")).tap(cp.parse("router.0"))


def test_parallel_blocks_have_no_middle_of_the_stream(refuses):
    model = cp.open_model(tiny_model("gpt_neox"))
    pairs = cp.load_pairs([{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}], model)
    with refuses(
        SiteUnsupported,
        """
        'GPTNeoXForCausalLM' does not have the site 'resid_mid.*'
          reason  attention and MLP read the same stream (parallel blocks); use resid_pre or resid_post
          fix: list the sites with: model.site_rows()
        """,
    ):
        cp.sweep(cp.Experiment(model, pairs), "resid_mid")


def test_a_model_of_no_known_family_has_sites_of_modules_only(refuses, tagger):
    pairs = cp.load_pairs([{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}], tagger)
    with refuses(
        SiteUnsupported,
        """
        'Tagger' does not have the site 'resid_pre.*'
          reason  no known family; use module(PATH).output, such as module(embed).output
          fix: list the sites with: model.site_rows()
        """,
    ):
        cp.sweep(cp.Experiment(tagger, pairs), "resid_pre")


def test_a_module_that_is_not_there_is_answered_with_the_closest(refuses, llama, pairs):
    with refuses(
        SiteNotFound,
        """
        no site named 'module(model.layer.1.mlp).output' in 'LlamaForCausalLM'
          module   no module 'model.layer.1.mlp'
          closest  model.layers.1.mlp  model.layers.0.mlp  model.layers.1
          fix: did you mean module(model.layers.1.mlp).output?
        """,
    ):
        cp.Experiment(llama, pairs).run(["module(model.layer.1.mlp).output"])


def test_a_path_with_a_star_that_matches_nothing_is_answered_with_modules(refuses, classifier):
    pairs = cp.Pairs.from_arrays([[0.0] * 4], [[1.0] * 4], [0], [1])
    with refuses(
        SiteNotFound,
        """
        no site named 'module(conv*).output' in 'Sequential'
          selected  no module matches the path
          modules   0  1  2
          fix: list the sites with: model.site_rows()
        """,
    ):
        cp.sweep(cp.Experiment(classifier, pairs), "module(conv*).output")


def test_a_module_that_runs_twice_is_ambiguous(refuses, tagger):
    pairs = cp.load_pairs([{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}], tagger)
    with refuses(
        SiteUnsupported,
        """
        'module(mix).output' is ambiguous: its module runs 2 times in one forward
          module  mix
          fix: choose a module that runs once, such as the one before or after it
        """,
    ):
        cp.Experiment(tagger, pairs).run(["module(mix).output"])


def test_a_module_that_never_runs_is_no_effect_of_zero(refuses, tagger):
    pairs = cp.load_pairs([{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}], tagger)
    with refuses(
        PatchDidNotFire,
        """
        nothing was read at 'module(spare).output'
          module  spare
          ran     0 times in this forward
          fix: choose a module that runs in the model's forward
        """,
    ):
        cp.Experiment(tagger, pairs).run([cp.Patch("module(spare).output", "zero")])


def test_a_position_in_a_tensor_without_positions_is_refused(refuses, classifier):
    pairs = cp.Pairs.from_arrays([[0.0] * 4], [[1.0] * 4], [0], [1])
    with refuses(
        SiteNotFound,
        """
        site 'module(0).output@-1' has no positions in 'Sequential'
          its axes  are not named
          fix: leave the position out, or name the axes: axes=(position,width)
        """,
    ):
        cp.Experiment(classifier, pairs).run(["module(0).output@-1"])


def test_axes_must_name_all_of_a_tensor(refuses, classifier):
    pairs = cp.Pairs.from_arrays([[0.0] * 4], [[1.0] * 4], [0], [1])
    with refuses(
        SiteUnsupported,
        """
        'module(0).output axes=(channel,height)' names 2 axes
          its tensor  has 1 after the pair, of sizes (5,)
          fix: name every axis after the pair, such as axes=(channel,height,column)
        """,
    ):
        cp.sweep(cp.Experiment(classifier, pairs), "module(0).output axes=(channel,height)", over="channel")


def test_a_part_of_an_output_that_is_not_there_is_refused(refuses, llama, pairs):
    with refuses(
        SiteUnsupported,
        """
        module(model.layers.0.self_attn).output[7] names no tensor
          problem  there is no item 7 in a tuple
          fix: pick an item, such as module(model.layers.0.self_attn).output[0] or ["name"]
        """,
    ):
        cp.Experiment(llama, pairs).run(["module(model.layers.0.self_attn).output[7]"])


def test_a_site_whose_definition_does_not_hold_in_the_model_is_refused(refuses):
    module = tiny_model("llama")
    # A layer that adds something else to the stream, as no llama does; the names of its modules stay the same.
    module.model.layers[1].register_forward_hook(lambda layer, args, output: output + 0.1)
    model = cp.open_model(module)
    pairs = cp.load_pairs([{"clean": [3, 4], "corrupt": [3, 5], "answer_id": 6, "wrong_answer_id": 7}], model)
    with refuses(
        SiteUnsupported,
        """
        site 'mlp_out' failed its proof in 'LlamaForCausalLM'
          failed  algebra: resid_pre + attn_out + mlp_out in layer 1 is off by 4.5e-03
          passed  identity, edit
          fix: see all sites with: model.site_rows()
        """,
    ):
        cp.Experiment(model, pairs).run(["mlp_out.1"])


def unequal():
    model = cp.open_model(tiny_model("llama"))
    pairs = Pairs([Pair(np.array([3, 4, 5, 6]), np.array([3, 9, 4, 5, 6]), ((5,),), ((6,),))], name="prompts")
    return cp.Experiment(model, pairs, show_progress=False)


def test_rows_over_keys_of_prompts_that_differ_in_length_do_not_meet(refuses):
    with refuses(
        PairError,
        """
        the keys of 'pattern.0.1' in pair 0 of 'prompts' are not those of its source
          why        query 4 takes the row of token 3 of the source prompt
          rule       key by key: both prompts must have the same tokens in the same places up to the query
          clean      4 tokens
          corrupted  5 tokens
          fix: drop it (pairs.drop(0)), patch earlier queries, or patch z.0: it has no keys
        """,
    ):
        unequal().run(["pattern.0.1@-1"])


def test_rows_over_keys_that_an_alignment_moves_do_not_meet(refuses):
    experiment = unequal()
    pairs = experiment.pairs.align("map", mapping=[[(1, 2), (3, 3)]])
    with refuses(
        PairError,
        """
        the keys of 'scores.0.1' in pair 0 of 'prompts' are not those of its source
          why        key 2 is aligned with token 1 of the source prompt
          rule       key by key: both prompts must have the same tokens in the same places up to the query
          clean      4 tokens
          corrupted  5 tokens
          fix: drop it (pairs.drop(0)), patch earlier queries, or patch z.0: it has no keys
        """,
    ):
        cp.Experiment(experiment.model, pairs).run(["scores.0.1@3"])
    assert cp.Experiment(experiment.model, pairs, show_progress=False).run(["scores.0.1@0"]).effect().shape == (1,)


def test_rows_of_different_queries_have_no_mean(refuses):
    with refuses(
        PatchError,
        """
        'pattern.0.1' has no mean over positions
          why not  each query sees other keys, so that rows of different queries have no mean
          fix: take the mean of each query over prompts: Mean(over="pairs")
        """,
    ):
        unequal().run([cp.Patch("pattern.0.1", cp.Mean("positions"))])


def test_a_hook_name_that_means_the_gate_in_gated_mlps_says_so(refuses):
    with refuses(
        SiteUnsupported,
        """
        'LlamaForCausalLM' does not have the site 'mlp_pre.0.3@-1'
          reason  'blocks.0.mlp.hook_pre.3@-1' is what goes into the activation function: in gated MLPs,
                  as here, the gate
          fix: write 'mlp_gate.0.3@-1'
        """,
    ):
        unequal().run(["blocks.0.mlp.hook_pre.3@-1"])


def test_sites_that_a_family_lacks_say_what_to_use_instead(refuses):
    with refuses(
        SiteUnsupported,
        """
        'LlamaForCausalLM' does not have the site 'pos_embed'
          reason  positions enter inside attention, by rotary embeddings; use q_rot or k_rot
          fix: list the sites with: model.site_rows()
        """,
    ):
        unequal().run(["pos_embed"])
    with refuses(
        SiteUnsupported,
        """
        'LlamaForCausalLM' does not have the site 'attn_bias.0'
          reason  self_attn.o_proj has no bias
          fix: list the sites with: model.site_rows()
        """,
    ):
        unequal().run(["attn_bias.0"])
    with refuses(
        SiteUnsupported,
        """
        'GPT2LMHeadModel' does not have the site 'mlp_gate.0.1'
          reason  its MLP has no gate; use mlp_pre
          fix: list the sites with: model.site_rows()
        """,
    ):
        cp.open_model(tiny_model("gpt2")).tap(cp.Site("mlp_gate", 0, 1))


def test_a_picture_has_only_so_many_tokens(refuses):
    model = cp.open_model(tiny_seer("vit"))
    pairs = Pairs.from_arrays(*np.zeros((2, 1, 3, 12, 8)), answer=[0], wrong_answer=[1], name="seen")
    with refuses(
        PairError,
        """
        @7 lies outside the corrupted picture of pair 0 of 'seen'
          corrupted  7 tokens: @0 to @6, or @-7 to @-1
          fix: name a position that every picture has, such as @-1, or a span
        """,
    ):
        cp.Experiment(model, pairs).run(["resid_pre.0@7"])


def test_a_model_of_pictures_alone_has_no_stream_of_texts(refuses):
    model = cp.open_model(tiny_seer("vit"))
    pairs = Pairs.from_arrays(*np.zeros((2, 1, 3, 12, 8)), answer=[0], wrong_answer=[1])
    with refuses(
        SiteUnsupported,
        """
        'ViTForImageClassification' does not have the site 'text/z.0.0'
          reason  the model has no stream 'text'; it has vision
          fix: list the sites with: model.site_rows()
        """,
    ):
        cp.Experiment(model, pairs).run(["text/z.0.0"])


def test_texts_that_all_runs_share_are_not_patched(refuses):
    model = cp.open_model(tiny_seer("clip"))
    pairs = Pairs.from_arrays(*np.zeros((2, 1, 3, 12, 12)), answer=[0], wrong_answer=[1])
    with refuses(
        SiteUnsupported,
        """
        'CLIPModel' does not have the site 'text/z.0.0'
          reason  the texts are the same in all runs; give pairs of prompts, and pictures
                  with_common(pixel_values=…)
          fix: list the sites with: model.site_rows()
        """,
    ):
        cp.Experiment(model, pairs.with_common(input_ids=np.ones((2, 3), dtype=int))).run(["text/z.0.0"])
