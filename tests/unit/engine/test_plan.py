from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import causalpatch as cp
from causalpatch.base.errors import MetricError
from causalpatch.engine import Gauge, Job, ModelCost, make_plan, plan_job, targets_of
from causalpatch.engine.cone import Point, Runs, cone, full_flops
from causalpatch.engine.plan import Wave, for_tier
from causalpatch.engine.planning import numbers_of
from causalpatch.pairs import Pair, Pairs
from causalpatch.testing.tiny import GROUPED, tiny_model
from tiers import quickly
from toys import Chain, opened, prompts, vectors
from worlds import FIRST, ON_WAVEFRONT, tiny_world

COST = ModelCost(weights=1000, attention=64, bytes_per_row=2**20, rows_per_forward=8)
SHOWN = (("'a'", "'b'"), ("z.0.0@-1", "z.0.1@-1"))


def plan(cells=(3, 3), lengths=(5, 7), **changes):
    settings = {"n_interventions": 3, "n_more": 3, "n_forks": 0, "shown": SHOWN} | changes
    return make_plan(COST, lengths, cells, **settings)


def test_rows_are_those_asked_for_and_those_that_every_pair_needs_anyway():
    made = plan()
    assert made.rows == 2 * (3 + 3)
    assert made.forwards == 2
    assert made.tokens == 6 * 5 + 6 * 7
    assert made.n_unaligned == 0


def test_operations_are_two_for_each_weight_and_token_and_two_for_half_of_the_keys_in_scores_and_values():
    made = plan()
    matrices = 2 * 1000 * (6 * 5 + 6 * 7)
    # Each query meets half of the keys on average: n*n/2 products of heads x width, twice, two operations each.
    attention = 6 * (5 * 5 + 7 * 7) / 2 * 64 * 2 * 2
    assert made.flops == pytest.approx(matrices + attention)


def test_answers_of_several_tokens_run_every_row_again():
    assert plan(n_forks=2).rows == 3 * plan().rows
    assert plan(n_forks=2).flops == pytest.approx(3 * plan().flops)


def test_cells_without_the_position_are_not_run_and_are_counted():
    made = plan(cells=(3, 1))
    assert made.rows == 6 + 4
    assert made.n_unaligned == 2


def test_memory_is_that_of_the_rows_that_stand_together():
    assert plan().gib == 8 * 2**20 / 2**30
    assert plan(cells=(0, 0), n_more=2).gib == 4 * 2**20 / 2**30


def test_a_plan_prints_what_is_patched_what_it_costs_and_the_first_pair():
    text = str(plan(cells=(3, 1), n_forks=1))
    assert "patch          z.0.0@-1, z.0.1@-1" in text
    assert "3 on 2 pairs" in text
    assert "2 cells whose pair lacks the position" in text
    assert "1 more forwards per row, through answers or what is written" in text
    assert "20 rows in 3 forwards of up to 8 rows" in text
    assert text.splitlines()[-2:] == ["clean          'a'", "corrupted      'b'"]
    shown = (("'a'", "'b'"), tuple(f"z.0.{head}" for head in range(12)))
    assert "z.0.0, z.0.1, z.0.2, z.0.3 … (12 sites)" in str(plan(shown=shown))


@pytest.mark.parametrize("value", [None, "zero", cp.Mean("positions", "clean")])
def test_a_plan_counts_the_rows_that_the_run_then_makes(value):
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    pairs = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([8, 9, 10], [8, 11, 10]), ([8, 9, 10], [12, 9, 10]))
    direction = "denoise" if value is None else "noise"
    experiment = cp.Experiment(model, pairs, direction=direction, engine="rows", max_rows=4)
    patches = [cp.Patch(site, value) for site in ("z.0.1@-1", "resid_pre.1")]
    made = experiment.plan(patches)
    effects = experiment.run(patches)
    n_means = len(pairs) * isinstance(value, cp.Mean)
    assert made.rows - n_means == effects.provenance["cost"]["rows"]
    assert made.n_interventions == 2
    assert made.rows_per_forward == 4
    assert made.forwards <= effects.provenance["cost"]["forwards"] + 1


