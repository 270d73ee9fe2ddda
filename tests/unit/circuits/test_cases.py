"""Cases: what they hold, and that patching single edges exactly finds the true ones where nothing is redundant."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from benchmarks import ground_truth as runner

import causalpatch as cp
from causalpatch.circuits.ground_truth import case_names, cases
from causalpatch.engine.prove import prove
from oracle_truth import Small


def one(name, *forms):
    return cases([name], forms=forms or ["plain"])


def check_cases(found):
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert {case.program for case in found} == set(case_names())
    for case in found:
        assert case.true_edges <= set(case.edges)
        assert case.edge_is_true.sum() == len(case.true_edges)
        assert case.true_nodes <= set(case.nodes)
        assert case.node_is_true.sum() == len(case.true_nodes)
        assert case.model.family is not None
        assert case.model.family.name == "gpt2"
        assert len({len(side) for pair in case.pairs for side in (pair.clean, pair.corrupt)}) == 1


def test_every_program_has_its_cases():
    found = cases(forms=["plain", "trained"])
    check_cases(found)
    assert len(case_names()) >= 8 + 4
    # Three settings of each program, and two of two trained models.
    assert len(found) == 3 * len(case_names()) + 2 * 2


@pytest.mark.slow
def test_every_program_has_a_hidden_form():
    found = cases(forms=["hidden"])
    check_cases(found)
    assert len(found) == 3 * len(case_names())


def test_equal_seeds_give_equal_cases():
    first, again, other = (cases(["sort"], forms=["hidden"], seed=seed)[0] for seed in (0, 0, 1))
    weights = [case.model.module.state_dict()["transformer.h.0.attn.c_attn.weight"] for case in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert weights[0].shape != weights[2].shape or not torch.equal(weights[0], weights[2])
    prompts = [[pair.clean.tolist() for pair in case.pairs] for case in (first, again, other)]
    assert prompts[0] == prompts[1] != prompts[2]


@pytest.mark.parametrize("name", case_names())
def test_the_model_tells_clean_from_corrupted_prompts(name):
    """The metric is what the program's answers say: of categories 1 against 0, of numbers their own difference."""
    case = one(name)[0]
    baseline = case.experiment().baseline
    gap = baseline.clean[0] - baseline.corrupt[0]
    assert (gap > 0).all()
    if case.metric.name.startswith("logit_difference over"):
        # Slots at which both prompts have the same answer count nothing.
        shares = [
            np.mean([dict(pair.extra["answers"])[p] != a for p, a in dict(pair.extra["wrong_answers"]).items()])
            for pair in case.pairs
        ]
        np.testing.assert_allclose(baseline.clean[0], shares, atol=1e-9)
        np.testing.assert_allclose(baseline.corrupt[0], np.negative(shares), atol=1e-9)


@pytest.mark.parametrize("name", ["fraction", "reverse"])
def test_the_true_edges_of_a_hidden_model_are_not_the_only_ones_that_carry_something(name):
    """What nearly every component sends differs between prompts, and the weights that read it are dense."""
    case = one(name, "hidden")[0]
    small = Small(case.model.module)
    ids = torch.tensor(np.stack([case.pairs[0].clean, case.pairs[0].corrupt]))
    with torch.no_grad():
        sends = small.run(ids)[1]
    still = {node for node, sent in sends.items() if float((sent[0] - sent[1]).abs().max()) < 1e-3}
    # The head that looks for "=" finds the same in all prompts, by the program.
    assert still == ({"a0.h0"} if name == "reverse" else set())
    carrying = [edge for edge in case.edges if edge.partition(" -> ")[0] not in still]
    assert len(carrying) > 15 * len(case.true_edges)
    for key, value in small.weights.items():
        if value.ndim == 2 and "wpe" not in key and "wte" not in key:
            used = value[value.abs().sum(1) > 0][:, value.abs().sum(0) > 0]
            assert float((used.abs() > 1e-12).double().mean()) > 0.9, key


@pytest.mark.slow
@pytest.mark.parametrize("form", ["plain", "hidden"])
@pytest.mark.parametrize("name", case_names())
def test_every_kind_of_site_is_proven(name, form):
    names = ("embed", "pos_embed", "resid_pre", "resid_mid", "attn_out", "head_out", "mlp_out", "final_norm", "logits")
    names += ("q", "k", "v", "pattern", "z", "mlp_pre", "mlp_post")
    model = one(name, form)[0].model
    assert {site: prove(model, site).failure for site in names} == dict.fromkeys(names)


