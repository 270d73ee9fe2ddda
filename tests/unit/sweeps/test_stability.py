"""Selections made again on resampled pairs: of the cells of a sweep, and by the rules of a search."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import SettingError
from causalpatch.results.status import Status
from causalpatch.testing.known_shares import world
from planted_heads import planted_heads

SHARES = [0.4, 0.25, 0.0, -0.3]
ALONE, AGAINST = {(1, 3): 0.5, (2, 2): 0.3}, {(3, 1): 0.8, (3, 0): -0.8}


@pytest.fixture(scope="module")
def made():
    return world(SHARES, 40)


def test_what_stands_out_is_selected_again_and_a_near_tie_is_not():
    tied = world([0.4, 0.2, 0.195, 0.0], 30, spread=0.1)
    found = cp.selection_stability(cp.sweep(tied.experiment(), "z.0@-1"), k=2)
    frequency = found.to_dataframe().set_index("cell")["frequency"]
    assert frequency["layer 0, head 0"] > 0.99
    assert 0.05 < frequency["layer 0, head 1"] < 0.95
    assert frequency["layer 0, head 1"] + frequency["layer 0, head 2"] == pytest.approx(1.0, abs=0.01)
    assert found.wanted == 0.0
    assert "every cell was measured" in str(found)
    above = cp.selection_stability(cp.sweep(tied.experiment(), "z.0@-1"), delta=0.3)
    assert above.to_dataframe()["cell"].tolist() == ["layer 0, head 0"]


def partly(effects, missing):
    """Return effects in which some layers were never measured."""
    data = effects.to_xarray()
    values, status = data["metric"].values.copy(), data["status"].values.copy()
    values[missing], status[missing] = np.nan, Status.SKIPPED
    return cp.Effects.build(
        axes={axis: data[axis].values.tolist() for axis in effects.axes},
        pair_ids=effects.pair_ids,
        groups=data["component"].values,
        metrics=effects.metrics,
        values=values[None],
        status=status,
        baselines={role: data[f"baseline_{role}"].values[None] for role in ("clean", "corrupt")},
        provenance=effects.provenance,
    )


def test_resamples_that_wanted_what_was_never_measured_are_counted():
    """The second layer's heads restore .1 together, so that about half of the resamples open it."""
    near = world([0.5, 0.0, 0.0, 0.0, 0.1, 0.0, 0.0, 0.0], 30, spread=0.05)
    experiment = near.experiment()
    heads = cp.sweep(experiment, "z@-1")
    layers = cp.sweep(experiment, "attn_out@-1")
    some = partly(heads, [1])
    found = cp.selection_stability(some, delta=0.1, parents=layers)
    share = layers.by_component().query("layer == 1")["effect"].to_numpy()
    assert found.n_unmeasured == 4
    assert 0.05 < found.wanted < 0.95
    draws = np.random.default_rng(0).choice(share, (4000, 30)).mean(1) / near.gap.mean()
    assert found.wanted == pytest.approx((draws > 0.1).mean(), abs=0.1)
    assert "of resamples wanted one of them" in str(found)
    unknown = cp.selection_stability(some, delta=0.1)
    assert np.isnan(unknown.wanted)
    again = cp.selection_stability(some, delta=0.1, experiment=experiment, rerun=True)
    whole = cp.selection_stability(heads, delta=0.1)
    assert (again.n_unmeasured, again.wanted) == (0, 0.0)
    assert again.to_dataframe().equals(whole.to_dataframe())


def test_selections_that_cannot_be_resampled_are_refused(made):
    heads = cp.sweep(made.experiment(), "z@-1")
    with pytest.raises(SettingError, match="3 independent components cannot be resampled"):
        cp.selection_stability(cp.sweep(made.experiment(slice(0, 3)), "z@-1"))
    with pytest.raises(SettingError, match="not the parents of the cells"):
        cp.selection_stability(partly(heads, [0]), parents=cp.sweep(made.experiment(slice(0, 20)), "attn_out@-1"))
    with pytest.raises(SettingError, match="without their experiment"):
        cp.selection_stability(heads, rerun=True)
    with pytest.raises(SettingError, match=r"in 1\.5 of the resamples"):
        cp.selection_stability(heads, threshold=1.5)


def near(at=0.1, n=40):
    """Two heads, one of which has a share near delta that spreads over pairs; the others of its layer do nothing."""
    noise = np.zeros((8, n))
    noise[4] = 0.1 * np.random.default_rng(0).standard_normal(n)
    noise[4] -= noise[4].mean()
    return world([0.5, 0.0, 0.0, 0.0, at, 0.0, 0.0, 0.0], n, noise=noise)


def searched(made, **how):
    experiment = made.experiment()
    return experiment, cp.localize(experiment, 10**6, **{"positions": "all", "units": "heads", "sample": 0, **how})


def frequencies(stable):
    return {cell["cell"]: cell["frequency"] for cell in stable.cells}


def test_what_a_search_found_far_from_delta_is_always_selected_again_with_what_cancels():
    found = cp.localize(planted_heads({**ALONE, **AGAINST}, n_pairs=24), budget=10**6, sample=0)
    stable = cp.selection_stability(found)
    often = {name for name, frequency in frequencies(stable).items() if frequency > 0}
    assert often == {cell.name for cell in found.found} == {"z.1.3", "z.2.2", "z.3.1", "z.3.0"}
    assert set(stable.stable) == often
    assert stable.overlap.min() == 1.0
    assert stable.wanted == 0.0


