"""The search finds what was planted, or says that it stayed closed, and spends what it may."""

import numpy as np
import pytest
import torch

import causalpatch as cp
from causalpatch.circuits.ground_truth import cases
from causalpatch.sites import Site
from causalpatch.sweeps.localize.budget import Budget
from causalpatch.sweeps.localize.nodes import Node, cells_of
from causalpatch.sweeps.localize.parts import Decoder, Modules, Part, together, tree_of
from planted_heads import planted_heads
from toys import Pictures, prompts, vectors

ALONE, AGAINST = {(1, 3): 0.5, (2, 2): 0.3}, {(3, 1): 0.8, (3, 0): -0.8}
HEADS = {f"z.{layer}.{head}" for layer, head in {**ALONE, **AGAINST}}
APART, BESIDE = [(0, 2), (2, 1)], [(0, 2), (0, 3)]  # heads of an OR-gate in two layers, and in one


def names(found):
    return {str(site) for site in found.components}


def heads_of(found):
    """Return the heads among what was found, wherever."""
    return {str(site.at(None)) for site in found.components if site.name == "z"}


def exact(experiment, names):
    """Return the effect of each by itself, by its name."""
    return dict(zip(names, experiment.run(list(names)).recovered().values.tolist(), strict=True))


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_heads_that_act_alone_and_heads_that_cancel_are_found_and_no_others(direction):
    experiment = planted_heads({**ALONE, **AGAINST}, direction=direction)
    found = cp.localize(experiment, budget=5000)
    assert names(found) == HEADS
    effects = {cell.name: cell.effect for cell in found.cells}
    assert effects == pytest.approx(exact(experiment, effects), abs=1e-9)
    assert set(found.summary()["opened_by"]) == {"effect", "scores"}


@pytest.mark.parametrize("halves", [0, 4])
def test_heads_that_cancel_are_found_by_random_halves_where_nothing_is_scored(halves):
    experiment = planted_heads({**ALONE, **AGAINST})
    found = cp.localize(experiment, budget=5000, scores=None, halves=halves, sample=0)
    against = {f"z.{layer}.{head}" for layer, head in AGAINST}
    assert names(found) >= HEADS - against
    assert (against <= names(found)) == bool(halves)
    if halves:
        assert {cell.opened for cell in found.cells if cell.name == "attn_out.3"} == {"half"}
    else:
        closed = found.unopened.set_index("level").loc["head"]
        assert closed["closed"] == 8
        assert closed["sampled"] == 0
        assert closed["fraction_at_most"] == 1.0


def test_what_the_sample_finds_among_the_closed_is_found():
    experiment = planted_heads({**ALONE, **AGAINST})
    found = cp.localize(experiment, budget=5000, scores=None, halves=0)
    assert names(found) == HEADS
    closed = found.unopened.set_index("level").loc["head"]
    assert (closed["closed"], closed["sampled"], closed["above_delta"], closed["at_most"]) == (8, 8, 2, 2)


@pytest.mark.parametrize("places", [APART, BESIDE])
def test_heads_that_stand_in_for_each_other_are_found_as_a_set(places):
    """In the direction noise neither head of an OR has an effect, and neither is scored."""
    experiment = planted_heads({**ALONE, **AGAINST}, places, direction="noise")
    gate = {f"z.{layer}.{head}" for layer, head in places}
    assert max(map(abs, exact(experiment, gate).values())) < 1e-9
    found = cp.localize(experiment, budget=20000)
    assert heads_of(found) == HEADS | gate
    rows = found.summary().set_index("component")
    assert (rows.loc[sorted(gate), "together"] != "").all()
    (both,) = experiment.run([sorted(gate)]).recovered().values
    effects = [abs(found.sets[cell.together].effect) for cell in found.found if cell.name in gate]
    assert effects == pytest.approx([abs(float(both))] * 2, abs=1e-6)


