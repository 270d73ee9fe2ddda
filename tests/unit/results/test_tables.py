import functools
import re
import time

import numpy as np
import pandas as pd
import pytest

from causalpatch.results import inference
from causalpatch.statistics.agreement import sign_agreement
from causalpatch.statistics.families import benjamini_hochberg
from causalpatch.statistics.intervals import ratio_interval
from causalpatch.statistics.permutation import sign_flip
from causalpatch.statistics.together import simulated_family_coverage

COLUMNS = ["effect", "recovered", "low", "high", "p", "p_bh", "agreement", "n_pairs", "n_components", "status"]
HEADS = {"layer": [0, 1, 2], "head": [0, 1, 2, 3]}


@pytest.fixture
def shares():
    found = np.zeros((3, 4))
    found[1, 2], found[2, 0], found[0, 3] = 0.8, -0.3, 0.15
    return found


def gap_of(effects):
    data = effects.to_xarray()
    return (data["baseline_clean"] - data["baseline_reference"]).values


def test_the_summary_has_a_row_per_cell_in_the_order_of_the_axes(make, shares):
    summary = make(HEADS, shares).summary()
    assert list(summary.columns) == ["layer", "head", *COLUMNS]
    assert summary[["layer", "head"]].values.tolist() == [[layer, head] for layer in range(3) for head in range(4)]
    assert summary["recovered"].to_numpy().reshape(3, 4) == pytest.approx(shares, abs=0.05)
    assert summary["status"].tolist() == ["measured"] * 12


def test_tokens_stand_beside_their_positions(make):
    summary = make({"layer": [0], "position": [0, 1]}, [[0, 0.5]], labels={"position": ["the", "the"]}).summary()
    assert list(summary.columns)[:3] == ["layer", "position", "token"]
    assert summary["token"].tolist() == ["the", "the"]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_the_numbers_are_those_of_the_statistics(make, shares, direction):
    groups = np.arange(80) // 2
    effects = make(HEADS, shares, direction=direction, n_pairs=80, groups=groups)
    summary = effects.summary()
    changes = effects.effect(per_pair=True).values.reshape(12, 80)
    sign = 1 if direction == "denoise" else -1
    interval = ratio_interval(sign * changes[6], gap_of(effects), groups)
    assert interval.status == "exact"
    row = summary.iloc[6]
    assert row["recovered"] == pytest.approx(interval.estimate)
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["low"] < row["recovered"] < row["high"]
    assert row["effect"] == pytest.approx(changes[6].mean())
    assert summary["p"].to_numpy() == pytest.approx(sign_flip(changes, groups))
    assert summary["p_bh"].to_numpy() == pytest.approx(benjamini_hochberg(summary["p"]))
    assert summary["agreement"].to_numpy() == pytest.approx(sign_agreement(changes))
    assert (row["n_pairs"], row["n_components"]) == (80, 40)


def test_a_cell_that_was_not_measured_has_no_number_anywhere(make, shares):
    status = np.zeros((3, 4, 40), int)
    status[0, 0], status[1, 2, :10], status[2, 3, :4] = 4, 3, 5
    effects = make(HEADS, shares, status=status)
    summary = effects.summary()
    assert summary.loc[0, COLUMNS[:7]].isna().all()
    assert summary.loc[0, ["n_pairs", "n_components", "status"]].tolist() == [0, 0, "skipped"]
    assert summary.loc[6, ["n_pairs", "n_components", "status"]].tolist() == [30, 30, "measured; 10 unaligned"]
    assert np.isfinite(summary.loc[6, COLUMNS[:7]].to_numpy(float)).all()
    notes = summary.attrs["notes"]
    assert "not measured: 1 of 12 cells (runs: 40 skipped)" in notes
    assert "2 cells rest on some of the 40 pairs, the gap on the same ones" in notes
    assert "p: screening only, against 0; p_bh: Benjamini-Hochberg over 11 cells, a heuristic" in notes


def test_a_sweep_that_measured_nothing_still_has_a_table(make):
    effects = make({"layer": [0, 1]}, [0.1, 0.2], status=np.full((2, 40), 4))
    assert effects.summary()["recovered"].isna().all()
    assert len(effects.top()) == 0
    assert "nothing measured" in repr(effects)


def test_the_interval_of_a_cell_uses_the_gap_of_its_own_pairs(make, shares):
    status = np.zeros((3, 4, 40), int)
    status[1, 2, :8] = 3
    effects = make(HEADS, shares, status=status)
    change = effects.effect(per_pair=True).values[1, 2]
    interval = ratio_interval(change[8:], gap_of(effects)[8:], np.arange(32))
    row = effects.summary().iloc[6]
    assert (row["recovered"], row["low"], row["high"]) == pytest.approx(
        (interval.estimate, interval.low, interval.high)
    )