def test_making_a_plan_runs_nothing():
    model = opened(Chain())
    model.module.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    made = cp.Experiment(model, vectors(6)).plan(["module(first).output", "module(second).output"])
    assert made.n_pairs == 6
    assert made.first_pair == ("array (4,)", "array (4,)")


def test_unaligned_cells_are_planned_as_such():
    model, _ = tiny_world("gpt2", (1, 2, 2, 2))
    pairs = prompts(([3, 4, 5], [6, 4]), ([3, 4, 5], [6, 4, 5])).align("map", mapping=[[(0, 0)], [(0, 0), (2, 2)]])
    made = cp.Experiment(model, pairs).plan([cp.Patch("resid_pre.0", column=column) for column in (0, 1)])
    assert made.n_unaligned == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_weights_are_those_that_every_token_meets(family):
    module = tiny_model(family, dtype=torch.float32)
    model = cp.open_model(module)
    pairs = prompts(([3, 4, 5], [6, 4, 5]))
    made = cp.Experiment(model, pairs).plan(["resid_pre.0"])
    tables = {"gpt2": ["wte", "wpe"], "llama": ["embed_tokens"]}[family]
    own = sum(p.numel() for name, p in module.named_parameters() if not any(table in name for table in tables))
    unembedding = 40 * 32
    # GPT-2 ties its head to the embedding, Llama here has a head of its own.
    weights = own + (unembedding if family == "gpt2" else 0)
    attention = made.rows * 3 * 3 * 2 * (2 * 4 * 8)
    assert made.flops == pytest.approx(2 * made.tokens * weights + attention)


WAVE = Wave(
    token_layers=1234,
    chunk_rows=2048,
    chunk_bytes=2**30,
    base_bytes=2**29,
    base_place="device",
    logits_bytes=2**28,
    held_bytes=2**31,
    passes=4,
)


def planned(tier="wavefront", **changes):
    given = {"patched_flops": {"wavefront": 1e5, "restart": 2e5}, "wave": WAVE, "n_derived": 2, "untouched_flops": 2e4}
    return for_tier(plan(), tier, **(given | {"rate": 1e6} | changes))


def test_every_engine_also_makes_the_untouched_runs():
    made = planned()
    assert made.flops_of == {"wavefront": 1.2e5, "restart": 2.2e5, "rows": made.flops, "reference": made.flops}
    assert made.tier_flops == 1.2e5
    assert made.saved == pytest.approx(1 - 1.2e5 / made.flops)
    assert made.seconds == pytest.approx(0.12)


def test_what_is_not_known_beforehand_is_not_claimed():
    made = planned("graph")
    assert made.tier_flops is made.saved is made.seconds is None
    assert "saves" not in str(made)
    assert planned(rate=None).seconds is None
    assert "time" not in str(planned(rate=None))
    assert plan().tier_flops == plan().flops


def test_the_plan_of_the_wavefront_says_what_it_saves_and_how_often_it_goes_through_the_layers():
    made = planned()
    lines = dict(line.split(maxsplit=1) for line in str(made).splitlines())
    assert lines["engine"] == "wavefront"
    assert lines["known"] == "2 cells that lead to nothing that is read: their effect is 0"
    assert lines["runs"] == "1,234 tokens through single layers, up to 2,048 at once"
    whole = f"{made.flops / 1e9:,.1f} by 12 rows in whole forwards"
    assert lines["arithmetic"] == f"0.0 GFLOP instead of {whole} (saves {made.saved:.0%})"
    assert lines["memory"] == "about 3.75 GiB of activations, in 4 passes over the layers"
    assert lines["time"] == "at least 0.1 s"
    assert "one pass over the layers" in str(planned(wave=replace(WAVE, passes=1)))
    assert "12 rows in 2 forwards" in str(planned("restart"))
    assert "saves" in str(planned("restart"))


@pytest.mark.parametrize(
    ("rate", "text"), [(1e9, "0.1 ms"), (1e4, "12.0 s"), (1e3, "2.0 min"), (10.0, "3.3 h"), (1.2e5 / 5390, "89.8 min")]
)
def test_seconds_are_told_in_units_that_are_easy_to_read(rate, text):
    assert f"time           at least {text}\n" in str(planned(rate=rate))


