import numpy as np
import pytest
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import PairError, SettingError, SiteNotFound, SiteUnsupported
from causalpatch.results.status import Status
from causalpatch.sweeps import plan_sweep
from toys import Chain, Pictures, opened, prompts, vectors
from worlds import tiny_world, unchecked

MODEL, _ = tiny_world("llama", (2, 4, 2, 0))
PAIRS = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([3, 9, 10, 6], [3, 11, 10, 12]))
IMAGES = vectors(3, shape=(1, 6, 6), n_classes=4)


@pytest.fixture
def experiment():
    return cp.Experiment(MODEL, PAIRS, show_progress=False)


@pytest.fixture
def pictures():
    return cp.Experiment(opened(Pictures()), IMAGES, show_progress=False)


@pytest.mark.parametrize(
    ("site", "dims"),
    [
        ("resid_pre", ("layer", "position")),
        ("resid_mid.1", ("layer", "position")),
        ("attn_out", ("layer", "position")),
        ("mlp_out@-1", ("layer",)),
        ("embed", ("position",)),
        ("final_norm", ("position",)),
        ("logits@-1", ("intervention",)),
        ("z", ("layer", "head")),
        ("z.1.2", ("layer", "head")),
        ("q.0@-1", ("layer", "head")),
        ("head_out", ("layer", "head")),
        ("k", ("layer", "kv_head")),
        ("v.1@0", ("layer", "kv_head")),
        ("mlp_post.0.3:6@-1", ("layer", "neuron")),
        ("resid_pre@*", ("layer", "position")),
        ("z@subject", ("layer", "head")),
    ],
)
def test_every_site_has_its_axes_by_default(site, dims):
    pairs = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([3, 9, 10, 6], [3, 11, 10, 12]), spans={"subject": ((0, 2), (0, 2))})
    effects = cp.sweep(cp.Experiment(MODEL, pairs, show_progress=False), site)
    assert effects.dims == (*dims, "pair")
    assert (effects.to_xarray()["status"].values <= Status.DERIVED).all()


def test_coordinates_are_the_members_of_the_set(experiment):
    data = cp.sweep(experiment, "mlp_post.1.2,5,90@-1").to_xarray()
    assert data["layer"].values.tolist() == [1]
    assert data["neuron"].values.tolist() == [2, 5, 90]
    assert data["pair"].values.tolist() == ["pair 0", "pair 1"]
    assert cp.sweep(experiment, "z.0:2.1:3").to_xarray()["head"].values.tolist() == [1, 2]


@pytest.mark.parametrize("over", [("layer", "head"), "layer,head", ["head", "layer"], "head", "layer", ()])
def test_axes_may_be_chosen_and_the_rest_is_patched_together(experiment, over):
    effects = cp.sweep(experiment, "z", over=over)
    axes = tuple(over.split(",")) if isinstance(over, str) else tuple(over)
    assert effects.axes == (axes or ("intervention",))
    cells = {
        ("layer", "head"): [f"z.{layer}.{head}" for layer in range(2) for head in range(4)],
        ("head", "layer"): [f"z.{layer}.{head}" for head in range(4) for layer in range(2)],
        ("head",): [[f"z.0.{head}", f"z.1.{head}"] for head in range(4)],
        ("layer",): ["z.0", "z.1"],
        (): ["z"],
    }[axes]
    wanted = experiment.run(cells).effect(per_pair=True).values
    np.testing.assert_allclose(effects.effect(per_pair=True).values.reshape(wanted.shape), wanted, atol=1e-12)


def test_heads_may_be_walked_along_positions_too(experiment):
    effects = cp.sweep(experiment, "z.1", over=("head", "position"))
    assert effects.to_xarray()["metric"].shape == (4, 4, 2)
    one = experiment.run([cp.Patch("z.1.2", column=1)]).effect(per_pair=True).values[0]
    np.testing.assert_allclose(effects.effect(per_pair=True).values[2, 1], one, atol=1e-12)


def test_positions_are_labelled_by_tokens_that_all_pairs_share(experiment):
    data = cp.sweep(experiment, "resid_pre").to_xarray()
    assert data["position"].values.tolist() == [0, 1, 2, 3]
    # The base is the corrupted run, whose tokens label the axis.
    assert data["token"].values.tolist() == ["(varies)", "(varies)", "(varies)", "(varies)"]
    same = cp.sweep(cp.Experiment(MODEL, PAIRS[:1], direction="noise"), "resid_pre").to_xarray()
    assert same["token"].values.tolist() == ["3", "4", "5", "6"]
    assert same["base_position"].values.tolist() == [[0, 1, 2, 3]]