@pytest.mark.parametrize(
    "name", ["and, plain, resample, denoise", "or, plain, resample, noise", "cancelling, plain, resample, noise"]
)
def test_gates_are_found_with_their_positions(name):
    case = next(each for each in cases([name.partition(",")[0]], forms=["plain"]) if each.name == name)
    found = cp.localize(case.experiment(), budget=2000)
    heads = {f"a{site.layer}.h{site.unit}" for site in found.components if site.name == "z"}
    assert heads == {node for node in case.true_nodes if node.startswith("a")}
    assert all(str(site.position) == "3" for site in found.components)


@pytest.mark.parametrize("budget", [180, 300, 600, 1200, "0.003 GFLOP", "0.006 GFLOP"])
def test_no_more_is_spent_than_the_budget(budget):
    experiment = planted_heads({**ALONE, **AGAINST}, BESIDE, direction="noise")
    found = cp.localize(experiment, budget)
    allowed = Budget.of(budget)
    assert 0 < found.spent[allowed.unit] <= allowed.amount
    planted = HEADS | {f"z.{layer}.{head}" for layer, head in BESIDE}
    closed = found.unopened.set_index("level").loc["head"]
    # Where the budget ends before the gate is divided, its sublayer is found.
    n_missing = 0 if "attn_out.0" in names(found) else len(planted - heads_of(found))
    alone = exact(experiment, planted)
    by_effect = {name for name in planted if abs(alone[name]) > 0.1}
    assert len(by_effect - heads_of(found)) <= closed["at_most"]
    if n_missing:
        assert closed["closed"] or found.pending


def test_runs_are_counted_as_the_engine_counts_them(monkeypatch):
    experiment = planted_heads({**ALONE, **AGAINST})
    counted = [2 * len(experiment.pairs)]
    run = cp.Experiment.run

    def counting(self, *asked, **more):
        found = run(self, *asked, **more)
        counted.append(found.provenance["cost"]["rows"])
        return found

    monkeypatch.setattr(cp.Experiment, "run", counting)
    found = cp.localize(experiment, budget=5000, scores=None)
    assert found.spent["runs"] == sum(counted)


def test_pairs_are_drawn_in_rounds_where_there_are_enough():
    experiment = planted_heads({**ALONE, **AGAINST}, n_pairs=100)
    found = cp.localize(experiment, budget=100000)
    whole = cp.localize(experiment, budget=100000, races=False)
    assert names(found) == names(whole) == HEADS
    assert found.provenance["saved"] > 0.5
    assert whole.provenance["saved"] == 0
    assert found.spent["runs"] < whole.spent["runs"]
    by_name = {cell.name: cell for cell in whole.cells}
    for cell in found.found:
        assert cell.n_pairs < 100
        assert cell.effect == pytest.approx(by_name[cell.name].effect, abs=0.1)
    assert any("asymptotic" in note for note in found.provenance["notes"])


def test_what_was_found_is_saved_and_read(tmp_path):
    found = cp.localize(planted_heads({**ALONE, **AGAINST}, BESIDE, direction="noise"), budget=20000)
    again = cp.Localization.load(found.save(tmp_path / "found.npz"))
    assert str(again) == str(found)
    assert again.cells == found.cells
    assert again.unopened.equals(found.unopened)
    assert again.components == found.components


def test_words_claim_nothing_and_say_what_to_do_next():
    experiment = planted_heads(ALONE)
    said = str(cp.localize(experiment, budget=5000))
    assert "exploratory: found and measured on the same pairs, nothing is claimed" in said
    assert (
        said.splitlines()[-1]
        == "next: confirm these on pairs that the search never saw: the other half of pairs.split()"
    )
    assert "is necessary" not in said
    assert "significant" not in said
    short = str(cp.localize(experiment, budget=180))
    assert "not opened for lack of budget: attn_out.1 (4 heads)" in short
    assert "next: open what is pending with a larger budget" in short


