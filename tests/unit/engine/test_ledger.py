"""Engines that share a job: their numbers are comparable, and nothing that was measured is lost."""

import dataclasses

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine import BASE, tiers
from causalpatch.results.status import Status
from causalpatch.testing.tiny import tiny_model
from tiers import assert_agree, statuses
from worlds import random_pairs, unchecked

OUTSIDE = ["module(model.norm).output@0", "module(lm_head).output@0", "module(model.embed_tokens).output@0"]
SAME = cp.Patch("module(lm_head).output@-1", "identity")
PAIRS = random_pairs(1, n_pairs=5, prefix=0.5)


def model_in(dtype):
    return cp.open_model(tiny_model("llama", layers=3, heads=4, kv_heads=2, seed=0, dtype=dtype))


def run(model, asked, engine="auto", pairs=PAIRS):
    experiment = cp.Experiment(model, pairs, engine=engine, show_progress=False)
    with unchecked():
        return experiment.run(asked, axes={"intervention": list(range(len(asked)))})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_first", [True, False])
def test_each_engine_is_compared_with_its_own_untouched_runs(dtype, is_first):
    asked = ["resid_pre.1@-1", *OUTSIDE, SAME] if is_first else [SAME, *OUTSIDE, "resid_pre.1@-1"]
    effects = run(model_in(dtype), asked)
    assert effects.provenance["engine"]["interventions"] == {"wavefront": 1, "restart": 4}
    measured = effects.effect(per_pair=True).values
    is_derived = statuses(effects) == Status.DERIVED
    assert is_derived.sum() >= 5
    assert (measured[is_derived] == 0).all()
    assert np.abs(measured[asked.index(SAME)]).max() <= effects.provenance["noise_floor"]["logit_difference"]
    alone = run(model_in(dtype), asked, "rows")
    assert np.abs(measured - alone.effect(per_pair=True).values).max() < (0.5 if dtype == torch.bfloat16 else 1e-4)


def test_the_noise_floor_is_that_of_every_engine_that_took_part():
    model, inside, outside = model_in(torch.bfloat16), "resid_pre.1@-1", "module(lm_head).output@-1"
    one, other, *both = [
        run(model, some).provenance["noise_floor"]["logit_difference"]
        for some in ([inside], [outside], [inside, outside], [outside, inside])
    ]
    assert one > other == 0
    assert both == [one, one]


class Stops:
    """An engine that refuses to go on after some pairs."""

    def __init__(self, tier, n_pairs):
        self.tier, self.n_pairs, self.seen, self.asked = tier, n_pairs, 0, []

    def __call__(self, job, gauge, means, cost):
        if gauge.metrics[0].name.startswith("check"):
            yield from self.tier.measure(job, gauge, means, cost)
            return
        self.asked.append((len(job.pairs), len(job.interventions)))
        for block in self.tier.measure(dataclasses.replace(job, max_rows=1), gauge, means, cost):
            if block.interventions[0] == BASE:
                self.seen += len(block.pairs)
                if self.seen > self.n_pairs:
                    raise ModelUnsupported("its tokens see later ones")
            yield block


@pytest.fixture
def stopping(monkeypatch):
    def stop(name, after):
        made = {tier.name: tier for tier in tiers.TIERS}
        stops = Stops(made["rows"], after)
        changed = tuple(dataclasses.replace(t, measure=stops) if t.name == name else t for t in tiers.TIERS)
        monkeypatch.setattr(tiers, "TIERS", changed)
        return stops

    return stop


@pytest.mark.parametrize("after", [0, 1, 3])
def test_what_an_engine_refuses_later_is_made_by_the_next_and_what_it_measured_stays(stopping, after):
    model = model_in(torch.float64)
    asked = ["resid_pre.1@0", cp.Patch("z.0.1", cp.Mean()), OUTSIDE[0], "resid_post.1@-1"]
    wanted = run(model, asked, "reference")
    stopping("wavefront", after)
    got = run(model, asked)
    assert_agree(got, wanted)
    assert (statuses(got) != Status.SKIPPED).all()
    record = got.provenance["engine"]
    made = record["interventions"]
    assert made.get("wavefront", 0) == (3 if after else 0)
    assert made["restart"] == 4
    left = f" on {5 - after} of 5 pairs" if after else ""
    assert f"wavefront: its tokens see later ones{left}" in record["reason"]


def test_the_next_engine_makes_the_open_pairs_alone(stopping, monkeypatch):
    first = stopping("wavefront", 3)
    second = Stops(next(tier for tier in tiers.TIERS if tier.name == "rows"), 99)
    changed = tuple(dataclasses.replace(t, measure=second) if t.name == "restart" else t for t in tiers.TIERS)
    monkeypatch.setattr(tiers, "TIERS", changed)
    run(model_in(torch.float64), ["resid_pre.1@0", "z.0.1"])
    assert first.asked == [(5, 3)]  # and the identity patch
    assert second.asked == [(2, 3)]


def test_an_engine_that_was_named_is_not_replaced_when_it_refuses_later(stopping):
    stopping("wavefront", 3)
    with pytest.raises(ModelUnsupported, match="its tokens see later ones"):
        run(model_in(torch.float64), ["resid_pre.1@0"], "wavefront")
