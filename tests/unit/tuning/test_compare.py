"""Comparisons on tiny models: all arms are made alike, what is counted is what is trained, and what is said follows."""

import json
import math
from collections.abc import MutableMapping
from dataclasses import replace

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.pairs import Pair, Pairs
from causalpatch.results.tuning import TuningReport
from causalpatch.tuning import runner, train as training
from causalpatch.tuning.arms import KINDS, Request, candidates
from causalpatch.tuning.checks import Bench
from causalpatch.tuning.compare import compare_tuning, plan_tuning
from causalpatch.tuning.comparison import Comparison
from causalpatch.tuning.parts import parts_of, sites_of
from causalpatch.tuning.train import Schedule
from causalpatch.tuning.untrained import Prefixed, Steered, prefixes, steering
from causalpatch.tuning.ways import Slices
from tunings import prompts, stirred, tiny, tiny_data

QUICK = Schedule(steps=4, every=2, rates=(0.05,), batch=4, retain_batch=2, enough=0.5)
NEURONS = ["mlp_post.1.3", "mlp_post.1.5"]


def experiment(model):
    rows = prompts(12, 7)
    pairs = [Pair(row, other, ((4,),), ((3,),)) for row, other in zip(rows, prompts(12, 8), strict=True)]
    return cp.Experiment(model, Pairs(pairs), cp.log_probability_difference, show_progress=False)


def request(model, components, **how):
    settings = {"way": "slice", "rank": 4, "shared": "leave", "n_random": 19, "kinds": KINDS} | how
    return Request(experiment(model), sites_of(components, model), tiny_data(), **settings)


def test_arms_have_the_size_and_the_place_of_what_was_located():
    model = tiny("llama")
    made, notes = candidates(request(model, NEURONS))
    by_kind = {}
    for each in made:
        by_kind.setdefault(each.kind, []).append(each)
    located = by_kind["located"][0]
    assert len(by_kind["random"]) == 19
    for draw in by_kind["random"]:
        sites = sites_of(list(draw.components), model)
        assert {(site.name, site.layer) for site in sites} == {("mlp_post", 1)}
        assert not set(draw.components) & set(NEURONS)
        assert draw.n_weights == located.n_weights == draw.make(0).n_trained
    (near,) = by_kind["same layers"]
    assert {site.layer for site in sites_of(list(near.components), model)} == {1}
    assert near.n_weights <= 1.05 * located.n_weights
    (lowest,) = by_kind["lowest effect"]
    effects = experiment(model).run(["mlp_post.1.3", *lowest.components]).effect()
    assert np.abs(effects.values[1:]).max() <= np.abs(effects.values[0])
    assert by_kind["full"][0].make(0).n_trained == sum(p.numel() for p in model.module.parameters())
    assert any(
        "19 matched sets, drawn, in the same layers; the smallest attainable p is 0.05" in note for note in notes
    )
    heads, notes = candidates(request(model, ["z.0.1"], kinds=("random",)))
    assert len(heads) == 1 + 7
    assert any("all 7 matched sets, up to 2 layers off; the smallest attainable p is 0.125" in note for note in notes)


@pytest.mark.parametrize("way", ["lora", "offset"])
def test_an_arm_that_trains_other_many_numbers_says_so(way):
    made, notes = candidates(request(tiny("llama"), NEURONS, way=way, kinds=("spread",)))
    located, spread = (each.make(0).n_trained for each in made)
    assert located != spread
    assert f"spread: {spread:,} numbers are trained, {located:,} where it was located" in notes


