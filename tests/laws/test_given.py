"""Values given for each pair and token, against raw hooks and by every engine."""

import numpy as np
import torch
from hypothesis import strategies as st

import causalpatch as cp
from oracle import Edit
from oracle_values import key
from tiers import assert_agree, run_on
from worlds import assert_same, law, numbers, read_off

NAMES = ("resid_pre", "q", "k", "v", "z", "mlp_post", "mlp_out", "attn_out", "resid_post")


@law
def test_given_values_are_put_in_at_their_tokens_by_every_engine(world, draw):
    direction = draw(st.sampled_from(["denoise", "noise"]))
    base = "corrupt" if direction == "denoise" else "clean"
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    sites, values = [], []
    for _ in range(4):
        site = world.some_site(draw, draw(st.sampled_from(world.among(*NAMES))))
        shape = world.sizes(site.name).values()
        arrays = [rng.normal(size=(len(pair.input(base)), *shape)) for pair in world.pairs]
        for array in arrays:
            array[rng.random(len(array)) < 0.3] = np.nan  # these tokens stay as they are
        sites.append(site)
        values.append(arrays)
    laid = [cp.Patch(site, cp.Given.of(world.pairs, arrays)) for site, arrays in zip(sites, values, strict=True)]
    wanted = run_on("reference", world, laid, direction=direction)
    for tier in world.tiers:
        assert_agree(run_on(tier, world, laid, direction=direction), wanted)
    got = numbers(wanted)
    for place, (site, arrays) in enumerate(zip(sites, values, strict=True)):
        for number, pair in enumerate(world.pairs):
            tokens = np.flatnonzero(~np.isnan(arrays[number].reshape(len(arrays[number]), -1)).any(1)).tolist()
            edits = [Edit(key(site), tokens, torch.as_tensor(arrays[number][tokens]))] if tokens else []
            assert_same(got[:2, place, number], read_off(world.plain.logits(pair.input(base), edits), pair))


@law(lengths="equal")
def test_values_read_from_the_source_and_given_are_the_source_at_any_part_of_the_pairs(world, draw):
    site = world.some_site(draw, draw(st.sampled_from(world.among("z", "resid_pre", "mlp_out"))))
    arrays = [world.plain.value(pair.clean, key(site)).numpy() for pair in world.pairs]
    given = cp.Given.of(world.pairs, arrays, "values read before")
    some = world.pairs.take([2, 0])
    wanted, got = (numbers(world.experiment(some).run([patch])) for patch in (str(site), cp.Patch(site, given)))
    assert_same(got, wanted)
    assert given == cp.Given.of(world.pairs, arrays, "values read before")
    assert given != cp.Given.of(world.pairs, arrays, "others")