def test_a_set_that_stands_in_for_each_other_is_selected_as_a_set():
    experiment = planted_heads(ALONE, [(0, 2), (0, 3)], direction="noise", n_pairs=24)
    found = cp.localize(experiment, budget=10**6, sample=0)
    assert found.sets
    stable = cp.selection_stability(found)
    assert {cell.name for cell in found.found} == {name for name, each in frequencies(stable).items() if each == 1.0}


@pytest.mark.parametrize(("at", "is_open"), [(0.115, True), (0.085, False)])
def test_how_often_a_head_is_selected_is_how_often_its_share_is_above_delta(at, is_open):
    made = near(at)
    _, found = searched(made, scores=None, halves=0)
    head = next((cell for cell in found.cells if cell.name == "z.1.0"), None)
    assert (head is not None) == is_open
    stable = cp.selection_stability(found, n_draws=2000)
    draws = np.random.default_rng(5).integers(0, 40, (4000, 40))
    above = (made.effects[4][draws].sum(1) / made.gap[draws].sum(1) > 0.1).mean()
    assert 0.05 < above < 0.95
    if is_open:
        assert frequencies(stable)["z.1.0"] == pytest.approx(above, abs=0.04)
        # On the draws on which its layer is left closed, no cell is wanted.
        assert stable.wanted == 0.0
    else:
        assert "z.1.0" not in frequencies(stable)
        assert frequencies(stable)["attn_out.1"] == pytest.approx(above, abs=0.04)
        assert stable.wanted == pytest.approx(above, abs=0.04)
        assert "of resamples wanted one of them" in str(stable)


def test_what_resamples_wanted_is_measured_on_request():
    made = near(0.085)
    experiment, found = searched(made, scores=None, halves=0)
    stable = cp.selection_stability(found, experiment=experiment, rerun=True)
    assert stable.wanted == 0.0
    whole = cp.selection_stability(searched(made, scores=None, halves=1)[1])  # a half of it opens the layer
    assert frequencies(stable)["z.1.0"] > 0.05
    for name in ("z.0.0", "z.1.0"):
        assert frequencies(stable)[name] == frequencies(whole).get(name, frequencies(stable)[name])
    head = next(cell for cell in stable.cells if cell["cell"] == "z.1.0")
    assert head["share"] == pytest.approx(float(experiment.run(["z.1.0"]).recovered()[0]), abs=1e-9)
    assert not head["is_selected"]


@pytest.mark.slow
def test_positions_that_a_resample_wants_are_measured_down_to_the_units():
    made = near(0.085)
    experiment, found = searched(made, scores=None, halves=0, positions=["-1"])
    again = cp.selection_stability(found, experiment=experiment, rerun=True)
    assert again.wanted == 0.0
    assert {"attn_out.1@-1", "z.1.0@-1"} <= set(frequencies(again))
    assert frequencies(again)["z.1.0@-1"] > 0.05


def test_a_search_keeps_the_effect_of_every_part_on_every_pair(tmp_path):
    made = near()
    experiment, found = searched(made)
    exact = experiment.run([cell.name for cell in found.cells]).effect(per_pair=True).values
    np.testing.assert_allclose(found.measured.moved, exact, atol=1e-9)
    np.testing.assert_allclose(found.measured.gap, made.gap, atol=1e-9)
    again = cp.Localization.load(found.save(tmp_path / "found.npz"))
    assert str(cp.selection_stability(again)) == str(cp.selection_stability(found))


@pytest.mark.slow
def test_races_leave_pairs_unmeasured_and_shares_are_of_those_that_were():
    _, found = searched(near(0.3, n=120))
    assert np.isnan(found.measured.moved).any()
    stable = cp.selection_stability(found)
    assert frequencies(stable)["z.0.0"] == 1.0
    assert frequencies(stable)["z.1.0"] > 0.95


def test_a_search_is_selected_again_by_its_own_rules_on_its_own_pairs(made):
    experiment, found = searched(made)
    with pytest.raises(SettingError, match="by its own rules"):
        cp.selection_stability(found, k=2)
    with pytest.raises(SettingError, match="without their experiment"):
        cp.selection_stability(found, rerun=True)
    with pytest.raises(SettingError, match="made on other pairs"):
        cp.selection_stability(found, experiment=made.experiment(slice(0, 20)), rerun=True)
    with pytest.raises(SettingError, match="another direction"):
        cp.selection_stability(found, experiment=experiment.turned("noise"), rerun=True)


def test_frequencies_are_drawn_with_the_threshold_by_themselves_and_beside_the_way_down():
    _, found = searched(near(0.115), scores=None, halves=0)
    stable = cp.selection_stability(found, threshold=0.95)
    assert stable.stable == ["z.0.0"]
    for picture in (stable.plot(), found.plot(stable)):
        sheet = picture.to_dict()["datasets"]
        assert sheet["threshold"] == [{"at": 0.95}]
        assert {row["cell"]: row["frequency"] for row in sheet["frequencies"]} == {
            name: frequency for name, frequency in frequencies(stable).items() if frequency > 0
        }
        assert "share of resamples that select it" in picture.to_svg()
        assert "1 cell in 95% of the resamples or more" in picture.to_svg()
