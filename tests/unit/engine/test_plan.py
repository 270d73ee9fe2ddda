import pytest
import torch

import causalpatch as cp
from causalpatch.engine import ModelCost, make_plan
from causalpatch.testing.tiny import tiny_model
from toys import Chain, opened, prompts, vectors
from worlds import tiny_world

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
    assert "1 more forwards per row, to spell answers out" in text
    assert "20 rows in 3 forwards of up to 8 rows" in text
    assert text.splitlines()[-2:] == ["clean          'a'", "corrupted      'b'"]
    shown = (("'a'", "'b'"), tuple(f"z.0.{head}" for head in range(12)))
    assert "z.0.0, z.0.1, z.0.2, z.0.3 … (12 sites)" in str(plan(shown=shown))


@pytest.mark.parametrize("value", [None, "zero", cp.Mean("positions", "clean")])
def test_a_plan_counts_the_rows_that_the_run_then_makes(value):
    model, _ = tiny_world("llama", (2, 4, 2, 0))
    pairs = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([8, 9, 10], [8, 11, 10]), ([8, 9, 10], [12, 9, 10]))
    direction = "denoise" if value is None else "noise"
    experiment = cp.Experiment(model, pairs, direction=direction, max_rows=4)
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
