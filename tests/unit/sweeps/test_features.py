"""Top features: those that can have an effect are measured, and no other can."""

import json

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.cli.main import main
from causalpatch.pairs.tasks import generate
from causalpatch.testing.tiny import tiny_model
from dictionaries import encoded, weights, write_saelens
from worlds import random_pairs

FEATURES = 40


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    model = cp.open_model(tiny_model("llama"))
    folder = tmp_path_factory.mktemp("res")
    for layer in (0, 1):
        w = weights("topk", features=FEATURES, seed=layer)
        write_saelens(folder / f"l{layer}", "topk", w, f"blocks.{layer}.hook_resid_pre")
    model.add_dictionary("res", folder)
    return model


@pytest.fixture(scope="module")
def pairs():
    return random_pairs(5, n_pairs=3)


def experiment(model, pairs, **settings):
    return cp.Experiment(model, pairs, show_progress=False, **settings)


def test_the_table_holds_every_feature_with_an_effect_and_the_numbers_of_a_sweep(model, pairs):
    top = cp.top_features(experiment(model, pairs), "res", 1, position=-1, k=FEATURES)
    table = top.table()
    swept = cp.sweep(experiment(model, pairs), "feature(res).1@-1").effect()
    swept = dict(zip(swept["feature"].values.tolist(), swept.values.ravel().tolist(), strict=True))
    listed = dict(zip(table["feature"], table["effect"], strict=True))
    assert 0 < len(listed) < FEATURES
    assert all(abs(swept[unit] - listed.get(unit, 0.0)) < 1e-12 for unit in swept)
    assert {unit for unit, effect in swept.items() if effect} <= set(listed)
    assert table["effect"].abs().is_monotonic_decreasing


def test_totals_are_the_whole_tensor_all_features_and_what_is_not_explained(model, pairs):
    run = experiment(model, pairs)
    top = cp.top_features(run, "res", 1, position=-1)
    asked = ["resid_pre.1@-1", "feature(res).1@-1", "feature_error(res).1@-1"]
    wanted = run.run(asked).effect().values
    got = [top.total(1, what) for what in ("whole", "all features", "not explained")]
    np.testing.assert_allclose(got, wanted, atol=1e-12)
    table = top.table()
    np.testing.assert_allclose(table["share_of_layer"], table["effect"] / wanted[0])


def test_activity_is_what_the_encoder_gives_at_the_patched_tokens(model, pairs):
    top = cp.top_features(experiment(model, pairs), "res", 0, position=-1)
    w = weights("topk", features=FEATURES, seed=0)
    embed = model.module.get_input_embeddings().weight.detach()
    base, source = (
        torch.stack([encoded("topk", w, embed[int(pair.input(side)[-1])]) for pair in pairs])
        for side in ("corrupt", "clean")
    )
    found = top.activities[0]
    np.testing.assert_allclose(found.base, base.mean(0), atol=1e-12)
    np.testing.assert_allclose(found.source, source.mean(0), atol=1e-12)
    assert found.n_differing.tolist() == (base != source).sum(0).tolist()
    x = torch.stack([embed[int(pair.corrupt[-1])] for pair in pairs])
    error = x - (base @ w["W_dec"] + w["b_dec"])
    explained = 1 - error.square().sum() / (x - x.mean(0)).square().sum()
    assert found.explained == pytest.approx(float(explained))


def test_ablated_features_are_those_that_are_active(model, pairs):
    top = cp.top_features(experiment(model, pairs, direction="noise"), "res", 1, position=-1, value="zero", k=FEATURES)
    found = top.activities[1]
    assert set(top.table()["feature"]) == set(np.flatnonzero(found.n_active).tolist())
    assert top.table()["recovered"].isna().all()  # the ablated run is no worse than the clean one: no gap, no share
    assert top.effects[1].provenance["value"] == "zero"


