"""What is drawn: the same in every cell, batch and engine; from other pairs; as wide as the data."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PatchError
from causalpatch.engine.drawn import draw_donors
from causalpatch.pairs import Pair, Pairs
from oracle import Edit
from toys import Chain, opened, prompts, vectors
from worlds import random_pairs, tiny_world

ENGINES = ("wavefront", "restart", "rows", "reference")
PAIRS = random_pairs(5, n_pairs=6)
ALIKE = prompts(
    *[(rng.integers(3, 40, 5).tolist(), rng.integers(3, 40, 5).tolist()) for rng in [np.random.default_rng(2)] * 7]
)


@pytest.fixture(scope="module")
def llama():
    return tiny_world("llama", (2, 4, 2, 0))


def run(model, pairs, patches, direction="noise", **settings):
    """Return the effects of patches, (intervention, pair)."""
    experiment = cp.Experiment(model, pairs, direction=direction, metric="answer_logit", **settings)
    return experiment.run(patches, axes={"intervention": list(range(len(patches)))}).effect(per_pair=True).values


def embeddings(plain, pairs, side, tokens):
    return torch.cat([plain.value(pair.input(side), ("embed", None, None))[tokens(pair)] for pair in pairs])


@pytest.mark.parametrize("side", ["clean", "corrupt"])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_noise_is_three_standard_deviations_of_the_spans_embeddings(llama, side, padding_side):
    model, plain = llama
    experiment = cp.Experiment(model, PAIRS, direction="noise", padding_side=padding_side, max_rows=2)
    (fitted,) = experiment.fit([cp.Patch("embed@subject", cp.Noise(side=side))])
    subject = embeddings(plain, PAIRS, side, lambda pair: slice(*pair.spans["subject"][side == "corrupt"]))
    assert fitted.patches[0].value.sigma == pytest.approx(3 * float(subject.std()), rel=1e-12)
    effects = experiment.run([cp.Patch("embed@subject", cp.Noise(side=side)), fitted.patches[0]], axes=None)
    np.testing.assert_allclose(*effects.to_xarray()["metric"].values, rtol=0, atol=1e-12)
    record = effects.provenance["fitted"][0]
    assert record["sigma_low"] == record["sigma_high"] == pytest.approx(3 * float(subject.std()), rel=1e-12)


def test_noise_has_one_width_in_all_cells_of_a_sweep_over_positions(llama):
    model, plain = llama
    experiment = cp.Experiment(model, ALIKE, direction="noise", metric="answer_logit")
    effects = cp.sweep(experiment, "embed", value="noise")
    everything = embeddings(plain, ALIKE, "corrupt", lambda pair: slice(None))
    assert effects.provenance["fitted"][0]["sigma_high"] == pytest.approx(3 * float(everything.std()), rel=1e-12)


def test_a_draw_is_the_same_in_every_cell(llama):
    model, _ = llama
    noise = cp.Patch("embed@1", cp.Noise(0.5))
    alone, again, with_more, other = run(
        model,
        PAIRS,
        [
            noise,
            [noise, cp.Patch("z.1.1@0", "identity")],
            [noise, "z.0.1@-1"],
            cp.Patch("embed@1", cp.Noise(0.5, draw=1)),
        ],
    )
    np.testing.assert_allclose(alone, again, rtol=0, atol=1e-12)
    assert (np.abs(alone - with_more) > 1e-6).any()
    assert (np.abs(alone - other) > 1e-6).all()


@pytest.mark.parametrize("value", [cp.Noise(0.5, seed=3), cp.Resample(seed=3)])
def test_what_is_drawn_does_not_depend_on_order_batch_or_other_sites(llama, value):
    model, _ = llama
    patches = [cp.Patch(site, value) for site in ("embed@1", "z.0.2@-1", "resid_post.1@0")]
    straight = run(model, ALIKE, patches)
    order = [4, 2, 6, 0, 1, 5, 3]
    np.testing.assert_allclose(run(model, ALIKE.take(order), patches), straight[:, order], rtol=0, atol=1e-10)
    np.testing.assert_allclose(run(model, ALIKE, patches[::-1], max_rows=2), straight[::-1], rtol=0, atol=1e-10)


def test_noise_does_not_depend_on_which_pairs_run_beside_it(llama):
    model, _ = llama
    patches = [cp.Patch("embed@1", cp.Noise(0.5)), cp.Patch("mlp_out.0", cp.Noise(0.1))]
    some = [1, 4]
    np.testing.assert_allclose(
        run(model, PAIRS.take(some), patches), run(model, PAIRS, patches)[:, some], rtol=0, atol=1e-10
    )


def test_noise_is_standard_normal_times_sigma_and_differs_between_sites_and_tokens(llama):
    model, _ = llama
    seen = {}

    def keep(name):
        def function(current, source):
            seen.setdefault(name, []).append(current.clone())
            return current

        return cp.Function(function, name, needs_source=False)

    long = prompts(
        *[(np.random.default_rng(n).integers(3, 40, 60).tolist(), [4, 5]) for n in range(8)], answer=1, wrong=2
    )
    long = long.align("map", mapping=[[(0, 0)]] * len(long))
    quiet = [cp.Patch("attn_out.0", 0.0), cp.Patch("mlp_out.0", 0.0)]
    for name, sigma in (("noised", 2.0), ("plain", 0.0)):
        experiment = cp.Experiment(model, long, direction="noise", engine="reference", metric="answer_logit")
        experiment.run([[cp.Patch("embed", cp.Noise(sigma)), *quiet, cp.Patch("resid_pre.1", keep(name))]])
    # The function is tried on few tokens first; whole prompts hold sixty.
    noised, plain = ([each for each in seen[name] if len(each) == 60][:8] for name in ("noised", "plain"))
    drawn = torch.stack(noised) - torch.stack(plain)
    n = drawn.numel()
    assert float(drawn.mean()) == pytest.approx(0, abs=6 * 2 / n**0.5)
    assert float(drawn.std()) == pytest.approx(2, rel=6 / (2 * n) ** 0.5)
    flat = drawn.reshape(-1, drawn.shape[-1])
    alike = torch.corrcoef(flat)[~torch.eye(len(flat), dtype=torch.bool)]
    assert float(alike.abs().max()) < 0.9
    assert float(alike.mean()) == pytest.approx(0, abs=0.02)


def test_two_names_of_one_stream_have_one_noise(llama):
    model, _ = llama
    first, second = run(
        model, PAIRS, [cp.Patch("resid_post.0@-1", cp.Noise(0.5)), cp.Patch("resid_pre.1@-1", cp.Noise(0.5))]
    )
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-12)
    assert (first != 0).all()


@pytest.mark.parametrize("base", ["clean", "corrupt"])
@pytest.mark.parametrize("side", ["clean", "corrupt"])
def test_donors_are_other_prompts_of_the_same_length_where_there_are_any(base, side):
    pairs = random_pairs(11, n_pairs=40, shared=0.0)
    for draw in range(3):
        donated = draw_donors(pairs, base, cp.Resample(draw=draw, side=side))
        for pair in pairs:
            own, donor = pair.input(base), pairs[donated.donor(pair)].input(side)
            assert not np.array_equal(own, donor)
            others = [each.input(side) for each in pairs]
            if any(len(each) == len(own) and not np.array_equal(each, own) for each in others):
                assert len(donor) == len(own)


def test_draws_go_through_all_other_pairs_before_one_comes_again():
    found = [draw_donors(ALIKE, "clean", cp.Resample(draw=draw)).donor(ALIKE[0]) for draw in range(14)]
    assert sorted(found[:7]) == sorted(found[7:]) == list(range(7))
    assert found[:7] == found[7:]
    assert [draw_donors(ALIKE, "clean", cp.Resample(1, draw)).donor(ALIKE[0]) for draw in range(7)] != found[:7]


@pytest.mark.parametrize("engine", ENGINES)
def test_a_resampled_stream_gives_the_donors_own_run(llama, engine):
    model, _ = llama
    value = cp.Resample(side="clean")
    experiment = cp.Experiment(model, ALIKE, direction="noise", metric="answer_logit", engine=engine)
    got = experiment.run([cp.Patch("resid_pre.0", value)]).to_xarray()["metric"].values[0]
    donated = draw_donors(ALIKE, "clean", value)
    donors = Pairs([Pair(ALIKE[donated.donor(pair)].clean, pair.corrupt, pair.answer, id=pair.id) for pair in ALIKE])
    wanted = cp.Experiment(model, donors, metric="answer_logit").baseline.clean[0]
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-10)


def test_spans_and_columns_are_resampled_from_their_like(llama):
    model, plain = llama
    pairs = random_pairs(3, n_pairs=5).align("spans")
    value = cp.Resample(side="corrupt")
    donated = draw_donors(pairs, "corrupt", value)
    named, by_column = run(
        model,
        pairs,
        [cp.Patch("resid_pre.1@subject", value, align="first"), cp.Patch("resid_pre.1", value, column=0)],
        "denoise",
    )
    for number, pair in enumerate(pairs):
        donor = pairs[donated.donor(pair)]
        mine, theirs = (range(*each.spans["subject"][1]) for each in (pair, donor))
        whole = plain.value(donor.corrupt, ("resid_pre", 1, None))
        base = plain.logits(pair.corrupt)[-1][pair.answer[0][0]]
        for got, n in ((named[number], min(len(mine), len(theirs))), (by_column[number], 1)):
            edit = Edit(("resid_pre", 1, None), list(mine)[:n], whole[list(theirs)[:n]])
            wanted = plain.logits(pair.corrupt, [edit])[-1][pair.answer[0][0]] - base
            assert got == pytest.approx(float(wanted), abs=1e-10)


@pytest.mark.parametrize("engine", ["reference", "rows", "graph"])
def test_arrays_are_resampled_and_noised_too(engine):
    model, pairs = opened(Chain()), vectors(5)
    patches = [
        cp.Patch("module(first).output", value) for value in (cp.Resample(side="clean"), cp.Noise(0.5), cp.Noise())
    ]
    experiment = cp.Experiment(model, pairs, direction="noise", engine=engine)
    got = experiment.run(patches, axes={"intervention": [0, 1, 2]}).effect(per_pair=True).values
    wanted = cp.Experiment(model, pairs, direction="noise", engine="reference", max_rows=1).run(
        patches, axes={"intervention": [0, 1, 2]}
    )
    np.testing.assert_allclose(got, wanted.effect(per_pair=True).values, rtol=0, atol=1e-9)
    assert (np.abs(got) > 1e-6).all()


def test_a_spread_needs_more_than_one_number(llama):
    model, _ = llama
    one = prompts(([3, 4, 5], [6, 4, 5]))
    with pytest.raises(PatchError, match="cannot be taken of 1 numbers"):
        cp.Experiment(model, one, direction="noise").run([cp.Patch("mlp_post.0.3@-1", "noise")])


def test_means_are_taken_per_group(llama):
    model, plain = llama
    pairs = random_pairs(9, n_pairs=7)
    assert {pair.group for pair in pairs} == {"a", "b"}
    (fitted,) = cp.Experiment(model, pairs).fit([cp.Patch("z.1.2", cp.Mean("positions", "clean", per_group=True))])
    value = fitted.patches[0].value
    assert value.groups == ("a", "b")
    for number, name in enumerate(value.groups):
        mine = torch.cat([plain.value(pair.clean, ("z", 1, 2)) for pair in pairs if pair.group == name])
        np.testing.assert_allclose(value.array[number], mine.mean(0), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("value", [cp.Mean(side="clean"), cp.Mean("positions"), cp.Mean("positions", per_group=True)])
def test_what_was_fitted_on_the_same_pairs_gives_the_same_numbers(llama, value):
    model, _ = llama
    asked = [cp.Patch(site, value) for site in ("z.0@-1", "attn_out.1@0", "resid_post.0@1")]
    experiment = cp.Experiment(model, PAIRS, direction="noise")
    fitted = experiment.fit(asked)
    first, second = (experiment.run(each).to_xarray()["metric"].values for each in (asked, fitted))
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-12)
    assert len(fitted[0].patches) == 4


def test_several_draws_have_an_axis_and_a_spread(llama):
    model, _ = llama
    experiment = cp.Experiment(model, ALIKE, direction="noise", metric="answer_logit")
    effects = cp.sweep(experiment, "resid_pre@1", value=cp.Noise(2.0), draws=4)
    assert effects.dims == ("layer", "draw", "pair")
    single = [cp.sweep(experiment, "resid_pre@1", value=cp.Noise(2.0, draw=draw)) for draw in range(4)]
    per_draw = np.stack([one.effect().values for one in single], 1)
    np.testing.assert_allclose(effects.effect().values, per_draw, rtol=0, atol=1e-12)
    np.testing.assert_allclose(effects.spread().values, per_draw.std(1, ddof=1), rtol=1e-9)
    mean = effects.over_draws()
    assert mean.dims == ("layer", "pair")
    np.testing.assert_allclose(mean.effect().values, per_draw.mean(1), rtol=0, atol=1e-12)
    gap = [one.to_xarray()["baseline_clean"].values - one.to_xarray()["baseline_reference"].values for one in single]
    np.testing.assert_allclose(mean.recovered().values, -per_draw.mean(1) / np.mean(gap), rtol=1e-9)
    assert "mean over 4 draws" in mean.provenance["notes"][-1]
    assert "draws    4" in repr(effects)


def test_effects_of_draws_come_back_from_disk(llama, tmp_path):
    model, _ = llama
    experiment = cp.Experiment(model, ALIKE, direction="noise", metric=["answer_logit", "probability"])
    effects = cp.sweep(experiment, "z.0@1", value=cp.Resample(), draws=2)
    again = cp.Effects.load(effects.save(tmp_path))
    assert again.to_xarray().equals(effects.to_xarray())
    assert again.to_dataframe().equals(effects.to_dataframe())
    frame = effects.to_dataframe()
    assert np.allclose(frame["metric"] - frame["base"], frame["effect"])
