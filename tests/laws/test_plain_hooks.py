"""Every site and every way to say where: the engine measures what raw hooks on the modules measure."""

from hypothesis import strategies as st

import causalpatch as cp
from causalpatch.results.status import Status
from causalpatch.sites import Span
from oracle import Edit
from worlds import Laid, assert_same, by_plain_hooks, key, law, numbers, read_off, run_all, some_patch


@law(is_typed=True, is_for_all=True)
def test_one_patch_measures_what_a_raw_hook_measures_at_every_site(world, draw):
    direction = draw(st.sampled_from(["denoise", "noise"]))
    base = "corrupt" if direction == "denoise" else "clean"
    laid = [some_patch(world, draw, world.some_site(draw, name), base=base) for name in world.site_names]
    got = run_all(world.experiment(direction=direction), [one.patch for one in laid])
    for number, one in enumerate(laid):
        assert_same(got[:, number], by_plain_hooks(world, [one], base))


@law
def test_two_patches_in_one_run_measure_what_two_raw_hooks_measure(world, draw):
    runs = []
    while len(runs) < 6:
        sites = [world.some_site(draw) for _ in range(draw(st.integers(2, 3)))]
        laid = [some_patch(world, draw, site) for site in sites]
        if len({(one.patch.site, one.patch.column) for one in laid}) == len(laid):
            runs.append(laid)
    got = run_all(world.experiment(), [[one.patch for one in laid] for laid in runs])
    for number, laid in enumerate(runs):
        assert_same(got[:, number], by_plain_hooks(world, laid))


@law(needs=["z"])
def test_a_patch_of_all_units_in_one_run_measures_what_raw_hooks_on_each_unit_measure(world, draw):
    name = draw(st.sampled_from(world.among("z", "q", "k", "v", "head_out")))
    whole = cp.Patch(f"{name}.*.*@-1")
    ends = [(len(pair.corrupt) - 1, len(pair.clean) - 1) for pair in world.pairs]
    got = run_all(world.experiment(), [whole])
    assert_same(got[:, 0], by_plain_hooks(world, [Laid(whole, lambda n: ([ends[n][0]], [[ends[n][1]]]))]))


@law
def test_spans_of_any_lengths_meet_at_their_first_tokens_last_tokens_or_mean(world, draw):
    for align in ("first", "last", "mean"):
        site = world.some_site(draw, draw(st.sampled_from(world.among("resid_pre", "z", "mlp_out", "embed"))))
        patch = cp.Patch(site.at(Span("subject")), align=align)
        got = run_all(world.experiment(), [patch])
        for number, pair in enumerate(world.pairs):
            (a, b), (c, d) = pair.spans["subject"]
            clean = world.plain.value(pair.clean, key(site))[a:b]
            n = min(b - a, d - c)
            edges = {"first": (range(c, c + n), clean[:n]), "last": (range(d - n, d), clean[len(clean) - n :])}
            tokens, new = edges.get(align, (range(c, d), clean.mean(0).expand(d - c, *clean.shape[1:])))
            if align == "mean" and b - a == d - c:
                new = clean  # spans of one length meet token by token
            logits = world.plain.logits(pair.corrupt, [Edit(key(site), tokens, new)])
            assert_same(got[:, 0, number], read_off(logits, pair))


@law(lengths="unequal")
def test_a_sweep_over_positions_walks_along_the_aligned_columns(world, draw):
    site = world.some_site(draw, draw(st.sampled_from(world.among("resid_pre", "attn_out", "resid_post"))))
    direction = draw(st.sampled_from(["denoise", "noise"]))
    effects = cp.sweep(world.experiment(direction=direction), site, over="position")
    got, status = numbers(effects), effects.to_xarray()["status"].values
    columns = world.pairs.alignment.columns
    assert got.shape == (2, columns.shape[1], len(world.pairs))
    for number, pair in enumerate(world.pairs):
        for column, (in_clean, in_corrupt) in enumerate(columns[number].tolist()):
            if in_clean < 0:
                assert status[column, number] == Status.UNALIGNED
                continue
            base, source = (pair.corrupt, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupt)
            here, there = (in_corrupt, in_clean) if direction == "denoise" else (in_clean, in_corrupt)
            edit = Edit(key(site), [here], world.plain.value(source, key(site))[[there]])
            assert_same(got[:, column, number], read_off(world.plain.logits(base, [edit]), pair))
            assert status[column, number] in (Status.MEASURED, Status.DERIVED)