@pytest.mark.parametrize("family", quickly([f for f in ON_WAVEFRONT if f != "opt"], *FIRST))
def test_a_models_numbers_give_the_operations_that_are_counted_when_it_runs(family):
    kv_heads = 1 if family in GROUPED else None
    module = tiny_model(family, layers=3, kv_heads=kv_heads, dtype=torch.float32)
    numbers = numbers_of(cp.open_model(module))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.arange(3, 10)[None])
    names = ("aten.mm", "aten.addmm")
    products = sum(n for operation, n in counter.get_flop_counts()["Global"].items() if str(operation) in names)
    assert products == 2 * 7 * (3 * numbers.layer + numbers.width * numbers.vocab)
    assert numbers.is_parallel == (family in ("gpt_neox", "gptj", "phi", "stablelm_parallel", "cohere", "cohere2"))
    assert numbers.number_bytes == 4
    windows = dict.fromkeys(["mistral", "phi3"], (4, 4, 4))
    windows |= dict.fromkeys(["gemma2", "gemma3", "cohere2"], (4, None, 4))
    assert numbers.windows == windows.get(family, numbers.windows)
    assert not any(numbers.windows) or family in windows


def test_a_model_without_a_family_has_no_such_numbers():
    assert numbers_of(opened(Chain())) is None


PAIRS = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([8, 9, 10], [8, 11, 10]))


def plan_of(requests, *, pairs=PAIRS, family="llama", metric=cp.logit_difference, tier="wavefront", **settings):
    model, _ = tiny_world(family, (3, 4, 2, 0))
    targets = [targets_of(model, cp.Intervention.of(request)) for request in requests]
    gauge = Gauge([metric], pairs, model)
    job = Job(model, pairs, targets, "corrupt", **settings)
    return plan_job(job, len(gauge.forks), gauge=gauge, tier=tier)


def patched(requests, **settings):
    """Return what the plan says of the patched runs alone."""
    made = plan_of(requests, **settings)
    nothing = made.flops_of["rows"] * 2 * made.n_pairs / made.rows
    return made.flops_of["wavefront"] - nothing


ONE = prompts(([3, 4, 5, 6], [7, 4, 5, 6]))
NUMBERS = numbers_of(tiny_world("llama", (3, 4, 2, 0))[0])


@pytest.mark.parametrize(
    ("request_", "layer", "point", "tokens", "columns"),
    [
        ("embed@1", 0, Point.STREAM, [1], 0),
        ("resid_pre.1@1", 1, Point.STREAM, [1], 0),
        ("resid_post.0@1", 1, Point.STREAM, [1], 0),
        ("resid_post.2@-1", 3, Point.STREAM, [3], 0),
        ("final_norm@-1", 3, Point.STREAM, [3], 0),
        ("logits@-1", 3, Point.LOGITS, [3], 0),
        ("q.1.2@2", 1, Point.QUERY, [2], 8),
        ("k.1.0@1", 1, Point.KEY_VALUE, [1], 16),
        ("v.1.1", 1, Point.KEY_VALUE, [0, 1, 2, 3], 16),
        (["k.1.0@1", "v.1.0@1"], 1, Point.KEY_VALUE, [1], 16),
        ("v.1.*@1", 1, Point.KEY_VALUE, [1], 0),
        ("z.0.3", 0, Point.ATTENDED, [0, 1, 2, 3], 8),
        ("z.0.0:2@1", 0, Point.ATTENDED, [1], 16),
        ("head_out.1.0@0", 1, Point.MIDDLE, [0], 0),
        ("attn_out.2@-1", 2, Point.MIDDLE, [3], 0),
        ("resid_mid.2", 2, Point.MIDDLE, [0, 1, 2, 3], 0),
        ("mlp_post.1.7@2", 1, Point.ACTIVATED, [2], 1),
        ("mlp_out.0@2", 0, Point.ADDED, [2], 0),
        ("module(model.layers.1.mlp.up_proj).output@2", 1, Point.STREAM, [2], 0),
        ("module(model.layers.1).input@2", 1, Point.STREAM, [2], 0),
        ("module(model.embed_tokens).output@2", 0, Point.STREAM, [2], 0),
        (["z.1.0@2", "mlp_post.1.3@1"], 1, Point.ATTENDED, [1, 2], 0),
        (["mlp_post.2.3@1", "z.1.0@2"], 1, Point.ATTENDED, [1, 2], 8),
        ("resid_pre.*@1", 0, Point.STREAM, [1], 0),
    ],
)
def test_every_site_enters_where_it_stands(request_, layer, point, tokens, columns):
    run = Runs(np.array([layer]), np.array([point]), np.array([tokens]), np.array([[3]]), np.array([columns]))
    made = cone(NUMBERS, run, 2)
    assert patched([request_], pairs=ONE) == pytest.approx(made.flops[0], rel=1e-12)
    planned = plan_of([request_], pairs=ONE)
    assert planned.wave.token_layers == made.rows[0]
    assert planned.n_derived == 0


