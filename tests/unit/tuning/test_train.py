"""Training on tiny models: what is learnt, where it stops, and what is put back when something goes wrong."""

import math
from dataclasses import replace

import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import PairError, SettingError
from causalpatch.pairs import Pair, Pairs
from causalpatch.pairs.words import NAMES
from causalpatch.sites import Site
from causalpatch.tuning import train as training
from causalpatch.tuning.data import TuningData, require_apart
from causalpatch.tuning.losses import Answers, Kept, target_loss
from causalpatch.tuning.parts import parts_of
from causalpatch.tuning.train import KeptSides, Schedule, train
from causalpatch.tuning.ways import Slices
from tunings import prompts, stirred, tiny, tiny_data

SHORT = Schedule(steps=60, every=5, rates=(0.03,), keep=0.1)


def head(model):
    return Slices(model, parts_of([Site("z", 1, 1), Site("mlp_out", 1)], model))


def test_the_wanted_answer_gets_ahead_and_the_model_stays_as_it_was():
    model = tiny("llama")
    before = {name: each.clone() for name, each in model.module.state_dict().items()}
    tuned = cp.tune(model, ["z.1.1", "mlp_out.1"], tiny_data(), schedule=SHORT)
    assert tuned.training.looks[0].success < 0.8
    assert tuned.training.best.success == 1.0
    assert tuned.training.looks[0].moved == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(each, before[name]) for name, each in model.module.state_dict().items())
    assert all(each.grad is None for each in model.module.parameters())
    merged = tuned.model()
    data = tiny_data()
    assert bool(Answers(merged, data.target["validation"]).succeed(None).all())
    assert "target" in str(tuned)


def test_how_far_ahead_chooses_the_checkpoint_and_success_is_told_as_it_is():
    schedule = replace(SHORT, steps=30, every=1, patience=30, enough=0.8)
    near, far = (
        cp.tune(tiny("llama"), ["mlp_out.1"], tiny_data(), schedule=replace(schedule, ahead=nats)).training
        for nats in (0.0, 2.0)
    )
    assert near.best.success == near.best.clear >= 0.8
    passed = next(each for each in far.looks if each.step == near.best.step)
    assert passed.success == near.best.success
    assert passed.clear < 0.8 <= far.best.clear < far.best.success
    assert far.best.step > near.best.step
    out_of_reach = replace(SHORT, ahead=50.0)
    lacking = cp.tune(tiny("llama"), ["mlp_out.1"], tiny_data(), schedule=out_of_reach).training.best
    assert lacking.success == 1.0
    assert lacking.clear == 0.0


def test_what_is_kept_moves_less_where_more_weight_lies_on_it():
    moved = []
    for keep in (0.0, 30.0):
        schedule = Schedule(steps=30, every=30, rates=(0.03,), keep=keep)
        moved.append(cp.tune(tiny("llama"), ["mlp_out.1"], tiny_data(), schedule=schedule).training.looks[-1].moved)
    assert moved[1] < 0.7 * moved[0]


def test_the_same_seed_gives_the_same_weights():
    both = [cp.tune(tiny("gpt2"), ["z.1.1"], tiny_data(), schedule=SHORT, seed=3) for _ in range(2)]
    first, second = (each.way.state() for each in both)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_answers_of_several_tokens_and_sets_are_what_runs_of_their_own_say():
    model = tiny("gpt2", dtype=torch.float64)
    rows = prompts(2, 3)
    answers = [(((7, 8), (9,)), ((4,),)), (((6,),), ((5, 5), (3, 2, 1)))]
    pairs = Pairs([Pair(row, row, *both, id=str(k)) for k, (row, both) in enumerate(zip(rows, answers, strict=True))])
    with torch.no_grad():
        said = Answers(model, pairs).said(None, [0, 1])

    def log_p(prompt, answer):
        total, ids = 0.0, list(prompt)
        for token in answer:
            logits = model.module(torch.tensor([ids])).logits[0, -1]
            total += float(logits.log_softmax(-1)[token].detach())
            ids.append(token)
        return total

    for number, both in enumerate(answers):
        for found, side in zip((said.wanted, said.unwanted), both, strict=True):
            whole = math.log(sum(math.exp(log_p(rows[number], answer)) for answer in side))
            assert float(found[number]) == pytest.approx(whole, abs=1e-9)


def test_a_margin_asks_for_nothing_more_of_what_is_ahead():
    model = tiny("gpt2")
    data = tiny_data()
    with torch.no_grad():
        said = Answers(model, data.target["train"]).said(None, [0, 1, 2])
    ahead = said.wanted - said.unwanted
    assert float(target_loss(said, "margin", float(ahead.min()))) == pytest.approx(0, abs=1e-6)
    assert float(target_loss(said, "margin", 2.0)) == pytest.approx(float(torch.relu(2.0 - ahead).mean()))
    alone = tiny_data(unwanted=())
    said = Answers(model, alone.target["train"]).said(None, [0])
    with pytest.raises(SettingError, match="compares with the unwanted answer"):
        target_loss(said, "margin", 2.0)
    assert torch.isfinite(
        torch.autograd.grad(target_loss(said, "cross_entropy", 0.0), model.module.lm_head.weight)[0]
    ).all()


def test_the_distance_of_retain_tokens_is_the_divergence_from_the_base_kept_or_not():
    model, pairs = tiny("gpt2"), tiny_data().retain["train"]
    way = stirred(head(model))
    kept = Kept(model, pairs)
    found = kept.distances(way, [1, 0]).detach()
    again = Kept(model, pairs)
    again._fits = False  # as where it would not go into memory
    torch.testing.assert_close(again.distances(way, [1, 0]).detach(), found)
    ids = torch.tensor(pairs[1].clean.tolist())[None]
    with torch.no_grad():
        before = model.module(ids).logits[0].log_softmax(-1)
        with way.running() as module:
            after = module(ids).logits[0].log_softmax(-1)
    wanted = (before.exp() * (before - after)).sum(-1)
    torch.testing.assert_close(found[: len(wanted)], wanted, rtol=1e-4, atol=1e-5)


