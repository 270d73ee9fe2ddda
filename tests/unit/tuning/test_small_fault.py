"""A planted fault, tuned away where it was planted, beside the other places of its kind and all weights."""

import pytest
import torch
from benchmarks.tuning_faults import tuning_data

import causalpatch as cp
from causalpatch.experiment.judging import comparing
from causalpatch.testing.faults import FAULTS, plant
from causalpatch.tuning.tuned import digests_outside

FAULT = next(fault for fault in FAULTS if fault.name == "behaviour-agreement-mlp-17")


@pytest.fixture(scope="module")
def planted():
    return plant(FAULT)


@pytest.fixture(scope="module")
def data(planted):
    return tuning_data(planted)


def test_no_prompt_that_is_tested_was_trained_or_validated_on(data):
    def prompts(pairs):
        return {pair.clean.tobytes() for pair in pairs}

    seen = {name for side in ("train", "validation") for pair in data.target[side] for name in pair.entities}
    assert not seen & {name for pair in data.target["test"] for name in pair.entities}
    learnt = prompts(data.retain["train"]) | prompts(data.retain["validation"])
    assert not learnt & prompts(data.retain["test"])
    assert not learnt & {prompt for pairs in data.others.values() for prompt in prompts(pairs)}
    assert not prompts(data.retain["train"]) & prompts(data.retain["validation"])


def test_it_is_repaired_on_held_out_pairs_and_no_other_weight_moves(planted, data, tmp_path):
    schedule = cp.Schedule(steps=30, rates=(0.01,), batch=8, retain_batch=8, every=10)
    arms = ("random", "full")
    experiment = cp.Experiment(
        planted.model,
        data.target["train"],
        comparing(data.target["train"]),
        source_model=planted.base,
        show_progress=False,
    )
    comparison = cp.Comparison(schedule=schedule, arms=arms, n_seeds=1)
    report = cp.compare_tuning(experiment, list(planted.place), data, comparison)
    assert [arm.name for arm in report.arms] == ["base", "located", "random 1", "random 2", "full"]
    assert report.arm("base").success[0] <= 0.1
    assert report.located.success[0] >= 0.95
    assert report.mechanism["weights outside"][0] == {"tensors": 39, "changed": 0}
    assert "the smallest attainable p is 0.333" in " ".join(report.notes)
    tuned = cp.tune(planted.model, list(planted.place), data, schedule=schedule)
    merged, own = tuned.model().module, planted.model.module
    assert digests_outside(tuned.way, merged) == digests_outside(tuned.way, own)
    moved = {name for name, each in merged.state_dict().items() if not torch.equal(each, own.state_dict()[name])}
    assert moved == {f"model.layers.3.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    read = cp.open_model(tuned.save(tmp_path), device="cpu")
    ids = torch.tensor(data.target["test"][0].clean.tolist())[None]
    with torch.no_grad(), tuned.way.running() as running:
        torch.testing.assert_close(read.module(ids).logits, running(ids).logits, rtol=1e-5, atol=1e-5)
    assert read.tokenizer.encode("Lily saw Tom") == planted.model.tokenizer.encode("Lily saw Tom")
