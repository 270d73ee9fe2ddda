"""Scores and exact effects of edges find the true edges of programs that were compiled to weights."""

import numpy as np
import pytest

import causalpatch as cp
from causalpatch.circuits.against import hold_against
from causalpatch.circuits.ground_truth import cases


@pytest.mark.parametrize("form", ["plain", "hidden"])
@pytest.mark.parametrize("program", ["fraction", "reverse"])
def test_true_edges_come_first_by_every_method(program, form):
    case = next(case for case in cases([program], forms=[form]) if case.ablation == "resample")
    experiment = case.experiment()
    assert tuple(cp.graph_of(experiment).names(cp.graph_of(experiment).edges)) == case.edges
    by_method = {
        method: np.abs(cp.attribute_edges(experiment, method).to_dataframe()["score"].to_numpy())
        for method in ("eap", "eap-ig", "clean-corrupted")
    }
    effects = cp.patch_edges(experiment, case.edges).effect(per_pair=True)
    by_method["exact"] = np.abs(effects.values).mean(1)
    for method, scores in by_method.items():
        assert hold_against(case.edge_is_true, scores, floor=1e-9).auroc == 1.0, method


@pytest.mark.parametrize("form", ["plain", "hidden"])
@pytest.mark.parametrize("program", ["fraction", "reverse", "balance", "cancelling", "linear"])
def test_true_edges_of_zero_ablation_are_those_that_change_some_prompt(program, form):
    case = next(case for case in cases([program], forms=[form]) if case.ablation == "zero")
    scores = []
    for direction in ("noise", "denoise"):  # clean prompts, then corrupted ones
        effects = cp.patch_edges(case.experiment().turned(direction), case.edges, value="zero").effect(per_pair=True)
        scores.append(np.abs(effects.values).max(1))
    assert hold_against(case.edge_is_true, np.maximum(*scores), floor=1e-9).auroc == 1.0
