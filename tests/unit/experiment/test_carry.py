"""Values carried from one patched run into another, against plain hooks."""

import dataclasses

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import PairError, PatchError
from causalpatch.experiment import put_values, read_values
from causalpatch.pairs import Pairs
from causalpatch.sites import parse
from tiers import quickly
from toys import Chain as ToyChain, opened, vectors
from worlds import FAMILY_NAMES, FIRST, LACKS, projection, random_pairs, run_all, tiny_world

SHAPE = (2, 4, 2, 0)


def having(*names):
    """Return the families that have some sites, the first of them in the quick suite."""
    return quickly([family for family in FAMILY_NAMES if not LACKS[family] & set(names)], *FIRST)


def named(pairs, name="named"):
    """Give each pair a group of its own, by which its values are found."""
    return Pairs([dataclasses.replace(pair, group=str(k)) for k, pair in enumerate(pairs)], name=name, kind=pairs.kind)


@pytest.mark.parametrize("family", having("z", "resid_post", "mlp_out", "q"))
def test_values_read_in_the_source_and_put_in_are_the_patch_from_the_source(family):
    model, _ = tiny_world(family, SHAPE)
    pairs = named(random_pairs(3, n_pairs=4))
    experiment = cp.Experiment(model, pairs, metric=[cp.logit_difference, projection], show_progress=False)
    for text in ("z.1.1@-1", "resid_post.0@1", "mlp_out.1", "q.0.2@0:2"):
        (values,) = read_values(experiment.turned("noise"), [parse(text)])
        given = run_all(experiment, [put_values(experiment, parse(text), values), cp.Patch(text)])
        assert np.allclose(given[:, 0], given[:, 1], atol=1e-10)
        assert np.abs(given[:, 0] - run_all(experiment, [cp.Patch(text, "identity")])[:, 0]).max() > 1e-6


@pytest.mark.parametrize("family", having("resid_pre", "resid_post"))
def test_a_value_read_in_a_patched_run_is_what_that_run_computes(family):
    """Carried on by itself, what a patch does to the last stream is all that it does."""
    model, _ = tiny_world(family, SHAPE)
    pairs = named(random_pairs(5, n_pairs=4))
    experiment = cp.Experiment(model, pairs, metric=[cp.logit_difference, projection], show_progress=False)
    patch = cp.Patch("resid_pre.0@-1")
    (stream,) = read_values(experiment, [parse("resid_post.1")], patch)
    direct, carried = np.moveaxis(
        run_all(experiment, [patch, put_values(experiment, parse("resid_post.1"), stream)]), 1, 0
    )
    assert np.allclose(direct, carried, atol=1e-10)
    (untouched,) = read_values(experiment, [parse("resid_post.1")])
    assert max(np.abs(a - b).max() for a, b in zip(stream, untouched, strict=True)) > 1e-6
    assert [len(each) for each in stream] == pairs.lengths("corrupt").tolist()


def test_sites_without_positions_are_carried_whole():
    pairs = named(vectors(5))
    experiment = cp.Experiment(opened(ToyChain()), pairs, show_progress=False)
    site = parse("module(second).output")
    (values,) = read_values(experiment.turned("noise"), [site])
    assert values[0].shape == (4,)
    given, source = np.moveaxis(run_all(experiment, [put_values(experiment, site, values), cp.Patch(site)]), -2, 0)
    assert np.allclose(given, source, atol=1e-12)


def test_pairs_that_cannot_be_told_apart_are_refused():
    model, _ = tiny_world("llama", SHAPE)
    experiment = cp.Experiment(model, random_pairs(3, n_pairs=3), show_progress=False)
    (values,) = read_values(experiment, [parse("z.0.0@-1")])
    with pytest.raises(PairError, match="cannot be told apart"):
        put_values(experiment, parse("z.0.0@-1"), values)


def test_values_of_other_tokens_than_are_written_are_refused():
    model, _ = tiny_world("llama", SHAPE)
    experiment = cp.Experiment(model, named(random_pairs(3, n_pairs=3)), show_progress=False)
    (values,) = read_values(experiment, [parse("z.0.0@0:2")])
    with pytest.raises(PatchError, match="values of 2 tokens cannot be put at 1 tokens"):
        put_values(experiment, parse("z.0.0@-1"), values)
