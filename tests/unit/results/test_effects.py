import json
import re
import subprocess
import sys

import numpy as np
import pytest

from causalpatch.base.axes import AXES
from causalpatch.base.errors import NoGap, NotFinite, ResultsNotFound, SettingError
from causalpatch.results.effects import Effects


def by_hand(**changes):
    """Two layers, three pairs, numbers that can be checked in the head."""
    parts = {
        "axes": {"layer": [0, 1]},
        "pair_ids": ["a", "b", "c"],
        "groups": np.array([0, 0, 1]),
        "metrics": ["logit_difference"],
        "values": np.array([[[1.0, 3.0, 0.0], [0.0, 1.0, -1.0]]]),
        "status": np.zeros((2, 3), int),
        "baselines": {"clean": np.array([[2.0, 7.0, 1.0]]), "corrupt": np.array([[0.0, 1.0, -1.0]])},
        "provenance": {"direction": "denoise"},
    }
    return Effects.build(**(parts | changes))


def test_recovered_is_a_ratio_of_means_and_not_a_mean_of_ratios():
    # effects 1, 2, 1 over gaps 2, 6, 2
    assert by_hand().recovered().values.tolist() == pytest.approx([4 / 10, 0.0])
    assert by_hand().recovered(per_pair=True).values[0].tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 2])


def test_effect_is_the_change_against_the_base_run():
    found = by_hand().effect(per_pair=True)
    assert found.dims == ("layer", "pair")
    assert found.sel(layer=0).values.tolist() == [1.0, 2.0, 1.0]
    assert by_hand().effect().sel(layer=0).item() == pytest.approx(4 / 3)


def test_noise_gives_the_share_removed_with_its_sign():
    effects = by_hand(
        values=np.array([[[1.0, 4.0, 0.0], [3.0, 7.0, 1.0]]]),
        provenance={"direction": "noise"},
    )
    assert effects.effect().values.tolist() == pytest.approx([-5 / 3, 1 / 3])
    assert effects.recovered().values.tolist() == pytest.approx([5 / 10, -1 / 10])


def test_the_gap_is_taken_against_the_reference_run_and_the_effect_against_the_base():
    baselines = {"clean": np.array([[2.0, 7.0, 1.0]]), "corrupt": np.array([[0.0, 1.0, -1.0]])}
    effects = by_hand(baselines=baselines | {"reference": np.array([[-3.0, 2.0, 1.0]])})
    assert effects.recovered().values[0] == pytest.approx(4 / 10)
    assert effects.recovered().attrs["mean_gap"] == pytest.approx(10 / 3)
    effects = by_hand(baselines=baselines | {"reference": np.array([[-3.0, -3.0, -4.0]])})
    assert effects.recovered().values[0] == pytest.approx(4 / 20)


def test_values_beyond_nought_and_one_are_kept():
    effects = by_hand(values=np.array([[[9.0, 9.0, 9.0], [-9.0, -9.0, -9.0]]]))
    assert effects.recovered().values.tolist() == pytest.approx([27 / 10, -27 / 10])


def test_what_was_not_run_is_nan_whatever_stood_there():
    status = np.array([[0, 4, 0], [5, 4, 3]])
    effects = by_hand(status=status, values=np.zeros((1, 2, 3)))
    metric = effects.to_xarray()["metric"].values
    assert np.isnan(metric).tolist() == [[False, True, False], [True, True, True]]
    assert np.isnan(effects.effect().values).tolist() == [False, True]
    assert np.isnan(effects.recovered().values).tolist() == [False, True]


def test_the_gap_of_a_cell_is_that_of_the_pairs_measured_in_it():
    effects = by_hand(status=np.array([[0, 3, 0], [0, 0, 0]]))
    assert effects.recovered().values[0] == pytest.approx(2 / 4)
    assert effects.effect().values[0] == pytest.approx(1.0)


@pytest.mark.parametrize("code", [1, 2])
def test_derived_and_screened_numbers_count(code):
    assert by_hand(status=np.array([[code] * 3, [0, 0, 0]])).recovered().values[0] == pytest.approx(4 / 10)
    assert by_hand(status=np.array([[code, code, 3], [0, 0, 0]])).summary()["n_pairs"].tolist() == [2, 3]