def test_a_comparison_makes_what_its_plan_counted(tmp_path):
    model, data = (
        tiny("llama"),
        tiny_data(
            paraphrases=tiny_data().target["test"],
            others={"other": Pairs([Pair(row, row, ((k,),), id=str(k)) for k, row in enumerate(prompts(12, 11))])},
            evaluate=lambda changed: [float(changed.module.lm_head.weight.detach().sum())] * 3,
        ),
    )
    asked = Comparison(schedule=QUICK, n_seeds=2)
    plan = plan_tuning(experiment(model), ["z.0.1"], data, asked)
    assert plan.n_trainings == (1 + 7 + 4) * (1 + 1)
    assert "24 trainings of at most 4 steps: 12 arms" in str(plan)
    report = compare_tuning(experiment(model), ["z.0.1"], data, asked)
    assert sum(arm.n_trainings for arm in report.arms) == plan.n_trainings == report.spec["n_trainings"]
    assert [arm.kind for arm in report.arms] == [
        "base", "located", *["random"] * 7, *(kind for kind in KINDS if kind != "random")
    ]  # fmt: skip
    assert report.is_complete
    base, located, full = report.arm("base"), report.located, report.arm("full")
    assert base.moved == (0.0,)
    assert all(each.estimate == 0 for each in base.endpoints)
    assert len(located.success) == len(located.paraphrased) == 2
    assert located.paraphrased == located.success
    assert full.n_trained > located.n_trained
    names = [each.name for each in located.endpoints]
    assert names == [
        "retain KL, mean", "retain KL, p95", "retain KL, p99", "perplexity, log ratio", "answers lost, other",
        "evaluation, drop",
    ]  # fmt: skip
    own = {each.name: each.endpoints[-1] for each in report.arms}
    assert (own["base"].name, own["base"].estimate) == ("evaluation, drop", 0)
    for name in ("prefix", "steering"):  # nothing that is merged into a model: not shown, and not forgotten
        assert (own[name].name, own[name].verdict) == ("evaluation, drop", "not shown")
        assert own[name].note == "not made: this change cannot be merged into a model"
    assert {each.n_tested for each in report.arms} == {len(np.unique(data.target["test"].components))}
    assert set(report.mechanism) == {
        "weights outside", "effects before and after", "carried from the tuned model", "relearning"
    }  # fmt: skip
    assert report.mechanism["weights outside"][0]["changed"] == 0
    rows = report.mechanism["carried from the tuned model"]
    assert "share" in rows[0] or "not made" in rows[0]
    text = str(report)
    assert report.verdict in text
    assert "located - full" in text
    again = TuningReport.load(report.save(tmp_path / "report.json"))
    assert str(again) == text
    picture = report.plot()
    held = picture.to_dict()["datasets"]
    assert {row["arm"] for name in ("hollow", "reached") for row in held.get(name, [])} == {a.name for a in report.arms}
    assert "target success" in picture.to_svg()


def test_a_stop_by_the_user_leaves_the_arms_that_were_made(monkeypatch):
    model, seen = tiny("llama"), []
    real = training.looks

    def looks(*given):
        seen.append(1)
        if len(seen) > 5:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(training, "looks", looks)
    report = compare_tuning(
        experiment(model), NEURONS, tiny_data(), Comparison(schedule=QUICK, n_seeds=1, mechanism=False)
    )
    assert not report.is_complete
    assert len(report.arms) == 1 + 8 + 8  # what is trained side by side had made two steps
    assert report.verdict == "no evidence of advantage"
    assert report.reasons[0] == "not all arms were made"
    assert any("stopped by the user" in note for note in report.notes)


def test_a_prefix_changes_the_prompts_as_if_it_were_written_there():
    model = tiny("gpt2")
    way = Prefixed(model, [6, 7, 8], "three tokens")
    ids = torch.as_tensor(prompts(2, 3))
    batch = Pairs([Pair(row, row) for row in prompts(2, 3)]).batch("clean")
    with way.running() as module, torch.no_grad():
        found = model.logits(module(**model.inputs(batch.ids, batch.mask, batch.position_ids)))
        whole = model.module(torch.cat([torch.tensor([[6, 7, 8]] * 2), ids], 1)).logits
    torch.testing.assert_close(found, whole[:, 3:])
    assert [len(each._wrapped._ids) for each in prefixes(model, tiny_data(), None)] == [6, 12, 24]


