"""Runs that begin at the first patched layer: the reference's numbers, for models that allow it, and nothing left."""

from functools import partial
from operator import itemgetter

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.base.errors import ModelUnsupported
from causalpatch.engine import BASE, SOURCE, Cost, Gauge, Job, fit_all_means, reference, restart, targets_of
from causalpatch.metrics import METRICS
from causalpatch.pairs import Pair, Pairs
from causalpatch.patches import Intervention
from causalpatch.results.status import Status
from causalpatch.sites import NAMES
from causalpatch.testing.tiny import VOCAB, tiny_model
from doctored import Body, doctored, llama
from tiers import quickly
from toys import Chain, hooks_of, opened, vectors
from worlds import FIRST, projection, random_pairs, tiny_world, unchecked

PAIRS = random_pairs(5, 4, "equal", shared=0.3)
BUILT_IN = (METRICS["logit_difference"], METRICS["log_probability"], METRICS["kl_divergence"].at(-2))


def _last_two(outputs, pairs):
    rows = torch.arange(len(pairs))
    return sum(torch.tanh(outputs.logits[rows, outputs.column - back]).sum(1) for back in (0, 1))


LAST_TWO = cp.metric(_last_two, name="last two")


def job_of(model, requests, pairs=PAIRS, n_controls=0, **settings):
    """Return the job of some requests, the last ones being controls."""
    interventions = [targets_of(model, Intervention.of(request)) for request in requests]
    return Job(model, pairs, interventions, "corrupt", n_controls=n_controls, **settings)


def cells(engine, job, metrics=BUILT_IN, cost=None):
    """Measure a job; return values (metric, intervention, pair), base and source last, and status."""
    gauge = Gauge(metrics, job.pairs, job.model)
    shape = (len(job.interventions) + 2, len(job.pairs))
    values, status = np.full((len(metrics), *shape), np.nan), np.full(shape, Status.SKIPPED)
    places = {BASE: shape[0] - 2, SOURCE: shape[0] - 1}
    for block in engine(job, gauge, fit_all_means(job), cost or Cost()):
        rows = [places.get(number, number) for number in block.interventions.tolist()]
        assert (status[rows, block.pairs] == Status.SKIPPED).all()
        values[:, rows, block.pairs], status[rows, block.pairs] = block.values, block.status
    assert (status != Status.SKIPPED).all()
    return values, status


def assert_restart_is_right(job, metrics=BUILT_IN):
    with unchecked():
        wanted, _ = cells(reference.measure_reference, job, metrics)
    got, status = cells(restart.measure, job, metrics)
    np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-10)
    return status


def requests_for(model):
    """Return patches at every kind of place, two of them at once, and every kind of value."""
    path = model.tap(cp.parse("mlp_out.1")).port.path
    head = model.tap(cp.parse("final_norm")).port.path
    outside = ("module", "embed", "pos_embed", "final_norm", "logits", *model.shape.refused)
    names = [name for name in NAMES if name not in outside]
    return [
        *[f"{name}.1.1@-1" if NAMES[name].unit_axis else f"{name}.1@0" for name in names],
        *(["pos_embed@0"] if "pos_embed" not in model.shape.refused else []),
        "embed@1",
        "final_norm@-1",
        "logits@-1",
        "resid_post.2",
        f"module({path}).input@-2",
        f"module({head}).input@-1",
        ["resid_pre.2@0", "mlp_out.1@-1"],
        ["resid_post.1@0", "resid_pre.2@0"],
        cp.Patch("z.2", cp.Mean("positions", "corrupt")),
        cp.Patch("resid_post.0@1", cp.Mean("pairs", "clean")),
        cp.Patch("mlp_out.2@-1", cp.Function(lambda current, source: current * source)),
        cp.Patch("attn_out.1@-1", "zero"),
        cp.Patch("resid_pre.1", cp.Identity()),
    ]


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("family", quickly(FIRST, "gpt2", "gemma2"))
def test_runs_that_begin_at_a_layer_give_what_whole_runs_give(family, padding_side):
    model, _ = tiny_world(family, (3, 2, 2, 0))
    job = job_of(model, requests_for(model), padding_side=padding_side)
    for metrics in (BUILT_IN, (projection, LAST_TWO)):
        assert restart.why_not(job, Gauge(metrics, PAIRS, model)) is None
        assert_restart_is_right(job, metrics)


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("max_rows", [1, 3, None])
def test_answers_of_several_tokens_are_spelt_out_from_the_same_layer(padding_side, max_rows):
    rng = np.random.default_rng(0)
    pairs = [
        Pair(
            rng.integers(3, VOCAB, length),
            rng.integers(3, VOCAB, length),
            tuple(tuple(rng.integers(3, VOCAB, size).tolist()) for size in sizes),
            id=str(length),
        )
        for length, sizes in [(3, (1, 3)), (6, (2,)), (4, (3, 2))]
    ]
    model, _ = tiny_world("mistral", (3, 2, 2, 0))
    settings = {"padding_side": padding_side, "max_rows": max_rows}
    job = job_of(model, ["resid_pre.1@0", "z.2.1@-1", "resid_post.1@1"], Pairs(pairs, name="spelt"), **settings)
    assert_restart_is_right(job, (METRICS["log_probability"], METRICS["log_probability"].at(-1)))


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_a_short_prompt_runs_without_the_columns_of_a_longer_one_that_is_derived(padding_side):
    rng = np.random.default_rng(3)
    short, long = rng.integers(3, VOCAB, 3), rng.integers(3, VOCAB, 6)
    answers = (((4,),), ((5,),))
    pairs = [
        Pair(short, np.append((short[0] - 2) % (VOCAB - 3) + 3, short[1:]), *answers, id="differs at once"),
        Pair(long, np.append(long[:-1], (long[-1] - 2) % (VOCAB - 3) + 3), *answers, id="differs last"),
    ]
    model, _ = tiny_world("llama", (3, 2, 2, 0))
    job = job_of(model, ["resid_pre.1@0"], Pairs(pairs, name="unequal"), padding_side=padding_side)
    status = assert_restart_is_right(job)
    assert status[0].tolist() == [Status.MEASURED, Status.DERIVED]


