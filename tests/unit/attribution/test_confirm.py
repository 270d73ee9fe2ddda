"""Scores against exact effects: these are those of plain sweeps, and what a screen missed is counted."""

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from scipy import stats

import causalpatch as cp
from causalpatch.pairs import Pairs
from causalpatch.statistics import most_missed
from causalpatch.testing.tiny import tiny_model
from oracle_edges import EdgePlain, ungrouped
from scored import exact_scores, scores_of
from toys import prompts

torch.set_num_threads(1)

PROMPTS = (([1, 7, 3, 9, 12, 4], [1, 8, 3, 10, 12, 4]), ([2, 5, 30, 11, 6, 9], [2, 5, 31, 17, 6, 9]))


@functools.cache
def experiment_of(family="llama", direction="denoise"):
    """Prompts of a model with random weights, and answers by whose difference clean ones have more than corrupted."""
    model = cp.open_model(tiny_model(family))
    made = cp.Experiment(model, prompts(*PROMPTS), direction=direction, show_progress=False)
    if made.baseline.clean.mean() < made.baseline.corrupt.mean():
        pairs = prompts(*PROMPTS, answer=6, wrong=5)
        made = cp.Experiment(model, pairs, direction=direction, show_progress=False)
    return made


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("site", ["z", "resid_pre", "mlp_post@-1", "k", "module(model.layers.*.mlp).output"])
def test_cells_are_patched_as_by_a_sweep(site, direction):
    experiment = experiment_of(direction=direction)
    scores = cp.attribute(experiment, site)
    found = scores.confirm(top=3, random_sample=4)
    frame = found.to_dataframe()
    n_cells = int(np.prod([len(held) for held in scores.coordinates.values()]))
    assert len(frame) == min(7, n_cells)
    exact, importance = cp.sweep(experiment, site, budget=10**6).recovered(), scores.importance()
    for row in frame.to_dict("records"):
        at = {axis: row[axis] for axis in scores.axes}
        assert row["effect"] == pytest.approx(float(exact.sel(at)), abs=1e-9)
        assert row["score"] == pytest.approx(float(importance.sel(at)))
    largest = np.sort(np.abs(scores.score().values.reshape(-1)))[::-1]
    gap = abs(scores.provenance["mean_source"] - scores.provenance["mean_base"])
    np.testing.assert_allclose(frame["score"].abs()[:3] * gap, largest[:3])


def test_edges_are_interchanged_one_by_one():
    experiment = experiment_of()
    scores = cp.attribute_edges(experiment, "eap")
    found = scores.confirm(top=4, random_sample=5)
    plain, graph = EdgePlain(ungrouped("llama"), "llama"), scores.graph
    sign = 1 if experiment.pairs[0].answer == ((5,),) else -1
    gap = (experiment.baseline.clean - experiment.baseline.corrupt).mean()

    def metric(logits):
        return sign * float(logits[5] - logits[6])

    for row in found.to_dataframe().to_dict("records"):
        mask = torch.tensor(graph.mask([row["edge"]]))
        changes = [
            metric(plain.patched(corrupt, plain.run(clean), mask)[-1])
            - metric(plain.patched(corrupt, plain.run(clean), mask & False)[-1])
            for clean, corrupt in PROMPTS
        ]
        assert row["effect"] == pytest.approx(np.mean(changes) / gap, abs=1e-6)
        assert row["score"] == pytest.approx(scores[row["edge"]] / gap)


def test_all_measured_says_what_plain_numbers_say():
    experiment = experiment_of()
    scores = cp.attribute(experiment, "z")
    found = scores.confirm(top=100, delta=0.01)
    exact, importance = cp.sweep(experiment, "z").recovered(), scores.importance()
    x, y = importance.values.reshape(-1), exact.values.reshape(-1)
    row = found.agreement().set_index("of").loc["all"]
    assert row["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    assert row["kendall"] == pytest.approx(stats.kendalltau(x, y).statistic)
    assert row["same_sign"] == pytest.approx((np.sign(x) == np.sign(y)).mean())
    both = {k: set(np.argsort(-np.abs(each))[:k]) for k in (3,) for each in (x, y)}
    assert found.recall_at(3) == len(both[3] & set(np.argsort(-np.abs(x))[:3])) / 3
    assert found.missed == found.missed_at_most == 0
    assert int(found.matters.sum()) == int((np.abs(y) > 0.01).sum())
    assert "missed: none, all were measured" in str(found)


class Gate(torch.nn.Module):
    """Six units behind a gate that is shut at 0: its slope there is 0, and 1 above."""

    def __init__(self):
        super().__init__()
        self.units, self.read = torch.nn.Identity(), torch.nn.Linear(6, 2, bias=False)
        with torch.no_grad():
            self.read.weight[0] = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.5])
            self.read.weight[1] = 0

    def forward(self, x):
        units = self.units(x)
        return self.read(torch.where(torch.arange(6) == 1, torch.relu(units - 0.5), units))


def test_a_false_negative_is_counted():
    """Unit 1 has a slope of 0 at the base and a fifth of the gap: scores put it last, and a sample finds it."""
    model = cp.open_model(Gate().double())
    pairs = Pairs.from_arrays(np.ones((1, 6)), np.zeros((1, 6)), [0], [1])
    experiment = cp.Experiment(model, pairs, show_progress=False)
    scores = cp.attribute(experiment, "module(units).output axes=(neuron)", over="neuron")
    assert scores.score().values.tolist() == pytest.approx([5, 0, 3, 2, 1, 0.5])
    found = scores.confirm(top=3, random_sample=3, delta=0.1)
    assert (found.missed, found.missed_at_most) == (1, 1)
    assert found.recall == (3 / 4, 3 / 4)
    frame = found.to_dataframe().set_index("neuron")
    assert frame.loc[1, ["effect", "score", "part"]].tolist() == [pytest.approx(2 / 13.5), 0, "sample"]
    assert found.recall_at(3) == 1  # 5, 3, and 2 as 2
    assert found.recall_at(1) == 1
    assert "missed: about 1, at most 1" in str(found)