def test_positions_of_base_and_source_stand_beside_each_column():
    pairs = prompts(([3, 4, 5], [6, 4]), ([3, 4], [7, 8])).align("map", mapping=[[(0, 0), (2, 1)], [(1, 0)]])
    data = cp.sweep(cp.Experiment(MODEL, pairs), "resid_pre").to_xarray()
    assert data["base_position"].values.tolist() == [[0, 1], [0, -1]]
    assert data["source_position"].values.tolist() == [[0, 2], [1, -1]]
    assert data["status"].values[0].T.tolist() == [[0, 0], [0, Status.UNALIGNED]]
    assert np.isnan(data["metric"].values[0, 1, 1])


def test_pairs_of_unequal_lengths_need_an_alignment_to_be_walked_along():
    pairs = prompts(([3, 4, 5], [6, 4]))
    with pytest.raises(PairError, match="cannot be aligned by position"):
        cp.sweep(cp.Experiment(MODEL, pairs), "resid_pre")
    assert cp.sweep(cp.Experiment(MODEL, pairs), "resid_pre@-1").dims == ("layer", "pair")


def test_kv_heads_say_which_heads_they_serve(experiment):
    data = cp.sweep(experiment, "k.0@-1").to_xarray()
    assert data["kv_head_label"].values.tolist() == ["(heads 0-1)", "(heads 2-3)"]


def test_a_sweep_takes_other_values_and_alignments(experiment):
    noise = cp.Experiment(MODEL, PAIRS, direction="noise")
    swept = cp.sweep(noise, "mlp_out@-1", value="zero")
    run = noise.run([cp.Patch(f"mlp_out.{layer}@-1", "zero") for layer in range(2)])
    np.testing.assert_array_equal(swept.effect(per_pair=True).values, run.effect(per_pair=True).values)
    pairs = prompts(([3, 4, 5], [6, 4, 5]), spans={"s": ((0, 2), (0, 1))})
    uneven = cp.Experiment(MODEL, pairs)
    with pytest.raises(PairError):
        cp.sweep(uneven, "resid_pre@s")
    assert cp.sweep(uneven, "resid_pre@s", align="mean").dims == ("layer", "pair")


@pytest.mark.parametrize(
    ("site", "over", "said"),
    [
        ("z", "neuron", "'z.*.*' cannot be swept over 'neuron'"),
        ("z@-1", "position", "'z.*.*@-1' cannot be swept over 'position'"),
        ("embed", "layer", "'embed' cannot be swept over 'layer'"),
        ("z", ("layer", "layer"), "an axis is named twice: layer, layer"),
        ("k", "head", "'k.*.*' cannot be swept over 'head'"),
    ],
)
def test_an_axis_that_the_site_does_not_have_is_refused_with_those_it_has(experiment, site, over, said):
    with pytest.raises(SettingError) as caught:
        cp.sweep(experiment, site, over=over)
    assert caught.value.what == said
    assert caught.value.fix


def test_why_there_is_no_position_axis_is_said(experiment):
    with pytest.raises(SettingError) as caught:
        cp.sweep(experiment, "resid_pre@2", over="position")
    assert ("because", "it stands at @2") in caught.value.facts


def test_a_grid_above_its_budget_is_refused_before_anything_runs(experiment):
    calls = []
    hook = MODEL.module.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(SettingError, match=r"takes 8 interventions, 16 runs of the model: the budget is 15 rows"):
            cp.sweep(experiment, "z", budget=15)
        with pytest.raises(SettingError, match="192 interventions, 384 runs of the model: at all positions at once"):
            cp.sweep(experiment, "mlp_post")
        assert calls == []
        assert cp.sweep(experiment, "z", budget=16).dims == ("layer", "head", "pair")
    finally:
        hook.remove()


def test_neurons_at_one_position_need_no_budget(experiment):
    assert cp.sweep(experiment, "mlp_post.0.0:2@-1").to_xarray()["metric"].shape == (1, 2, 2)
    assert cp.sweep(experiment, "mlp_post.0.0:2", budget=4).to_xarray()["metric"].shape == (1, 2, 2)


def test_what_is_not_in_the_model_is_refused(experiment):
    with pytest.raises(SiteNotFound):
        cp.sweep(experiment, "resid_pre.7")
    neox, _ = tiny_world("gpt_neox", (2, 4, 2, 0))
    with pytest.raises(SiteUnsupported):
        cp.sweep(cp.Experiment(neox, PAIRS), "resid_mid")


def test_a_plan_of_a_sweep_counts_its_cells_and_runs_nothing(experiment):
    made = plan_sweep(experiment, "z")
    assert made.n_interventions == 8
    assert made.n_pairs == 2
    assert plan_sweep(experiment, "resid_pre", value="zero").n_interventions == 2 * 4


