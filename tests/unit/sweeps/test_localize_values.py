"""Searches by ablations, by features of a dictionary, and within seconds."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.pairs.tasks import generate
from causalpatch.sweeps.localize import budget
from causalpatch.sweeps.localize.budget import Budget
from dictionaries import weights, write_saelens
from planted_heads import planted_heads
from tiers import quickly

ALONE = {(1, 3): 0.5, (2, 2): 0.3}
HEADS = {"z.1.3", "z.2.2"}


def names(found):
    return {str(site) for site in found.components}


def shares_by_hand(experiment, found, value):
    """Return effects of what was measured as shares of what is lost where all sublayers are ablated."""
    sublayers = [
        f"{name}.{layer}" for layer in range(experiment.model.shape.n_layers) for name in ("attn_out", "mlp_out")
    ]
    asked = [[cp.Patch(cell.name, value)] for cell in found.cells]
    effects = experiment.run([[cp.Patch(site, value) for site in sublayers], *asked]).effect().values
    return effects[1:] / effects[0]


@pytest.mark.parametrize("value", ["zero", "mean", "0.25", "resample"])
def test_a_search_by_ablation_measures_shares_of_what_is_lost_where_all_parts_are_ablated(value):
    experiment = planted_heads(ALONE, direction="noise")
    found = cp.localize(experiment, budget=5000, value=value)
    expected = shares_by_hand(experiment, found, value)
    np.testing.assert_allclose([cell.effect for cell in found.cells], expected, atol=1e-9)
    assert found.provenance["whole"] == pytest.approx(1.0)
    assert found.provenance["reference"].endswith("at all 8 parts together")
    assert f"gap: clean run to {found.provenance['reference']}" in str(found)
    assert any("units were not scored" in note for note in found.provenance["notes"])
    if value != "0.25":
        assert names(found) == HEADS


@pytest.mark.parametrize("amount", [250, 400, 1200, "0.004 GFLOP"])
def test_what_is_fitted_counts_and_no_more_is_spent_than_the_budget(amount, monkeypatch):
    experiment = planted_heads(ALONE, direction="noise")
    fits, fit = [], cp.Experiment.fit

    def counting(self, asked):
        fits.append(len(self.pairs))
        return fit(self, asked)

    monkeypatch.setattr(cp.Experiment, "fit", counting)
    found = cp.localize(experiment, amount, value="mean")
    allowed = Budget.of(amount)
    assert 0 < found.spent[allowed.unit] <= allowed.amount
    assert fits
    assert set(fits) == {12}


def test_parts_are_found_by_ablation_on_the_embedded_model_and_selected_again(tmp_path):
    model = cp.open_model("zoo:stories")
    pairs = cp.load_pairs("ioi", model)[:16]
    experiment = cp.Experiment(model, pairs, direction="noise", show_progress=False)
    found = cp.localize(experiment, budget=4000, value="mean(positions)", units="heads", positions="all", edges=True)
    assert {"z.0.2", "z.3.2"} <= names(found)
    assert found.edges == {}
    assert any("edges were not measured: they carry values of the source run" in n for n in found.provenance["notes"])
    again = cp.Localization.load(found.save(tmp_path / "found.npz"))
    stable = cp.selection_stability(again, experiment=experiment, rerun=True)
    assert stable.wanted == 0.0
    assert "z.3.2" in stable.stable


@pytest.mark.slow
def test_interpolation_restores_a_part_of_the_gap():
    experiment = planted_heads(ALONE)
    half = cp.localize(experiment, budget=5000, value=cp.Interpolate(0.5), delta=0.05)
    whole = cp.localize(experiment, budget=5000, scores=None)
    effects = {cell.name: cell.effect for cell in whole.cells}
    for cell in half.found:
        assert cell.effect == pytest.approx(effects[cell.name] / 2, abs=1e-6)
    assert names(half) == HEADS


def test_noise_as_wide_as_the_data_is_put_into_parts_of_the_embedded_model():
    model = cp.open_model("zoo:stories")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:12], direction="noise", show_progress=False)
    found = cp.localize(experiment, 600, value=cp.Noise(2.0), units="heads", positions="all", sample=0)
    np.testing.assert_allclose(
        [cell.effect for cell in found.cells], shares_by_hand(experiment, found, cp.Noise(2.0)), atol=1e-6
    )
    fitted = cp.localize(experiment, 600, value="noise", units="heads", positions="all", sample=0)
    assert fitted.found
    assert fitted.spent["runs"] <= 600


class Clock:
    """A clock that goes on by a hundredth of a second with every run of the model, and with nothing else."""

    def __init__(self, monkeypatch, slower=lambda n_calls: 1.0):
        self.now, self.n_calls, self.longest = 0.0, 0, 0.0
        run = cp.Experiment.run

        def counting(experiment, *asked, **more):
            found = run(experiment, *asked, **more)
            self.n_calls += 1
            took = 0.01 * found.provenance["cost"]["rows"] * slower(self.n_calls)
            self.now, self.longest = self.now + took, max(self.longest, took)
            return found

        monkeypatch.setattr(cp.Experiment, "run", counting)
        monkeypatch.setattr(budget, "time", SimpleNamespace(perf_counter=lambda: self.now))


@pytest.mark.parametrize("seconds", [4, 8, 30])
def test_a_budget_in_seconds_is_kept_where_runs_take_what_was_foretold(seconds, monkeypatch):
    experiment = planted_heads(ALONE)
    clock = Clock(monkeypatch)
    found = cp.localize(experiment, f"{seconds} s")
    assert found.spent["seconds"] <= clock.now <= seconds
    assert str(found.provenance["budget"]) in (f"{seconds:.1f} seconds", f"{seconds} seconds")
    if seconds == 30:
        assert names(found) == HEADS
    else:
        assert found.pending or (found.unopened["sampled"] < found.unopened["closed"]).any()


def test_a_budget_in_seconds_is_exceeded_by_the_last_runs_alone_where_these_take_longer(monkeypatch):
    clock = Clock(monkeypatch, slower=lambda n_calls: 20.0 if n_calls == 3 else 1.0)
    found = cp.localize(planted_heads(ALONE), "8 s")
    assert 8 < clock.now <= 8 + clock.longest
    assert found.cells


def test_seconds_that_do_not_suffice_for_the_coarsest_parts_end_the_search_with_them(monkeypatch):
    clock = Clock(monkeypatch)
    found = cp.localize(planted_heads(ALONE), "0.5 s")
    assert {cell.level for cell in found.cells} == {"sublayer"}
    assert clock.n_calls == 1
    assert found.pending


@pytest.fixture(scope="module")
def stories(tmp_path_factory):
    """The embedded model with a dictionary of what the attention of its last layer adds, fitted to that, and pairs."""
    model = cp.open_model("zoo:stories", device="cpu")
    pairs = cp.load_pairs(generate("ioi", n=24, templates=["when-went"]), model, name="ioi")
    seen = []
    added = model.module.get_submodule("model.layers.3.self_attn.o_proj")
    handle = added.register_forward_hook(lambda module, args, output: seen.append(output[0].float()))
    with torch.no_grad():
        for ids in (ids for pair in pairs for ids in (pair.clean, pair.corrupt)):
            model.module(torch.tensor(ids)[None])
    handle.remove()
    w, left = fitted_autoencoder(torch.cat(seen))
    assert left < 0.1
    folder = write_saelens(tmp_path_factory.mktemp("sae"), "standard", w, hook="blocks.3.hook_attn_out")
    model.add_dictionary("sae", folder)
    return model, pairs


def fitted_autoencoder(x, n_features=48, n_steps=600):
    """Fit a sparse autoencoder to vectors; return its tensors, and the share of their variance that it leaves."""
    draw = torch.Generator().manual_seed(0)
    w = {
        "W_enc": torch.randn(x.shape[1], n_features, generator=draw) * x.shape[1] ** -0.5,
        "W_dec": torch.randn(n_features, x.shape[1], generator=draw) * n_features**-0.5,
        "b_enc": torch.zeros(n_features),
        "b_dec": x.mean(0),
    }
    w = {name: tensor.clone().requires_grad_() for name, tensor in w.items()}
    optimiser = torch.optim.Adam(w.values(), lr=0.01)
    for _ in range(n_steps):
        features = torch.relu((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
        left = ((features @ w["W_dec"] + w["b_dec"] - x) ** 2).mean() / x.var()
        optimiser.zero_grad()
        (left + 1e-3 * features.abs().mean()).backward()
        optimiser.step()
    return {name: tensor.detach() for name, tensor in w.items()}, float(left.detach())


@pytest.mark.slow
def test_a_search_goes_down_to_the_features_of_a_dictionary(stories, tmp_path):
    model, pairs = stories
    experiment = cp.Experiment(model, pairs, show_progress=False)
    found = cp.localize(experiment, budget=20000, features="sae", units="heads", positions=["giver", "-1"], edges=True)
    features = {cell.name: cell.effect for cell in found.found if cell.level == "feature"}
    assert features
    assert all(name.startswith("feature(sae).3.") and name.endswith("@-1") for name in features)
    by_name = {cell.name: cell for cell in found.cells}
    assert {by_name[name].delta for name in features} == {0.02}
    exact = experiment.run(list(features)).recovered().values
    assert list(features.values()) == pytest.approx(exact.tolist(), abs=1e-6)
    # What was found accounts for most of what the sublayer does: single features of this dictionary do little.
    (together,) = experiment.run([list(features)]).recovered().values
    assert together > 0.7
    assert by_name["attn_out.3@-1"].effect == pytest.approx(1.0, abs=0.01)
    assert "z.0.2@giver" in names(found)
    closed = found.unopened.set_index("level")
    assert closed.loc["feature", "n"] == 48
    assert closed.loc["head", "n"] == 12  # those of the other layers
    panels = [panel["title"]["text"] for panel in found.plot().to_dict()["hconcat"]]
    assert any(title.startswith("features") for title in panels)
    again = cp.Localization.load(found.save(tmp_path / "found.npz"))
    assert again.components == found.components
    assert set(cp.selection_stability(again).stable) & set(features)


@pytest.mark.slow
def test_features_are_confirmed_on_pairs_that_the_search_never_saw(stories):
    model, pairs = stories
    discovery, held_out = pairs.split(0.4)
    found = cp.localize(
        cp.Experiment(model, discovery, show_progress=False), 20000, features="sae", units="heads", positions=["-1"]
    )
    features = found.select("feature", beyond=0.05)
    claim = cp.confirm(
        cp.Experiment(model, held_out, show_progress=False), features, found_on=discovery, checks=cp.Checks.none()
    )
    assert claim.delta == 0.02
    assert claim.supported
    assert set(claim.supported) <= {str(site) for site in features.components}


@pytest.mark.parametrize("described", quickly(["attn.hook_z", "mlp.hook_post"], "mlp.hook_post"))
def test_features_of_all_heads_or_neurons_together_are_parts_of_their_sublayer(described, tmp_path):
    model = cp.open_model("zoo:stories", device="cpu")
    width = model.n_heads * model.head_width if "attn" in described else model.shape.units["neuron"]
    w = weights("standard", width, 12)
    model.add_dictionary("sae", write_saelens(tmp_path, "standard", w, hook=f"blocks.3.{described}"))
    pairs = cp.load_pairs(generate("ioi", n=6, templates=["when-went"]), model, name="ioi")
    experiment = cp.Experiment(model, pairs, show_progress=False)
    found = cp.localize(experiment, 10000, features="sae", units="heads", positions="all")
    assert found.unopened.set_index("level").loc["feature", "n"] == 12
    cells = [cell for cell in found.cells if cell.level == "feature"]
    assert cells
    exact = experiment.run([cell.name for cell in cells]).recovered().values
    assert [cell.effect for cell in cells] == pytest.approx(exact.tolist(), abs=1e-6)


@pytest.mark.slow
def test_edges_of_the_embedded_model_are_those_of_exact_interchange():
    model = cp.open_model("zoo:stories", device="cpu")
    experiment = cp.Experiment(model, cp.load_pairs("ioi", model)[:12], show_progress=False)
    found = cp.localize(experiment, budget=6000, units="heads", positions="all", edges=True)
    assert len(found.edges) > 3
    exact = cp.patch_edges(experiment, list(found.edges)).recovered().values
    assert list(found.edges.values()) == pytest.approx(exact.tolist(), abs=1e-6)
    sizes = np.abs(list(found.edges.values()))
    assert (sizes > 0.02).all()
    assert (np.diff(sizes) <= 0).all()
    ends = {end for name in found.edges for end in name.partition("<")[0].split(" -> ")}
    heads = {f"a{site.layer}.h{site.unit}" for site in found.components}
    assert ends <= heads | {"logits"}
