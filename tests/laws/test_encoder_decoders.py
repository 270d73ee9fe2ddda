"""Laws of models with an encoder and a decoder: every site of either stream against plain hooks on single prompts."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import prove
from causalpatch.experiment import read_values
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import NAMES, Site, expand, parse
from causalpatch.sites.names import ATTENTION_SITES, FEATURE_SITES
from causalpatch.testing.encoder_decoders import FRAMES, MELS
from causalpatch.testing.tiny import ENCODER_DECODERS, VOCAB, tiny_model
from oracle_streams import ByHand
from tiers import quickly

FAMILIES = quickly(ENCODER_DECODERS, "t5", "bart", "whisper")
BY_HAND = ("embed", "pos_embed", "resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z")
BY_HAND += ("mlp_pre", "mlp_gate", "mlp_post", "final_norm")
CROSS_BY_HAND = ("cross_q", "cross_k", "cross_v", "cross_z", "cross_attn_out")
FEW = ("encoder/resid_pre", "encoder/z", "decoder/resid_post", "cross_k", "cross_z")
TOLERANCE = 1e-10


@functools.cache
def world(family):
    """Return a model of a family, opened, and plain hooks on it."""
    module = tiny_model(family, seed=3)
    return cp.open_model(module), ByHand(module, family)


def make_pairs(*sizes, seed=0):
    """Return random pairs: tokens of the encoder's clean and corrupted prompt, and of the decoder's."""
    rng = np.random.default_rng(seed)
    made = []
    for number, (clean, corrupt, clean_decoder, corrupt_decoder) in enumerate(sizes):
        ids = [rng.integers(3, VOCAB, size) for size in (clean, corrupt, clean_decoder, corrupt_decoder)]
        encoder = Pair(ids[0], ids[1])
        made.append(Pair(ids[2], ids[3], ((3 + number,),), ((20 + number,),), id=str(number), encoder=encoder))
    return Pairs(made, name="random")


@functools.cache
def equal(family):
    """Return pairs whose sides are equally long."""
    pairs = make_pairs((6, 6, 3, 3), (9, 9, 2, 2), (7, 7, 4, 4))
    return hearing(pairs) if family == "whisper" else pairs


@functools.cache
def unequal(family):
    """Return pairs whose sides are not."""
    pairs = make_pairs((6, 8, 3, 2), (9, 5, 2, 4))
    return hearing(pairs) if family == "whisper" else pairs


def hearing(pairs):
    """Return the pairs with sound for the encoder."""
    frames, rng = np.arange(FRAMES), np.random.default_rng(1)
    encoder = Pair(frames, frames, is_called="sound")
    sounds = [tuple(rng.normal(size=(2, MELS, 2 * FRAMES))) for _ in pairs]
    made = [replace(p, encoder=encoder, beside={"input_features": one}) for p, one in zip(pairs, sounds, strict=True)]
    return Pairs(made, name="sounds")


def sites_of(model, only=None):
    """Yield members of every kind of site that plain hooks reach, or of some: the first and the last."""
    for stream, part in model.shape.parts.items():
        names = [*(f"{stream}/{name}" for name in BY_HAND), *(CROSS_BY_HAND if stream == "decoder" else ())]
        for name in names if only is None else (name for name in only if name in names):
            if name.rpartition("/")[2] in part.refused:
                continue
            members = expand(parse(name), model.shape)
            yield from dict.fromkeys((members[0], members[-1]))


def difference(pair, logits):
    (answer,), (wrong,) = pair.answer[0], pair.wrong_answer[0]
    return float(logits[-1, answer] - logits[-1, wrong])


def by_hand(family, pair, base, patches):
    """Return the metric of one pair with patches, each a site with (base token, source token) or None for all."""
    model, hand = world(family)
    source = "clean" if base == "corrupt" else "corrupt"
    places = {}
    for site, _ in patches:
        path, side, has_units = hand.place(site.stream or "decoder", site.name, site.layer)
        width = model.sizes(site.name, site.stream)["head_width"] if "mlp" not in site.name else 1
        columns = slice(site.unit * width, (site.unit + 1) * width) if has_units else slice(None)
        places[site] = (path, side), columns
    reads = [place for place, _ in places.values()]
    _, there = hand.run(hand.read_by_encoder(pair, source), pair.input(source), reads=reads)
    _, here = hand.run(hand.read_by_encoder(pair, base), pair.input(base), reads=reads)

    def change(tensor, site, tokens):
        own, other = (slice(None), slice(None)) if tokens is None else tokens
        place, columns = places[site]
        new = there[place][other, columns]
        # The stream between attention and MLP is read in two places where norms stand in front: attention moves it.
        tensor[own, columns] = tensor[own, columns] + new - here[place][own, columns] if is_sum(hand, site) else new
        return tensor

    def written(site):
        if not is_sum(hand, site):
            return places[site][0]
        attention = "attn_out" if site.stream == "encoder" else "cross_attn_out"
        return hand.place(site.stream, attention, site.layer)[:2]

    edits = [(written(site), functools.partial(change, site=site, tokens=tokens)) for site, tokens in patches]
    return difference(pair, hand.run(hand.read_by_encoder(pair, base), pair.input(base), edits)[0])


def is_sum(hand, site):
    return site.name == "resid_mid" and hand.kind == "bart" and not hand.is_post


def tokens_at(model, pair, site, position, base):
    """Return the token of the base and of the source at a position of the site's stream."""
    own = pair.encoder if model.stream_of(site) == "encoder" else pair
    sizes = (len(own.input(base)), len(own.input("clean" if base == "corrupt" else "corrupt")))
    return tuple(size + position if position < 0 else position for size in sizes)