def test_modules_are_one_intervention_each(pictures):
    effects = cp.sweep(pictures, "module(conv*).output")
    data = effects.to_xarray()
    assert data["intervention"].values.tolist() == ["module(conv1).output", "module(conv2).output"]
    gap = (pictures.baseline.clean - pictures.baseline.corrupt)[0]
    # All that the network knows of its input passes through each of them.
    np.testing.assert_allclose(effects.effect(per_pair=True).values, [gap, gap], atol=1e-12)


@pytest.mark.parametrize(
    "site", ["module(conv1).output axes=(channel,height,column)", "module(conv1).input axes=(channel,height,column)"]
)
def test_units_of_a_module_are_counted_by_running_it(pictures, site):
    effects = cp.sweep(pictures, site, over="channel")
    n_channels = 3 if "output" in site else 1
    assert effects.to_xarray()["channel"].values.tolist() == list(range(n_channels))
    each = pictures.run([f"{site}#{channel}" for channel in range(n_channels)]).effect(per_pair=True).values
    np.testing.assert_array_equal(effects.effect(per_pair=True).values, each)
    starred = cp.sweep(pictures, f"{site}#*")
    assert starred.dims == ("intervention", "channel", "pair")
    np.testing.assert_array_equal(starred.effect(per_pair=True).values[0], each)


def test_some_units_of_a_module_may_be_named(pictures):
    data = cp.sweep(pictures, "module(conv2).output axes=(channel,height,column)#1:4", over="channel").to_xarray()
    assert data["channel"].values.tolist() == [1, 2, 3]


def test_a_channel_patched_is_what_a_raw_hook_on_the_channel_gives(pictures):
    module = pictures.model.module
    got = cp.sweep(pictures, "module(conv2).output axes=(channel,height,column)", over="channel").to_xarray()["metric"]
    clean, corrupt = (module.conv1.weight.new_tensor(IMAGES.batch(side).values) for side in ("clean", "corrupt"))
    for channel in range(5):
        kept = []
        hook = module.conv2.register_forward_hook(lambda part, args, output, kept=kept: kept.append(output.detach()))
        module(clean)
        hook.remove()

        def put(part, args, output, kept=kept, channel=channel):
            output = output.clone()
            output[:, channel] = kept[0][:, channel]
            return output

        hook = module.conv2.register_forward_hook(put)
        logits = module(corrupt).detach().numpy()
        hook.remove()
        rows = range(3)
        wanted = logits[rows, [p.answer[0][0] for p in IMAGES]] - logits[rows, [p.wrong_answer[0][0] for p in IMAGES]]
        np.testing.assert_allclose(got.values[channel], wanted, atol=1e-12)


def test_modules_of_different_sizes_do_not_fill_a_grid(pictures):
    with pytest.raises(SettingError, match="there is no site at") as caught:
        cp.sweep(pictures, "module(conv*).output axes=(channel,height,column)", over=("intervention", "channel"))
    assert ("channel", "5 of them") in caught.value.facts
    both = cp.sweep(pictures, "module(conv*).output axes=(channel,height,column)#0:3", over=("intervention", "channel"))
    assert both.to_xarray()["metric"].shape == (2, 3, 3)


def test_axes_that_do_not_fit_the_tensor_are_refused(pictures):
    with pytest.raises(SiteUnsupported, match="names 2 axes"):
        cp.sweep(pictures, "module(conv1).output axes=(channel,height)", over="channel")


def test_units_are_counted_on_their_own_axis_wherever_positions_stand():
    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.turned, self.head = nn.Embedding(40, 8), nn.Identity(), nn.Linear(8, 40)

        def forward(self, input_ids):
            return self.head(self.turned(self.embed(input_ids).transpose(1, 2)).transpose(1, 2))

    experiment = cp.Experiment(opened(Turned()), PAIRS)
    data = cp.sweep(experiment, "module(turned).output axes=(width,position)@-1", over="width").to_xarray()
    assert data["width"].values.tolist() == list(range(8))


def test_modules_of_prompts_may_be_walked_along_positions(experiment):
    effects = cp.sweep(experiment, "module(model.layers.*.mlp).output", over=("intervention", "position"))
    named = cp.sweep(experiment, "mlp_out")
    # A module may be anywhere in its layer, so that more of the layer is run: equal to rounding.
    per_pair = [swept.effect(per_pair=True).values for swept in (effects, named)]
    np.testing.assert_allclose(*per_pair, rtol=1e-10, atol=1e-12)


def test_an_axis_of_a_generic_module_may_be_called_kv_head():
    experiment = cp.Experiment(opened(Chain()), vectors())
    assert cp.sweep(experiment, "module(first).output axes=(kv_head)", over="kv_head").to_xarray()["metric"].shape == (
        4,
        5,
    )


def test_a_text_of_something_else_is_no_value(experiment):
    with unchecked(), pytest.raises(cp.RequestError):
        cp.sweep(experiment, "z", value="nothing")
