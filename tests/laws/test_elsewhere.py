"""Values of other sites, tokens, runs, prompts and models, against raw hooks and by every engine."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import strategies as st

import causalpatch as cp
from oracle import Edit
from oracle_values import key, other
from tiers import METRICS, assert_agree, mixed, read_all, run_on
from worlds import SHORTEST, VOCAB, World, assert_same, law, numbers, random_pairs

WIDE = ("resid_pre", "resid_post", "attn_out", "mlp_out", "embed", "head_out")
NARROW = ("z", "v")


def alike(world: World) -> list[list[str]]:
    """Return the sites that may stand in for one another, by the axes of their values."""
    found: dict[tuple[tuple[str, int], ...], list[str]] = {}
    for name in world.among(*WIDE, *NARROW):
        found.setdefault(tuple(world.sizes(name).items()), []).append(name)
    return list(found.values())


def sides_of(draw):
    base = draw(st.sampled_from(["corrupt", "clean"]))
    return base, other(base), "denoise" if base == "corrupt" else "noise"


def measured(world, interventions, direction, engines, **settings):
    """Return the reference engine's numbers, with which all engines must agree."""
    wanted = run_on("reference", world, interventions, direction=direction, **settings)
    for engine in engines:
        assert_agree(run_on(engine, world, interventions, direction=direction, **settings), wanted)
    return numbers(wanted)


@law(lengths="equal")
def test_a_value_of_another_site_token_run_or_prompt_is_written_as_raw_hooks_write_it(world, draw):
    base, source, direction = sides_of(draw)
    strange = np.random.default_rng(draw(st.integers(0, 99))).integers(3, VOCAB, 5).tolist()
    others = random_pairs(draw(st.integers(0, 999)), len(world.pairs))
    laid, wanted = [], []
    for _ in range(4):
        names = draw(st.sampled_from(alike(world)))
        target, read = (world.some_site(draw, draw(st.sampled_from(names))) for _ in range(2))
        here, there = (draw(st.integers(-SHORTEST, SHORTEST - 1)) for _ in range(2))
        whose = draw(st.sampled_from(["source", "base", "one", "of"]))
        prompts = {"one": cp.OtherPrompts.one(strange), "of": cp.OtherPrompts.of(world.pairs, others, "corrupt")}
        run = whose if whose in ("source", "base") else "source"
        laid.append(cp.Patch(target.at(here), cp.From(read.at(there), run, prompts.get(whose))))
        rows = []
        for number, pair in enumerate(world.pairs):
            prompt = {"source": pair.input(source), "base": pair.input(base), "one": strange}
            value = world.plain.value(prompt.get(whose, others[number].corrupt), key(read))[there]
            token = here % len(pair.input(base))
            logits = world.plain.logits(pair.input(base), [Edit(key(target), [token], value[None])])
            runs = {"base": base, "source": source}
            untouched = {name: world.plain.logits(pair.input(side)) for name, side in runs.items()}
            rows.append(read_all(logits, pair, untouched))
        wanted.append(np.stack(rows, -1))
    got = measured(world, laid, direction, world.tiers)
    assert_same(got, np.stack(wanted, 1))


@law(lengths="unequal")
def test_without_a_position_tokens_meet_as_those_of_the_source_do(world, draw):
    names = world.among("resid_pre", "mlp_out", "z")
    site = world.some_site(draw, draw(st.sampled_from(names)))
    column = draw(st.integers(0, world.pairs.alignment.columns.shape[1] - 1))
    ways = [{"site": site}, {"site": site.at(-1)}, {"site": site, "column": column}]
    plain = [cp.Patch(**way) for way in ways]
    read = [cp.Patch(**way, value=cp.From(site)) for way in ways]
    open_layer = [cp.Patch(**way, value=cp.From(site.name)) for way in ways]
    wanted = numbers(run_on("reference", world, plain))
    for engine in world.tiers:
        assert_same(numbers(run_on(engine, world, read)), wanted)
        assert_same(numbers(run_on(engine, world, open_layer)), wanted)


