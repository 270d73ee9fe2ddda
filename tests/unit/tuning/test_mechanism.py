"""Looks into a tuned model: what its parts carry, and where the behaviour may have gone."""

import contextlib

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import NoGap
from causalpatch.models import open_model
from causalpatch.pairs import Pair, Pairs
from causalpatch.tuning import mechanism
from causalpatch.tuning.low_rank import LowRank
from causalpatch.tuning.parts import parts_of, sites_of
from causalpatch.tuning.tuned import merged_module
from causalpatch.tuning.ways import Offsets, Slices
from tunings import prompts, stirred, tiny, tiny_data

BY_CONSTRUCTION = "by construction: nothing else was changed"


def experiment(model):
    rows = prompts(12, 7)
    pairs = [Pair(row, other, ((4,),), ((3,),)) for row, other in zip(rows, prompts(12, 8), strict=True)]
    return cp.Experiment(model, Pairs(pairs), cp.log_probability_difference, show_progress=False)


def carried(model, components, kind, **how):
    """Return what the outputs of a change with random numbers carry, of the components and of all others."""
    parts = parts_of(sites_of(components, model), model, outputs_alone=kind is Offsets)
    way = stirred(kind(model, parts, **how), size=1.0)
    tuned = open_model(merged_module(way))
    for wanted, unwanted in ((4, 3), (3, 4)):  # random numbers help the one or the other
        data = tiny_data(wanted=((wanted,),), unwanted=((unwanted,),))
        with contextlib.suppress(NoGap):
            return mechanism.carried(experiment(model), tuned, way, data)
    return pytest.fail("the change moves neither")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", [Slices, Offsets])
@pytest.mark.parametrize("components", [["z.0.1"], ["z.0.1", "z.1.0"], ["mlp_post.0.3"], ["attn_out.0", "mlp_out.1"]])
def test_of_slices_and_offsets_the_located_parts_carry_all(family, kind, components):
    own, *others = carried(tiny(family), components, kind)
    assert own["share"] == pytest.approx(1, abs=1e-3)
    assert own["said"] == BY_CONSTRUCTION
    assert len(others) == 1


def test_of_adapters_the_share_is_found_out():
    own, _ = carried(tiny("llama"), ["z.0.1"], LowRank)
    assert own["share"] != pytest.approx(1, abs=0.01)  # the layer's other heads changed with it
    assert own["said"] != BY_CONSTRUCTION


def test_the_behaviour_is_looked_for_in_heads_and_mlps_of_all_layers(monkeypatch):
    model = tiny("llama")
    at = experiment(model)
    asked = []
    real = cp.Experiment.run
    monkeypatch.setattr(cp.Experiment, "run", lambda self, sites: asked.append(list(sites)) or real(self, sites))
    rows = mechanism.before_and_after(at, tiny("llama", seed=3), sites_of(["mlp_post.0.3"], model))
    names = [str(site) for site in asked[0]]
    assert asked[0] == asked[1]
    assert len(set(names)) == len(names)
    assert names[0] == "mlp_post.0.3"
    n_heads = model.shape.units["head"]
    for layer in range(2):
        assert {f"mlp_out.{layer}", *(f"head_out.{layer}.{head}" for head in range(n_heads))} <= set(names)
    assert (rows[0]["component"], rows[0]["located"]) == ("mlp_post.0.3", "yes")
    others = [max(abs(row["effect before"]), abs(row["effect after"])) for row in rows[1:]]
    assert others == sorted(others, reverse=True)
    assert np.isfinite(others).all()
    names = [str(site) for site in mechanism._elsewhere(sites_of(["z.0.1"], model), model)]
    assert "head_out.0.1" not in names  # it is z.0.1, seen from behind
    monkeypatch.setattr(mechanism, "_MOST_OTHERS", 5)
    large = [str(site) for site in mechanism._elsewhere([], model)]
    assert large == ["attn_out.0", "mlp_out.0", "attn_out.1", "mlp_out.1"]
