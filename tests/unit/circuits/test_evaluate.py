"""Evaluation: against one circuit at a time by raw hooks, on circuits that are known, and what follows."""

import functools

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch import Circuit, Evaluation
from causalpatch.base.errors import CausalPatchWarning
from causalpatch.circuits import keep
from causalpatch.circuits.ground_truth import cases
from causalpatch.engine.exact_edges import ExactEdges
from causalpatch.testing.tiny import tiny_model
from oracle_edges import EdgePlain, ungrouped
from scored import exact_scores, scores_of
from toys import prompts

torch.set_num_threads(1)

PROMPTS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]), ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]))
SIZES = (0.01, 0.1, 0.4, 1.0)


@functools.cache
def evaluated(family="llama"):
    """Scores by chance of a model with random weights, and circuits of four sizes."""
    model = cp.open_model(tiny_model(family, kv_heads=2))
    experiment = cp.Experiment(model, prompts(*PROMPTS), show_progress=False)
    graph = cp.graph_of(model)
    values = np.random.default_rng(0).normal(size=graph.n_edges)
    clean, corrupt = experiment.baseline.clean.mean(), experiment.baseline.corrupt.mean()
    scores = scores_of(graph, values, base=corrupt, source=clean, model=model)
    if clean < corrupt:  # the metric is a difference of two answers: let it be that of the other order
        experiment = cp.Experiment(model, prompts(*PROMPTS, answer=6, wrong=5), show_progress=False)
        scores = scores_of(graph, values, base=-corrupt, source=-clean, model=model)
    return experiment, scores, cp.evaluate_circuit(experiment, scores, fractions=SIZES, n_random=2)


def test_all_sizes_at_once_are_one_circuit_at_a_time():
    experiment, scores, found = evaluated()
    plain = EdgePlain(ungrouped("llama"), "llama")
    graph, sign = scores.graph, 1 if experiment.pairs[0].answer == ((5,),) else -1
    key = scores.importance().values[tuple(graph.edges.T)]
    order = {"importance": np.argsort(-key, kind="stable"), "magnitude": np.argsort(-np.abs(key), kind="stable")}

    def run(pair, kept):
        clean, corrupt = PROMPTS[pair]
        logits = plain.patched(clean, plain.run(corrupt), torch.tensor(graph.exists & ~kept))[-1]
        return sign * float(logits[5] - logits[6])

    checked = 0
    for number, each in enumerate(found.runs):
        if each["kind"] == "random" or each["fraction"] not in (0.1, 0.4):
            continue
        mask = np.zeros(graph.shape, dtype=bool)
        mask[tuple(graph.edges[order[each["order"]][: int(each["fraction"] * graph.n_edges)]].T)] = True
        kept = mask if each["kind"] == "circuit" else graph.exists & ~mask
        wanted = [run(pair, kept) for pair in range(2)]
        np.testing.assert_allclose(found.values[number], wanted, atol=1e-9)
        ends = [[run(pair, edges) for pair in range(2)] for edges in (graph.exists, graph.exists & False)]
        whole, nothing = np.mean(ends, axis=1)
        assert found.f()[number] == pytest.approx((np.mean(wanted) - nothing) / (whole - nothing))
        checked += 1
    assert checked == 8


def test_everything_is_the_model_and_sets_that_are_alike_run_once():
    experiment, scores, found = evaluated()
    whole = [number for number, run in enumerate(found.runs) if run["n_edges"] == scores.graph.n_edges]
    np.testing.assert_allclose(found.f()[[n for n in whole if found.runs[n]["kind"] == "circuit"]], 1)
    np.testing.assert_allclose(found.f()[[n for n in whole if found.runs[n]["kind"] == "complement"]], 0, atol=1e-12)
    # Of two orders, complements and two random ones at four sizes, the largest is the same, and its complement.
    n_sets = 2 * 3 + 2 * 3 + 2 * 3 + 2 + 1  # and m(0), which is run by itself
    assert found.provenance["cost"]["rows"] <= (n_sets + 2) * len(experiment.pairs) * 3  # heads that share keys: copies


