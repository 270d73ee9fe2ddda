"""Runs of studies: they resume, nothing is measured twice, and where it was measured changes no number."""

import sys
from types import ModuleType

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.base.errors import MissingExtra, StoreCorrupt
from causalpatch.pairs.words import NOUNS
from causalpatch.results.effects import Effects
from causalpatch.studies import opened as opening
from causalpatch.studies.opened import Opened
from causalpatch.studies.results import Results
from causalpatch.studies.standing import standing
from causalpatch.studies.verifying import verify
from small_studies import measured, run_in, same, store_of, study_of, the_run


def test_a_study_gives_what_its_call_gives(undisturbed):
    model = cp.open_model("zoo:stories", device="cpu")
    pairs = cp.load_pairs("ioi", model)[:6]
    whole = cp.sweep(cp.Experiment(model, pairs, metric="logit_difference", show_progress=False), "z.2:4@-1")
    assert undisturbed.axes == whole.axes
    assert undisturbed.pair_ids == whole.pair_ids
    np.testing.assert_allclose(undisturbed.effect().values, whole.effect().values, atol=1e-4)
    np.testing.assert_array_equal(undisturbed.to_xarray()["component"], whole.to_xarray()["component"])
    assert undisturbed.provenance["pairs"] == whole.provenance["pairs"]
    assert undisturbed.provenance["cost"]["rows"] > 6 * 8


def test_running_again_measures_nothing(tmp_path, undisturbed):
    first = run_in(tmp_path)
    again = run_in(tmp_path)
    assert len(measured(first[1])) == 3
    assert measured(again[1]) == []
    assert same(first[0].results["heads"], again[0].results["heads"])
    assert same(first[0].results["heads"], undisturbed)


def test_a_changed_study_is_another_run_and_shares_nothing_with_it(tmp_path):
    run_in(tmp_path)
    _, told = run_in(tmp_path, "direction=noise")
    assert len(measured(told)) == 3
    assert len(store_of(tmp_path).hashes()) == 2


def test_a_run_that_was_stopped_goes_on_with_the_next_shard(tmp_path, undisturbed):
    class StoppedError(Exception):
        pass

    def stop(line):
        if line["event"] == "shard":
            raise StoppedError

    with pytest.raises(StoppedError):
        cp.run_study(study_of(), tmp_path, listeners=(stop,))
    (row,) = standing(the_run(tmp_path), study_of()).steps
    assert (row["state"], row["shards"], row["runs"]) == ("begun", 1, 8 * 2)
    found, told = run_in(tmp_path)
    assert len(measured(told)) == 2
    assert same(found.results["heads"], undisturbed)
    (row,) = standing(the_run(tmp_path), study_of()).steps
    assert (row["state"], row["shards"], row["runs"]) == ("finished", 3, 8 * 6)


def test_the_step_s_record_is_made_again_out_of_the_shards(tmp_path, undisturbed):
    run_in(tmp_path)
    run = the_run(tmp_path)
    run.objects.delete(run.name("results", "heads.json"))
    found, told = run_in(tmp_path)
    assert measured(told) == []
    assert same(found.results["heads"], undisturbed)


def test_cells_are_cut_where_a_pair_has_more_than_a_shard_holds(tmp_path, undisturbed):
    found, told = run_in(tmp_path, "shards={pairs: 6, cells: 3}")
    assert len(measured(told)) == 3
    np.testing.assert_allclose(found.results["heads"].effect().values, undisturbed.effect().values, atol=1e-4)


@pytest.mark.parametrize(("value", "n_shards"), [("zero", 3), ("mean", 1)])
def test_ablations_have_the_same_reference_however_they_are_cut(tmp_path, value, n_shards):
    found, told = run_in(tmp_path, f"steps.0.value={value}", "direction=noise")
    assert len(measured(told)) == n_shards
    model = cp.open_model("zoo:stories", device="cpu")
    pairs = cp.load_pairs("ioi", model)[:6]
    experiment = cp.Experiment(model, pairs, metric="logit_difference", direction="noise", show_progress=False)
    whole = cp.sweep(experiment, "z.2:4@-1", value=value)
    np.testing.assert_allclose(found.results["heads"].recovered().values, whole.recovered().values, atol=1e-4)


def test_draws_are_kept_side_by_side(tmp_path):
    found, _ = run_in(tmp_path, "steps=[{kind: sweep, site: embed@-2, value: noise, draws: 2}]", "direction=noise")
    assert found.results["sweep"].axes == ("intervention", "draw")
    assert same(Results(found.run).load("sweep"), found.results["sweep"])


def test_positions_keep_their_tokens(tmp_path):
    found, _ = run_in(tmp_path, "steps.0.site=resid_pre.1", "pairs={name: ioi, where: {template: when-went}, first: 4}")
    loaded = Results(found.run).load("heads")
    assert isinstance(loaded, Effects)
    assert {"token", "base_position"} <= set(loaded.to_xarray().coords)


