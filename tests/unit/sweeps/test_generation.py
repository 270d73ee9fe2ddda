"""What a model goes on to write behind patched prompts, against loops of plain hooks."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import MetricError, SettingError
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import tiny_model
from tiers import quickly, run_model
from worlds import tiny_world

STEPS = 5
FAMILIES = quickly(["gpt2", "llama", "gemma2", "gpt_neox", "bloom", "mamba"], "gpt2", "llama", "bloom")
DIRECTION = np.random.default_rng(3).normal(size=24) * 3


def prompts(lengths=(4, 7, 5), answer=((1, 2),)) -> Pairs:
    rng = np.random.default_rng(5)
    made = [(rng.integers(3, 40, n), rng.integers(3, 40, n)) for n in lengths]
    return Pairs([Pair(*both, answer, id=str(i)) for i, both in enumerate(made)], name="prompts")


def layer_of(module: torch.nn.Module, number: int) -> torch.nn.Module:
    return next(part for name, part in module.named_modules() if name.endswith((f"layers.{number}", f"h.{number}")))


def go_on(module, ids, write, steps=STEPS, stops=()):
    """Take the likeliest token each time, the layer's input written by a plain hook in every forward."""
    ids, written = list(ids), []

    def hook(part, args, kwargs):
        stream = args[0] if args else kwargs["hidden_states"]
        changed = write(stream.clone(), len(ids) - len(written))
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    for _ in range(steps):
        handle = layer_of(module, 1).register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            logits = module(input_ids=torch.tensor([ids])).logits[0, -1]
        handle.remove()
        written.append(int(logits.argmax()))
        ids.append(written[-1])
        if written[-1] in stops:
            break
    return written + [-1] * (steps - len(written))


def stream_of(module, ids):
    """Return what enters the layer in an untouched run."""
    seen = []

    def hook(part, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).clone())

    handle = layer_of(module, 1).register_forward_pre_hook(hook, with_kwargs=True)
    with torch.no_grad():
        module(input_ids=torch.tensor([list(ids)]))
    handle.remove()
    return seen[0]


@pytest.fixture
def module(request):
    return tiny_model(getattr(request, "param", "llama"), layers=3)


@pytest.mark.parametrize("engine", ["auto", "rows", "reference"])
@pytest.mark.parametrize("module", FAMILIES, indirect=True)
def test_what_is_written_sees_the_patched_prompt_and_is_left_to_itself(module, engine):
    pairs, model = prompts(), cp.open_model(module)
    wanted = []
    for pair in pairs:
        source = stream_of(module, pair.clean)

        def write(stream, n_prompt, source=source):
            stream[:, n_prompt - 2] = source[:, n_prompt - 2]
            return stream

        wanted.append(go_on(module, pair.corrupt, write, stops=model.stop_ids))
    experiment = cp.Experiment(model, pairs, "log_probability", engine=engine)
    got = cp.generate(experiment, "resid_pre.1@-2", max_new_tokens=STEPS)
    assert got.ids.sel(intervention="resid_pre.1@-2").values.tolist() == wanted
    untouched = [go_on(module, pair.corrupt, lambda stream, _: stream, stops=model.stop_ids) for pair in pairs]
    assert got.ids.sel(intervention="base").values.tolist() == untouched
    assert untouched != wanted


@pytest.mark.parametrize("patched", ["prompt", "all"])
@pytest.mark.parametrize("module", FAMILIES, indirect=True)
def test_a_direction_is_added_at_the_prompt_or_at_all_that_is_written(module, patched):
    model = cp.open_model(module)
    direction = np.resize(DIRECTION, model.width)
    pairs = prompts()

    def write(stream, n_prompt):
        stop = n_prompt if patched == "prompt" else stream.shape[1]
        stream[:, :stop] += torch.tensor(direction)
        return stream

    wanted = [go_on(module, pair.corrupt, write, stops=model.stop_ids) for pair in pairs]
    steered = cp.Patch("resid_pre.1", cp.Steer(direction))
    got = cp.generate(cp.Experiment(model, pairs, "log_probability"), steered, max_new_tokens=STEPS, patched=patched)
    assert got.ids.values[2].tolist() == wanted


def test_the_two_ways_differ_and_a_patch_at_a_position_stays_there(module):
    experiment = cp.Experiment(cp.open_model(module), prompts(), "log_probability")
    value = cp.Steer(np.resize(DIRECTION, experiment.model.width))
    found = {}
    for site in ("resid_pre.1", "resid_pre.1@-1"):
        for patched in ("prompt", "all"):
            texts = cp.generate(experiment, cp.Patch(site, value), max_new_tokens=STEPS, patched=patched)
            found[site, patched] = texts.ids.values[2].tolist()
    assert found["resid_pre.1", "prompt"] != found["resid_pre.1", "all"]
    assert found["resid_pre.1@-1", "prompt"] == found["resid_pre.1@-1", "all"]