def measured(model, pairs, asked, direction, **more):
    experiment = cp.Experiment(model, pairs, direction=direction, show_progress=False, **more)
    return experiment.run(asked).to_xarray()["metric"].values


def cases(*quick):
    """Return every family in both directions with all of its sites, and the quick ones with few."""
    every = [(*case, None) for case in itertools.product(ENCODER_DECODERS, ("denoise", "noise"))]
    return [*((*case, FEW) for case in quick), *(pytest.param(*case, marks=pytest.mark.slow) for case in every)]


@pytest.mark.parametrize(("family", "direction", "only"), cases(("t5", "denoise"), ("bart", "noise")))
def test_a_patch_at_every_site_does_what_a_hook_does(family, direction, only):
    model, _ = world(family)
    sites, base = list(sites_of(model, only)), "corrupt" if direction == "denoise" else "clean"
    wanted = np.array([[by_hand(family, pair, base, [(site, None)]) for pair in equal(family)] for site in sites])
    for engine in ("rows", "restart"):
        got = measured(model, equal(family), sites, direction, engine=engine)
        assert np.abs(got - wanted).max() < TOLERANCE, (engine, sites[int(np.abs(got - wanted).max(1).argmax())])


@pytest.mark.parametrize(("family", "direction", "only"), cases(("t5", "noise"), ("bart", "denoise")))
def test_positions_count_the_tokens_of_their_stream_whatever_stands_beside(family, direction, only):
    model, _ = world(family)
    base = "corrupt" if direction == "denoise" else "clean"
    asked = [site.at(position) for site in list(sites_of(model, only))[::2] for position in (1, -1)]
    wanted = np.array(
        [
            [
                by_hand(family, pair, base, [(site.at(None), tokens_at(model, pair, site, site.position, base))])
                for pair in unequal(family)
            ]
            for site in asked
        ]
    )
    for side in ("right",) if model.family.counts_columns else ("right", "left"):
        got = measured(model, unequal(family), asked, direction, padding_side=side)
        assert np.abs(got - wanted).max() < TOLERANCE, side


@pytest.mark.slow
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_every_engine_gives_what_single_forwards_give(family):
    model, _ = world(family)
    sites = [*sites_of(model), *expand(parse("cross_pattern"), model.shape)[-1:], Site("cross_scores", 0, 0)]
    asked = [*sites, list(sites[:3]), ["encoder/z.1", "cross_k.0", "decoder/mlp_post.2.3"]]
    wanted = measured(model, equal(family), asked, "denoise", engine="reference")
    for engine in ("rows", "restart"):
        assert np.abs(measured(model, equal(family), asked, "denoise", engine=engine) - wanted).max() < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_writing_back_what_is_there_changes_nothing_bit_for_bit(family):
    model, _ = world(family)
    names = [row.name for row in model.site_rows() if row.refused is None and not row.name.startswith("module")]
    # Scores and patterns are computed step by step, in a kernel of our own.
    members = [site for name in names if (site := expand(parse(name), model.shape)[-1]).name not in ATTENTION_SITES]
    pairs = equal(family)[:1]
    experiment = cp.Experiment(model, pairs, direction="noise", engine="reference", show_progress=False)
    got = experiment.run([cp.Patch(site, "identity") for site in members]).to_xarray()["metric"].values
    assert (got == experiment.baseline.clean[0]).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_that_both_streams_begin_with_gives_the_source(family):
    model, _ = world(family)
    whole = [["encoder/resid_pre.0", "decoder/resid_pre.0"], ["encoder/resid_post.1", "decoder/resid_pre.0"]]
    experiment = cp.Experiment(model, equal(family), show_progress=False)
    got = experiment.run([*whole, "encoder/resid_pre.0", "decoder/resid_pre.0"]).to_xarray()["metric"].values
    assert np.abs(got[:2] - experiment.baseline.clean[0]).max() < TOLERANCE
    assert np.abs(got[2:] - experiment.baseline.clean[0]).max(1).min() > 1e-3  # either stream alone does not


