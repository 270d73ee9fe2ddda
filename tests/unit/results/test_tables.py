import numpy as np
import pandas as pd
import pytest

from causalpatch.statistics.agreement import sign_agreement
from causalpatch.statistics.families import benjamini_hochberg
from causalpatch.statistics.intervals import ratio_interval
from causalpatch.statistics.permutation import sign_flip

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
    assert "1 of 12 cells were not measured (runs: 40 skipped)" in notes
    assert "2 cells rest on some of the 40 pairs, their gap on the same ones" in notes
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
    assert notes[0] == "too few independent groups: 5 (an interval needs 10); the value of each: effects.by_component()"
    assert "smallest attainable p with so few independent groups: 0.0625" in notes
    top = effects.top(1)
    assert top.by_component.shape == (1, 5)
    each = effects.by_component().query("layer == 1 and head == 2")["recovered"].tolist()
    assert top.by_component[0] == pytest.approx(each)
    shown = str(top)
    assert " ".join(f"{value:.2f}" for value in each) in shown
    assert "low" not in shown.splitlines()[1]


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


def test_intervals_together_are_approximate_with_few_or_skewed_groups(make, shares):
    few = make(HEADS, shares, n_pairs=15).top(2).notes
    assert "holding together is approximate: 15 independent groups, fewer than 20" in few
    assert not any("together" in note for note in make(HEADS, shares).top(2).notes)
    skewed = make(HEADS, shares)
    data = skewed.to_xarray()
    values = data["metric"].values[None].copy()
    values[0, 1, 2, 0] += 20.0
    effects = type(skewed).build(
        axes=HEADS,
        pair_ids=skewed.pair_ids,
        groups=np.arange(40),
        metrics=["m"],
        values=values,
        status=np.zeros((3, 4, 40)),
        baselines={role: data[f"baseline_{role}"].values[None] for role in ("clean", "corrupt")},
    )
    assert "holding together is approximate: 1 of these cells are skewed between groups" in effects.top(2).notes


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