def test_the_way_down_is_one_figure():
    found = cp.localize(planted_heads({**ALONE, **AGAINST}), budget=5000, units="heads")
    picture = found.plot()
    spec = picture.to_dict()
    assert [panel["title"]["text"] for panel in spec["hconcat"]] == ["sublayers", "heads"]
    outlined = {row["name"] for row in spec["datasets"]["heads-found"]}
    assert outlined == HEADS
    svg = picture.to_svg()
    for text in ("layer 3", "attention", "MLP", "attn_out.3", "nothing is claimed"):
        assert text in svg


def test_a_budget_is_read_from_numbers_and_texts():
    read = {
        text: (Budget.of(text).amount, Budget.of(text).unit) for text in (2000, "2,000 forwards", "1.5 min", "2 PFLOP")
    }
    assert read == {
        2000: (2000, "runs"),
        "2,000 forwards": (2000, "runs"),
        "1.5 min": (90, "seconds"),
        "2 PFLOP": (2e15, "FLOP"),
    }


def test_modules_of_any_model_are_parts_and_their_channels_units():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pairs = vectors(12, shape=(1, 6, 6), n_classes=4)
        experiment = cp.Experiment(cp.open_model(Pictures()), pairs, metric="kl_divergence", show_progress=False)
    found = cp.localize(experiment, budget=5000)
    sublayers = [cell.name for cell in found.cells if cell.level == "module"]
    assert sublayers == ["module(conv1).output", "module(conv2).output", "module(head).output"]
    effects = {cell.name: cell.effect for cell in found.cells}
    assert effects == pytest.approx(exact(experiment, effects), abs=1e-5)
    assert {cell.level for cell in found.found} == {"channel", "neuron"}
    tree = tree_of(experiment, None, "all", None)
    assert isinstance(tree, Modules)


def test_positions_are_spans_and_the_last_token_or_columns_that_are_the_same_in_all_pairs():
    model = planted_heads(ALONE).model
    even = prompts(([1, 2, 3], [1, 4, 3]), ([5, 6, 3], [5, 7, 3]))
    ragged = prompts(([1, 2, 3], [1, 4, 3]), ([5, 6], [5, 7]))
    spanned = prompts(([1, 2, 3], [1, 4, 3]), ([5, 6], [5, 7]), spans={"who": ((1, 2), (1, 2))})

    def positions(pairs, asked=None):
        tree = tree_of(cp.Experiment(model, pairs, "kl_divergence"), asked, "all", None)
        assert isinstance(tree, Decoder)
        return tree.positions

    assert positions(even) == ("0", "1", "2")
    assert positions(ragged) == ()
    assert positions(spanned) == ("who", "-1")
    assert positions(even, "all") == ()
    assert positions(ragged, ["-1", "-2"]) == ("-1", "-2")


def test_units_of_a_layer_go_into_a_run_as_one_set():
    tree = tree_of(planted_heads(ALONE), None, "all", None)
    sublayers = tree.groups(tree.whole)[0]
    heads = [unit for part in sublayers for unit in tree.units(part) if unit.level == "head"]
    made = together(heads[:3] + heads[4:5] + sublayers[1:2], "some")
    assert sorted(str(patch.site) for patch in made.patches) == ["mlp_out.0", "z.0.0,1,2", "z.1.0"]


def test_edges_between_what_was_found_are_measured():
    experiment = planted_heads(ALONE)
    found = cp.localize(experiment, budget=5000, edges=True)
    direct = cp.patch_edges(experiment, ["a1.h3 -> logits", "a2.h2 -> logits"]).recovered().values
    assert found.edges == {
        "a1.h3 -> logits": pytest.approx(direct[0]),
        "a2.h2 -> logits": pytest.approx(direct[1]),
    }