@pytest.mark.parametrize("family", quickly(ENCODER_DECODERS, "t5"))
@pytest.mark.parametrize("name", ["cross_pattern", "encoder/pattern", "decoder/pattern"])
def test_a_row_of_weights_is_mixed_anew_with_the_values_that_are_there(family, name):
    model, hand = world(family)
    site = expand(parse(name), model.shape)[-1].at(1)
    stream, prefix = site.stream or "decoder", "cross_" if site.name.startswith("cross") else ""
    width = model.sizes("v", stream)["head_width"]
    columns = slice(site.unit * width, (site.unit + 1) * width)
    q, k, v, z = (hand.place(stream, prefix + part, site.layer)[:2] for part in "qkvz")
    got = measured(model, equal(family), [site], "denoise", engine="rows")[0]
    for number, pair in enumerate(equal(family)):
        _, there = hand.run(hand.read_by_encoder(pair, "clean"), pair.clean, reads=[q, k])
        _, here = hand.run(hand.read_by_encoder(pair, "corrupt"), pair.corrupt, reads=[v])
        scale = 1.0 if hand.kind == "t5" else width**-0.5
        scores = scale * there[q][1, columns] @ there[k][:, columns].T + bias_of(family, hand, site, len(there[k]))
        mixed = scores.softmax(-1) @ here[v][:, columns]

        def change(tensor, mixed=mixed):
            tensor[1, columns] = mixed
            return tensor

        wanted = difference(pair, hand.run(hand.read_by_encoder(pair, "corrupt"), pair.corrupt, [(z, change)])[0])
        assert abs(got[number] - wanted) < TOLERANCE


def bias_of(family, hand, site, n_keys):
    """Return what is added to the scores of query 1: T5's bias by distance, and minus infinity at later keys."""
    hidden = torch.zeros(n_keys, dtype=torch.float64)
    if site.stream == "decoder":
        hidden[2:] = -torch.inf
    if hand.kind != "t5" or site.name.startswith("cross"):
        return hidden
    block = site.layer if family == "umt5" else 0
    attends = hand.module.get_submodule(f"{site.stream}.block.{block}.layer.0.SelfAttention")
    return hidden + attends.compute_bias(2, n_keys)[0, site.unit, 1].detach()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["encoder/head_out", "decoder/head_out", "cross_head_out"])
def test_heads_and_the_bias_add_up_to_the_projection(family, name):
    model, hand = world(family)
    heads = [site for site in expand(parse(name), model.shape) if site.layer == 1]
    stream = heads[0].stream or "decoder"
    prefix = "cross_" if name.startswith("cross") else ""
    projection = hand.place(stream, f"{prefix}attn_out", 1)[:2]
    for index, pair in enumerate(equal(family)):
        _, here = hand.run(hand.read_by_encoder(pair, "clean"), pair.clean, reads=[projection])
        of_heads = [values_of(family, site)[index] for site in heads]
        bias = getattr(model.module.get_submodule(projection[0]), "bias", None)
        total = sum(of_heads) + (0.0 if bias is None else bias.detach().numpy())
        assert np.abs(total - here[projection].numpy()).max() < TOLERANCE


@functools.cache
def values_of(family, site):
    model, _ = world(family)
    experiment = cp.Experiment(model, equal(family), direction="noise", show_progress=False)
    return read_values(experiment, [site])[0]


@pytest.mark.slow
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_every_site_is_proved_or_refused_with_a_reason(family):
    model, _ = world(family)
    others = (*FEATURE_SITES, "module(PATH)")
    rows = [row for row in model.site_rows() if row.name.rpartition("/")[2] not in others]
    proofs = {row.name: prove(model, row.name) for row in rows}
    refused = {row.name: row.refused for row in rows if row.refused is not None}
    assert {name: proof.failure for name, proof in proofs.items() if proof.failure} == refused
    for name in ("cross_z", "cross_v", "cross_head_out", "cross_attn_out", "encoder/resid_mid", "decoder/resid_post"):
        assert proofs[name].passed[-1] == "algebra"
    assert proofs["cross_pattern"].passed == ("identity", "edit", "algebra", "kernel")
    for name in ("encoder/resid_pre", "decoder/resid_mid", "encoder/resid_post"):
        assert "whole" in proofs[name].passed
    assert set(NAMES) - {"module", *FEATURE_SITES} == {name.rpartition("/")[2] for name in proofs}


def test_sites_of_both_streams_in_one_run_are_written_together():
    family = "t5"
    model, _ = world(family)
    both = [Site("z", 1, 2, stream="encoder"), Site("cross_v", 2, 1), Site("mlp_post", 0, 5, stream="decoder")]
    wanted = [by_hand("t5", pair, "corrupt", [(site, None) for site in both]) for pair in equal(family)]
    for engine in ("reference", "restart"):
        assert np.abs(measured(model, equal(family), [both], "denoise", engine=engine)[0] - wanted).max() < TOLERANCE
