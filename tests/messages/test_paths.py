"""Refusals of edges, paths, and values given beforehand."""

import numpy as np

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported, PairError, PatchError, PathError, SettingError
from causalpatch.testing.tiny import tiny_model
from worlds import unchecked

GRAMMAR = "SENDER -> RECEIVER [-> [SENDER ->] RECEIVER]…"


def test_a_text_without_an_arrow_is_no_path(refuses):
    with refuses(
        PathError,
        f"""
        'head_out.3.2' is not a path
          grammar  {GRAMMAR}
          fix: write for instance head_out.3.2 -> q.5.1
        """,
    ):
        cp.Path.parse("head_out.3.2")


def test_a_path_needs_a_chain(refuses):
    with refuses(
        PathError,
        f"""
        'embed -> q.1.1 -> head_out.1.2 -> logits' is not a path
          problem  q.1.1 is no input of the component that sends head_out.1.2
          grammar  {GRAMMAR}
          fix: write for instance head_out.3.2 -> q.5.1 -> logits
        """,
    ):
        cp.Path.parse("embed -> q.1.1 -> head_out.1.2 -> logits")


def test_a_value_is_no_path(refuses, experiment):
    with (
        refuses(
            PathError,
            """
        3 is not a path
          type  int
          fix: give for instance Path(["head_out.3.2", "q.5.1"]) or "head_out.3.2 -> q.5.1"
        """,
        ),
        unchecked(),
    ):
        cp.path_patch(experiment, paths=[[3]])


def test_what_adds_nothing_to_the_stream_cannot_send(refuses, experiment):
    with refuses(
        PathError,
        """
        'z.0.1' cannot be a sender
          senders  embed  pos_embed  resid_pre  resid_mid  resid_post  attn_out  head_out  mlp_out
          why      a sender adds to the stream, or is the stream
          fix: did you mean head_out?
        """,
    ):
        cp.path_patch(experiment, "z.0.1", "q.1.0")


def test_an_output_cannot_receive(refuses, experiment):
    with refuses(
        PathError,
        """
        'mlp_out.1' cannot receive
          receivers  q.LAYER.HEAD  k.LAYER.KV_HEAD  v.LAYER.KV_HEAD  mlp_in.LAYER  logits
          fix: did you mean mlp_in?
        """,
    ):
        cp.path_patch(experiment, "embed", "mlp_out.1")


def test_one_receiver_has_one_head(refuses):
    with refuses(
        PathError,
        """
        'q.1' names several receivers
          fix: give one number for each layer and head, such as q.5.1
        """,
    ):
        cp.Edge("embed", "q.1")


def test_one_sender_has_one_head(refuses):
    with refuses(
        PathError,
        """
        'head_out.1' names several senders
          fix: give one number for each layer and head, such as head_out.3.2
        """,
    ):
        cp.Edge("head_out.1", "logits")


def test_a_sender_stands_before_its_receiver(refuses, experiment):
    with refuses(
        PathError,
        """
        nothing goes from 'mlp_out.1' to 'q.1.0'
          why    mlp_out.1 is added to the stream behind where q.1.0 reads it
          order  attention of layer 0, its MLP, attention of layer 1, …
          fix: name a sender that stands before its receiver
        """,
    ):
        cp.path_patch(experiment, paths=["mlp_out.1 -> q.1.0"])


def test_a_named_sender_behind_all_receivers_is_refused_and_none_is_left_out(refuses, experiment):
    with refuses(
        PathError,
        """
        nothing goes from 'head_out.1.0' to 'q.1.0'
          why    head_out.1.0 is added to the stream behind where q.1.0 reads it
          order  attention of layer 0, its MLP, attention of layer 1, …
          fix: name senders that stand before their receivers
        """,
    ):
        cp.path_patch(experiment, ["head_out.0", "head_out.1.0"], "q.1.0")


def test_parallel_blocks_have_no_way_from_attention_to_the_mlp_beside_it(refuses, pairs):
    model = cp.open_model(tiny_model("gpt_neox"))
    with refuses(
        PathError,
        """
        nothing goes from 'head_out.0.1' to 'mlp_in.0'
          why    attention and MLP of a layer read the same stream (parallel blocks)
          order  attention of layer 0, its MLP, attention of layer 1, …
          fix: name a sender that stands before its receiver
        """,
    ):
        cp.path_patch(cp.Experiment(model, pairs), paths=["head_out.0.1 -> mlp_in.0"])


