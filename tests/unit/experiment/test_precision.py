from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import CausalPatchWarning, SettingError
from causalpatch.engine import Screen
from causalpatch.experiment import experiment as room
from causalpatch.results.status import Status
from causalpatch.testing.tiny import tiny_model
from toys import Chain, prompts, vectors
from worlds import unchecked

MODEL = cp.open_model(tiny_model("llama", layers=3, dtype=torch.float32))
PAIRS = prompts(([3, 4, 5, 6, 9], [7, 4, 5, 8, 9]), ([3, 9, 10, 5], [3, 11, 12, 5]), ([12, 13, 14], [15, 13, 14]))
SITES = [f"{name}@{token}" for token in (1, 2, -1) for name in ("resid_pre.1", "z.0.1", "z.1.2", "mlp_out.0", "v.1.0")]


@pytest.fixture(autouse=True)
def _small_models_are_screened(monkeypatch):
    monkeypatch.setattr(room, "Screen", partial(Screen, n_sample=4, min_weights=0, product="int8"))


def run(requests=SITES, **settings):
    with unchecked():
        return cp.Experiment(MODEL, PAIRS, show_progress=False, **settings).run(requests)


def test_a_screen_ranks_as_float32_does_and_says_what_was_screened(tmp_path):
    plain, effects = run(), run(precision="screen", recheck_top=3)
    top, wanted = (each.top(3).to_dataframe() for each in (effects, plain))
    assert top["intervention"].tolist() == wanted["intervention"].tolist()
    np.testing.assert_allclose(top["effect"], wanted["effect"], atol=1e-5)
    assert not top["status"].str.contains("screened").any()
    status = effects.to_xarray()["status"].values
    n_screened = int((status == Status.SCREENED).any(1).sum())
    record = effects.provenance["precision"]
    assert record["asked"] == "screen"
    assert record["product"] == "int8"
    assert record["n_screened"] == n_screened > 0
    assert record["noise"]["logit_difference"]["n_cells"] == 4
    note = f"{n_screened} of {len(SITES)} cells screened in int8: noise up to about"
    assert any(each.startswith(note) for each in effects.summary().attrs["notes"])
    assert note in repr(effects)
    assert effects.provenance["engine"]["tier"] == "wavefront"
    loaded = cp.Effects.load(effects.save(tmp_path / "effects"))
    assert loaded.provenance["precision"] == record
    assert (loaded.to_xarray()["status"].values == status).all()


def test_all_controls_of_a_screen_are_float32():
    requests = [cp.Patch(site, "zero") for site in SITES]
    plain, effects = run(requests), run(requests, precision="screen", recheck_top=3)
    for name in ("baseline_clean", "baseline_corrupt", "baseline_reference"):
        got, wanted = (each.to_xarray()[name].values for each in (effects, plain))
        np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert max(effects.provenance["noise_floor"].values()) < 1e-5


def test_the_sample_follows_the_seed():
    def measured(seed):
        status = run(precision="screen", recheck_top=0, seed=seed).to_xarray()["status"].values
        return np.flatnonzero((status == Status.MEASURED).any(1)).tolist()

    assert measured(1) == measured(1)
    assert any(measured(1) != measured(seed) for seed in (2, 3, 4))


def test_a_stopped_screen_keeps_what_it_has(monkeypatch):
    whole = room.measure_screened

    def stopping(*args, **settings):
        for block in whole(*args, **settings):
            yield block
            if (block.status == Status.SCREENED).any():
                raise KeyboardInterrupt

    monkeypatch.setattr(room, "measure_screened", stopping)
    with pytest.warns(CausalPatchWarning, match=f"of {len(SITES) * len(PAIRS)} runs were made and are kept"):
        effects = run(precision="screen", recheck_top=3)
    assert not effects.is_complete
    assert any("noise not known" in note for note in effects.provenance["notes"])


