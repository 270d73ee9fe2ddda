"""A screen against the same sweep in float32: how far it is off, what is measured again, and what is refused."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.engine import (
    Cost,
    Gauge,
    Job,
    Means,
    Route,
    Screen,
    measure,
    measure_screened,
    plan_screen,
    screen,
    targets_of,
)
from causalpatch.engine.delta import MIN_WEIGHTS
from causalpatch.engine.delta_gain import fastest_product
from causalpatch.engine.few_bits import FewBits, large_weights
from causalpatch.experiment.tally import Tally
from causalpatch.pairs import Pair, Pairs
from causalpatch.patches import Identity, Intervention
from causalpatch.results.status import Status
from causalpatch.testing.tiny import VOCAB, tiny_model
from worlds import unchecked

SITES = [
    f"{name}@{token}"
    for token in range(2, 7)
    for name in (
        *(f"resid_pre.{i}" for i in (1, 2)),
        "z.1.0",
        "z.2.3",
        "mlp_post.1.5",
        "attn_out.0",
        "v.1.0",
        "resid_mid.1",
    )
]
N_SAMPLE, TOP = 8, 5


def some_pairs(lengths=(7, 8, 8, 9), n_tokens=1):
    rng = np.random.default_rng(0)
    answers = [
        ((tuple(rng.integers(0, VOCAB, n_tokens)),), (tuple(rng.integers(0, VOCAB, n_tokens)),)) for _ in lengths
    ]
    made = [
        Pair(rng.integers(0, VOCAB, n), rng.integers(0, VOCAB, n), *answer, str(number))
        for number, (n, answer) in enumerate(zip(lengths, answers, strict=True))
    ]
    return Pairs(made, name="random").align("position")


def job_of(family, sites=SITES, pairs=None, dtype=torch.float32, **more):
    model = cp.open_model(tiny_model(family, layers=3, heads=4, dtype=dtype))
    names = [name for name in sites if name.split(".")[0].split("@")[0] not in model.shape.refused]
    asked = [targets_of(model, Intervention.of(name)) for name in names]
    same = targets_of(model, Intervention.of(cp.Patch("resid_pre.0@2", Identity())))
    return Job(model, pairs or some_pairs(), [*asked, same], "corrupt", n_controls=1, **more)


def run(job, metrics=(cp.logit_difference,), **how):
    gauge = Gauge(list(metrics), job.pairs, job.model)
    tally = Tally.of(job, len(metrics))
    if not how:
        blocks = measure(job, gauge, Means(), tally.cost, route=Route("wavefront"))
        made = None
    else:
        made = Screen(**({"top_k": TOP, "n_sample": N_SAMPLE, "min_weights": 0} | how))
        blocks = measure_screened(job, gauge, Means(), tally.cost, route=Route("auto"), screen=made)
    with unchecked():
        for block in blocks:
            tally.add(block)
    return tally, made


def effects_of(tally, job):
    return (tally.values - tally.untouched[0][:, None])[:, : job.n_asked].mean(-1)


@pytest.mark.parametrize("product", ["bf16", "int8"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2", "gpt_neox"])
def test_screened_effects_are_off_by_no_more_than_the_noise_and_the_largest_are_those_of_float32(family, product):
    job = job_of(family)
    wanted = effects_of(run(job)[0], job)[0]
    tally, made = run(job, product=product)
    got, status = effects_of(tally, job)[0], tally.status[: job.n_asked]
    is_screened = (status == Status.SCREENED).any(1)
    assert 0 < is_screened.sum() == made.n_screened < job.n_asked - TOP
    error = np.abs(got - wanted)
    scale = np.abs(wanted).max()
    assert error[~is_screened].max() < 2e-6 * scale
    assert 2e-6 * scale < error[is_screened].max() < (0.05 if product == "bf16" else 0.2) * scale
    noise = made.noise["logit_difference"]
    # Three times the largest of a small sample: very few others may lie beyond it.
    assert (error[is_screened] <= noise.of(got[is_screened])).mean() > 0.9
    largest, found = (np.argsort(-np.abs(effects))[:TOP] for effects in (wanted, got))
    # Two may be one number up to rounding.
    np.testing.assert_allclose(np.abs(wanted[found]), np.abs(wanted[largest]), rtol=1e-5)
    assert not is_screened[found].any()


def test_base_runs_controls_and_derived_cells_are_those_of_float32():
    job = job_of("llama", sites=[*SITES, "resid_post.2@1"])
    plain, _ = run(job)
    tally, _ = run(job, product="int8")
    np.testing.assert_allclose(tally.untouched, plain.untouched, rtol=0, atol=1e-5)
    assert (tally.status[job.n_asked :] == Status.MEASURED).all()
    np.testing.assert_allclose(tally.values[:, -1], plain.values[:, -1], rtol=0, atol=1e-5)
    is_derived = plain.status == Status.DERIVED
    assert is_derived[job.n_asked - 1].all()
    assert (tally.status[is_derived] == Status.DERIVED).all()
    effects = tally.values - tally.untouched[0][:, None]
    assert (effects[:, is_derived] == 0).all()


def test_passes_in_small_batches_give_the_same_numbers():
    whole, parts = job_of("gpt2"), job_of("gpt2", budget_gib=2e-5)
    (one, _), (many, _) = (run(job, product="bf16") for job in (whole, parts))
    assert many.cost.forwards > one.cost.forwards
    both = (one.status[: whole.n_asked] == many.status[: whole.n_asked]).all(1)
    assert both.mean() > 0.8
    error = np.abs(effects_of(one, whole) - effects_of(many, parts))[0, both]
    # Rounding between batches moves what is rounded to few bits by a step here and there.
    assert np.median(error) < 1e-3


def test_answers_of_several_tokens_are_screened_too():
    job = job_of("llama", pairs=some_pairs(n_tokens=2))
    metrics = (cp.log_probability,)
    wanted = effects_of(run(job, metrics)[0], job)[0]
    tally, made = run(job, metrics, product="int8")
    error = np.abs(effects_of(tally, job)[0] - wanted)
    assert made.n_screened
    assert 0 < error.max() < 0.2 * np.abs(wanted).max()


def test_the_largest_by_every_metric_are_those_of_float32():
    job = job_of("gpt2")
    metrics = (cp.logit_difference, cp.logit_difference.at(4))
    wanted = effects_of(run(job, metrics)[0], job)
    tally, made = run(job, metrics, product="int8")
    for place in range(2):
        largest = np.argsort(-np.abs(wanted[place]))[:TOP]
        assert set(np.argsort(-np.abs(effects_of(tally, job)[place]))[:TOP]) == set(largest)
        assert (tally.status[largest] != Status.SCREENED).all()
    assert set(made.noise) == {metric.name for metric in metrics}


def test_what_came_of_a_screen_is_plain_data_and_a_note():
    job = job_of("gpt2")
    _, made = run(job, product="int8")
    told = made.describe()
    assert told["asked"] == "screen"
    assert told["product"] == "int8"
    assert told["top"] == TOP
    assert told["n_rechecked"] >= N_SAMPLE
    noise = told["noise"]["logit_difference"]
    assert noise["n_cells"] == N_SAMPLE
    assert 0 < noise["floor"] < 1e-4 < noise["typical"]
    assert told["speed_up"] is None  # too few rows to time
    (note,) = made.notes()
    assert note == (
        f"{made.n_screened} of {job.n_asked} cells screened in int8: noise up to about {noise['typical']:.2g} in "
        f"logit_difference; the {TOP} largest are float32"
    )


def test_nothing_is_measured_again_beyond_the_sample_where_no_largest_are_asked_for():
    _, made = run(job_of("gpt2"), product="bf16", top_k=0)
    assert made.n_rechecked == N_SAMPLE
    assert "largest" not in made.notes()[0]


def test_a_stopped_screen_says_that_its_noise_is_not_known():
    job = job_of("gpt2")
    made = Screen(top_k=TOP, n_sample=N_SAMPLE, min_weights=0, product="bf16")
    gauge = Gauge([cp.logit_difference], job.pairs, job.model)
    with unchecked():
        for block in measure_screened(job, gauge, Means(), Cost(), route=Route("auto"), screen=made):
            if (block.status == Status.SCREENED).any():
                break
    assert "noise not known" in made.notes()[0]
    assert made.describe()["noise"] == {}


def test_the_model_is_as_it_was_after_a_screen():
    job = job_of("llama")
    before = [(name, dict(part.__dict__)) for name, part in job.model.module.named_modules()]
    run(job, product="bf16")
    for (name, held), part in zip(before, job.model.module.modules(), strict=True):
        assert held.keys() == part.__dict__.keys(), name


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"min_weights": MIN_WEIGHTS}, "no linear map of the layers has 131,072 weights"),
        ({"n_sample": 64}, "interventions are no more than would be measured again"),
        ({"product": None}, r"no product in few bits is faster on this machine \(in float32's rate: bf16 0.5\)"),
    ],
)
def test_where_a_screen_gains_nothing_all_is_float32_and_the_reason_is_kept(how, reason, monkeypatch):
    monkeypatch.setattr(screen, "fastest_product", lambda device, width: (None, {"bf16": 0.5}))
    job = job_of("gpt2")
    plain, _ = run(job)
    tally, made = run(job, **({"product": "int8"} | how))
    np.testing.assert_array_equal(tally.status, plain.status)
    np.testing.assert_array_equal(tally.values, plain.values)
    assert made.describe()["product"] == "float32"
    assert re.search(reason, made.notes()[0])


@pytest.mark.parametrize(
    ("job", "why"),
    [
        (lambda: job_of("gpt2", dtype=torch.float64), "it is in float64"),
        (lambda: job_of("gpt2", sites=["module(transformer.wte).output"]), "stands outside the layers"),
    ],
)
def test_a_job_that_cannot_be_screened_is_refused_with_the_reason(job, why):
    with pytest.raises(SettingError) as caught:
        run(job(), product="bf16")
    assert why in str(caught.value)
    assert 'leave out precision="screen"' in str(caught.value)


def test_hooks_of_the_user_are_a_reason_to_refuse():
    job = job_of("gpt2")
    job.model.module.transformer.h[0].register_forward_hook(lambda *_: None)
    with pytest.raises(SettingError, match="hooks stand on"):
        run(job, product="bf16")


def test_the_fastest_product_is_measured_once_and_is_none_or_faster_than_float32():
    device = torch.device("cpu")
    product, gains = fastest_product(device, 64)
    assert gains.keys() <= {"bf16", "int8"}
    assert product is None or gains[product] == max(gains.values()) > 1
    assert fastest_product(device, 64)[1] is gains


def plan_of(job, **how):
    made = Screen(**({"top_k": TOP, "n_sample": N_SAMPLE, "min_weights": 0} | how))
    return plan_screen(job, Gauge([cp.logit_difference], job.pairs, job.model), made, rate=1e9), made


def test_the_plan_of_a_screen_takes_the_product_and_the_gain_that_the_run_would(monkeypatch):
    monkeypatch.setattr(screen, "fastest_product", lambda device, width: ("int8", {"bf16": 0.5, "int8": 2.0}))
    job = job_of("gpt2")
    plan, made = plan_of(job)
    assert (plan.screen.product, plan.screen.gain) == (made.product, made.gain) == ("int8", 2.0)
    assert plan.screen.few_bits_flops == plan.one_pass.linear_flops
    assert plan.seconds == pytest.approx((plan.tier_flops - plan.one_pass.linear_flops / 2) / 1e9)
    large = sum(weight.numel() for weight in large_weights(job.model, 0))
    assert plan.screen.cast_bytes == large
    assert plan_of(job, product="bf16")[0].screen.cast_bytes == 2 * large
    assert plan_of(job, product="bf16")[0].seconds is None


def test_the_plan_of_a_screen_counts_its_records_as_far_as_the_budget_lets_them_grow():
    job = job_of("gpt2")
    tokens = sum(int(job.pairs.lengths(role).sum()) for role in ("clean", "corrupt"))
    wanted = 4 * tokens * FewBits("bf16", 0).numbers_per_token(job.model)
    assert plan_of(job, product="bf16")[0].screen.record_bytes == wanted
    narrow = replace(job, budget_gib=wanted / 2**30)
    assert 0 < plan_of(narrow, product="bf16")[0].screen.record_bytes < wanted


def test_the_sample_of_a_plan_is_drawn_from_what_is_not_known_beforehand():
    idle = ["mlp_out.2@2", "mlp_out.2@3", "mlp_out.2@4"]
    with_idle, without = (plan_of(job_of("gpt2", sites=sites), product="bf16")[0] for sites in (SITES + idle, SITES))
    assert with_idle.n_derived == without.n_derived + len(idle) * 4
    assert with_idle.screen.choice.n_leading == without.screen.choice.n_leading
    assert with_idle.screen.again_flops == without.screen.again_flops


@pytest.mark.parametrize(
    "how", [{"min_weights": MIN_WEIGHTS}, {"n_sample": 64}], ids=["weights too small", "interventions too few"]
)
def test_the_plan_of_a_screen_that_gains_nothing_gives_the_reason_of_the_run(how):
    job = job_of("gpt2")
    plan, made = plan_of(job, product="bf16", **how)
    assert plan.screen is None
    assert plan.not_screened == made.reason == run(job, product="bf16", **how)[1].reason


def test_a_job_that_cannot_be_screened_cannot_be_planned():
    with pytest.raises(SettingError, match="stands outside the layers"):
        plan_of(job_of("gpt2", sites=["module(transformer.wte).output"]), product="bf16")


def test_memory_of_the_records_counts_what_goes_in_and_comes_out_of_each_large_map():
    model = job_of("gpt2").model
    width = model.width
    maps = large_weights(model, 0)
    assert len(maps) == 3 * 4
    per_layer = (width + 3 * width) + (width + width) + 2 * (width + model.shape.units["neuron"])
    assert FewBits("bf16", 0).numbers_per_token(model) == 3 * per_layer
    assert large_weights(model, MIN_WEIGHTS) == []