def test_random_circuits_lie_in_each_other_and_have_the_sizes():
    _, scores, found = evaluated()
    sizes = [run["n_edges"] for run in found.runs if run["kind"] == "random"]
    assert sorted(set(sizes)) == [int(share * scores.graph.n_edges) for share in SIZES]
    frame = found.summary()
    assert list(frame["order"]) == ["importance"] * 4 + ["magnitude"] * 4
    band = frame.iloc[1]
    drawn = [
        f
        for f, run in zip(found.f(), found.runs, strict=True)
        if run["kind"] == "random" and run["n_edges"] == band.n_edges
    ]
    assert (band.random_low, band.random_high) == (min(drawn), max(drawn))


def test_areas_are_those_of_the_curve():
    _, _, found = evaluated()
    f = found.summary().set_index(["order", "fraction"])["f"]
    assert found.cpr == pytest.approx(np.trapezoid(f["importance"], SIZES))
    assert found.cmd == pytest.approx(np.trapezoid(np.abs(1 - f["magnitude"]), SIZES))
    text = str(found)
    assert f"by importance: CPR {found.cpr:.3f}" in text
    assert f"by magnitude: CMD {found.cmd:.3f}" in text


def test_few_components_have_no_interval_and_say_why():
    _, _, found = evaluated()
    frame = found.summary()
    assert frame["low"].isna().all()
    assert "too few independent groups" in frame.attrs["notes"]
    assert set(found.equivalence()["verdict"]) == {"too few independent groups"}


def stopped_after(monkeypatch, n_forwards):
    """Let the user press Ctrl-C after so many forwards with edges put in."""
    real, made = ExactEdges._run, []

    def run(self, *args):
        if len(made) == n_forwards:
            raise KeyboardInterrupt
        made.append(None)
        return real(self, *args)

    monkeypatch.setattr(ExactEdges, "_run", run)


def by_name(found):
    return {(run["kind"], run["order"], run["n_edges"], run["draw"]): n for n, run in enumerate(found.runs)}


@pytest.mark.parametrize(("max_rows", "n_forwards"), [(16, 3), (1, 12)])
def test_what_was_measured_before_ctrl_c_is_kept(monkeypatch, max_rows, n_forwards):
    experiment, scores, whole = evaluated()
    small = cp.Experiment(experiment.model, experiment.pairs, max_rows=max_rows, show_progress=False)
    stopped_after(monkeypatch, n_forwards)
    with pytest.warns(CausalPatchWarning, match="stopped: "):
        found = cp.evaluate_circuit(small, scores, fractions=SIZES, n_random=2)
    assert not found.is_complete
    assert whole.is_complete
    assert 0 < found.values.size < whole.values.size
    pairs = [n for n, clean in enumerate(whole.clean) if np.isclose(clean, found.clean, atol=1e-9).any()]
    assert len(pairs) == len(found.clean)
    for name, number in by_name(found).items():
        np.testing.assert_allclose(found.values[number], whole.values[by_name(whole)[name]][pairs], atol=1e-9)
    assert f"stopped by the user: {len(found.runs)} of {len(whole.runs)} runs" in " ".join(found.notes)
    assert np.isfinite(found.f()).all()


def test_what_is_whole_of_a_table_are_its_whole_rows_or_else_its_whole_columns():
    there = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], dtype=bool)
    rows, columns = keep._whole(there)
    assert (rows.tolist(), columns.tolist()) == ([0, 2], [0, 1, 2])
    there[2, 2] = False
    rows, columns = keep._whole(there)
    assert (rows.tolist(), columns.tolist()) == ([0, 1, 2], [0, 1])