def test_steering_adds_its_vector_behind_a_layer_and_helps_the_wanted_answer():
    model, data = tiny("llama"), tiny_data()
    vectors = steering(model, data)
    assert len(vectors) == 2 * 4
    vector = Steered(model, 0, torch.ones(model.width), "ones")
    ids = torch.as_tensor(prompts(1, 3))
    with torch.no_grad():
        stream = model.module(ids, output_hidden_states=True).hidden_states[1]
        with vector.running() as module:
            moved = module(ids, output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(moved, stream + 1)
    assert steering(model, tiny_data(unwanted=())) == []


def test_endpoints_see_what_changed_and_where_nothing_did():
    model, data = tiny("llama"), tiny_data()
    way = stirred(Slices(model, parts_of(sites_of(["mlp_out.0"], model), model)), size=0.5)
    bench = Bench(model, data)
    base, changed = bench.measure(None), bench.measure(way)
    assert base.damage == 0
    assert changed.damage > 0.01
    assert changed.moved.shape == changed.document.shape
    lengths = data.retain["test"].lengths("clean")
    assert len(changed.rise) == int((lengths - 1).sum())
    sums = changed.per_document()
    assert sums[:, 0].sum() / sums[:, 1].sum() == pytest.approx(changed.damage)


def test_impossible_comparisons_are_refused():
    with pytest.raises(SettingError, match="no comparison is made with n_random=3"):
        Comparison(n_random=3)
    with pytest.raises(SettingError, match="no arm is called 'lucky'"):
        candidates(request(tiny("llama"), NEURONS, kinds=("lucky",)))
    assert math.isfinite(Comparison().alpha)


@pytest.mark.parametrize(("n", "left"), [(3, ["base", "located"]), (1, None)])
def test_a_stop_while_something_is_measured_leaves_what_was_before(monkeypatch, n, left):
    model, seen = tiny("llama"), []
    real = Bench.measure

    def measure(*given, **named):
        seen.append(1)
        if len(seen) > n:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(Bench, "measure", measure)
    asked = Comparison(schedule=QUICK, n_seeds=2, arms=("full", "prefix"))
    if left is None:  # nothing can be said of what was located
        with pytest.raises(KeyboardInterrupt):
            compare_tuning(experiment(model), ["z.0.1"], tiny_data(), asked)
        return
    report = compare_tuning(experiment(model), ["z.0.1"], tiny_data(), asked)
    assert not report.is_complete
    assert [arm.name for arm in report.arms] == left
    assert "not all arms were made" in report.reasons


def test_adapters_that_are_one_are_one_draw():
    model = tiny("llama")
    made, notes = candidates(request(model, ["z.0.1"], way="lora", kinds=("random",)))
    draws = [each.components for each in made if each.kind == "random"]
    assert len(draws) == 1  # of the other layer; the heads of its own have its adapters
    assert draws[0][0].startswith("z.1.")
    assert "without 6 that change the modules of another" in " ".join(notes)
    assert "the smallest attainable p is 0.5" in " ".join(notes)
    by_slices, _ = candidates(request(model, ["z.0.1"], kinds=("random",)))
    assert len(by_slices) == 1 + 7


def test_what_few_pairs_and_seeds_cannot_show_is_said():
    asked = Comparison(schedule=replace(QUICK, enough=0.95), n_seeds=1, arms=("prefix",), mechanism=False)
    data = tiny_data(n=40)
    few = Pairs([*list(data.target["train"])[:2], *list(data.retain["train"])[:1], *list(data.target["test"])[:4]])
    data = replace(data, others={"few": few}, paraphrases=data.target["test"])
    report = compare_tuning(experiment(tiny("llama")), ["z.0.1"], data, asked)
    said = " ".join(report.notes)
    assert "3 of 7 prompts of 'few' were trained or validated on" in said
    assert "'paraphrases' were trained" not in said
    assert "10 independent test pairs can tell a share of 70% or less from the target, 95%" in said
    assert "only 1 seed of each arm" in said


class AsJson(MutableMapping):
    """Keeps what it is given as text of JSON, as a file would."""

    def __init__(self):
        self.texts = {}

    def __getitem__(self, key):
        return json.loads(self.texts[key])

    def __setitem__(self, key, value):
        self.texts[key] = json.dumps(value, allow_nan=False)

    def __delitem__(self, key):
        del self.texts[key]

    def __iter__(self):
        return iter(self.texts)

    def __len__(self):
        return len(self.texts)


def test_a_stopped_comparison_goes_on_where_it_was_and_ends_alike(monkeypatch):
    model, made = tiny("llama"), []
    asked = Comparison(schedule=QUICK, n_seeds=2, arms=("random", "full", "prefix", "steering"))
    real = runner.train_all

    def train_all(*given, **named):
        if len(made) == 1:
            raise KeyboardInterrupt
        made.append(1)
        return real(*given, **named)

    at_once = compare_tuning(experiment(model), ["z.0.1"], tiny_data(), asked)
    kept = AsJson()
    monkeypatch.setattr(runner, "train_all", train_all)
    stopped = compare_tuning(experiment(model), ["z.0.1"], tiny_data(), asked, kept=kept)
    assert not stopped.is_complete
    assert [arm.kind for arm in stopped.arms] == ["base", "located", *["random"] * 7]
    assert [key.rpartition("-")[0] for key in kept] == ["located", *(f"random-{k}" for k in range(1, 8))]
    made.clear()
    monkeypatch.setattr(runner, "train_all", lambda *given, **named: made.append(1) or real(*given, **named))
    again = compare_tuning(experiment(model), ["z.0.1"], tiny_data(), asked, kept=kept)
    assert len(made) == 1  # further seeds of the one arm that was lacking: all weights
    assert str(again) == str(at_once)
    assert again.is_complete
    made.clear()
    assert str(compare_tuning(experiment(model), ["z.0.1"], tiny_data(), asked, kept=kept)) == str(at_once)
    assert made == []
    n_kept = len(kept)
    compare_tuning(experiment(model), ["z.0.1"], tiny_data(), replace(asked, arms=("full",), n_seeds=1), kept=kept)
    assert len(kept) == n_kept + 3  # other rules: nothing is taken from there