@pytest.mark.slow
def test_what_is_asked_for_twice_is_measured_once(tmp_path):
    _, told = run_in(tmp_path, "steps=[{kind: sweep, site: z.2@-1}, {kind: sweep, name: again, site: z.2@-1}]")
    assert len(measured(told)) == 3


@pytest.mark.slow
def test_seeds_share_what_does_not_depend_on_them(tmp_path):
    found, told = run_in(tmp_path, "seeds=[0, 1]")
    assert list(found.results) == ["heads-seed0", "heads-seed1"]
    assert len(measured(told)) == 3
    assert found.results["heads-seed1"].provenance["seed"] == 1


def test_every_step_feeds_the_next_and_is_read_again(tmp_path):
    steps = (
        "steps=[{kind: sweep, site: z@-1}, {kind: localize, budget: 1500, units: heads, positions: all},"
        "{kind: attribute, method: eap}, {kind: attribute, name: nodes, site: z@-1, method: atp},"
        "{kind: discover, from: attribute, n_edges: 12}, {kind: evaluate, from: discover, n_random: 1},"
        "{kind: confirm, from: sweep, top: 2, checks: few}]"
    )
    asked = (steps, "split={discovery: 0.5}", "pairs.first=24", "shards.pairs=12")
    found, _ = run_in(tmp_path, *asked)
    kinds = [type(each).__name__ for each in found.results.values()]
    assert kinds == ["Effects", "Localization", "EdgeScores", "Scores", "Circuit", "Evaluation", "Claim"]
    claim = found.results["confirm"]
    assert claim.supported
    assert not claim.reused
    again, told = run_in(tmp_path, *asked)
    assert [line["event"] for line in told if line["event"].startswith("step")] == ["step was there"] * 7
    assert again.results["confirm"].statement == claim.statement
    assert again.results["discover"].edges() == found.results["discover"].edges()


@pytest.mark.slow
def test_a_search_for_a_circuit_that_was_stopped_is_no_result_and_goes_on(tmp_path):
    """By itself it would return what was left by then; a study goes on from the runs that it stored."""
    search = ("steps=[{kind: discover, method: acdc, threshold: 4.0}]", "shards={runs: 40}", "pairs.first=2")
    told = []

    def stop(line):
        told.append(line)
        if len(measured(told)) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cp.run_study(study_of(*search), tmp_path, listeners=(stop,))
    assert Results(the_run(tmp_path)).names() == []
    found, later = run_in(tmp_path, *search)
    circuit = found.results["discover"]
    assert circuit.record["found"]["complete"]
    assert not set(measured(told)) & set(measured(later))
    model = cp.open_model("zoo:stories", device="cpu")
    alone = cp.acdc(cp.Experiment(model, cp.load_pairs("ioi", model)[:2], show_progress=False), 4.0)
    assert circuit.edges() == alone.edges()


SMALL_TUNING = (
    "steps=[{kind: tune, components: [mlp_out.3], target: agreement, retain: induction, side: corrupt, steps: 5,"
    " rates: [0.03], arms: [prefix], n_seeds: 1}]"
)


def test_a_tuning_is_a_step_whose_arms_are_kept(tmp_path):
    found, told = run_in(tmp_path, SMALL_TUNING)
    report = found.results["tune"]
    assert [arm.name for arm in report.arms] == ["base", "located", "prefix"]
    assert report.is_complete
    kept = [line["what"].rpartition("-")[0] for line in told if line["event"] == "kept"]
    assert kept == ["located", "prefix", "mechanism"]
    run = the_run(tmp_path)
    run.objects.delete(run.name("results", "tune.json"))
    again, told = run_in(tmp_path, SMALL_TUNING)
    assert not [line for line in told if line["event"] == "kept"]
    assert again.results["tune"].to_dataframe().equals(report.to_dataframe())


def test_a_tuning_step_takes_its_settings_and_tasks_of_lm_eval(tmp_path, monkeypatch):
    monkeypatch.setattr(opening, "lm_eval_task", lambda task: lambda _: [1.0, 0.0] * len(task))
    monkeypatch.setitem(sys.modules, "lm_eval", ModuleType("lm_eval"))
    study = SMALL_TUNING.replace("steps: 5,", "steps: 5, batch: 3, ahead: 1.5, lm_eval: [arc_easy],")
    found, _ = run_in(tmp_path, study)
    report = found.results["tune"]
    assert (report.spec["schedule"]["batch"], report.spec["schedule"]["ahead"]) == (3, 1.5)
    own = next(each for each in report.located.endpoints if each.name == "arc_easy, drop")
    assert (own.estimate, own.high) == (0.0, 0.0)


def test_tasks_are_refused_before_anything_is_trained_where_lm_eval_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtra, match="'lm_eval' is not installed"):
        run_in(tmp_path, SMALL_TUNING.replace("steps: 5,", "steps: 5, lm_eval: [arc_easy],"))


