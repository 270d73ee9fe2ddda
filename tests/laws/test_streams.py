"""Sites through which everything flows, and sites that are two names of one thing."""

import numpy as np
from hypothesis import assume, strategies as st

import causalpatch as cp
from worlds import assert_same, law, projection, run_all

WHOLE = ("embed", "resid_pre", "resid_mid", "resid_post", "final_norm", "logits")
READERS = [projection, projection.at(0), projection.at(2)]


def source_of(experiment: cp.Experiment) -> np.ndarray:
    return experiment.baseline.corrupt if experiment.base == "clean" else experiment.baseline.clean


@law(lengths="equal", needs=["resid_pre"])
def test_patching_every_position_of_resid_pre_0_from_the_source_gives_the_sources_logits(world, draw):
    experiment = world.experiment(metric=READERS, direction=draw(st.sampled_from(["denoise", "noise"])))
    base = experiment.baseline.corrupt if experiment.base == "corrupt" else experiment.baseline.clean
    assert np.abs(base - source_of(experiment)).max() > 1e-3
    assert_same(run_all(experiment, ["resid_pre.0"])[:, 0], source_of(experiment))


@law(lengths="equal", is_for_all=True)
def test_any_site_through_which_everything_flows_gives_the_sources_logits(world, draw):
    experiment = world.experiment(metric=READERS, direction=draw(st.sampled_from(["denoise", "noise"])))
    sites = [world.some_site(draw, name) for name in world.among(*WHOLE) if world.flows_through(name)]
    got = run_all(experiment, sites)
    for number in range(len(sites)):
        assert_same(got[:, number], source_of(experiment))


@law(needs=["z"], is_for_all=True)
def test_z_patched_on_all_heads_equals_attn_out_patched(world, draw):
    layer = draw(st.integers(0, world.model.shape.n_layers - 1))
    for where in ("", f"@{draw(st.integers(-3, 2))}"):
        heads, whole = run_all(world.experiment(), [f"z.{layer}{where}", f"attn_out.{layer}{where}"]).swapaxes(0, 1)
        assert_same(heads, whole)


@law(needs=["mlp_post"])
def test_mlp_post_patched_on_all_neurons_equals_mlp_out_patched(world, draw):
    layer, token = draw(st.integers(0, world.model.shape.n_layers - 1)), draw(st.integers(-3, 2))
    neurons, whole = run_all(world.experiment(), [f"mlp_post.{layer}@{token}", f"mlp_out.{layer}@{token}"]).swapaxes(
        0, 1
    )
    assert_same(neurons, whole)


@law(needs=["resid_pre"])
def test_the_stream_out_of_a_layer_patched_equals_the_stream_into_the_next_patched(world, draw):
    assume(world.model.shape.n_layers > 1)
    layer = draw(st.integers(0, world.model.shape.n_layers - 2))
    post, pre = run_all(world.experiment(), [f"resid_post.{layer}@1", f"resid_pre.{layer + 1}@1"]).swapaxes(0, 1)
    assert_same(post, pre)


@law(needs=["z"])
def test_a_head_patched_in_z_equals_its_share_patched_where_no_norm_follows(world, draw):
    site = world.some_site(draw, "z")
    token = draw(st.integers(-3, 2))
    z, share = run_all(
        world.experiment(), [f"z.{site.layer}.{site.unit}@{token}", f"head_out.{site.layer}.{site.unit}@{token}"]
    ).swapaxes(0, 1)
    # Gemma's norm after attention reads the sum of the shares, so there too the two are one.
    assert_same(z, share)


@law(lengths="equal", shared=0.0)
def test_patches_of_the_tiny_models_have_effects_that_are_not_small(world, draw):
    experiment = world.experiment(world.pairs)
    spread = np.mean([world.plain.logits(pair.corrupt)[-1].std().item() for pair in world.pairs])
    for site in world.among("resid_pre", "z"):
        effect = cp.sweep(experiment, site).metric("logit_difference").effect(per_pair=True).values
        # Half of them may be: of one layer with a window, tokens far from the last one have no effect at all.
        assert np.nanquantile(np.abs(effect), 0.75) >= 1e-2 * spread