def test_an_answer_counts_where_it_is_written_token_for_token(module):
    model = cp.open_model(module)
    blank = prompts()
    ids = cp.generate(cp.Experiment(model, blank, "log_probability"), "resid_pre.0", max_new_tokens=3).ids.values[2]
    right, wrong = tuple(ids[0].tolist()), (*ids[0, :2].tolist(), (ids[0, 2] + 1) % 40)
    answers = [((right[:2], wrong)), ((wrong,)), ((tuple(ids[2].tolist()),))]
    pairs = Pairs([Pair(p.clean, p.corrupt, a, id=p.id) for p, a in zip(blank, answers, strict=True)], name="answers")
    effects = run_model("auto", model, pairs, ["resid_pre.0"], metric=cp.generated_answer)
    assert effects.to_xarray()["metric"].values.ravel().tolist() == [1.0, 0.0, 1.0]
    first = cp.generated_answer.generating(1)
    short = run_model("auto", model, pairs, ["resid_pre.0"], metric=first).to_xarray()["metric"].values.ravel()
    assert short.tolist() == [0.0, 0.0, 0.0]
    assert "what the model goes on to write" in effects.provenance["engine"]["reason"]
    assert effects.provenance["generates"] == {"generated_answer": {"max_new_tokens": None, "patched": "prompt"}}


def test_a_function_of_ones_own_reads_what_is_written_beside_metrics_of_logits(module):
    model, pairs = cp.open_model(module), prompts()
    longest = cp.metric(lambda outputs, pairs: (outputs.generated >= 0).sum(1).double(), name="n", position=-1)
    metrics = [longest.generating(4), "log_probability", replace(longest.generating(2), name="fewer")]
    both = run_model("auto", model, pairs, ["z.0.1"], metric=metrics).to_xarray()["metric"].values[:, 0]
    alone = run_model("auto", model, pairs, ["z.0.1"], metric="log_probability").to_xarray()["metric"].values[0]
    np.testing.assert_allclose(both[1], alone, rtol=1e-9)
    assert both[0].max() == 4
    assert both[2].max() == 2


def test_the_token_that_ends_a_text_is_its_last(module):
    pairs = prompts()
    experiment = cp.Experiment(cp.open_model(module), pairs, "log_probability")
    open_end = cp.generate(experiment, "resid_pre.1@0", max_new_tokens=STEPS).ids.values[2]
    module.generation_config.eos_token_id = [int(open_end[0, 1]), 7]
    stopped = cp.generate(experiment, "resid_pre.1@0", max_new_tokens=STEPS).ids.values[2]
    place = int(np.flatnonzero(np.isin(open_end[0], module.generation_config.eos_token_id))[0])
    assert stopped[0].tolist() == [*open_end[0, : place + 1].tolist(), *[-1] * (STEPS - place - 1)]


def test_padding_and_memory_change_nothing(module):
    model, pairs = cp.open_model(module), prompts((3, 9, 5, 6))
    wanted = None
    for settings in ({}, {"padding_side": "left"}, {"max_rows": 1}):
        ids = cp.generate(cp.Experiment(model, pairs, "log_probability", **settings), ["z.1.2", "resid_pre.0@1"]).ids
        wanted = ids if wanted is None else wanted
        assert ids.equals(wanted)
    assert dict(wanted.sizes) == {"intervention": 4, "pair": 4, "step": 16}


def test_texts_come_with_a_tokenizer():
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model).take([0, 1]))
    frame = cp.generate(experiment, "resid_pre.0", max_new_tokens=3).to_dataframe()
    assert frame.columns.tolist() == ["intervention", "pair", "text", "ids"]
    clean = frame[(frame.intervention == "source") & (frame.pair == "ioi-000")].text.item()
    patched = frame[(frame.intervention == "resid_pre.0") & (frame.pair == "ioi-000")].text.item()
    assert clean == patched != frame[(frame.intervention == "base") & (frame.pair == "ioi-000")].text.item()
    assert model.tokenizer.decode(experiment.pairs[0].answer[0]).strip() in clean


def test_a_plan_counts_the_forwards_that_follow():
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    experiment = cp.Experiment(model, prompts(), cp.generated_answer.generating(4))
    plan = experiment.plan(["z.0.1"])
    assert (plan.n_forks, plan.tier) == (3, "rows")


def test_what_cannot_be_read_is_refused(module):
    model, pairs = cp.open_model(module), prompts()
    with pytest.raises(MetricError, match="does not say how the model goes on"):
        run_model("auto", model, pairs, ["z.0.1"], metric=cp.metric(lambda o, p: o.generated[:, 0], position=-1))
    with pytest.raises(MetricError, match="generated tokens at position 0"):
        cp.Experiment(model, pairs, cp.generated_answer.at(0))
    with pytest.raises(MetricError, match="cannot write 0 tokens"):
        cp.generated_answer.generating(0)
    with pytest.raises(SettingError, match="takes whole forwards"):
        run_model("wavefront", model, pairs, ["z.0.1"], metric=cp.generated_answer)
