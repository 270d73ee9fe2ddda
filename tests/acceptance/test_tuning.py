"""A planted fault is tuned away where it was planted, and a pronoun where it is made, while all else stays."""

import pytest
import torch
from benchmarks.tuning_faults import tuning_data
from benchmarks.tuning_stories import stories

import causalpatch as cp
from causalpatch.testing.faults import FAULTS, plant
from causalpatch.tuning.checks import Bench
from causalpatch.tuning.tuned import digests_outside


@pytest.mark.slow
def test_a_planted_fault_is_repaired_by_its_own_head_alone():
    planted = plant(FAULTS[0])
    data = tuning_data(planted)
    seen = {name for side in ("train", "validation") for pair in data.target[side] for name in pair.entities}
    assert not seen & {name for pair in data.target["test"] for name in pair.entities}
    tuned = cp.tune(planted.model, list(planted.place), data, schedule=cp.Schedule(rates=(0.01,)))
    bench = Bench(planted.model, data)
    before, after = bench.measure(None), bench.measure(tuned.way)
    assert before.success.mean() <= 0.2
    assert after.success.mean() >= 0.85
    assert after.damage < 0.1
    merged = tuned.model()
    assert digests_outside(tuned.way, merged.module) == digests_outside(tuned.way, planted.model.module)
    own = planted.model.module.state_dict()
    moved = {name for name, each in merged.module.state_dict().items() if not torch.equal(each, own[name])}
    assert moved == {f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"}


@pytest.mark.slow
def test_the_pronoun_is_changed_at_its_own_head_and_names_are_copied_as_before():
    rows = {row["head"]: row for row in stories()}
    own = rows.pop("L4H2")
    assert len(rows) == 7
    assert own["reached"]
    assert own["success before"] <= 0.05
    assert own["success"] >= 0.85  # of 28 names: what validation asks for, .95, less two standard errors
    assert own["lost"] <= 0.02  # the default margin
    assert own["lost at most"] <= 0.035  # of 136 names: one may be lost
    for other in rows.values():
        assert other["lost"] > own["lost"] or not other["reached"]
