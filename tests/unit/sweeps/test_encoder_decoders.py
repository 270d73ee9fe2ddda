"""Sweeps, values, answers and texts on models with an encoder and a decoder, against plain hooks on single prompts."""

import functools

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import tiny_model
from oracle_streams import ByHand
from tiers import quickly

FAMILIES = quickly(["t5", "bart", "umt5", "pegasus", "marian", "mbart"], "t5")


@functools.cache
def world(family="t5"):
    module = tiny_model(family, seed=3)
    return cp.open_model(module), ByHand(module, family)


def prompts(*sizes, answers=((3, 4),), spans=(1, 3), decoder=(7,)):
    """Return random pairs whose decoder begins alike."""
    rng, ids = np.random.default_rng(5), np.array(decoder)
    made = []
    for number, size in enumerate(sizes or (5, 5, 5)):
        encoder = Pair(rng.integers(3, 40, size), rng.integers(3, 40, size), spans={"subject": (spans, spans)})
        more = {"id": str(number), "group": "ab"[number % 2], "encoder": encoder}
        made.append(Pair(ids, ids, answers, ((9,),), **more))
    return Pairs(made, name="prompts")


def hidden(hand, place, pair, role, extra=()):
    return hand.run(pair.encoder.input(role), [*pair.input(role), *extra], reads=[place])[1][place]


def put(rows, values):
    """Return an edit that puts values into rows of a tensor."""

    def change(tensor):
        tensor[rows] = values
        return tensor

    return change