def test_data_of_a_tuning_that_changed_is_refused(tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n\n".join(f"Once the {noun} did not stop." for noun in NOUNS[:12]))
    study = SMALL_TUNING.replace("induction", "texts.txt")
    run_in(tmp_path, study)
    texts.write_text(texts.read_text().replace("Once", "Then"))
    with pytest.raises(StoreCorrupt, match="other data of 'tune'"):
        run_in(tmp_path, study)


CLAIM = ("steps=[{kind: sweep, site: z@-1}, {kind: confirm, from: sweep, top: 1, checks: few}]",)
HALVES = ("split={discovery: 0.5}", "pairs.first=24", "shards.pairs=12")


def test_held_out_pairs_that_another_run_has_seen_confirm_nothing(tmp_path):
    first, _ = run_in(tmp_path, *CLAIM, *HALVES)
    other, _ = run_in(tmp_path, CLAIM[0].replace("top: 1", "top: 2"), *HALVES)
    assert first.results["confirm"].supported
    assert other.results["confirm"].reused
    assert not other.results["confirm"].supported


@pytest.mark.slow
def test_a_claim_that_was_stopped_on_its_way_is_one_claim(tmp_path):
    class StoppedError(Exception):
        pass

    seen = []

    def stop(line):
        seen.append(line)
        if line["event"] == "shard" and [one["name"] for one in seen if one["event"] == "step"][-1] == "confirm":
            raise StoppedError

    with pytest.raises(StoppedError):
        cp.run_study(study_of(*CLAIM, *HALVES), tmp_path, listeners=(stop,))
    assert store_of(tmp_path).objects.names("openings")  # its numbers are in the store
    other, _ = run_in(tmp_path, CLAIM[0].replace("top: 1", "top: 2"), *HALVES)
    assert other.results["confirm"].reused
    again, _ = run_in(tmp_path, *CLAIM, *HALVES)
    assert not again.results["confirm"].supported  # the other one has seen them by now
    assert set(again.results["confirm"].reused) != {"sweep"}


def test_a_claim_that_was_stopped_and_goes_on_is_not_reused(tmp_path):
    class StoppedError(Exception):
        pass

    def stop(line):
        if line["event"] == "step done" and line["name"] == "confirm":
            raise StoppedError

    with pytest.raises(StoppedError):
        cp.run_study(study_of(*CLAIM, *HALVES), tmp_path, listeners=(stop,))
    run = the_run(tmp_path)
    run.objects.delete(run.name("results", "confirm.json"))
    found, told = run_in(tmp_path, *CLAIM, *HALVES)
    assert measured(told) == []
    assert found.results["confirm"].supported


def test_the_journal_and_the_manifest_say_where_numbers_come_from(tmp_path):
    found, told = run_in(tmp_path)
    assert [line["event"] for line in told] == ["session", "step", "call", *["shard"] * 3, "step done", "finished"]
    assert told[0]["program"]["versions"]["torch"]
    manifest = found.run.manifest()
    assert manifest["facts"]["pairs"] == study_pairs_hash()
    assert manifest["environment"]["machine"]["cores"]
    assert manifest["study"]["steps"][0]["site"] == "z.2:4@-1"


def study_pairs_hash():
    model = cp.open_model("zoo:stories", device="cpu")
    return cp.load_pairs("ioi", model).take(range(6)).content_hash


def test_two_runs_share_the_work(tmp_path, undisturbed):
    """A second run, begun inside of the first, measures what the first does not hold and both find the same."""
    inner = []

    def join_in(line):
        if line["event"] == "shard" and not inner:
            inner.append(None)
            inner[0] = run_in(tmp_path)

    outer = cp.run_study(study_of(), tmp_path, listeners=(join_in,))
    found, told = inner[0]
    assert len(measured(told)) == 2
    assert same(found.results["heads"], undisturbed)
    assert same(outer.results["heads"], undisturbed)


def test_means_of_an_evaluation_are_those_of_the_discovery_pairs(tmp_path):
    steps = (
        "steps=[{kind: attribute, name: scores, method: eap}, {kind: evaluate, from: scores, n_random: 1, value: mean}]"
    )
    changes = (steps, *HALVES, "shards={pairs: 3}")
    found, told = run_in(tmp_path, *changes)
    opened = Opened(study_of(*changes), tmp_path)
    sides = opened.sides
    experiment = cp.Experiment(opened.model, sides["held_out"], metric="logit_difference", show_progress=False)
    scores = cp.attribute_edges(cp.Experiment(opened.model, sides["discovery"], "logit_difference"), "eap")
    wanted = cp.evaluate_circuit(experiment, scores, n_random=1, value="mean", found_on=sides["discovery"])
    np.testing.assert_allclose(found.results["evaluate"].values, wanted.values, atol=1e-4)
    assert found.results["evaluate"].provenance["fitted_on"]["hash"] == sides["discovery"].content_hash
    assert verify(found.run, opened, n_cells=40).is_sound
    assert len(measured(told)) > 2  # not one shard of all pairs: their means are not their own