@pytest.mark.slow
def test_what_is_missed_is_bounded_in_a_model_all_of_whose_edges_are_known():
    """Scores turned round rank the largest effects last: over 40 draws the bound is never below what is missed."""
    experiment = experiment_of("gpt2")
    exact = exact_scores(experiment)
    graph = exact.graph
    shares = exact.importance().values[tuple(graph.edges.T)]
    turned = scores_of(graph, 1 / (1e-3 + np.abs(shares)), model=experiment.model)
    turned.provenance |= {"metrics": ["logit_difference"], "direction": "denoise"}
    rest = np.argsort(-np.abs(turned.values[tuple(graph.edges.T)]), kind="stable")[10:]
    missed = int((np.abs(shares[rest]) > 0.02).sum())
    assert missed > 20
    bounds = []
    for seed in range(40):
        experiment.seed = seed
        found = cp.confirm_scores(experiment, turned, top=10, random_sample=30)
        drawn = [graph.parse(edge) for edge in found.axes["edge"][10:]]
        held = shares[[graph.edges.tolist().index(list(edge)) for edge in drawn]]
        assert found.found.sum() == (np.abs(held) > 0.02).sum()
        bounds.append(found.missed_at_most)
        assert found.missed_at_most == most_missed(found.sizes, found.sampled, found.found)
    experiment.seed = 0
    assert min(bounds) < 1.5 * missed
    assert np.mean(np.array(bounds) >= missed) >= 0.95


def test_a_seed_makes_the_sample_and_another_another():
    experiment = experiment_of()
    scores = cp.attribute_edges(experiment, "eap")
    first, again = (scores.confirm(top=2, random_sample=6) for _ in range(2))
    assert first.axes == again.axes
    np.testing.assert_array_equal(first.effects, again.effects)
    other = copy.copy(experiment)
    other.seed = 5
    assert cp.confirm_scores(other, scores, top=2, random_sample=6).axes != first.axes


def test_a_sample_can_be_sized_for_a_bound():
    scores = cp.attribute(experiment_of(), "mlp_post@-1")
    found = scores.confirm(top=2, at_most=20, delta=10)
    assert found.found.sum() == 0
    assert found.missed_at_most <= 20
    assert 0 < found.sampled.sum() < found.sizes.sum()


def test_scores_are_held_against_other_pairs_and_that_is_said():
    experiment = experiment_of()
    one = cp.Experiment(experiment.model, experiment.pairs[:1], show_progress=False)
    scores = cp.attribute(experiment, "z")
    found = cp.confirm_scores(one, scores, top=2, random_sample=2)
    assert found.notes == ["scores are of other pairs than exact effects"]
    assert found.effects[0] == pytest.approx(
        float(cp.sweep(one, "z").recovered().sel({axis: held[0] for axis, held in found.axes.items()}))
    )
    assert scores.confirm(top=2, random_sample=2).notes == []


def test_scores_without_a_sign_meet_magnitudes():
    experiment = experiment_of()
    found = cp.attribute(experiment, "z", "atp*").confirm(top=100)
    row = found.agreement().set_index("of").loc["all"]
    assert (found.scores >= 0).all()
    assert (found.effects < 0).any()
    assert row["spearman"] == pytest.approx(stats.spearmanr(found.scores, np.abs(found.effects)).statistic)
    assert np.isnan(row["same_sign"])
    assert all(row["shown"] >= 0 for row in found.plot().to_dict()["datasets"]["components"])


def test_the_picture_and_the_file_hold_the_same_numbers(tmp_path):
    found = cp.attribute_edges(experiment_of(), "eap").confirm(top=5, random_sample=20)
    spec = found.plot().to_dict()
    rows = spec["datasets"]["components"]
    assert [row["component"] for row in rows] == found.axes["edge"]
    assert [row["shown"] for row in rows] == pytest.approx(found.effects.tolist())
    assert "Scores of 110 edges (eap) against exact effects" in found.plot().to_svg()
    again = cp.Confirmation.load(found.save(tmp_path / "confirmation.npz"))
    assert str(again) == str(found)
    assert again.to_dataframe().equals(found.to_dataframe())
    assert again.summary().equals(found.summary())


def test_copies_and_files_of_scores_do_not_hold_the_model(tmp_path):
    scores = cp.attribute(experiment_of(), "z")
    for each in (
        pickle.loads(pickle.dumps(scores)),
        copy.deepcopy(scores),
        cp.Scores.load(scores.save(tmp_path / "s.npz")),
    ):
        with pytest.raises(cp.RequestError, match="do not know their experiment"):
            each.confirm()
        again = cp.confirm_scores(experiment_of(), each, top=2, random_sample=2)
        np.testing.assert_array_equal(again.effects, scores.confirm(top=2, random_sample=2).effects)


def test_a_screen_in_few_bits_is_not_what_scores_are_held_against():
    model = cp.open_model(tiny_model("gpt2").float())
    pairs = experiment_of("gpt2").pairs
    screened = cp.Experiment(model, pairs, precision="screen", show_progress=False)
    found = cp.attribute(screened, "z").confirm(top=2, random_sample=2)
    assert found.provenance["precision"]["asked"] == "as the model is"
    assert screened.precision == "screen"
