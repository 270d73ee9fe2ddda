"""What a check says that a study's steps cost, against the runs that they then make."""

import numpy as np
import pytest

from causalpatch.engine.structure import structure_of
from causalpatch.studies.checking import check
from causalpatch.studies.opened import Opened
from small_studies import run_in, study_of

TEXT = """
schema: 1
name: many
model: zoo:stories
pairs: {name: ioi, first: 40}
executor: {threads: 1, device: cpu}
store: store
steps:
  - {kind: attribute, name: eap, method: eap}
  - {kind: attribute, name: eap-ig, steps: 2}
  - {kind: attribute, name: nodes, site: z, method: ig, steps: 3}
  - {kind: attribute, name: dropped, site: mlp_out, method: atp*}
  - {kind: attribute, name: moved, site: "mlp_out@-1", method: ig-activations, steps: 2}
  - {kind: discover, name: top, from: eap, n_edges: 20}
  - {kind: discover, name: acdc, method: acdc, threshold: 3.0}
  - {kind: discover, name: gates, method: ugs, n_edges: 20, steps: 3}
  - {kind: evaluate, name: one, from: top, n_random: 3}
  - {kind: evaluate, name: sizes, from: eap, n_random: 1}
  - {kind: sweep, name: heads, site: z@-1}
  - {kind: confirm, name: claim, from: heads, top: 2, unrelated: [greater_than]}
  - {kind: confirm, name: bare, components: [z.1.0@-1], checks: few}
"""


def spent(found):
    """How many runs a step's result says that it took."""
    record = found.record if hasattr(found, "record") else found.provenance
    return record["n_runs"] if "n_runs" in record else record["cost"]["rows"]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    study, folder = study_of(text=TEXT), tmp_path_factory.mktemp("planned")
    opened = Opened(study, folder)
    before = structure_of(opened.model)
    planned = {step.name: step for step in check(opened).steps}
    assert before.is_still(structure_of(opened.model))
    found, _ = run_in(folder, text=TEXT)
    return planned, found.results


@pytest.mark.parametrize("name", ["eap", "eap-ig", "nodes", "dropped", "moved", "one", "sizes", "claim", "bare"])
def test_a_step_takes_no_more_runs_than_was_planned_and_not_many_fewer(both, name):
    planned, found = both[0][name], spent(both[1][name])  # counts no backward, which is planned as two runs
    assert found <= planned.runs <= 5 * found


def test_acdc_takes_about_a_run_for_each_edge_and_learning_one_for_each_step(both):
    made = both[1]["acdc"].record["found"]["runs"] * 20  # sets of edges, each on 20 pairs
    assert made / 3 <= both[0]["acdc"].runs <= 3 * made
    assert both[0]["gates"].runs == 3 * 3 * 10  # three steps, ten of 20 pairs in each


def test_what_is_taken_from_scores_costs_nothing(both):
    assert both[0]["top"].runs == 0
    assert np.isfinite([each.runs for each in both[0].values()]).all()
