"""The search on a trained language model, from all of its components to the heads that plain hooks point at."""

import json
from pathlib import Path

import pytest

import causalpatch as cp
from tiers import quickly

HEADS = {"name_copy": {"z.4.4"}, "object_copy": {"z.4.2", "z.4.3", "z.4.4"}, "pronoun": {"z.4.0", "z.4.2"}}
RUNS_PER_PAIR = 130


@pytest.fixture(scope="module")
def model(shared: Path) -> cp.Model:
    return cp.open_model(shared / "models" / "stories260k")


@pytest.mark.parametrize("behaviour", quickly(list(HEADS), "name_copy"))
def test_the_search_comes_down_to_the_heads_that_plain_hooks_found(behaviour, model, shared):
    pairs = cp.load_pairs(shared / "models" / "stories260k" / "pairs.jsonl", model).where(behaviour=behaviour)
    reference = json.loads((shared / "reference" / "stories260k_heads.json").read_text())["layer_by_head"][behaviour]
    recovered = reference["recovered"]
    above = {
        f"z.{layer}.{head}" for layer, row in enumerate(recovered) for head, value in enumerate(row) if abs(value) > 0.1
    }
    assert above == HEADS[behaviour]
    experiment = cp.Experiment(model, pairs, show_progress=False)
    found = cp.localize(experiment, budget=RUNS_PER_PAIR * len(pairs), units="heads")
    heads = {cell.name: cell.effect for cell in found.found if cell.level == "head"}
    assert set(heads) == above
    expected = {name: recovered[int(name[2])][int(name[4])] for name in above}
    assert heads == pytest.approx(expected, abs=0.02)  # at all positions, where the hooks were at the last one
    assert found.spent["runs"] <= RUNS_PER_PAIR * len(pairs)
    assert found.pending == ()