@law
def test_the_source_run_of_another_model_is_that_model_s(world, draw):
    """A head's share is a product with the other model's projection, not with this one's."""
    base, source, direction = sides_of(draw)
    model, plain = world.sibling()
    assert plain.n_kv_heads == world.plain.n_kv_heads
    sites = [world.some_site(draw, draw(st.sampled_from(world.among(*WIDE, *NARROW, "mlp_post")))) for _ in range(4)]
    values = [None, cp.Interpolate(0.4), cp.Function(mixed), None]
    laid = [cp.Patch(site.at(-1), value) for site, value in zip(sites, values, strict=True)]
    laid[3] = cp.Patch(sites[3].at(-1), cp.From(sites[3].at(0)))
    wanted = []
    for number, site in enumerate(sites):
        rows = []
        for pair in world.pairs:
            there = plain.value(pair.input(source), key(site))[0 if number == 3 else -1]
            here = world.plain.value(pair.input(base), key(site))[-1]
            new = {1: torch.lerp(here, there, 0.4), 2: mixed(here, there)}.get(number, there)
            last = len(pair.input(base)) - 1
            logits = world.plain.logits(pair.input(base), [Edit(key(site), [last], new[None])])
            untouched = {"base": world.plain.logits(pair.input(base)), "source": plain.logits(pair.input(source))}
            rows.append(read_all(logits, pair, untouched))
        wanted.append(np.stack(rows, -1))
    got = measured(world, laid, direction, world.tiers, source_model=model)
    assert_same(got, np.stack(wanted, 1))


@law(lengths="equal")
def test_baselines_are_those_of_the_model_that_made_the_run(world, draw):
    base, source, direction = sides_of(draw)
    model, plain = world.sibling()
    experiment = world.experiment(metric="logit_difference", direction=direction, source_model=model)
    runs = {base: world.plain, source: plain}
    wanted = {}
    for side, of in runs.items():
        last = [of.logits(pair.input(side))[-1] for pair in world.pairs]
        answers = [(pair.answer[0][0], pair.wrong_answer[0][0]) for pair in world.pairs]
        wanted[side] = [float(row[right] - row[wrong]) for row, (right, wrong) in zip(last, answers, strict=True)]
    assert_same(experiment.baseline.clean[0], wanted["clean"])
    assert_same(experiment.baseline.corrupt[0], wanted["corrupt"])
    for engine in world.tiers:
        array = run_on(engine, world, ["embed@-1"], direction=direction, source_model=model).to_xarray()
        assert_same(array["baseline_clean"].values[0], wanted["clean"])
        assert_same(array["baseline_corrupt"].values[0], wanted["corrupt"])


def test_all_metrics_are_among_those_compared():
    assert {"kl_divergence", "kl_from_base"} <= {metric.name for metric in METRICS}


@law(lengths="equal", needs=["resid_pre", "mlp_out"])
def test_the_part_of_a_value_inside_a_subspace_is_written_as_the_formula_says(world, draw):
    layer = draw(st.integers(0, world.model.shape.n_layers - 1))
    target, read = cp.Site("resid_pre", layer), cp.Site("mlp_out", layer)
    basis = np.linalg.qr(np.random.default_rng(1).normal(size=(world.model.width, 2)))[0].T
    patch = cp.Patch(target.at(1), cp.Subspace(basis, cp.From(read.at(-1))))
    project = torch.as_tensor(basis.T @ basis)
    for engine in ("reference", *world.tiers):
        got = numbers(run_on(engine, world, [patch]))[0, 0]
        for number, pair in enumerate(world.pairs):
            value = world.plain.value(pair.clean, key(read))[-1]
            edit = Edit(key(target), [1], lambda now, value=value: now + (value - now) @ project)
            last = world.plain.logits(pair.corrupt, [edit])[-1]
            assert_same(got[number], float(last[pair.answer[0][0]] - last[pair.wrong_answer[0][0]]))
    assert replace(patch, value=patch.value) == patch