@pytest.mark.parametrize("precision", [None, "float32"])
def test_without_a_screen_all_is_as_the_model_is(precision):
    effects = run(precision=precision)
    assert effects.provenance["precision"] == {"asked": precision or "as the model is", "product": "float32"}
    assert (effects.to_xarray()["status"].values != Status.SCREENED).all()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"precision": "float16"}, "precision cannot be 'float16'"),
        ({"precision": "screen", "engine": "rows"}, 'precision="screen" needs the wavefront engine'),
        ({"precision": "screen", "recheck_top": -1}, "recheck_top=-1 is not a number of effects"),
    ],
)
def test_a_precision_that_there_is_not_is_refused_at_once(settings, said):
    with unchecked(), pytest.raises(SettingError, match=said):
        cp.Experiment(MODEL, PAIRS, **settings)


def plan(requests=SITES, **settings):
    return cp.Experiment(MODEL, PAIRS, show_progress=False, **settings).plan(requests)


def test_the_plan_of_a_screen_says_what_is_screened_and_that_the_rest_is_known_only_in_the_run():
    plain, made = plan(), plan(precision="screen", recheck_top=3)
    assert plain.screen is None
    assert plan(precision="float32") == plain
    assert made.flops_of == plain.flops_of
    assert plain.tier_flops < made.tier_flops < made.most_flops
    lines = dict(line.split(maxsplit=1) for line in str(made).splitlines())
    assert lines["screen"] == f"all {len(SITES)} in int8 first"
    hidden = "what the noise leaves open, known only in the run"
    assert lines["again"] == f"in float32: 4 at random, the 3 largest, and {hidden}"
    assert " again, up to " in lines["runs"]
    assert " again, instead of " in lines["arithmetic"]


def test_the_plan_counts_the_untouched_runs_of_every_pass_that_a_screen_makes():
    forwards = {top: run(precision="screen", recheck_top=top).provenance["cost"]["forwards"] for top in (0, 3)}
    once = run().provenance["cost"]["forwards"]
    assert forwards[0] == 3 * once
    assert 3 * once <= forwards[3] <= 4 * once
    one, made = plan().one_pass, plan(precision="screen", recheck_top=3)
    # The controls with the first pass, the screen with the second, what is measured again with two more at most.
    assert made.most_flops == pytest.approx(plan().tier_flops + 3 * one.untouched_flops + one.flops)


def test_making_the_plan_of_a_screen_runs_no_model(monkeypatch):
    called = Mock()
    monkeypatch.setattr(MODEL.module.model, "forward", called)
    plan(precision="screen")
    called.assert_not_called()


def test_the_plan_of_a_screen_that_gains_nothing_is_that_of_float32_with_the_reason(monkeypatch):
    monkeypatch.setattr(room, "Screen", Screen)
    plain, made = plan(), plan(precision="screen")
    assert made.screen is None
    assert made.tier_flops == made.most_flops == plain.tier_flops
    reason = run(precision="screen").provenance["precision"]["reason"]
    assert made.not_screened == reason
    assert f"screen         none, all in float32: {reason}\n" in str(made)


def test_a_screen_that_cannot_be_made_cannot_be_planned():
    experiment = cp.Experiment(MODEL, PAIRS, precision="screen")
    for ask in (experiment.plan, experiment.run):
        with pytest.raises(SettingError, match="stands outside the layers"):
            ask(["module(lm_head).output@-1"])


@pytest.mark.parametrize("precision", ["screen", "float32"])
def test_a_model_of_another_dtype_is_refused_at_once(precision):
    model = cp.open_model(tiny_model("llama", dtype=torch.bfloat16))
    with pytest.raises(SettingError) as caught:
        cp.Experiment(model, PAIRS, precision=precision)
    assert "in bfloat16" in str(caught.value)
    assert 'dtype="float32"' in str(caught.value)


def test_a_model_without_known_layers_is_refused_with_the_reason():
    experiment = cp.Experiment(cp.open_model(Chain().float()), vectors(), precision="screen")
    with pytest.raises(SettingError) as caught:
        experiment.run(["module(first).output"])
    assert "its layers are not known by name" in str(caught.value)
    assert 'leave out precision="screen"' in str(caught.value)