def test_layers_before_the_first_patched_one_do_not_run():
    model, _ = tiny_world("llama", (3, 2, 2, 0))
    calls = []
    parts = [
        layer.mlp.register_forward_hook(lambda *_, n=n: calls.append(n))
        for n, layer in enumerate(model.module.model.layers)
    ]
    try:
        job = job_of(model, ["z.2.0@-1", "resid_post.1@-1", "final_norm@-1"])
        gauge = Gauge(BUILT_IN, PAIRS, model)
        for block in restart.measure(job, gauge, fit_all_means(job), Cost()):
            is_patched = (block.interventions >= 0).all()
            if not is_patched:
                calls.clear()
        assert calls == [2]
    finally:
        for part in parts:
            part.remove()


def test_cells_whose_new_value_is_the_old_one_are_derived_but_never_controls_or_other_values():
    model, _ = tiny_world("gpt2", (3, 2, 2, 0))
    pairs = Pairs([Pair(np.array([3, 4, 5, 6]), np.array([3, 4, 7, 6]), ((8,),), ((9,),), id="a")], name="one")
    same = ["resid_pre.1@0", ["z.1.0@1", "mlp_out.0@0"]]
    other = [["z.1.0@1", "mlp_out.0@2"], "resid_pre.1@-1", cp.Patch("resid_pre.1@0", cp.Identity()), "resid_pre.1@0"]
    job = job_of(model, [*same, *other], pairs, n_controls=1)
    status = assert_restart_is_right(job)
    assert (status[:2] == Status.DERIVED).all()
    assert (status[2:] == Status.MEASURED).all()


@pytest.mark.parametrize("name", ["features between its layers", "a dictionary that layers share"])
def test_a_model_that_leaves_more_than_the_stream_to_the_next_layer_is_refused_before_anything_is_measured(name):
    model = cp.open_model(doctored(name))
    before = hooks_of(model.module)
    job = job_of(model, ["z.2.0@-1"])
    with pytest.raises(ModelUnsupported, match="cannot be left out") as caught:
        next(restart.measure(job, Gauge(BUILT_IN, PAIRS, model), fit_all_means(job), Cost()))
    assert "rows" in caught.value.fix
    assert hooks_of(model.module) == before


def test_a_model_that_keeps_something_beside_its_layers_is_refused():
    module = llama()
    first, last = module.model.layers[0], module.model.layers[-1]
    memo = {}
    first.mlp.register_forward_hook(lambda part, args, output: memo.update(kept=output))
    last.mlp.register_forward_hook(lambda part, args, output: output + memo["kept"])
    model = cp.open_model(module)
    job = job_of(model, ["z.2.0@-1"])
    with pytest.raises(ModelUnsupported, match="cannot be left out") as caught:
        next(restart.measure(job, Gauge(BUILT_IN, PAIRS, model), fit_all_means(job), Cost()))
    assert ("problem", "the run does not come out the same from this layer on") in caught.value.facts


def test_models_without_layers_that_are_known_are_refused_in_words():
    model, pairs = opened(Chain()), vectors()
    job = job_of(model, ["module(first).output"], pairs)
    assert restart.why_not(job, Gauge(BUILT_IN[:1], pairs, model)) == "the layers of 'Chain' are not known by name"


def test_a_run_that_fails_leaves_forwards_and_hooks_as_they_were():
    module = tiny_model("llama", layers=3)
    layer, own = module.model.layers[0], module.model.layers[1].forward
    module.model.layers[1].forward = own  # a forward of the object's own, as wrappers leave them
    model, calls = cp.open_model(module), []

    def fail(part, args, output):
        calls.append(1)
        if len(calls) > 6:
            raise KeyboardInterrupt

    module.model.layers[2].register_forward_hook(fail)
    before = hooks_of(module)
    with pytest.raises(KeyboardInterrupt):
        cells(restart.measure, job_of(model, ["z.2.0@-1", "z.2.1@-1"], max_rows=1))
    assert hooks_of(module) == before
    assert "forward" not in layer.__dict__
    assert module.model.layers[1].forward is own