def test_a_change_stays_at_its_token(refuses, experiment):
    with refuses(
        PathError,
        """
        nothing goes from 'head_out.0.1@1' to 'q.1.0@-1' in pair 0 of 'two.jsonl'
          sends     at tokens 1
          receives  at tokens 3
          why       all else is frozen, so that a change stays at its token
          fix: name one position for both, or go through a head's keys and values
        """,
    ):
        cp.path_patch(experiment, "head_out.0.1@1", "q.1.0@-1")


def test_a_kv_head_goes_on_with_heads_that_it_serves(refuses, experiment):
    with refuses(
        PathError,
        """
        'k.1.0' is no input of 'head_out.1.3'
          it serves  head_out.1.0, head_out.1.1
          fix: go on with head_out.1.0, or leave the sender out for all of them
        """,
    ):
        cp.path_patch(experiment, paths=["embed -> k.1.0 -> head_out.1.3 -> logits"])


def test_a_component_is_not_both_replaced_and_computed_again(refuses, experiment):
    with refuses(
        PathError,
        """
        'head_out.1.0' cannot both begin a path and stand in the middle of another one that goes on alike
          the other  embed -> q.1.0 -> head_out.1.0
          fix: leave one of them out: its source value holds all that reaches it
        """,
    ):
        cp.path_patch(experiment, paths=[["head_out.1.0 -> logits", "embed -> q.1.0 -> logits"]])


def test_no_sender_holds_another_one(refuses, experiment):
    with refuses(
        PathError,
        """
        'resid_pre.1' and 'head_out.0.1' cannot both send to 'q.1.0'
          why  resid_pre.1 holds head_out.0.1 already
          fix: measure them in runs of their own
        """,
    ):
        cp.path_patch(experiment, paths=[["resid_pre.1 -> q.1.0", "head_out.0.1 -> q.1.0"]])


def test_paths_of_one_run_end_in_an_input_once(refuses, experiment):
    with refuses(
        PathError,
        """
        paths end in 'q.1.0@-1' and in the same input at other positions
          ends  q.1.0@-1, q.1.0
          fix: let them end in one receiver, such as one with a range of positions
        """,
    ):
        cp.path_patch(experiment, paths=[["embed -> q.1.0@-1", "mlp_out.0 -> q.1.0"]])


def test_there_must_be_something_to_patch(refuses, experiment):
    with refuses(PathError, 'there is no path to patch\n  fix: paths=["head_out.3.2 -> q.5.1"]'):
        cp.path_patch(experiment, paths=[])
    with refuses(PathError, 'there is no sender\n  fix: path_patch(experiment, "head_out", "q.5.1")'):
        cp.path_patch(experiment, [], "q.1.0")
    with refuses(PathError, 'there is no receiver\n  fix: path_patch(experiment, "head_out", "q.5.1")'):
        cp.path_patch(experiment, "embed", [[]])


def test_senders_and_receivers_or_paths_are_named(refuses, experiment):
    with refuses(
        SettingError,
        """
        path patching needs senders and receivers, or paths
          given  senders
          fix: path_patch(experiment, "head_out", "q.5.1"), or path_patch(experiment, paths=["embed -> q.1.0"])
        """,
    ):
        cp.path_patch(experiment, "head_out")


def test_positions_are_walked_along_where_none_is_named(refuses, experiment):
    with refuses(
        SettingError,
        """
        'q.1.0@-1' has a position, so that there is none to walk along
          why  what is sent at a token is received at that token
          fix: leave "@-1" out, or positions="each"
        """,
    ):
        cp.path_patch(experiment, "embed", "q.1.0@-1", positions="each")
    with refuses(
        SettingError,
        """
        sets of paths have no axis 'position'
          positions  each
          fix: name positions in the paths: "head_out.3.2@-1 -> q.5.1"
        """,
    ):
        cp.path_patch(experiment, paths=["embed -> q.1.0"], positions="each")
    for ask in (cp.path_patch, cp.direct_effect):
        said = "positions cannot be 'all'\n  known  each\n  fix: positions=\"each\""
        with refuses(SettingError, said), unchecked():
            ask(experiment, "embed", **({"receivers": "logits"} if ask is cp.path_patch else {}), positions="all")