def test_what_was_screened_says_so_wherever_it_is_read():
    effects = by_hand(status=np.array([[2, 2, 1], [0, 3, 0]]))
    assert "5 of 6 measured, 1 of them derived, 2 of them in reduced precision (1 unaligned)" in repr(effects)
    summary = effects.summary()
    assert summary["status"].tolist() == ["derived; 2 screened", "measured; 1 unaligned"]
    assert "screened: 2 of 6 runs, measured in reduced precision" in summary.attrs["notes"]
    assert "screened: 2 of 6 runs, measured in reduced precision" in effects.top().notes
    assert effects.to_dataframe()["status"].tolist().count("screened") == 2


def test_a_cell_whose_own_pairs_have_no_gap_has_no_share():
    baselines = {"clean": np.array([[2.0, 7.0, -1.0]]), "corrupt": np.array([[0.0, 1.0, -1.0]])}
    effects = by_hand(baselines=baselines, status=np.array([[3, 3, 0], [0, 0, 0]]))
    assert np.isnan(effects.recovered().values[0])
    assert effects.effect().values[0] == 1.0


def test_a_pair_with_a_tiny_gap_has_no_ratio_of_its_own_and_is_counted():
    baselines = {"clean": np.array([[2.0, 7.0, -0.999]]), "corrupt": np.array([[0.0, 1.0, -1.0]])}
    effects = by_hand(baselines=baselines)
    found = effects.recovered(per_pair=True)
    assert np.isnan(found.values).tolist() == [[False, False, True]] * 2
    assert found.attrs["n_small_gap"] == 1
    assert found.attrs["smallest_gap"] == effects.smallest_gap == pytest.approx(8.001 / 3 * 1e-3)
    assert effects.recovered(per_pair=True, smallest_gap=3.0).attrs["n_small_gap"] == 2
    # the ratio of means keeps every pair
    assert effects.recovered().values[0] == pytest.approx(4 / 8.001)


@pytest.mark.parametrize("read", [Effects.recovered, Effects.summary, Effects.top, Effects.plot])
def test_without_a_gap_there_is_an_error_and_no_number(read):
    same = np.array([[0.0, 1.0, -1.0]])
    effects = by_hand(baselines={"clean": same, "corrupt": same})
    with pytest.raises(NoGap) as caught:
        read(effects)
    assert str(caught.value) == (
        "clean and reference runs have no gap in 'logit_difference', so no share of it can be given\n"
        "  clean      0 (mean of 3 pairs)\n"
        "  reference  0\n"
        "  gap        0\n"
        "  fix: read effects.effect() instead, or choose pairs that the model tells apart (pairs.check())"
    )
    assert effects.effect().values[0] == pytest.approx(4 / 3)
    assert "no gap" in repr(effects)


def test_a_gap_whose_interval_contains_nought_is_no_gap(make):
    rng = np.random.default_rng(0)
    clean = rng.normal(0.1, 5.0, (1, 40))
    effects = Effects.build(
        axes={"layer": [0]},
        pair_ids=[str(i) for i in range(40)],
        groups=np.arange(40),
        metrics=["m"],
        values=np.zeros((1, 1, 40)),
        status=np.zeros((1, 40), int),
        baselines={"clean": clean - clean.mean() + 0.1, "corrupt": np.zeros((1, 40))},
    )
    with pytest.raises(NoGap, match="no gap in 'm'") as caught:
        effects.recovered()
    assert "gap        0.1, 95 % interval -1." in str(caught.value)


def test_a_gap_the_wrong_way_round_is_refused():
    turned = {"clean": np.array([[0.0, 1.0, -1.0]]), "corrupt": np.array([[2.0, 7.0, 1.0]])}
    with pytest.raises(NoGap, match="no gap"):
        by_hand(baselines=turned).recovered()


def test_a_gap_that_is_only_rounding_is_refused():
    corrupt = np.array([[10.0, 11.0, 9.0]])
    with pytest.raises(NoGap, match="no gap"):
        by_hand(baselines={"clean": corrupt * (1 + 1e-8), "corrupt": corrupt}).recovered()


def test_a_metric_of_which_less_is_better_may_have_a_gap_below_nought():
    turned = {"clean": np.array([[0.0, 1.0, -1.0]]), "corrupt": np.array([[2.0, 7.0, 1.0]])}
    values = np.array([[[1.0, 5.0, 0.0], [2.0, 7.0, 1.0]]])
    provenance = {"direction": "denoise", "higher_is_better": {"logit_difference": False}}
    effects = by_hand(baselines=turned, values=values, provenance=provenance)
    assert effects.recovered().values.tolist() == pytest.approx([4 / 10, 0.0])
    with pytest.raises(NoGap, match="no gap") as caught:
        by_hand(provenance=provenance).recovered()
    assert "a smaller value of this metric is better" in str(caught.value)
    assert len(str(caught.value).splitlines()) <= 8