def test_all_layers_of_a_dictionary_are_in_one_table(model, pairs):
    top = cp.top_features(experiment(model, pairs), "res", position=-1, k=7)
    assert list(top.effects) == [0, 1]
    assert len(top.table()) == 7
    assert set(top.table(k=1000)["layer"]) == {0, 1}
    assert "in layer 0" in repr(top)
    assert "variance explained" in repr(top)


def test_several_metrics_are_told_apart(model, pairs):
    run = experiment(model, pairs, metric=[cp.logit_difference, cp.log_probability])
    top = cp.top_features(run, "res", 1, position=-1)
    first, second = (top.table(metric=name)["effect"].to_list() for name in ("logit_difference", "log_probability"))
    assert first != second


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"name": "rse"}, "did you mean 'res'"),
        ({"layer": 3}, "has no layer 3"),
        ({"value": "mean"}, "are not known before they are patched"),
        ({"budget": 2}, "runs of the model"),
    ],
)
def test_what_cannot_be_listed_is_refused(model, pairs, asked, said):
    asked = {"name": "res", "layer": 1, "position": -1} | asked
    with pytest.raises(cp.RequestError) as caught:
        cp.top_features(experiment(model, pairs), asked.pop("name"), **asked)
    assert said in str(caught.value)


def test_where_nothing_differs_there_is_nothing_to_list(model, pairs):
    same = random_pairs(5, n_pairs=2, shared=1.0)
    place = next(n for n in range(3) if all(pair.clean[n] == pair.corrupt[n] for pair in same))
    with pytest.raises(cp.RequestError, match="can have an effect"):
        cp.top_features(experiment(model, same), "res", 0, position=place)


def test_a_whole_dictionary_is_swept_only_at_a_position_or_within_a_budget(model, pairs):
    with pytest.raises(cp.RequestError, match="at all positions at once"):
        cp.sweep(experiment(model, pairs), "feature(res)")
    swept = cp.sweep(experiment(model, pairs), "feature(res).1.0:3@-1")
    assert swept.axes == ("layer", "feature")
    (largest,) = cp.sites_of(swept, 1)
    assert str(largest).startswith("feature(res).1.")


def test_the_program_lists_features_and_proves_dictionaries(model, capsys, tmp_path):
    folder = tmp_path / "sae"
    zoo = cp.open_model("zoo:stories")
    write_saelens(folder, "topk", weights("topk", width=zoo.width, dtype=torch.float32), "blocks.1.hook_resid_pre")
    rows = tmp_path / "pairs.jsonl"
    made = generate("agreement", n=12, templates=["near"])
    rows.write_text("\n".join(json.dumps({**row, "spans": None} if "spans" not in row else row) for row in made))
    words = ["zoo:stories", str(rows), "--dictionary", f"sae={folder}"]
    with pytest.raises(SystemExit) as done:
        main(["features", *words, "--position", "2", "--top", "3", "--json", "--out", str(tmp_path / "out")])
    assert not done.value.code
    told = json.loads(capsys.readouterr().out)
    assert len(told["features"]["sae"]["top"]) == 3
    assert set(told["features"]["sae"]["layers"]["1"]["totals"]) == {"whole", "all features", "not explained"}
    assert list((tmp_path / "out").rglob("*.json"))
    with pytest.raises(SystemExit) as done:
        main(["sweep", *words, "--site", "feature(sae).1.0:4@2", "--json"])
    assert not done.value.code
    capsys.readouterr()
    with pytest.raises(SystemExit) as done:
        main(["doctor", "zoo:stories", "--dictionary", f"sae={folder}", "--json"])
    assert not done.value.code
    proven = {row["site"]: row["passed"] for row in json.loads(capsys.readouterr().out)["sites"]}
    assert proven["feature(sae)"] == ["identity", "edit", "algebra"]
    with pytest.raises(SystemExit) as done:
        main(["features", "zoo:stories", str(rows), "--dictionary", "sae"])
    assert done.value.code == 2
    assert "is not NAME=FOLDER" in capsys.readouterr().err