def test_ctrl_c_before_anything_was_measured_goes_on(monkeypatch):
    experiment, scores, _ = evaluated()
    stopped_after(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        cp.evaluate_circuit(experiment, scores, fractions=SIZES, n_random=2)


def test_a_file_gives_the_evaluation_back(tmp_path):
    _, _, found = evaluated()
    back = Evaluation.load(found.save(tmp_path / "evaluation.npz"))
    assert back.runs == found.runs
    np.testing.assert_array_equal(back.f(), found.f())
    assert back.provenance == found.provenance
    assert repr(back) == repr(found)
    assert len(back.to_dataframe()) == len(found.runs) * 2


@functools.cache
def case_of(name, form="plain"):
    return next(case for case in cases([name], forms=[form]) if case.ablation == "resample")


@pytest.mark.parametrize(
    ("name", "form"),
    [("reverse", "plain"), ("fraction", "hidden"), ("or", "plain"), ("and", "hidden"), ("linear", "plain")],
)
def test_the_true_circuit_does_all_and_the_rest_nothing(name, form):
    case = case_of(name, form)
    circuit = Circuit.of(case.model, case.true_edges)
    found = cp.evaluate_circuit(case.experiment(), circuit, n_random=0)
    np.testing.assert_allclose(found.f(), [1, 0], atol=1e-6)
    np.testing.assert_allclose(found.f_per_pair()[0], 1, atol=1e-6)


def test_exact_scores_of_what_is_not_redundant_give_the_true_circuit():
    case = case_of("reverse")
    scores = exact_scores(case.experiment())
    circuit = cp.discover_circuit(scores, len(case.true_edges))
    assert set(circuit.edges()) == case.true_edges
    assert set(cp.discover_circuit(scores, len(case.true_edges), method="greedy").edges()) == case.true_edges


def test_single_edges_of_gates_mislead_a_search_in_one_direction():
    case = case_of("or")
    noise = exact_scores(case.experiment().turned("noise"))
    denoise = exact_scores(case.experiment().turned("denoise"))
    n = len(case.true_edges)
    # With both bits on, an OR loses nothing with one of them: only what comes behind the gate has an effect.
    assert set(cp.discover_circuit(noise, n).edges()) != case.true_edges
    assert set(cp.discover_circuit(denoise, n).edges()) == case.true_edges


def test_of_the_cancelling_pair_one_is_important_and_the_other_works_against_it():
    case = case_of("cancelling")
    scores = exact_scores(case.experiment())
    n = len(case.true_edges)
    assert set(cp.discover_circuit(scores, n, by="magnitude").edges()) == case.true_edges
    assert set(cp.discover_circuit(scores, n).edges()) != case.true_edges


def test_tokens_without_a_partner_stay_so_that_nothing_kept_is_not_the_corrupted_run():
    pairs = prompts(([1, 7, 3, 9, 4], [1, 8, 8, 3, 9, 4])).align("difference")
    experiment = cp.Experiment(cp.open_model(tiny_model("gpt2")), pairs, show_progress=False)
    circuit = Circuit.of(experiment, ["m0 -> logits"])
    found = cp.evaluate_circuit(experiment, circuit, n_random=0)
    everything = cp.patch_edges(experiment.turned("noise"), circuit.graph.exists).to_xarray()["metric"].values
    np.testing.assert_allclose(found.empty, everything.reshape(-1), atol=1e-12)


def test_pairs_that_a_circuit_was_found_on_are_named():
    experiment, scores, _ = evaluated()
    circuit = cp.discover_circuit(scores, 10)
    whole = {"name": "prompts", "hash": experiment.pairs.content_hash}
    same = Circuit(circuit.graph, circuit.mask, {**circuit.record, "pairs": whole})
    other = Circuit(circuit.graph, circuit.mask, {**circuit.record, "pairs": {**whole, "hash": "another"}})
    said = [cp.evaluate_circuit(experiment, each, n_random=0).notes for each in (same, other, circuit)]
    assert "found on: f is too high" in said[0][0]
    assert "was not looked at" in said[1][0]
    assert said[2] == []
    far = prompts(([4, 6, 15, 8], [4, 7, 16, 8]))
    named = Circuit(circuit.graph, circuit.mask, {**circuit.record, "pairs": {**whole, "hash": far.content_hash}})
    assert cp.evaluate_circuit(experiment, named, n_random=0, found_on=far).notes == []
    (note,) = cp.evaluate_circuit(experiment, other, n_random=0, found_on=far).notes
    assert "found_on are other pairs than those on record" in note


def test_means_are_those_of_the_pairs_that_a_circuit_was_found_on():
    experiment, scores, _ = evaluated()
    circuit = cp.discover_circuit(scores, 10)
    far = prompts(*(([4, 6, last, 8, 17, 3], [4, 7, 16, last, 8, 9]) for last in (15, 21, 20)))
    own, fitted = (cp.evaluate_circuit(experiment, circuit, n_random=0, value="mean", found_on=f) for f in (None, far))
    assert any("means are those of the pairs that are measured" in note for note in own.notes)
    assert not any("means are those" in note for note in fitted.notes)
    assert fitted.provenance["fitted_on"]["hash"] == far.content_hash
    assert own.provenance["fitted_on"]["hash"] == experiment.pairs.content_hash
    # All senders of the patched run are means; the last MLP into the logits, by hand of those of the other pairs.
    last = f"mlp_out.{experiment.model.shape.n_layers - 1}"
    graph = cp.graph_of(experiment)
    edge = graph.label(graph.n_senders - 1, graph.logits)
    found = cp.patch_edges(experiment, [edge], value="mean", fitted_on=far).to_xarray()["metric"].values.reshape(-1)
    (patch,) = cp.Experiment(experiment.model, far).fit([cp.Patch(last, value="mean")])
    wanted = experiment.run([patch]).to_xarray()["metric"].values.reshape(-1)
    np.testing.assert_allclose(found, wanted, atol=1e-9)
    other = cp.patch_edges(experiment, [edge], value="mean").to_xarray()["metric"].values.reshape(-1)
    assert np.abs(other - found).max() > 1e-3


def test_distances_have_a_gap_the_other_way_round():
    """KL from the clean run is 0 for the model, and what is kept makes it smaller."""
    experiment, scores, _ = evaluated()
    found = cp.evaluate_circuit(experiment.measuring("kl_from_base"), scores, fractions=(0.4, 1.0), n_random=0)
    frame = found.summary().set_index(["order", "fraction"])
    assert frame["f"]["importance", 1.0] == pytest.approx(1)
    assert found.clean == pytest.approx(0)
    row = next(number for number, run in enumerate(found.runs) if run["fraction"] == 0.4)
    assert frame["f"]["importance", 0.4] == pytest.approx(1 - found.values[row].mean() / found.empty.mean())


def made_up(f, groups=24, noise=0.0):
    """An evaluation of circuits with given f, complements at 0, on pairs of gap 1."""
    rng = np.random.default_rng(0)
    runs, values = [], []
    for number, each in enumerate(f):
        run = {"order": "by hand", "fraction": (number + 1) / 10, "n_edges": number + 1, "draw": -1}
        runs += [{**run, "kind": "circuit"}, {**run, "kind": "complement"}]
        values += [each + noise * rng.normal(size=groups), noise * rng.normal(size=groups)]
    record = {"metrics": ["metric"], "model": {"name": "made up"}, "pairs": {"name": "pairs"}, "seed": 0}
    return Evaluation(runs, np.array(values), np.ones(groups), np.zeros(groups), np.arange(groups), record)


def test_equivalence_is_shown_or_not():
    found = made_up([1.0, 0.5, 0.9], noise=0.1)
    assert list(found.equivalence()["verdict"]) == ["within", "outside", "not shown"]
    assert list(found.equivalence(delta=0.3)["verdict"]) == ["within", "outside", "within"]
    frame = found.summary()
    assert ((frame["low"] < frame["f"]) & (frame["f"] < frame["high"])).all()
    own = found.f_per_pair()[0]
    assert frame["off_p90"][0] == pytest.approx(np.quantile(np.abs(1 - own), 0.9))


def test_hypotheses_have_their_own_nulls():
    frame = made_up([1.0, 0.5], noise=0.1).hypotheses()
    assert frame["p_non_equivalence"][0] > 0.05 > frame["p_non_equivalence"][1]
    assert (frame["p_dependence"] > 0.05).all()


def test_a_chart_shows_circuits_complements_and_the_band():
    _, _, found = evaluated()
    picture = found.plot()
    spec = picture.to_dict()
    assert {"whole", "band", "circuits"} <= set(spec["datasets"])
    assert [row["f"] for row in spec["datasets"]["circuits"]] == pytest.approx(list(found.summary()["f"]))
    svg = picture.to_svg()
    assert "share of the edges kept" in svg
    assert "no intervals: too few independent groups" in svg
