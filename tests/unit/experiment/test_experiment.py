import numpy as np
import pytest
import torch
from torch import nn

import causalpatch as cp
from causalpatch.base.errors import MetricError, NoGap, PairError, PatchError, SettingError
from causalpatch.pairs import Pair, Pairs
from causalpatch.results.status import Status
from toys import Chain, hooks_of, opened, prompts, vectors
from worlds import tiny_world, unchecked

MODEL, PLAIN = tiny_world("llama", (2, 4, 2, 0))
PAIRS = prompts(([3, 4, 5, 6], [7, 4, 5, 6]), ([3, 9, 10], [3, 11, 10]), ([12, 13, 14], [15, 13, 14]))


class Two(nn.Module):
    """The sum of two linear maps with weights that one can compute with in one's head."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.one.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
            self.two.weight.copy_(torch.tensor([[2.0, 1.0], [0.0, 1.0]]))

    def forward(self, x):
        return self.one(x) + self.two(x)


# Logits 0 minus 1 of the sum are 3 a - b for an input (a, b): (a - b) from one, 2 a from two.
HAND = Pairs.from_arrays([[1.0, 2.0], [3.0, 1.0]], [[0.0, 2.0], [1.0, 1.0]], answer=[0, 0], wrong_answer=[1, 1])
BOTH = ["module(one).output", "module(two).output"]


def by_hand(**settings):
    return cp.Experiment(cp.open_model(Two()), HAND, **settings)


def test_denoising_by_hand():
    experiment = by_hand()
    assert experiment.base == "corrupt"
    assert experiment.baseline.clean.tolist() == [[1.0, 8.0]]
    assert experiment.baseline.corrupt.tolist() == [[-2.0, 2.0]]
    effects = experiment.run(BOTH)
    assert effects.to_xarray()["metric"].values.tolist() == [[-1.0, 4.0], [0.0, 6.0]]
    assert effects.effect(per_pair=True).values.tolist() == [[1.0, 2.0], [2.0, 4.0]]
    # The gap is 3 and 6: a third of it comes from one, two thirds from two.
    assert effects.recovered().values == pytest.approx([1 / 3, 2 / 3])


def test_noising_by_hand():
    effects = by_hand(direction="noise").run(BOTH)
    assert effects.effect(per_pair=True).values.tolist() == [[-1.0, -2.0], [-2.0, -4.0]]
    assert effects.recovered().values == pytest.approx([1 / 3, 2 / 3])


def test_a_share_is_a_ratio_of_means_and_not_a_mean_of_ratios():
    pairs = Pairs.from_arrays([[1.0, 0.0], [10.0, 0.0]], [[0.0, 0.0], [0.0, 10.0]], [0, 0], [1, 1])
    effects = cp.Experiment(cp.open_model(Two()), pairs).run(["module(one).output"])
    # Effects 1 and 20, gaps 3 and 40.
    assert effects.effect(per_pair=True).values.tolist() == [[1.0, 20.0]]
    assert effects.recovered().item() == pytest.approx(21 / 43)
    assert effects.recovered(per_pair=True).values[0] == pytest.approx([1 / 3, 1 / 2])


@pytest.mark.parametrize(
    ("value", "patched", "reference"),
    [
        ("zero", [[2.0, 6.0], [-1.0, 2.0]], [0.0, 0.0]),
        (1.0, [[2.0, 6.0], [-1.0, 2.0]], [0.0, 0.0]),
        # Means over the corrupted side: one gives (0.5, 1.5), two gives (2.5, 1.5).
        ("mean", [[1.0, 5.0], [0.0, 3.0]], [0.0, 0.0]),
    ],
)
def test_ablations_refer_to_the_run_in_which_everything_is_ablated(value, patched, reference):
    effects = by_hand(direction="noise").run([cp.Patch(site, value) for site in BOTH])
    data = effects.to_xarray()
    assert data["metric"].values == pytest.approx(np.array(patched))
    assert data["baseline_reference"].values.tolist() == reference
    assert data["baseline_clean"].values.tolist() == [1.0, 8.0]
    gap = (9.0 - sum(reference)) / 2
    wanted = [(4.5 - np.mean(row)) / gap for row in patched]
    assert effects.recovered().values == pytest.approx(wanted)
    assert effects.provenance["reference"].endswith("at 2 places together")


def test_a_reference_that_is_as_good_as_the_clean_run_leaves_no_gap():
    effects = by_hand(direction="noise").run([cp.Patch(site, cp.Mean(side="clean")) for site in BOTH])
    assert effects.to_xarray()["metric"].values == pytest.approx(np.array([[2.5, 6.5], [3.0, 6.0]]))
    assert effects.to_xarray()["baseline_reference"].values.tolist() == [4.5, 4.5]
    with pytest.raises(NoGap):
        effects.recovered()


def test_the_reference_ablates_what_a_pair_has_of_all_positions():
    pairs = prompts(([3, 4, 5], [6, 4]), ([3, 4], [7, 4])).align("map", mapping=[[(0, 0), (2, 1)], [(0, 0)]])
    patches = [cp.Patch("resid_post.1", "zero", column=column) for column in (0, 1)]
    data = cp.Experiment(MODEL, pairs, direction="noise").run(patches).to_xarray()
    # Nothing reads the first token behind the last layer.
    assert data["status"].values.tolist() == [[Status.DERIVED] * 2, [Status.MEASURED, Status.UNALIGNED]]
    # The second pair has the first column only, so that its reference is its only cell.
    assert data["baseline_reference"].values[1] == pytest.approx(data["metric"].values[0, 1])
    assert data["baseline_reference"].values[0] == pytest.approx(data["metric"].values[1, 0])


def test_the_baseline_says_whether_the_model_is_right_on_both_sides():
    baseline = by_hand().baseline
    assert baseline.metrics == ("logit_difference",)
    assert baseline.right_clean.tolist() == [True, True]
    assert baseline.right_corrupt.tolist() == [True, False]
    assert baseline.top1_clean.tolist() == [True, True]
    assert str(baseline).splitlines() == [
        "logit_difference: clean 4.500, corrupted 0.000, gap 4.500",
        "right on clean 100% (top choice of all 100%), wrong answer preferred on corrupted 50%, both 50%",
    ]


def test_the_baseline_is_measured_once_and_is_the_same_in_both_directions():
    experiment, other = by_hand(), by_hand(direction="noise")
    assert experiment.baseline is experiment.baseline
    assert experiment.baseline.clean.tolist() == other.baseline.clean.tolist()
    assert experiment.baseline.right_corrupt.tolist() == other.baseline.right_corrupt.tolist()


def test_pairs_without_answers_are_neither_right_nor_wrong():
    experiment = cp.Experiment(MODEL, Pairs([Pair([3, 4], [5, 4])]), metric="kl_divergence")
    assert experiment.baseline.right_clean is None
    assert "right on clean" not in str(experiment.baseline)


def test_several_metrics_stand_side_by_side():
    experiment = cp.Experiment(MODEL, PAIRS, metric=[cp.logit_difference, "rank", cp.logit_difference.at(0)])
    effects = experiment.run(["z.0.1@-1", "resid_pre.1@-1"])
    assert effects.metrics == ["logit_difference", "rank", "logit_difference@0"]
    assert effects.to_xarray()["metric"].dims == ("metric_name", "intervention", "pair")
    for metric in experiment.metrics:
        alone = cp.Experiment(MODEL, PAIRS, metric=metric).run(["z.0.1@-1", "resid_pre.1@-1"])
        # How many columns are read changes the order of sums, and with it the last bits.
        np.testing.assert_allclose(
            effects.metric(metric.name).effect(per_pair=True).values,
            alone.effect(per_pair=True).values,
            rtol=0,
            atol=1e-13,
        )


def test_interventions_are_labelled_by_what_they_patch():
    effects = cp.Experiment(MODEL, PAIRS).run(
        ["z.0.1@-1", ["z.0.1", "mlp_out.0"], cp.Patch("embed", "identity"), cp.Intervention.of("z")]
    )
    assert effects.to_xarray()["intervention"].values.tolist() == [
        "z.0.1@-1",
        "z.0.1 + mlp_out.0",
        "embed <- identity",
        "z.*.*",
    ]


def test_one_site_may_be_given_without_a_list():
    for request in ("z.0.1@-1", cp.parse("z.0.1@-1"), cp.Patch("z.0.1@-1"), cp.Intervention.of("z.0.1@-1")):
        assert cp.Experiment(MODEL, PAIRS).run(request).to_xarray()["intervention"].values.tolist() == ["z.0.1@-1"]


def test_interventions_fill_the_axes_that_are_asked_for():
    sites = [f"z.{layer}.{head}@-1" for layer in range(2) for head in (1, 3)]
    experiment = cp.Experiment(MODEL, PAIRS)
    effects = experiment.run(
        sites, axes={"layer": [0, 1], "head": [1, 3]}, labels={"head": ["one", "three"]}, title="z of two heads"
    )
    assert effects.dims == ("layer", "head", "pair")
    assert effects.provenance["site"] == "z of two heads"
    flat = experiment.run(sites).effect(per_pair=True).values
    np.testing.assert_array_equal(effects.effect(per_pair=True).values.reshape(flat.shape), flat)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"layer": [0, 1], "head": [0]}, "3 interventions do not fill the axes"),
        ({"row": [0, 1, 2]}, "results have no axis named 'row'"),
        ({"layer": [0, 1, 1]}, "axis 'layer' holds '1' more than once"),
    ],
)
def test_axes_that_do_not_fit_are_refused(axes, said):
    with pytest.raises(SettingError, match=said):
        cp.Experiment(MODEL, PAIRS).run(["z.0.0", "z.0.1", "z.0.2"], axes=axes)


def test_the_same_intervention_twice_is_refused():
    with pytest.raises(SettingError, match=r"holds 'z\.0\.0' more than once"):
        cp.Experiment(MODEL, PAIRS).run(["z.0.0", "z.0.0"])


def test_nothing_to_run_is_refused():
    with pytest.raises(PatchError, match="there is nothing to run"):
        cp.Experiment(MODEL, PAIRS).run([])


@pytest.mark.parametrize(
    ("settings", "kind", "said"),
    [
        ({"direction": "denoising"}, SettingError, "direction cannot be 'denoising'"),
        ({"engine": "fast"}, SettingError, "engine cannot be 'fast'"),
        ({"padding_side": "both"}, SettingError, "padding_side cannot be 'both'"),
        ({"metric": []}, SettingError, "one or more metrics with different names"),
        ({"metric": ["rank", cp.rank]}, SettingError, "one or more metrics with different names"),
        ({"metric": "rnk"}, MetricError, "there is no metric 'rnk'"),
        ({"metric": lambda outputs, pairs: outputs.logits}, MetricError, "is not a metric"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, kind, said):
    with unchecked(), pytest.raises(kind, match=said):
        cp.Experiment(MODEL, PAIRS, **settings)


def test_a_model_of_arrays_takes_no_prompts():
    with pytest.raises(PairError, match="holds prompts, but 'Chain' takes arrays"):
        cp.Experiment(opened(Chain()), PAIRS)


def test_with_every_number_stands_how_it_was_obtained():
    pairs = PAIRS.take([0, 1, 2])
    experiment = cp.Experiment(MODEL, pairs, metric=["logit_difference", "rank"], seed=5, max_rows=4)
    record = experiment.run(["z.0.1@-1", cp.Patch("z.1.3@-1")]).provenance
    assert record["model"] == {
        "name": "LlamaForCausalLM",
        "hash": MODEL.content_hash,
        "dtype": "float64",
        "device": "cpu",
        "attention": MODEL.attention,
    }
    assert record["pairs"] == {"name": "prompts", "hash": pairs.content_hash, "n": 3}
    assert record["site"] == "z.0.1@-1 … z.1.3@-1 (2 sites)"
    assert record["direction"] == "denoise"
    assert record["value"] == "source"
    assert record["reference"] == "corrupted run"
    assert record["metrics"] == ["logit_difference", "rank"]
    assert record["higher_is_better"] == {"logit_difference": True, "rank": False}
    assert record["engine"]["tier"] == "wavefront"
    assert record["seed"] == 5
    assert record["complete"] is True
    assert record["facts"] == {
        "granularity": "head",
        "kind": "node",
        "value": "source",
        "positions": "@-1",
        "direction": "denoise",
        "circuit": "single interventions, the rest of the run intact",
    }
    assert record["noise_floor"]["logit_difference"] < 1e-12
    assert set(record["versions"]) == {"causalpatch", "torch", "transformers", "numpy", "python"}
    assert record["versions"]["torch"] == torch.__version__ or record["versions"]["torch"] in torch.__version__
    # Two untouched runs, two patched ones and the identity control for each pair.
    assert record["cost"]["rows"] == 3 * (2 + 2 + 1)
    assert record["cost"]["seconds"] >= 0
    assert record["created"].endswith("+00:00")


def test_mirrored_pairs_make_the_other_direction_redundant_and_are_noted():
    mirrored = Pairs(
        [Pair([3, 4, 5], [6, 4, 5], ((7,),), ((8,),), "a"), Pair([6, 4, 5], [3, 4, 5], ((8,),), ((7,),), "b")]
    )
    notes = cp.Experiment(MODEL, mirrored).run(["z.0.0"]).provenance["notes"]
    assert notes == ["100% of the pairs are mirrored: the other direction is redundant by construction"]
    assert cp.Experiment(MODEL, PAIRS).run(["z.0.0"]).provenance["notes"] == []


def test_effects_of_a_run_survive_their_files(tmp_path):
    effects = cp.sweep(cp.Experiment(MODEL, PAIRS, metric=["logit_difference", "rank"]), "z")
    effects.save(tmp_path / "z")
    again = cp.Effects.load(tmp_path / "z")
    assert again.to_xarray().equals(effects.to_xarray())
    assert again.provenance == effects.provenance


def test_runs_print_nothing_and_show_a_bar_only_when_asked(capfd):
    cp.Experiment(MODEL, PAIRS, show_progress=False).run(["z.0.0"])
    shown = capfd.readouterr()
    assert (shown.out, shown.err) == ("", "")
    cp.Experiment(MODEL, PAIRS, show_progress=True).run(["z.0.0"])
    assert capfd.readouterr().out == ""


def test_a_run_leaves_the_model_as_it_was():
    model, pairs = opened(Chain()), vectors()
    model.module.train()
    state = {name: tensor.clone() for name, tensor in model.module.state_dict().items()}
    cp.Experiment(model, pairs).run(["module(first).output", cp.Patch("module(second).output", "zero")])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.module.state_dict().items())
    assert all(part.training for part in model.module.modules())
    assert hooks_of(model.module) == 0


def test_an_experiment_prints_what_it_asks():
    assert repr(cp.Experiment(MODEL, PAIRS, metric=["rank", "top1"], direction="noise")) == (
        "Experiment('LlamaForCausalLM', 'prompts', rank, top1, noise)"
    )