def test_divergence_puts_the_best_checkpoint_back_and_says_so():
    model, data = tiny("llama"), tiny_data()
    way = head(model)
    made = train(way, data, Schedule(steps=40, every=1), rate=1e38, seed=0)
    assert not made.is_whole
    assert made.ended.startswith("diverged at step")
    assert "was put back" in made.ended
    assert all(torch.isfinite(each).all() for each in way.trained().values())


def test_a_stop_by_the_user_puts_the_best_checkpoint_back_and_says_so(monkeypatch):
    model, data = tiny("llama"), tiny_data()
    way, seen = head(model), []
    real = training.looks

    def looks(*given):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append((real(*given)[0], way.state()))
        return [seen[-1][0]]

    monkeypatch.setattr(training, "looks", looks)
    made = train(way, data, SHORT, rate=0.03, seed=0)
    assert not made.is_whole
    assert made.ended.startswith("stopped by the user at step 15; the best checkpoint, of step")
    kept = next(state for found, state in seen if found == made.best)
    assert all(torch.equal(each, kept[name]) for name, each in way.state().items())
    tuned = cp.tune(model, ["mlp_out.1"], data, schedule=Schedule(steps=10, rates=(0.01, 0.03)))
    assert len(seen) == 3
    assert [each.n_steps for each in tuned.searched] == [0, 0]  # both rates had begun, side by side
    assert not tuned.is_whole


def test_a_rate_that_diverged_and_was_not_chosen_is_told():
    tuned = cp.tune(tiny("llama"), ["z.1.1"], tiny_data(), schedule=Schedule(steps=10, every=1, rates=(0.03, 1e38)))
    assert tuned.training.rate == 0.03
    assert "rate 1e+38 was not chosen: diverged at step" in str(tuned)


def test_training_ends_where_validation_gets_no_better():
    model, data = tiny("llama"), tiny_data()
    made = train(head(model), data, Schedule(steps=200, every=1, patience=3), rate=1e-9, seed=0)
    assert made.n_steps < 50
    assert "validation was no better for 3 looks" in made.ended


def test_validation_may_ask_for_answers_that_are_well_ahead():
    model, data = tiny("llama"), tiny_data()
    pairs = data.target["validation"]
    answers = Answers(model, pairs)
    with torch.no_grad():
        said = answers.said(None, range(len(pairs)))
    gaps = (said.wanted - said.unwanted).sort().values
    between = float(gaps[1:3].mean())
    assert said.succeeds(between).sum() == len(pairs) - 2
    seen = training.look(head(model), Schedule(ahead=max(0.0, between)), KeptSides(model, data), 0)
    assert seen.clear == pytest.approx(float(said.succeeds(max(0.0, between)).double().mean()))
    assert seen.success == pytest.approx(float(said.succeeds().double().mean()))


def test_data_are_divided_by_components_and_kept_apart():
    model = cp.open_model("zoo:stories")
    rows = [
        {"prompt": f"One day {name} saw", "wanted": " a", "unwanted": [" the", " and"], "entities": [name]}
        for name in NAMES[:10]
    ]
    texts = [f"{name} was happy and {name} saw" for name in NAMES[10:16]]
    data = TuningData.of(model, rows, texts, others={"more": rows[:3]}, window=4)
    assert [len(data.target[side]) for side in ("train", "validation", "test")] == [4, 2, 4]
    assert len(data.target["train"][0].wrong_answer) == 2
    groups = {side: {pair.group for pair in data.retain[side]} for side in data.retain}
    assert sum(map(len, groups.values())) == 6
    assert len(data.retain["train"]) > len(groups["train"])  # windows of documents
    assert data.record()["others"]["more"]["n"] == 3
    with pytest.raises(PairError, match="retain and target data overlap"):
        TuningData.of(model, rows, [*texts, f"{NAMES[20]} was happy. One day {NAMES[0]} saw a"])
    over_the_end = f"{NAMES[20]} was. One day {NAMES[0]} saw a"  # the prompt begins in one window and ends in the next
    with pytest.raises(PairError, match="retain and target data overlap"):
        TuningData.of(model, rows, [*texts, over_the_end], window=6)
    with pytest.raises(PairError, match="does not say what is wanted"):
        TuningData.of(model, [{"prompt": "One day"}] * 6, texts)
    with pytest.raises(PairError, match="too few to train, validate and test on"):
        TuningData.of(model, rows[:3], texts)
    require_apart(data.retain["test"], data.target["test"], model)


def test_impossible_schedules_are_refused():
    for wrong in ({"steps": 0}, {"enough": 0.0}, {"ahead": -1.0}, {"rates": ()}, {"objective": "hope"}):
        with pytest.raises(SettingError):
            Schedule(**wrong)
    with pytest.raises(SettingError, match="way='all' is none"):
        cp.tune(tiny("gpt2"), ["z.0.0"], tiny_data(), way="all")


def test_rates_share_what_the_base_says():
    model, data = tiny("gpt2"), tiny_data()
    way = head(model)
    kept = KeptSides(model, data)
    train(way, data, Schedule(steps=4, every=2), rate=0.01, seed=0, kept=kept)
    base = kept.retain["validation"]._base
    assert base is not None
    train(head(model), data, Schedule(steps=2), rate=0.01, seed=1, kept=kept)
    assert kept.retain["validation"]._base is base