def test_several_metrics_cost_an_axis_and_the_first_one_is_read():
    values = np.array([[[1.0, 3.0, 0.0], [0.0, 1.0, -1.0]], [[0.5, 0.5, 0.5], [1.0, 1.0, 1.0]]])
    baselines = {"clean": np.array([[2.0, 7.0, 1.0], [1.0, 1.0, 1.0]])}
    baselines["corrupt"] = np.array([[0.0, 1.0, -1.0], [0.0, 0.0, 0.0]])
    effects = by_hand(metrics=["logit_difference", "probability"], values=values, baselines=baselines)
    assert effects.metrics == ["logit_difference", "probability"]
    assert effects.to_xarray()["metric"].dims == ("metric_name", "layer", "pair")
    assert effects.dims == ("layer", "pair")
    assert effects.recovered().values[0] == pytest.approx(4 / 10)
    assert effects.metric("probability").recovered().values.tolist() == [0.5, 1.0]
    assert effects.metric("probability").to_xarray()["metric"].dims == ("layer", "pair")
    assert effects.top(1, "probability")["layer"].tolist() == [1]
    with pytest.raises(ResultsNotFound) as caught:
        effects.metric("probabilty")
    assert str(caught.value) == (
        "no metric named 'probabilty' in these effects\n"
        "  measured  logit_difference, probability\n"
        "  fix: effects.metric('probability')"
    )