def test_cells_of_all_pairs_are_added_up():
    requests = ["resid_pre.0@1", "resid_pre.0@1", "z.1.0", "z.1.1"]
    made = plan_of(requests)
    alone = [plan_of([request], pairs=PAIRS.take([pair])) for request in requests for pair in range(2)]
    assert made.wave.token_layers == sum(one.wave.token_layers for one in alone)
    both = sum(patched([request]) for request in requests)
    assert patched(requests) == pytest.approx(both)
    assert made.flops_of["wavefront"] < made.flops_of["restart"] < made.flops_of["rows"] == made.flops


def test_replaying_the_layers_above_costs_whole_prompts_from_the_entry_on():
    made = plan_of(["resid_pre.1@3", "z.2.0", "final_norm@-1"], pairs=ONE, tier="restart")
    layers = full_flops(NUMBERS, np.array([4, 4, 4]), from_layer=np.array([1, 2, 3])).sum()
    assert made.tier_flops == pytest.approx(layers + made.flops * 2 / 5)


def test_what_stands_behind_the_last_token_that_is_read_is_known_beforehand():
    requests = [f"resid_pre.0@{token}" for token in range(3)]
    assert plan_of(requests).n_derived == 0
    early = plan_of(requests, metric=cp.logit_difference.at(1))
    assert early.n_derived == 2  # token 2 of both pairs
    assert "known          2 cells" in str(early)
    # Behind attention of the last layer a token changes nothing but itself.
    assert plan_of(["mlp_out.2@0", "mlp_out.2@-1"]).n_derived == 2
    with pytest.raises(MetricError, match="reads token 3, which pair 1 does not have"):
        plan_of(requests, metric=cp.logit_difference.at(3))


def test_metrics_of_the_whole_vocabulary_and_of_all_tokens_need_more():
    answers, vocabulary = (patched(["z.2.0@-1"], metric=metric, pairs=ONE) for metric in (cp.logit_difference, cp.top1))
    assert vocabulary - answers == 2 * (NUMBERS.vocab - 2) * NUMBERS.width
    everything = cp.metric(lambda outputs, pairs: outputs.logits[:, :, 0].sum(1), name="everything")
    runs = Runs(np.array([1]), np.array([0]), np.array([[1]]), np.arange(4)[None], np.array([0]))
    assert patched(["resid_pre.1@1"], metric=everything, pairs=ONE) == cone(NUMBERS, runs, NUMBERS.vocab).flops[0]


def test_spelt_answers_go_on_through_the_layers_above():
    answers = ((5, 7, 8), (9,)), ((6, 7),)
    pairs = Pairs([Pair(np.array([3, 4, 5, 6]), np.array([7, 4, 5, 6]), *answers, id="0")], name="long")
    made = plan_of(["resid_pre.1@1"], pairs=pairs, metric=cp.log_probability)
    assert made.n_forks == 2
    prompt = cone(NUMBERS, Runs.at(1, Point.STREAM, 1, 3), NUMBERS.vocab).flops[0]
    per_token = 2 * 2 * (NUMBERS.layer + 2 * 4 * 8 * 4) + 2 * NUMBERS.width * NUMBERS.vocab
    untouched = made.flops * 2 / 3
    assert made.flops_of["wavefront"] - untouched == pytest.approx(prompt + 2 * per_token)