def logit_difference(pair, logits):
    return float(logits[-1, pair.answer[0][0]] - logits[-1, pair.wrong_answer[0][0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_sweep_over_layers_and_positions_walks_along_the_tokens_of_its_stream(family):
    (model, hand), pairs = world(family), prompts(answers=((3,),))
    found = cp.sweep(cp.Experiment(model, pairs, show_progress=False), "encoder/resid_pre")
    data = found.to_xarray()
    assert dict(data["metric"].sizes) == {"layer": 2, "position": 5, "pair": 3}
    assert data["token"].values.tolist() == ["(varies)"] * 5
    assert data["base_position"].values[0].tolist() == list(range(5))
    for layer, position in ((0, 0), (1, 4)):
        place = hand.place("encoder", "resid_pre", layer)[:2]
        for number, pair in enumerate(pairs):
            there = hidden(hand, place, pair, "clean")[position]
            logits, _ = hand.run(pair.encoder.corrupt, pair.corrupt, [(place, put(position, there))])
            got = float(data["metric"].sel(layer=layer, position=position).values[number])
            assert got == pytest.approx(logit_difference(pair, logits), abs=1e-10)
    of_decoder = cp.sweep(cp.Experiment(model, pairs, show_progress=False), "decoder/mlp_out").to_xarray()
    assert dict(of_decoder["metric"].sizes) == {"layer": 3, "position": 1, "pair": 3}
    assert of_decoder["token"].values.tolist() == ["7"]


def test_sweeps_over_heads_count_those_of_their_stream():
    model, _ = world("bart")
    experiment = cp.Experiment(model, prompts(answers=((3,),)), show_progress=False)
    assert dict(cp.sweep(experiment, "encoder/z").to_xarray()["metric"].sizes) == {"layer": 2, "head": 4, "pair": 3}
    heads = cp.sweep(experiment, "cross_z")
    assert dict(heads.to_xarray()["metric"].sizes) == {"layer": 3, "head": 2, "pair": 3}
    assert heads.provenance["site"] == "cross_z.*.*"
    by_token = cp.sweep(experiment, "cross_v.1", over=("head", "position"))
    assert dict(by_token.to_xarray()["metric"].sizes) == {"head": 2, "position": 5, "pair": 3}
    assert [str(site) for site in cp.everything_but(model, ["encoder/z.0.1", "encoder/z.1"])] == [
        f"encoder/z.0.{head}" for head in (0, 2, 3)
    ]


def test_answers_of_several_tokens_are_spelt_out_by_the_decoder():
    (model, hand), pairs = world(), prompts(4, 6)
    place = hand.place("encoder", "resid_pre", 1)[:2]
    wanted = []
    for pair in pairs:
        there = hidden(hand, place, pair, "clean")[-1]
        logits, _ = hand.run(pair.encoder.corrupt, [*pair.corrupt, 3], [(place, put(-1, there))])
        chosen = logits.log_softmax(-1)
        wanted.append(float(chosen[0, 3] + chosen[1, 4]))
    for engine in ("rows", "restart"):
        experiment = cp.Experiment(model, pairs, "log_probability", engine=engine, show_progress=False)
        got = experiment.run("encoder/resid_pre.1@-1").to_xarray()["metric"].values[0]
        assert np.abs(got - wanted).max() < 1e-10


def test_what_the_decoder_writes_on_is_what_the_model_generates():
    (model, hand), pairs = world(), prompts(4, 6, decoder=(0, 7))
    experiment = cp.Experiment(model, pairs, "log_probability", show_progress=False)
    got = cp.generate(experiment, "encoder/resid_pre.1@-1", max_new_tokens=4)
    greedy = {"max_new_tokens": 4, "do_sample": False, "use_cache": False}
    for pair, written in zip(pairs, got.ids.sel(intervention="base").values, strict=True):
        given, begun = torch.tensor(pair.encoder.corrupt)[None], torch.tensor(pair.corrupt)[None]
        theirs = hand.module.generate(given, decoder_input_ids=begun, **greedy)[0, 2:].tolist()
        assert [token for token in written.tolist() if token >= 0] == theirs
    place = hand.place("encoder", "resid_pre", 1)[:2]
    there, text = hidden(hand, place, pairs[1], "clean")[-1], []
    while len(text) < 4 and 2 not in text:
        logits, _ = hand.run(pairs[1].encoder.corrupt, [*pairs[1].corrupt, *text], [(place, put(-1, there))])
        text.append(int(logits[-1].argmax()))
    assert [token for token in got.ids.values[-1, 1].tolist() if token >= 0] == text


def test_means_are_taken_over_the_tokens_of_the_stream():
    (model, hand), pairs = world(), prompts(5, 5, 5, answers=((3,),))
    place = hand.place("encoder", "mlp_out", 1)[:2]
    mean = torch.stack([hidden(hand, place, pair, "corrupt") for pair in pairs]).mean(0)
    experiment = cp.Experiment(model, pairs, direction="noise", show_progress=False)
    got = experiment.run([cp.Patch("encoder/mlp_out.1", "mean"), cp.Patch("encoder/mlp_out.1@2", "mean")])
    for number, pair in enumerate(pairs):
        for cell, rows in enumerate((slice(None), 2)):
            logits, _ = hand.run(pair.encoder.clean, pair.clean, [(place, put(rows, mean[rows]))])
            wanted = logit_difference(pair, logits)
            assert got.to_xarray()["metric"].values[cell, number] == pytest.approx(wanted, abs=1e-10)


@pytest.mark.parametrize("value", ["resample", "noise", "zero", "interpolate(0.5)"])
@pytest.mark.parametrize("site", ["encoder/resid_pre.1", "cross_k.1", "decoder/resid_pre.1"])
def test_every_engine_puts_in_the_same_whatever_it_is(value, site):
    model, _ = world()
    pairs = prompts(5, 5, 7, 7, answers=((3,),))
    got = [
        cp.Experiment(model, pairs, direction="noise", engine=engine, show_progress=False).run(cp.Patch(site, value))
        for engine in ("reference", "restart")
    ]
    first, second = (one.to_xarray()["metric"].values for one in got)
    assert np.abs(first - second).max() < 1e-9
    assert np.abs(got[0].effect(per_pair=True).values).min() > 1e-6


def test_a_resampled_pair_is_another_as_the_encoder_sees_it():
    (model, hand), pairs = world(), prompts(5, 5, answers=((3,),))
    place = hand.place("decoder", "resid_pre", 1)[:2]
    got = cp.Experiment(model, pairs, direction="noise", show_progress=False).run(
        cp.Patch("decoder/resid_pre.1", cp.Resample(side="clean"))
    )
    for number, pair in enumerate(pairs):
        there = hidden(hand, place, pairs[1 - number], "clean")
        logits, _ = hand.run(pair.encoder.clean, pair.clean, [(place, put(slice(None), there))])
        assert got.to_xarray()["metric"].values[0, number] == pytest.approx(logit_difference(pair, logits), abs=1e-10)


def test_a_trace_goes_through_the_encoder():
    model, _ = world()
    experiment = cp.Experiment(model, prompts(answers=((3,),)), "probability", show_progress=False)
    traced = cp.trace(experiment, span="subject", window=2, kind="resid", draws=1)
    assert dict(traced["noise", "resid"].to_xarray()["metric"].sizes) == {
        "layer": 2,
        "position": 5,
        "draw": 1,
        "pair": 3,
    }
    assert traced.columns == (1, 2)


def test_the_logit_lens_reads_the_decoder():
    (model, hand), pairs = world(), prompts(answers=((3,),))
    lens = cp.logit_lens(cp.Experiment(model, pairs, show_progress=False))
    place = hand.place("decoder", "resid_post", 2)[:2]
    there = hidden(hand, hand.place("decoder", "resid_post", 0)[:2], pairs[0], "clean")
    logits, _ = hand.run(pairs[0].encoder.clean, pairs[0].clean, [(place, put(slice(None), there))])
    assert lens["clean"].values[0, 0] == pytest.approx(logit_difference(pairs[0], logits), abs=1e-10)


def test_sound_is_patched_frame_by_frame():
    model, _ = world("whisper")
    rng = np.random.default_rng(4)
    rows = [
        {
            "clean": rng.normal(size=(5, 12)),
            "corrupt": rng.normal(size=(5, 12)),
            "answer_id": 3 + k,
            "wrong_answer_id": 9,
        }
        for k in range(3)
    ]
    pairs = cp.load_pairs([{**row, "decoder": [0, 7], "spans": {"word": [1, 3]}} for row in rows], model)
    assert pairs.components.tolist() == [0, 1, 2]
    experiment = cp.Experiment(model, pairs, show_progress=False)
    data = cp.sweep(experiment, "encoder/resid_pre").to_xarray()
    assert dict(data["metric"].sizes) == {"layer": 2, "position": 6, "pair": 3}
    assert data["token"].values.tolist() == list("012345")
    got = experiment.run(["encoder/resid_pre.0@word", "encoder/resid_pre.0@1:3", "encoder/resid_pre.0", "logits"])
    values = got.to_xarray()["metric"].values
    assert np.array_equal(values[0], values[1])
    assert np.abs(values[2:] - experiment.baseline.clean[0]).max() < 1e-10  # both decoders begin alike


@pytest.mark.parametrize(
    "ask",
    [
        lambda experiment: cp.path_patch(experiment, "decoder/head_out", "logits"),
        cp.direct_effect,
        cp.direct_logit_attribution,
    ],
)
def test_what_follows_paths_says_that_there_are_two_streams(ask):
    model, _ = world()
    with pytest.raises(ModelUnsupported, match="an encoder and a decoder"):
        ask(cp.Experiment(model, prompts(answers=((3,),)), show_progress=False))