def test_paths_need_layers_that_run_token_by_token(refuses, llama, pairs):
    handle = llama.module.model.layers[0].register_forward_hook(lambda *_: None)
    try:
        with refuses(
            ModelUnsupported,
            """
            paths of 'LlamaForCausalLM' cannot be patched
              why     hooks stand on 'model.layers.0', and they expect whole prompts
              needed  layers that are known by name and can be run token by token
              fix: patch whole sites, such as sweep(experiment, 'z')
            """,
        ):
            cp.path_patch(cp.Experiment(llama, pairs), "embed", "q.1.0")
    finally:
        handle.remove()


def test_prompts_of_unequal_length_need_an_alignment(refuses, llama, uneven):
    with refuses(
        PairError,
        """
        pair 0 of 'uneven.jsonl' cannot be aligned by position
          clean      5 tokens: ... ' John' ' again'
          corrupted  6 tokens: ... ' Jo' ' Ann' ' again'
          fix: drop it (pairs.drop(0)) or align by span (pairs.align("spans"))
        """,
    ):
        cp.path_patch(cp.Experiment(llama, uneven), "embed", "q.1.0")


def test_given_values_come_one_array_for_each_pair(refuses, pairs):
    with refuses(
        PatchError,
        """
        1 arrays are no values for 2 pairs
          shapes  (4, 8)
          fix: give one array over (token, *value_axes) for each pair
        """,
    ):
        cp.Given.of(pairs, [np.zeros((4, 8))])
    with refuses(
        PatchError,
        """
        arrays of different axes are no values of one site
          shapes  (4, 4), (5, 5)
          fix: give one array over (token, *value_axes) for each pair
        """,
    ):
        cp.Given.of(pairs, [np.zeros((4, 4)), np.zeros((5, 5))])


def test_given_values_are_finite_and_laid_out(refuses, pairs):
    with refuses(PatchError, "given values hold NaN or infinity\n  fix: give finite numbers"):
        cp.Given.of(pairs, [np.full((4, 8), np.inf), np.zeros((5, 8))])
    with refuses(
        PatchError,
        """
        given values do not fit their pairs and tokens
          values  2
          tokens  1
          pairs   1
          fix: Given.of(pairs, arrays), one array over the base prompt's tokens per pair
        """,
    ):
        cp.Given(np.zeros((2, 8)), np.zeros(1), np.array([0, 2]), ("a",))


def test_given_values_fit_the_site(refuses, experiment, pairs):
    with refuses(
        PatchError,
        """
        the given values for 'z.0.1' do not fit
          given  shape (5,) per token
          site   shape (8,) per token
          fix: give values over the site's value axes
        """,
    ):
        experiment.run([cp.Patch("z.0.1", cp.Given.of(pairs, [np.zeros((4, 5)), np.zeros((5, 5))]))])


def test_given_values_fit_the_base_prompts(refuses, llama, uneven):
    # Made for the corrupted prompt, put into the clean one.
    given = cp.Given.of(uneven, [np.zeros((6, 8))])
    with refuses(
        PairError,
        """
        the given values for 'z.0.1' do not fit pair 0 of 'uneven.jsonl'
          values           up to token 5
          its base prompt  5 tokens
          fix: compute them for the prompts of the run that is changed, or turn the direction
        """,
    ):
        cp.Experiment(llama, uneven, direction="noise").run([cp.Patch("z.0.1", given)])


def test_given_values_need_tokens(refuses, classifier):
    pairs = cp.Pairs.from_arrays(np.zeros((1, 4), "f"), np.ones((1, 4), "f"), answer=[0], wrong_answer=[1])
    given = cp.Given.of(pairs, [np.zeros((4, 5))])
    with refuses(
        PatchError,
        """
        'module(0).output' has no tokens to be given values
          given  given values
          fix: name its axes, such as axes=(position,width), or give a Constant
        """,
    ):
        cp.Experiment(classifier, pairs).run([cp.Patch("module(0).output", given)])


def test_rows_over_keys_are_not_given(refuses, experiment, pairs):
    with refuses(
        PatchError,
        """
        'pattern.0.1' cannot be given the value 'given values'
          why not  its value is a row over keys, of which each query has another number
          known    Constant, Function, Identity, Interpolate, Mean, Resample, Source, Zero
          fix: take one of these, such as a Function of the current row
        """,
    ):
        experiment.run([cp.Patch("pattern.0.1", cp.Given.of(pairs, [np.zeros((4, 5)), np.zeros((5, 5))]))])