def test_the_array_carries_its_labels_components_and_positions(make):
    positions = np.arange(40 * 2 * 2).reshape(40, 2, 2)
    effects = make(
        {"layer": [3, 4, 5], "position": [0, 1]},
        np.zeros((3, 2)),
        labels={"position": ["The", " cat"]},
        positions=positions,
        groups=np.arange(40) // 4,
    )
    data = effects.to_xarray()
    assert data["metric"].dims == data["status"].dims == ("layer", "position", "pair")
    assert data["metric"].dtype == np.float64
    assert data["status"].dtype == np.uint8
    assert data["token"].values.tolist() == ["The", " cat"]
    assert data["component"].values.tolist() == (np.arange(40) // 4).tolist()
    assert (data["base_position"].values == positions[..., 0]).all()
    assert (data["source_position"].values == positions[..., 1]).all()
    assert set(data.dims) <= {*AXES, "metric_name"}
    assert json.loads(data.attrs["provenance"])["site"] == "resid_pre"
    assert effects.recovered().coords["token"].values.tolist() == ["The", " cat"]
    assert effects.n_components == 10


def test_the_array_handed_out_is_a_copy():
    effects = by_hand()
    effects.to_xarray()["metric"].values[:] = 99.0
    assert effects.effect().values[0] == pytest.approx(4 / 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"values": np.zeros((1, 3, 3))}, "the shape of values does not fit the axes"),
        ({"status": np.zeros((2, 2))}, "the shape of status does not fit the axes"),
        ({"groups": np.zeros(2)}, "the shape of groups does not fit the axes"),
        ({"status": np.full((2, 3), 9)}, "no status has the code 9"),
        ({"axes": {"depth": [0, 1]}}, "no axis named 'depth'"),
        ({"axes": {"layer": [1, 1]}}, "the axis 'layer' names a value twice"),
        ({"metrics": []}, "the metrics need names"),
        ({"labels": {"position": ["a"]}}, "labels for an axis that is not there"),
        ({"labels": {"layer": ["a"]}}, "the number of labels does not fit"),
        ({"positions": np.zeros((3, 2, 2))}, "the shape of positions does not fit"),
        ({"baselines": {"corrupt": np.zeros((1, 3))}}, "the baseline 'clean' is missing"),
        ({"baselines": {"cleen": np.zeros((1, 3))}}, "no baseline named 'cleen'"),
        ({"provenance": {"direction": "sideways"}}, "no direction named 'sideways'"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(changes, words):
    with pytest.raises(SettingError, match=words):
        by_hand(**changes)


def test_a_run_that_was_made_must_have_a_finite_number():
    with pytest.raises(NotFinite, match="'logit_difference' is not a finite number on a patched run"):
        by_hand(values=np.array([[[1.0, np.nan, 0.0], [0.0, 1.0, -1.0]]]))
    with pytest.raises(NotFinite, match="on an unpatched run"):
        by_hand(baselines={"clean": np.array([[2.0, np.inf, 1.0]]), "corrupt": np.zeros((1, 3))})


def test_printing_says_what_was_measured_and_what_was_not(make):
    status = np.zeros((2, 3, 40), int)
    status[1, 2] = 4
    effects = make(
        {"layer": [0, 1], "position": [0, 1, 2]},
        [[0, 0.9, 0], [0, 0, 0]],
        status=status,
        labels={"position": ["The", " the", "\n"]},
        provenance={"complete": False},
        noise=0.0,
    )
    lines = repr(effects).splitlines()
    assert lines[0] == "Effects of resid_pre (denoise, source values, stopped before its end)"
    assert "axes     layer 2 x position 3" in lines[1]
    assert "200 of 240 measured (40 skipped)" in repr(effects)
    assert re.search(r"gap +[\d.]+ \(clean run [\d.]+, corrupted run -[\d.]+\)", repr(effects))
    assert "layer 0, position 1 ·the: restores 0.900 of the gap (exploratory)" in lines[-1]
    assert len(lines) < 10
    assert effects._repr_html_().startswith("<pre>Effects of resid_pre")


def test_printing_says_what_is_removed_by_what_and_repeats_the_notes_of_the_run(make):
    provenance = {"value": "zero", "reference": "zero at 6 places together", "notes": ["40% of the pairs are mirrored"]}
    effects = make({"layer": [0, 1]}, [0.5, 0.0], direction="noise", noise=0.0, provenance=provenance)
    lines = repr(effects).splitlines()
    assert lines[0] == "Effects of resid_pre (noise, zero values)"
    assert re.search(r"clean run [\d.]+, zero at 6 places together -[\d.]+\)", lines[4])
    assert lines[-2:] == [
        "  largest  layer 0: removes 0.500 of the gap (exploratory)",
        "  note     40% of the pairs are mirrored",
    ]


def test_printing_says_which_engine_made_the_runs_and_how_many_needed_none(make):
    record = {"tier": "restart", "reason": "whole prompts; wavefront: its tokens see later ones"}
    status = np.zeros((2, 40), dtype=np.uint8)
    status[1] = 1
    effects = make({"layer": [0, 1]}, [0.5, 0.0], status=status, provenance={"engine": record})
    lines = repr(effects).splitlines()
    assert lines[5] == "  runs     80 of 80 measured, 40 of them derived"
    assert lines[6] == "  engine   restart: whole prompts; wavefront: its tokens see later ones"


def test_effects_that_are_a_share_of_nothing_say_why_when_printed(make):
    effects = make({"layer": [0]}, [0.5], provenance={"reference": "none", "no_share": "two kinds of ablation"})
    lines = repr(effects).splitlines()
    assert lines[4] == "  gap      none: two kinds of ablation"
    assert lines[-1] == "  largest  no gap, so no share of it; effects.effect() gives changes of the metric"


def test_shares_name_the_run_that_they_refer_to():
    assert by_hand().recovered().attrs["reference"] == "corrupted run"
    other = by_hand(
        baselines={"clean": np.array([[2.0, 7.0, 1.0]]), "corrupt": np.zeros((1, 3)), "reference": np.zeros((1, 3))}
    )
    assert other.recovered().attrs["reference"] == "reference run"


def test_writing_to_what_was_handed_out_changes_nothing():
    effects = by_hand()
    before = effects.summary()
    for read in (Effects.effect, Effects.recovered):
        for per_pair in (False, True):
            read(effects, per_pair=per_pair).values[:] = 77.0
    frame = effects.summary()
    frame.loc[:, "recovered"] = 77.0
    effects.summary().attrs["notes"].clear()
    effects.top().notes.clear()
    assert effects.summary().equals(before)
    assert effects.summary().attrs["notes"] == before.attrs["notes"] != []
    assert effects.top().notes
    assert effects.recovered().values.tolist() == pytest.approx([4 / 10, 0.0])


def test_reading_results_loads_nothing_heavy():
    code = (
        "import sys, causalpatch.results.effects, causalpatch.results.charts\n"
        "print([name for name in ('torch', 'transformers', 'xarray', 'pandas', 'altair', 'pyarrow', 'vl_convert', "
        "'jaxtyping', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