def test_a_race_finds_the_top_and_counts_what_it_did_without():
    experiment = planted_heads({**ALONE, **AGAINST}, n_pairs=100)
    candidates = [f"z.{layer}.{head}" for layer in range(1, 4) for head in range(4)]
    found = cp.race(experiment, candidates, k=4)
    assert set(found.top) == HEADS
    assert found.not_separable == []
    effects = experiment.run(found.top)
    rows = found.summary().set_index("candidate").loc[found.top]
    values = effects.effect().values
    assert ((rows["low"] <= values + 1e-9) & (values <= rows["high"] + 1e-9)).all()
    assert found.saved == pytest.approx(1 - found.n_pairs.sum() / (12 * 100))
    assert found.provenance["runs"] == found.n_pairs.sum() + 3 * found.n_pairs.max()
    above = cp.race(experiment, candidates, above=0.5)
    assert set(above.top) == {"z.1.3", "z.3.0", "z.3.1"}


def test_a_race_is_drawn_with_its_intervals_and_how_long_each_candidate_stayed():
    experiment = planted_heads({**ALONE, **AGAINST}, n_pairs=60)
    found = cp.race(experiment, [f"z.{layer}.{head}" for layer in range(1, 4) for head in range(4)], above=0.2)
    picture = found.plot()
    sheet = picture.to_dict()["datasets"]
    assert {row["candidate"]: row["n_pairs"] for row in sheet["candidates"]} == dict(
        zip(found.names, found.n_pairs.tolist(), strict=True)
    )
    assert all(row["low"] <= row["share"] <= row["high"] for row in sheet["spans"])
    assert sheet["threshold"] == [{"low": -0.2, "high": 0.2}]
    for text in ("all above 0.2 of the gap", "accepted", "dropped", "share of the gap restored", "pairs until"):
        assert text in picture.to_svg()


def test_a_race_among_equals_is_not_separable_and_costs_little_more_than_the_grid():
    experiment = planted_heads(dict.fromkeys([(0, 1), (1, 2), (2, 3)], 0.5), n_pairs=60)
    found = cp.race(experiment, ["z.0.1", "z.1.2", "z.2.3"], k=1)
    assert found.not_separable == ["z.0.1", "z.1.2", "z.2.3"]
    assert "not separable on this pool: z.0.1, z.1.2, z.2.3" in str(found)
    grid = experiment.run(["z.0.1", "z.1.2", "z.2.3"]).provenance["cost"]["rows"]
    assert found.provenance["runs"] <= 1.05 * grid


def test_clipped_effects_are_bounded_and_the_clipped_share_is_named(tmp_path):
    experiment = planted_heads(ALONE, n_pairs=100)
    found = cp.race(experiment, ["z.1.3", "z.2.2", "z.0.0"], k=1, clip=(-0.5, 0.5))
    assert found.top == ["z.1.3"]
    assert "by betting" in str(found)
    (note,) = [note for note in found.provenance["notes"] if "clipped" in note]
    assert "0.00%" not in note
    again = cp.Race.load(found.save(tmp_path / "race.npz"))
    assert str(again) == str(found)
    assert np.array_equal(again.status, found.status)


def test_small_heads_that_add_up_are_no_set_and_their_sublayer_is_found():
    small = {(1, head): 0.08 for head in range(4)}
    found = cp.localize(planted_heads({**small, (2, 0): 0.68}), budget=5000)
    assert names(found) == {"attn_out.1", "z.2.0"}
    assert found.sets == ()


def test_a_unit_that_only_the_sample_met_does_not_account_for_its_sublayer():
    sublayer, head = Part("sublayer", (Site("attn_out", 1),)), Part("head", (Site("z", 1, 0),))
    moved = np.zeros(12)
    met = [Node(sublayer, -1, 0.8, 12, 0.1, moved), Node(head, 0, 0.2, 12, 0.1, moved, found="sample")]
    assert [cell.is_component for cell in cells_of(met)] == [True, True]
    met[1].found = "search"
    assert [cell.is_component for cell in cells_of(met)] == [False, True]