@pytest.mark.slow
def test_a_few_pairs_suffice_to_find_single_edges():
    case = one("fraction")[0]
    case = replace(case, pairs=case.pairs.take(range(4)))
    (row,) = runner.measure([case], ["exact edges"])
    assert (row.found.auroc, row.found.auprc) == (1.0, 1.0)
    assert row.taken == (len(case.true_edges), 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", case_names())
def test_patching_single_edges_finds_them_all_where_nothing_is_redundant(name):
    for case in cases([name]):
        if case.ablation == "resample":
            (row,) = runner.measure([case], ["exact edges"])
            found = (row.found.auroc, row.found.auprc)
            assert found == (1.0, 1.0) if case.redundant in (None, "cancelling") else found[0] < 0.7, case.name


def alone(case, edge):
    """The effect of one edge on the first pair's metric as a share of the gap, by raw code."""
    small, pair = Small(case.model.module), case.pairs[0]
    sides = [torch.tensor(side)[None] for side in (pair.clean, pair.corrupt)]
    base, source = sides if case.direction == "noise" else sides[::-1]

    def metric(logits):
        return float(logits[0, -1, pair.answer[0][0]] - logits[0, -1, pair.wrong_answer[0][0]])

    with torch.no_grad():
        (from_base, _), (from_source, sends) = small.run(base), small.run(source)
        changed = small.run(base, edge, sends[edge.partition(" -> ")[0]])[0]
    gap = metric(from_source) - metric(from_base)
    return round((metric(changed) - metric(from_base)) / gap, 9)


@pytest.mark.parametrize(("name", "missing"), [("or", "noise"), ("and", "denoise")])
def test_single_patches_miss_a_gate_in_one_direction(name, missing):
    """Only what stands behind the gate is found, one of five true edges; in the other direction all are."""
    for case in one(name)[:2]:
        assert case.redundant == (name if case.direction == missing else None)
        expected = dict.fromkeys(case.true_edges, float(case.direction != missing)) | {"m0 -> logits": 1.0}
        assert {edge: alone(case, edge) for edge in case.true_edges} == expected


def test_patching_a_layer_does_not_show_the_heads_that_cancel():
    case = one("cancelling")[1]
    pairs = case.pairs.take([0])
    experiment = cp.Experiment(case.model, pairs, case.metric, case.direction, engine="reference", show_progress=False)
    heads = [f"z.0.{head}" for head in range(3)]
    shares = experiment.run([*heads, heads[1:], "attn_out.0"]).recovered().values
    assert shares == pytest.approx([1.0, 1.0, -1.0, 0.0, 1.0], abs=1e-9)


def test_the_page_shows_what_was_measured(tmp_path, capsys):
    out = tmp_path / "page.md"
    runner.main(["--only", "linear", "--forms", "plain", "--methods", "random", "--out", str(out)])
    page = out.read_text(encoding="utf-8")
    case = one("linear")[0]
    row = next(line for line in page.splitlines() if line.startswith(f"| {case.name} |"))
    found = runner.hold_against(case.edge_is_true, runner.random(case))
    assert f"| 46 (14) | {found.auroc:.2f} {found.auprc:.2f} " in row
    assert "wrote" in capsys.readouterr().out


def test_a_method_that_does_not_apply_leaves_its_cell_empty():
    zero = one("linear")[2]
    assert zero.ablation == "zero"
    (row,) = runner.measure([zero], ["EAP"])
    assert runner._cell(row) == "none"


@pytest.mark.parametrize("name", ["fraction", "reverse"])
def test_methods_find_all_of_what_is_neither_redundant_nor_curved(name):
    # Of what goes through one layer alone, AtP* without the gradient of one layer after the other keeps nothing.
    methods = [each for each in runner.EVERY if not each.startswith("random") and each != "AtP*"]
    for row in runner.measure([one(name)[1]], methods):
        assert (row.found.auroc, row.found.auprc) == (1.0, 1.0), row.method
        assert row.taken == (row.found.n_true, 0)


def test_nodes_are_held_against_the_ends_of_true_edges(tmp_path):
    (case, *_), out = one("fraction"), tmp_path / "page.md"
    effects = dict(zip(case.nodes, runner.exact_nodes(case), strict=False))
    assert set(effects) == set(case.nodes) - {"logits"}
    experiment = case.experiment()
    for node, site in (("embed", "resid_pre.0"), ("a1.h0", "z.1.0"), ("a0.h1", "z.0.1"), ("m0", "mlp_out.0")):
        assert effects[node] == pytest.approx(float(np.abs(experiment.run(site).effect(per_pair=True).values).mean()))
    runner.main(["--only", "fraction", "--forms", "plain", "--methods", "exact edges", "AtP*", "--out", str(out)])
    edges, nodes = out.read_text(encoding="utf-8").split("## Nodes")
    assert f"| {case.name} | 46 (3) | 1.00 1.00 3+0 |" in edges
    assert f"| {case.name} | 7 (3) | 0.67 0.62 1+0 |" in nodes


def test_ties_with_the_last_of_the_largest_are_taken_whole():
    scores = np.array([3.0, 1.0, 1.0, 0.0, np.nan])
    assert runner.largest(scores, 2).tolist() == [True, True, True, False, False]
    assert runner.largest(scores, 4).tolist() == [True, True, True, False, False]
