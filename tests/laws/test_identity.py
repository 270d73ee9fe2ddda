"""A site that is replaced with its own value: nothing may change, not even the last bit."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import causalpatch as cp
from causalpatch.engine import Means, Placer, Target, capture, targets_of
from causalpatch.engine.capture import inputs_of
from causalpatch.engine.hooks import run_with_hooks
from causalpatch.engine.values import Known, Row, writes_of_rows
from causalpatch.pairs import Pair, Pairs
from causalpatch.sites import NAMES, ModuleRef, Site, SiteSet
from causalpatch.sites.names import ATTENTION_SITES
from causalpatch.testing.tiny import FAMILY_NAMES, tiny_model
from worlds import World, law


class Replay:
    """One batch of base runs, run again with patches: rows of the same shape, so that rounding is the same."""

    def __init__(self, world: World, pairs: Pairs, patches: Sequence[cp.Patch]) -> None:
        self.model, self.pairs = world.model, pairs
        self.batch, other = (pairs.batch(role, padding_side=world.padding_side) for role in ("corrupt", "clean"))
        sites = {target.site for patch in patches for target in self.targets([patch])}
        self.is_open = any(site.name in ATTENTION_SITES for site in sites)  # base and patched runs use one kernel
        base, source = (capture(self.model, some, sites) for some in (self.batch, other))
        self.known = Known(source, base, Means())
        self.untouched = self.model.logits(base.output)

    def targets(self, patches: Sequence[cp.Patch]) -> tuple[Target, ...]:
        return targets_of(self.model, cp.Intervention(tuple(patches)))

    def patched(self, *patches: cp.Patch) -> torch.Tensor:
        targets, placer = self.targets(patches), Placer(self.pairs, "corrupt")
        placed = [tuple((target, placer.place(target, n)) for target in targets) for n in range(len(self.pairs))]
        rows = [Row(0, n, n, some) for n, some in enumerate(placed)]
        writes = writes_of_rows(self.model, self.known, rows, self.batch)
        assert writes
        call = inputs_of(self.model, self.batch)
        output, _ = run_with_hooks(self.model, call, writes, opens_attention=self.is_open)
        return self.model.logits(output)


def twins(pairs: Pairs) -> Pairs:
    """Return pairs whose clean prompt is the corrupted one."""
    return Pairs([Pair(pair.corrupt, pair.corrupt, pair.answer, pair.wrong_answer, pair.id) for pair in pairs])


def sites_of(world: World, draw) -> list[Site | SiteSet]:
    """Return for every name all its units in a layer, one unit, and one unit at one position; some modules too."""
    found: list[Site | SiteSet] = []
    for name in world.site_names:
        one = world.some_site(draw, name)
        found += [one, one.at(draw(st.integers(-3, 2)))]
        if NAMES[name].unit_axis:
            found.append(SiteSet(name, one.layer))
    for name in world.among("resid_post", "attn_out", "z"):
        port = world.model.tap(world.some_site(draw, name)).port
        found.append(Site("module", module=ModuleRef(port.path, port.side)))
    return found


@law
def test_replacing_a_site_with_its_own_value_changes_nothing_bit_for_bit(world, draw):
    patches = [cp.Patch(site, cp.Identity()) for site in sites_of(world, draw)]
    replay = Replay(world, world.pairs, patches)
    for patch in patches:
        assert torch.equal(replay.untouched, replay.patched(patch)), patch


@law
def test_patching_from_a_source_run_of_the_same_prompt_changes_nothing_bit_for_bit(world, draw):
    patches = [cp.Patch(site) for site in sites_of(world, draw)]
    replay = Replay(world, twins(world.pairs), patches)
    for patch in patches:
        assert torch.equal(replay.untouched, replay.patched(patch)), patch


@law
def test_replacing_many_sites_at_once_with_their_own_values_changes_nothing_bit_for_bit(world, draw):
    patches = [cp.Patch(world.some_site(draw, name), cp.Identity()) for name in world.site_names]
    replay = Replay(world, world.pairs, patches)
    assert torch.equal(replay.untouched, replay.patched(*patches))


@law
def test_the_comparison_itself_sees_a_change_of_the_last_bit(world, draw):
    name = draw(st.sampled_from(world.among("resid_post", "resid_pre", "final_norm", "logits")))
    nudge = cp.Function(lambda current, source: torch.nextafter(current, current + 1), "nudge", needs_source=False)
    patch = cp.Patch(world.some_site(draw, name), nudge)
    replay = Replay(world, world.pairs, [patch])
    assert not torch.equal(replay.untouched, replay.patched(patch))


@law
def test_an_identity_patch_in_an_experiment_gives_the_base_run_again(world, draw):
    experiment = world.experiment(direction=draw(st.sampled_from(["noise", "denoise"])))
    patches = [cp.Patch(site, "identity") for site in sites_of(world, draw)]
    effects = experiment.run(patches)
    base = experiment.baseline.clean if experiment.base == "clean" else experiment.baseline.corrupt
    got = effects.to_xarray()["metric"].values
    # Rows of another number may round differently in a matrix product, and in nothing else.
    np.testing.assert_allclose(got, np.broadcast_to(base[:, None], got.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_in_float32_many_identity_patches_at_once_are_the_identity_too(family):
    model = cp.open_model(tiny_model(family, dtype=torch.float32))
    ids = np.arange(3, 9)
    pairs = Pairs([Pair(ids, ids + 1, ((5,),), ((6,),)), Pair(ids[:4], ids[:4] + 2, ((5,),), ((6,),))])
    many = {"mlp_post": [f"mlp_post.1.{neuron}" for neuron in range(60)]}
    many |= {"head_out": [f"head_out.0.{head}" for head in range(4)], "resid_mid": ["resid_mid.0", "resid_mid.1"]}
    many |= {"resid_post": ["resid_post.0", "resid_pre.1"], "embed": ["embed"]}
    sites = [site for name, some in many.items() if name not in model.shape.refused for site in some]
    patches = [cp.Patch(site, cp.Identity()) for site in sites]
    replay = Replay(World(family, model, None, pairs, "left"), pairs, patches)
    assert torch.equal(replay.untouched, replay.patched(*patches))