def test_few_groups_make_an_approximate_interval_that_says_so(make, shares):
    notes = make(HEADS, shares, groups=np.arange(40) // 2).summary().attrs["notes"]
    assert any("intervals are approximate: 20 independent groups; coverage 0.9" in note for note in notes)
    assert not any("approximate" in note for note in make(HEADS, shares).summary().attrs["notes"])


def test_too_few_groups_have_no_interval_but_the_value_of_each(make, shares):
    effects = make(HEADS, shares, groups=np.arange(40) // 8)
    summary = effects.summary()
    assert summary[["low", "high"]].isna().all(axis=None)
    assert np.isfinite(summary["p"]).all()
    notes = summary.attrs["notes"]
    assert notes[1] == "too few independent groups: 5 (an interval needs 10); the value of each: effects.by_component()"
    assert "smallest attainable p with so few independent groups: 0.0625" in notes
    top = effects.top(1)
    assert top.by_component.shape == (1, 5)
    each = effects.by_component().query("layer == 1 and head == 2")["recovered"].tolist()
    assert top.by_component[0] == pytest.approx(each)
    shown = str(top)
    assert " ".join(f"{value:.2f}" for value in each) in shown
    assert "low" not in shown.splitlines()[2]
    assert "intervals" not in shown.splitlines()[0]


def test_the_values_of_components_are_ratios_of_their_own_means(make, shares):
    effects = make(HEADS, shares, groups=np.arange(40) // 8)
    table = effects.by_component()
    assert list(table.columns) == ["layer", "head", "component", "n_pairs", "effect", "gap", "recovered"]
    assert len(table) == 12 * 5
    change = effects.effect(per_pair=True).values[1, 2, 8:16].mean()
    row = table.query("layer == 1 and head == 2 and component == 1").iloc[0]
    assert (row["effect"], row["gap"]) == pytest.approx((change, gap_of(effects)[8:16].mean()))
    assert row["recovered"] == pytest.approx(row["effect"] / row["gap"])
    assert row["n_pairs"] == 8


def test_the_largest_cells_come_first_and_are_marked_exploratory(make, shares):
    effects = make(HEADS, shares)
    top = effects.top(3)
    assert top[["layer", "head"]].values.tolist() == [[1, 2], [2, 0], [0, 3]]
    assert top["recovered"].iloc[1] < 0
    assert str(top).startswith("exploratory: the 3 largest of 12 cells, chosen and estimated on the same pairs")
    assert repr(top) == str(top)
    assert "exploratory" in top._repr_html_()
    assert top.label == top.to_dataframe().attrs["label"] == "exploratory"
    assert isinstance(top.to_dataframe(), pd.DataFrame)
    assert len(effects.top(100)) == 12


def test_intervals_of_the_largest_cells_hold_together_and_so_are_wider(make, shares):
    effects = make(HEADS, shares)
    alone = effects.summary().set_index(["layer", "head"])
    together = effects.top(12).to_dataframe().set_index(["layer", "head"]).loc[alone.index]
    assert together["recovered"].to_numpy() == pytest.approx(alone["recovered"].to_numpy())
    assert (together["low"] < alone["low"]).all()
    assert (together["high"] > alone["high"]).all()


def test_the_interval_of_one_cell_is_not_widened(make):
    effects = make({"layer": [0]}, [0.4])
    assert effects.top(1)["low"].iloc[0] == pytest.approx(effects.summary()["low"].iloc[0], rel=0.02)


def uneven(make, shares, *, n_groups=60, n_skewed=1):
    """Return effects of which some cells are skewed: one pair of theirs is far off."""
    effects = make(HEADS, shares, n_pairs=n_groups)
    data = effects.to_xarray()
    values = data["metric"].values[None].copy()
    values.reshape(12, n_groups)[:n_skewed, 0] += 20.0
    return type(effects).build(
        axes=HEADS,
        pair_ids=effects.pair_ids,
        groups=np.arange(n_groups),
        metrics=["m"],
        values=values,
        status=np.zeros((3, 4, n_groups)),
        baselines={role: data[f"baseline_{role}"].values[None] for role in ("clean", "corrupt")},
    )


def test_intervals_that_can_be_believed_to_hold_together_say_so(make, shares):
    top = make(HEADS, shares, n_pairs=60).top(2)
    assert top.words.endswith("; the 95% intervals hold for all cells together")
    assert not any("together" in note for note in top.notes)


@pytest.mark.parametrize("level", [0.95, 0.9])
def test_with_few_groups_the_heading_says_how_often_intervals_hold_together(make, shares, level):
    top = make(HEADS, shares, n_pairs=15).top(2, level=level)
    share = simulated_family_coverage([1] * 15, 12, level=level)
    assert top.words.endswith(
        f"; the {level:.0%} intervals are approximate: all hold together in as few as {share:.0%} of simulated sweeps"
    )
    assert "hold for all" not in str(top)
    (note,) = (note for note in top.notes if "because" in note)
    assert note.startswith("holding together is approximate because 15 independent groups are fewer than 20")
    assert "simulated: 15 groups, 12 cells independent of each other, the lowest of normal and exponential" in note


def test_skewed_cells_make_holding_together_approximate_even_where_they_are_not_shown(make, shares):
    top = uneven(make, shares).top(1)
    share = simulated_family_coverage([1] * 60, 12)
    assert f"all hold together in as few as {share:.0%} of simulated sweeps" in top.words
    assert any("because 1 of 12 cells is skewed between groups (skewness beyond 1);" in note for note in top.notes)
    notes = uneven(make, shares, n_groups=15, n_skewed=2).top(1).notes
    assert any(
        re.search("15 independent groups are fewer than 20 and [2-9] of 12 cells are skewed", note) for note in notes
    )


def test_cells_that_do_not_vary_are_not_counted_among_those_that_hold_together(make, shares):
    effects = make({"layer": range(40)}, np.zeros(40), noise=0.0, n_pairs=12)
    assert effects.top(1).words.endswith("hold for all cells together")
    assert simulated_family_coverage([1] * 12, 40) < 0.5


def test_fewer_groups_in_one_cell_count_for_all(make, shares):
    status = np.zeros((3, 4, 60), int)
    status[1, 2, :48] = 3
    top = make(HEADS, shares, n_pairs=60, status=status).top(2)
    assert any("because 12 independent groups are fewer than 20" in note for note in top.notes)


def test_tables_say_what_the_share_is_a_share_of(make, shares):
    denoise = make(HEADS, shares, provenance={"site": "z.*.*@-1"})
    words = (
        "recovered: share of the gap in logit_difference from clean run to corrupted run, "
        "restored by putting clean values at z.*.*@-1 of the corrupted run (denoise)"
    )
    assert denoise.summary().attrs["notes"][0] == words
    top = denoise.top(2)
    assert top.to_dataframe().attrs["notes"][0] == words
    assert str(top).splitlines()[1] == words
    assert words in top._repr_html_()
    provenance = {"site": "z.*.*@-1", "value": "zero", "reference": "zero at 40 places together"}
    words = (
        "recovered: share of the gap in logit_difference from clean run to zero at 40 places together, "
        "removed by putting zero at z.*.*@-1 of the clean run (noise)"
    )
    noise = make(HEADS, shares, direction="noise", provenance=provenance)
    assert noise.summary().attrs["notes"][0] == str(noise.top()).splitlines()[1] == words
    assert "restored" not in str(noise.top())


def test_tables_repeat_what_the_run_has_to_say(make, shares):
    said = ["40% of the pairs are mirrored: the other direction is redundant", "3 tokens <unmatched>"]
    effects = make(HEADS, shares, provenance={"notes": said})
    assert effects.summary().attrs["notes"][-2:] == said
    top = effects.top(2)
    assert top.notes[-2:] == top.to_dataframe().attrs["notes"][-2:] == said
    assert str(top).splitlines()[-2:] == [f"note: {note}" for note in said]
    assert "3 tokens &lt;unmatched&gt;" in top._repr_html_()


@pytest.mark.parametrize(
    ("noise", "crosses", "words"),
    [
        (1.0, True, "p_bh below .05 though the interval crosses 0: 1 cell"),
        (1.2, False, "p_bh not below .05 though the interval excludes 0: 1 cell"),
    ],
)
def test_a_p_that_says_another_thing_than_its_interval_is_explained(make, noise, crosses, words):
    shares = np.zeros((3, 4))
    shares[0] = 0.5
    top = make(HEADS, shares, n_pairs=60, noise=noise).top(12)
    across, small = (top["low"] <= 0) & (top["high"] >= 0), top["p_bh"] < 0.05
    assert (across & small).sum() == crosses
    assert (~across & ~small).sum() == (not crosses)
    why = "(p_bh screens each cell by sign flips, the interval is made to hold for all cells together)"
    assert [note for note in top.notes if "though" in note] == [f"{words} {why}"]


def test_a_p_that_agrees_with_its_interval_needs_no_explanation(make, shares):
    top = make(HEADS, shares, n_pairs=60).top(12)
    assert (((top["low"] <= 0) & (top["high"] >= 0)) != (top["p_bh"] < 0.05)).all()
    assert not any("though" in note for note in top.notes)


def test_with_one_group_no_test_is_possible_and_the_notes_say_only_that(make, shares):
    effects = make(HEADS, shares, groups=np.zeros(40, int))
    notes = effects.summary().attrs["notes"]
    assert notes[1:] == [
        "too few independent groups: 1 (an interval needs 10); the value of each: effects.by_component()",
        "no p: no test is possible with one independent group",
    ]
    assert not re.search("0 cells|attainable|Benjamini", str(effects.top()))


def test_one_of_a_thing_is_called_so(make):
    effects = make({"layer": [0]}, [0.4], status=[[3, *[0] * 39]])
    notes = effects.summary().attrs["notes"]
    assert "1 cell rests on some of the 40 pairs, the gap on the same ones" in notes
    assert any("Benjamini-Hochberg over 1 cell," in note for note in notes)
    assert "the 1 largest of 1 cell," in effects.top().words


def count(calls, name, function, *given, **named):
    calls.append(name)
    return function(*given, **named)


def test_tables_and_pictures_of_a_sweep_compute_its_statistics_once(make, shares, monkeypatch):
    calls = []
    for name in ("sign_flip", "max_t", "ratio_intervals"):
        counted = functools.partial(count, calls, name, getattr(inference, name))
        monkeypatch.setattr(inference, name, counted)
    effects = make(HEADS, shares)
    for _ in range(2):
        effects.summary()
        effects.top(3)
        effects.plot()
        effects.plot("bars")
        repr(effects)
    assert sorted(calls) == ["max_t", "ratio_intervals", "ratio_intervals", "sign_flip"]
    effects.top(3, level=0.9)
    effects.summary(level=0.9)
    assert sorted(calls) == ["max_t"] * 2 + ["ratio_intervals"] * 4 + ["sign_flip"]
    assert effects.summary(level=0.9)["low"].iloc[0] > effects.summary()["low"].iloc[0]
    assert effects.top(3, level=0.9)["low"].iloc[0] > effects.top(3)["low"].iloc[0]


def test_each_metric_of_several_keeps_its_own_statistics(make, shares):
    one = make(HEADS, shares)
    data = one.to_xarray()
    several = type(one).build(
        axes=HEADS,
        pair_ids=one.pair_ids,
        groups=np.arange(40),
        metrics=["a", "b"],
        values=np.stack([data["metric"].values, -3 * data["metric"].values]),
        status=np.zeros((3, 4, 40)),
        baselines={
            role: np.stack([data[f"baseline_{role}"].values, 5 - data[f"baseline_{role}"].values])
            for role in ("clean", "corrupt")
        },
        provenance={"higher_is_better": {"a": True, "b": False}},
    )
    assert several.metric("b") is several.metric("b")
    for name in ("b", "a"):
        alone = type(one)(several.metric(name).to_xarray(), several.provenance).top(3).to_dataframe()
        pd.testing.assert_frame_equal(several.top(3, metric=name).to_dataframe(), alone)
    assert several.top(3, metric="a")["effect"].iloc[0] != several.top(3, metric="b")["effect"].iloc[0]


def test_a_sweep_over_thousands_of_cells_is_summed_up_in_seconds(make):
    effects = make({"layer": range(12), "neuron": range(1024)}, np.zeros((12, 1024)), n_pairs=100)
    start = time.perf_counter()
    effects.top(10)
    assert time.perf_counter() - start < 20  # 1.5 s alone on one core; room for a busy machine
    start = time.perf_counter()
    effects.summary()
    effects.top(10)
    assert time.perf_counter() - start < 4


def test_constant_cells_have_an_interval_without_width(make, shares):
    top = make(HEADS, shares, noise=0.0).top(1)
    assert (top["low"].iloc[0], top["high"].iloc[0]) == pytest.approx((0.8, 0.8))


def test_the_table_of_the_largest_shows_tokens_with_their_spaces(make):
    effects = make({"layer": [0], "position": [0, 1]}, [[0, 0.5]], labels={"position": ["\n", " the"]})
    assert "·the" in str(effects.top(1))
    assert effects.top(1)["token"].tolist() == [" the"]


def test_the_same_seed_gives_the_same_table(make, shares):
    first, second = (make(HEADS, shares).summary() for _ in range(2))
    pd.testing.assert_frame_equal(first, second)


def test_the_long_form_has_a_row_per_cell_and_pair(make, shares):
    status = np.zeros((3, 4, 40), int)
    status[0, 1, 7] = 3
    effects = make(HEADS, shares, status=status)
    table = effects.to_dataframe()
    assert len(table) == 12 * 40
    row = table.query("layer == 1 and head == 2 and pair == 'p3'").iloc[0]
    data = effects.to_xarray()
    assert row["metric"] == data["metric"].sel(layer=1, head=2, pair="p3").item()
    assert row["effect"] == pytest.approx(effects.effect(per_pair=True).sel(layer=1, head=2, pair="p3").item())
    assert row["status"] == "measured"
    gone = table.query("layer == 0 and head == 1 and pair == 'p7'").iloc[0]
    assert np.isnan(gone["metric"])
    assert np.isnan(gone["effect"])
    assert gone["status"] == "unaligned"
