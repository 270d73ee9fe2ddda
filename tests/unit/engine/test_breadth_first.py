"""Sweeps of models whose weights are fetched: the numbers of the whole model, each layer once per pass."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.engine import breadth_first, wave
from causalpatch.engine.layered import LayeredCapture
from causalpatch.engine.once import ports_of_job
from causalpatch.engine.stack import Stack
from checkpoints import FAMILIES, count_layers, opened, write
from tiers import quickly
from worlds import numbers, random_pairs

SWEEPS = ("resid_pre", "z", "mlp_out", "mlp_post@-1")
TIGHT = 2e-5
"""A budget in GiB that holds the streams of a few runs."""
METRICS = [cp.logit_difference, cp.log_probability]


def experiment(model, pairs, **settings):
    settings = {"metric": METRICS, "budget_gib": TIGHT, "engine": "wavefront", "show_progress": False} | settings
    return cp.Experiment(model, pairs, **settings)


def both(place, dtype="float32", **settings):
    return [opened(place, is_streamed=is_streamed, dtype=dtype, **settings) for is_streamed in (False, True)]


def pairs_of(n=3, seed=0):
    return random_pairs(6 + seed, n)


@pytest.mark.parametrize("family", quickly(list(FAMILIES), "gpt2", "llama", "gemma2", "gpt_neox"))
def test_sweeps_are_those_of_the_whole_model_bit_for_bit(tmp_path, family):
    whole, streamed = both(write(tmp_path, family))
    pairs = pairs_of()
    assert cp.plan_sweep(experiment(streamed, pairs), "resid_pre").wave.passes > 1
    for site in SWEEPS:
        wanted, got = (cp.sweep(experiment(model, pairs), site) for model in (whole, streamed))
        assert np.array_equal(numbers(got), numbers(wanted), equal_nan=True), site
        assert np.array_equal(got.to_xarray()["status"], wanted.to_xarray()["status"])
        assert got.provenance["engine"]["tier"] == "wavefront"


@pytest.mark.parametrize("family", quickly(list(FAMILIES), "gpt2", "llama"))
def test_sweeps_in_float64_are_those_of_plain_forwards(tmp_path, family):
    whole, streamed = both(write(tmp_path, family), dtype="float64")
    pairs = pairs_of(2)
    for site in ("resid_pre", "z"):
        wanted = cp.sweep(experiment(whole, pairs, engine="reference"), site)
        got = cp.sweep(experiment(streamed, pairs), site)
        same = cp.sweep(experiment(whole, pairs), site)
        assert np.array_equal(numbers(got), numbers(same), equal_nan=True)
        # Norms of transformers compute in float32 whatever they are given.
        limit = 1e-10 if family in ("gpt2", "gpt_neox") else 1e-4
        assert np.nanmax(np.abs(numbers(got) - numbers(wanted))) <= limit


@pytest.mark.parametrize("budget_gib", [1e-3, 1e-5])
def test_each_layer_is_fetched_once_per_pass_and_once_for_the_untouched_runs(tmp_path, budget_gib, monkeypatch):
    model = opened(write(tmp_path, "llama", layers=4), is_streamed=True)
    asked = experiment(model, pairs_of(), budget_gib=budget_gib)
    plan = cp.plan_sweep(asked, "resid_pre")
    cp.sweep(asked, "resid_pre")  # proofs and checks are behind us
    passes = passes_of(model, asked, "resid_pre", monkeypatch)
    # Each pass, the untouched runs of the wavefront, and a plain forward to compare them with.
    assert count_layers(model) == [sum(layer in each for each in passes) + 2 for layer in range(4)]
    assert plan.wave.passes >= len(passes)  # which knows of no cells that turn out to be derived
    assert (len(passes) > 5) == (budget_gib == 1e-5)


def passes_of(model, asked, site, monkeypatch):
    """Sweep, and return the layers of each pass; what was fetched before does not count."""
    real, step, passes = breadth_first._Front._pass, breadth_first._Front._step, []

    def counting(front, members):
        passes.append([])
        return real(front, members)

    def stepping(waves, layer):
        passes[-1].append(layer)
        step(waves, layer)

    model.weights.loads.clear()
    model.weights.bytes_loaded = 0
    with monkeypatch.context() as patched:
        patched.setattr(breadth_first._Front, "_pass", counting)
        patched.setattr(breadth_first._Front, "_step", staticmethod(stepping))
        cp.sweep(asked, site)
    assert all(len(set(layers)) == len(layers) for layers in passes)
    return passes


def test_the_plan_says_how_often_layers_are_fetched_and_how_many_bytes_that_is(tmp_path, monkeypatch):
    model = opened(write(tmp_path, "llama", layers=4), is_streamed=True)
    pairs = random_pairs(2, 3, shared=0.0)  # no cell is derived
    asked = experiment(model, pairs, metric=cp.logit_difference)
    plan = cp.plan_sweep(asked, "resid_pre")
    cp.sweep(asked, "resid_pre")
    passes = passes_of(model, asked, "resid_pre", monkeypatch)
    assert len(passes) == plan.wave.passes > 1
    layers, head = sum(model.weights.layer_bytes), model.weights.units["lm_head"].n_bytes
    loads = 4 + sum(map(len, passes))
    planned = loads * layers // 4 + (len(passes) + 1) * head
    assert (plan.wave.fetches.loads, plan.wave.fetches.n_bytes) == (loads, planned)
    text = str(plan)
    assert f"in {len(passes)} passes over the layers and one for the untouched runs" in text
    assert f"4 layers of {model.weights.layer_bytes[0] / 2**20:,.1f} MiB from disk: {loads} fetches" in text
    # In truth also a plain forward, rows of the embedding and the norms.
    plain = layers + head
    assert planned + plain <= model.weights.bytes_loaded < 1.1 * (planned + plain)


def test_layers_before_the_first_patch_are_fetched_for_the_untouched_runs_alone(tmp_path):
    model = opened(write(tmp_path, "llama", layers=4), is_streamed=True)
    asked = experiment(model, pairs_of())
    sites = [f"resid_pre.2@{token}" for token in range(3)]
    plan = asked.plan(sites)
    asked.run(sites)
    model.weights.loads.clear()
    asked.run(sites)
    found = count_layers(model)
    assert found[0] == found[1] == 2  # untouched runs, and a plain forward that they are compared with
    assert found[2] == found[3]
    assert plan.wave.fetches.loads <= sum(found)


@pytest.mark.parametrize("batches", [1, 3])
def test_pairs_in_many_batches_meet_each_layer_together(tmp_path, batches, monkeypatch):
    place = write(tmp_path, "gpt2")
    whole, streamed = both(place)
    pairs = pairs_of(9)
    budget = 2e-3 if batches == 1 else 1e-4
    begun = []
    real = LayeredCapture.begin
    monkeypatch.setattr(LayeredCapture, "begin", lambda capture: (begun.append(capture), real(capture))[1])
    wanted = cp.sweep(experiment(whole, pairs, budget_gib=budget), "resid_pre")
    cp.sweep(experiment(streamed, pairs, budget_gib=budget), "resid_pre")
    begun.clear()
    streamed.weights.loads.clear()
    got = cp.sweep(experiment(streamed, pairs, budget_gib=budget), "resid_pre")
    assert len(begun) >= batches
    assert (len(begun) > 1) == (batches > 1)
    assert np.array_equal(numbers(got), numbers(wanted), equal_nan=True)


def test_answers_of_several_tokens_go_through_the_layers_with_the_prompts(tmp_path):
    whole, streamed = both(write(tmp_path, "llama"))
    draw = np.random.default_rng(3)
    made = [
        cp.Pair(draw.integers(1, 40, 5), draw.integers(1, 40, 5), ((7, 8, 9),), ((4, 5),), id=str(n)) for n in range(3)
    ]
    pairs = cp.Pairs(made, name="long answers")
    for site in ("resid_pre", "z"):
        wanted, got = (
            cp.sweep(experiment(model, pairs, metric=cp.log_probability), site) for model in (whole, streamed)
        )
        assert np.array_equal(numbers(got), numbers(wanted), equal_nan=True)


def test_prompts_of_several_lengths_and_values_of_every_kind(tmp_path):
    whole, streamed = both(write(tmp_path, "gemma2"))
    draw = np.random.default_rng(5)
    made = []
    for number, length in enumerate((4, 7, 5, 8)):
        clean, corrupt = draw.integers(1, 40, (2, length))
        made.append(cp.Pair(clean, corrupt, ((int(draw.integers(40)),),), ((3,),), id=str(number)))
    pairs = cp.Pairs(made, name="uneven")
    asked = [
        cp.Patch(cp.parse("resid_pre.1@-1"), cp.Zero()),
        cp.Patch(cp.parse("mlp_out.0@-1"), cp.Mean("pairs")),
        cp.Patch(cp.parse("z.1.2@-2"), cp.Noise(0.3)),
        cp.Patch(cp.parse("embed@-1")),
        cp.Patch(cp.parse("attn_out.2@-1"), cp.Resample()),
        cp.Patch(cp.parse("final_norm@-1")),
        cp.Patch(cp.parse("pattern.1.0@-1"), cp.Zero()),
    ]
    wanted, got = (experiment(model, pairs).run(asked) for model in (whole, streamed))
    assert np.array_equal(numbers(got), numbers(wanted), equal_nan=True)


def test_every_token_may_be_read(tmp_path):
    whole, streamed = both(write(tmp_path, "gpt_neox"))
    metric = cp.metric(lambda outputs, pairs: outputs.logits[:, 1:].sum((1, 2)), name="all", position="all")
    wanted, got = (cp.sweep(experiment(model, pairs_of(), metric=metric), "resid_pre") for model in (whole, streamed))
    assert np.array_equal(numbers(got), numbers(wanted), equal_nan=True)


@pytest.mark.parametrize("most", [40, 9])
def test_calls_that_do_not_fit_are_made_smaller_and_give_the_same_numbers(tmp_path, monkeypatch, most):
    whole, streamed = both(write(tmp_path, "llama"))
    pairs = pairs_of()
    asked = experiment(streamed, pairs, budget_gib=1e-2)
    wanted = cp.sweep(experiment(whole, pairs, budget_gib=1e-2), "resid_pre")
    plenty = cp.sweep(asked, "resid_pre")
    real = wave.call_layer

    def limited(stack, run, layer, hidden, *args, **kwargs):
        if len(hidden) > most:
            raise torch.OutOfMemoryError("no room")
        return real(stack, run, layer, hidden, *args, **kwargs)

    monkeypatch.setattr(wave, "call_layer", limited)
    got = cp.sweep(asked, "resid_pre")
    assert np.allclose(numbers(got), numbers(wanted), atol=1e-4, equal_nan=True)
    assert got.provenance["cost"]["token_layers"] == plenty.provenance["cost"]["token_layers"]
    monkeypatch.setattr(wave, "call_layer", limited)
    assert all(parameter.is_meta for parameter in streamed.module.parameters())


def test_a_run_that_does_not_fit_by_itself_is_an_error(tmp_path, monkeypatch):
    streamed = opened(write(tmp_path, "llama"), is_streamed=True)
    asked = experiment(streamed, pairs_of())
    cp.sweep(asked, "resid_pre")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(wave, "call_layer", fail)
    with pytest.raises(cp.UnsupportedError, match="does not fit into memory"):
        cp.sweep(asked, "resid_pre")
    assert all(parameter.is_meta for parameter in streamed.module.parameters())


def test_a_layered_capture_keeps_what_a_whole_run_keeps(tmp_path):
    whole = opened(write(tmp_path, "gpt2"), is_streamed=False)
    pairs = pairs_of()
    asked = [cp.Intervention.of(text) for text in ("resid_pre.1", "z.0.1", "mlp_out.2", "final_norm", "embed", "k.1.0")]
    job = experiment(whole, pairs).job(asked)
    stack = Stack(whole)
    batch = pairs.batch("clean", np.arange(3), padding_side="right")
    wanted = stack.run(batch, *ports_of_job(job, stack))
    capture = LayeredCapture(stack, batch, *ports_of_job(job, stack), "device")
    capture.begin()
    for layer in range(stack.n_layers):
        capture.step(layer)
    got = capture.end()
    assert set(got.kept) == set(wanted.kept)
    assert all(torch.equal(got.kept[port], wanted.kept[port]) for port in wanted.kept)
    assert all(torch.equal(got.inputs[layer], wanted.inputs[layer]) for layer in range(stack.n_layers + 1))
    assert got.returns_tuple == wanted.returns_tuple
    for layer in range(stack.n_layers):
        assert torch.equal(got.seen(layer).keys, wanted.seen(layer).keys)
        assert np.array_equal(got.visible[layer], wanted.visible[layer])


def test_other_engines_run_such_models_too(tmp_path):
    whole, streamed = both(write(tmp_path, "llama"))
    pairs, sites = pairs_of(2), ["resid_pre.1@2", "z.0.1"]
    for engine in ("restart", "rows", "reference"):
        wanted, got = (
            cp.Experiment(model, pairs, engine=engine, show_progress=False).run(sites) for model in (whole, streamed)
        )
        assert np.array_equal(numbers(got), numbers(wanted))


def test_a_source_model_may_be_fetched_as_well(tmp_path):
    whole, streamed = both(write(tmp_path, "llama"))
    other = write(tmp_path / "other", "llama", seed=5)
    sources = both(other)
    pairs = pairs_of(2)
    wanted, got = (
        experiment(model, pairs, source_model=source).run(["resid_pre.1@2", "z.0.1"])
        for model, source in zip((whole, streamed), sources, strict=True)
    )
    assert np.array_equal(numbers(got), numbers(wanted))