def kept(*, projected=0, longest=4):
    """Return the bytes that are kept of a token: inputs of layers and norm, keys and values, a row of the mask."""
    return (4 * 32 + 3 * 2 * 2 * 8 + longest + projected) * 8


def test_what_is_held_is_the_stream_of_all_runs_and_the_base_runs_keys_values_and_inputs():
    requests = [f"resid_pre.{layer}@{token}" for layer in range(3) for token in range(3)]
    made = plan_of(requests)
    rows = 3 * (4 + 3 + 2) + 3 * (3 + 2 + 1)
    assert made.wave.held_bytes == rows * 32 * 8
    projected = 3 * (4 + 2 * 2) * 8  # queries, keys and values of the rows that are not written
    # Both prompts of both pairs, as wide as the longest.
    assert made.wave.base_bytes == 2 * 2 * 4 * kept(projected=projected)
    assert made.wave.base_place == "device"
    assert made.wave.logits_bytes == 2 * 2 * 2 * 8  # two columns
    whole = plan_of([f"resid_pre.{layer}" for layer in range(3)], metric=cp.top1)
    assert whole.wave.base_bytes == 2 * 2 * 4 * kept()
    assert whole.wave.logits_bytes == 2 * 2 * 40 * 8
    assert made.wave.chunk_rows == rows
    assert made.wave.passes == 1
    narrow = plan_of(requests, budget_gib=rows * 32 * 8 / 2**30)
    assert narrow.wave.held_bytes < made.wave.held_bytes
    assert narrow.wave.passes >= 8  # an eighth of the budget each


def test_untouched_runs_that_do_not_fit_are_kept_elsewhere_and_the_plan_says_so():
    made = plan_of(["resid_pre.0"], budget_gib=1e-6)
    assert made.wave.base_place == "disk"
    assert made.wave.base_bytes == 2 * 4 * kept()  # of the longer pair
    away = replace(made.wave, base_bytes=3 * 2**30, logits_bytes=0, held_bytes=0, chunk_bytes=2**29, passes=1)
    one = replace(made, wave=away)
    assert "memory         about 0.50 GiB of activations and 3.00 on disk, in one pass" in str(one)
    there = replace(one, wave=replace(one.wave, base_place="host"))
    assert "and 3.00 in the host's memory, in one pass" in str(there)


def test_controls_are_run_but_are_not_among_the_known_cells():
    requests = ["resid_pre.0@0", "resid_pre.0@2"]
    metric = cp.logit_difference.at(1)
    both = plan_of(requests, metric=metric)
    control = plan_of(requests, metric=metric, n_controls=1)
    assert both.n_derived == 2
    assert control.n_derived == 0
    assert control.wave == both.wave


def test_the_measured_rate_of_the_device_becomes_time():
    model, _ = tiny_world("llama", (3, 4, 2, 0))
    gauge = Gauge([cp.logit_difference], ONE, model)
    job = Job(model, ONE, [targets_of(model, cp.Intervention.of("resid_pre.0@0"))], "corrupt")
    made = plan_job(job, 0, gauge=gauge, tier="wavefront", rate=1e9)
    assert made.seconds == made.flops_of["wavefront"] / 1e9
    assert "at least" in str(made)


def test_a_model_without_layers_is_planned_by_whole_forwards_alone():
    model, pairs = opened(Chain()), vectors(3)
    metric = cp.metric(lambda outputs, pairs: outputs.logits[:, 0], name="first")
    job = Job(model, pairs, [targets_of(model, cp.Intervention.of("module(first).output"))], "corrupt")
    made = plan_job(job, 0, gauge=Gauge([metric], pairs, model), tier="graph")
    assert made.wave is None
    assert set(made.flops_of) == {"rows", "reference"}
    assert "engine         graph" in str(made)
