"""Patches of one tensor under two names: in every engine the later one counts, whatever runs beside them."""

from itertools import permutations

import numpy as np
import pytest

import causalpatch as cp
from tiers import TIERS, assert_agree, bent, quickly, run_on, world_of
from worlds import ON_WAVEFRONT, numbers, random_pairs

PAIRS = random_pairs(1, prefix=1 / 3)
SHAPE = (3, 4, 2, 0)


def layer_path(world, layer):
    return world.model.tap(cp.parse(f"resid_pre.{layer}")).port.path


def in_both_orders(*patches):
    return [list(some) for some in permutations(patches)]


@pytest.mark.parametrize("engine", [*TIERS, "auto"])
@pytest.mark.parametrize("family", quickly(ON_WAVEFRONT, "gpt2", "gemma2"))
def test_the_stream_out_of_a_layer_and_its_modules_output_are_written_in_the_order_given(family, engine):
    world = world_of(family, PAIRS, shape=SHAPE)
    asked = []
    for layer in range(3):
        output = f"module({layer_path(world, layer)}).output"
        for value in ("source", cp.Mean("pairs"), cp.Function(bent, needs_source=False)):
            asked += in_both_orders(cp.Patch(f"resid_post.{layer}", value), cp.Patch(output, "zero"))
        asked += in_both_orders(f"resid_post.{layer}@1", cp.Patch(output, 0.5), f"mlp_out.{layer}")
    asked += in_both_orders("resid_post.0", cp.Patch(f"module({layer_path(world, 0)}).output", 0.3), "resid_pre.1@0")
    wanted = run_on("reference", world, asked)
    values = numbers(wanted)
    assert np.abs(values[:, 0] - values[:, 1]).max() > 1e-3
    assert_agree(run_on(engine, world, asked), wanted)


@pytest.mark.parametrize("engine", [*TIERS, "auto"])
def test_two_spellings_of_one_tensor_are_written_in_the_order_of_each_run(engine):
    world = world_of("llama", PAIRS, shape=SHAPE)
    layer = layer_path(world, 1)
    attention, mlp = f"module({layer}.self_attn)", f"module({layer}.mlp)"
    spelt = (
        ("attn_out.1", f"{attention}.output[0]"),
        (f"{attention}.output", f"{attention}.output[0]"),
        ("attn_out.1", f"{attention}.output[-2]"),
        (f"{mlp}.input", f"{mlp}.input[0]"),
        (f"{attention}.input", f'{attention}.input["hidden_states"]'),
    )
    asked = [some for one, other in spelt for some in in_both_orders(cp.Patch(one, "zero"), cp.Patch(other, "source"))]
    asked += in_both_orders(cp.Patch(spelt[0][0], 0.2), f"{spelt[0][1]}@-1", "z.1.0")
    asked += [
        [cp.Patch(one, cp.Mean()), cp.Patch(other, cp.Function(bent, needs_source=False))] for one, other in spelt
    ]
    wanted = run_on("reference", world, asked)
    values = numbers(wanted)
    assert np.abs(values[:, 0] - values[:, 1]).max() > 1e-3
    assert_agree(run_on(engine, world, asked), wanted)