def test_a_readers_own_hooks_on_layers_keep_working():
    module = tiny_model("gpt2", layers=3)
    model, layers = cp.open_model(module), module.transformer.h
    steer = torch.linspace(-1, 1, model.width, dtype=torch.float64)
    layers[0].register_forward_hook(lambda part, args, output: output + steer)
    layers[1].register_forward_pre_hook(lambda part, args: (args[0] * 1.5, *args[1:]))
    layers[1].register_forward_hook(lambda part, args, output: output - 0.3 * steer)
    plain, _ = cells(reference.measure_reference, job_of(tiny_world("gpt2", (3, 4, 4, 0))[0], ["z.2.1@-1"]))
    requests = ["z.2.1@-1", "resid_pre.1@0", "resid_post.0@1", "resid_post.1@1", "mlp_out.1@1", "embed@0"]
    job = job_of(model, requests)
    assert_restart_is_right(job)
    assert not np.allclose(cells(restart.measure, job)[0][:, 0], plain[:, 0])


def test_memory_that_runs_out_halves_the_rows_and_changes_no_number():
    module = tiny_model("llama", layers=3)
    model, seen = cp.open_model(module), []

    def exhaust(part, args, kwargs):
        seen.append(len(kwargs["input_ids"]))
        if seen[-1] > 3:
            raise torch.OutOfMemoryError("no more")

    job = job_of(model, ["z.2.0@-1", "z.1.1@-1", "resid_pre.1@0"])
    wanted, _ = cells(restart.measure, job)
    hook = module.register_forward_pre_hook(exhaust, with_kwargs=True)
    got, _ = cells(restart.measure, job)
    hook.remove()
    np.testing.assert_allclose(got, wanted, atol=1e-10)
    assert max(seen) > 3


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_logits_are_computed_for_the_tokens_that_are_read(padding_side):
    module = tiny_model("llama", layers=3)
    model, widths = cp.open_model(module), []
    module.lm_head.register_forward_pre_hook(lambda part, args: widths.append(args[0].shape[1]))
    n_columns = max(len(pair.clean) for pair in PAIRS)
    assert len({len(pair.clean) for pair in PAIRS}) > 1
    job = job_of(model, ["z.2.0@-1"], padding_side=padding_side)
    cells(restart.measure, job)
    assert set(widths) == {n_columns}  # a reader's own hook sees all
    module.lm_head._forward_pre_hooks.clear()
    hidden = module.lm_head.forward
    module.lm_head.forward = lambda x: (widths.append(x.shape[1]), hidden(x))[1]
    widths.clear()
    assert_restart_is_right(job, (METRICS["logit_difference"],))
    assert min(widths) == (1 if padding_side == "left" else n_columns - min(len(pair.clean) for pair in PAIRS) + 1)


def add_extra(x):
    return x[0] + x[1]


def add_extra_if_there(x):
    return x[0] if x[1] is None else x[0] + x[1]


@pytest.mark.parametrize(
    ("extra", "read", "is_refused"),
    [
        (None, itemgetter(0), False),
        (torch.ones(1), itemgetter(0), False),  # such as weights of attention, for the caller alone
        (torch.ones(1), add_extra, True),
        (torch.ones(1), add_extra_if_there, True),
        ([None], itemgetter(0), True),
    ],
)
def test_what_a_layer_returns_beside_the_stream_may_be_left_out_only_if_nothing_reads_it(extra, read, is_refused):
    class Tuples(Body):
        def between(self, number, x, position_ids):
            return read(x) if isinstance(x, tuple) else x

    module = llama()
    module.model.__class__ = Tuples
    for layer in module.model.layers:
        layer.forward = partial(lambda own, *args, **kwargs: (own(*args, **kwargs), extra), layer.forward)
    module.model.norm.register_forward_pre_hook(lambda part, args: (read(args[0]),))
    job = job_of(cp.open_model(module), ["z.2.0@-1", "resid_pre.1@0"])
    if not is_refused:
        assert_restart_is_right(job)
        return
    with pytest.raises(ModelUnsupported, match="cannot be left out"):
        cells(restart.measure, job)


def test_answers_are_spelt_out_where_all_runs_begin_at_the_first_layer():
    prompts = [np.array([5, 6, 7, 8]), np.array([9, 10, 11])]
    pairs = Pairs([Pair(ids, np.roll(ids, 1), ((5, 9),), ((6,),), id=str(n)) for n, ids in enumerate(prompts)])
    model = cp.open_model(tiny_model("llama", layers=2))
    found = [
        cp.Experiment(model, pairs, metric=cp.log_probability, engine=engine, show_progress=False).run(["embed@0"])
        for engine in ("restart", "reference")
    ]
    got, wanted = (each.to_xarray()["metric"].values for each in found)
    assert np.abs(got - wanted).max() < 1e-10
