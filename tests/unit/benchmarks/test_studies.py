"""The benchmark of studies: it runs on small sizes, and its page says what was missed."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from benchmarks import studies
from benchmarks.shapes import SHAPES, tiny

from causalpatch.studies.study import ShardsPart


def test_the_store_s_part_is_measured_beside_the_runs_alone():
    experiment = studies.experiment_of(tiny(SHAPES["gpt2"]), 4)
    found = studies.overhead(experiment, "z@-1", repeats=2, shards=ShardsPart(pairs=2))
    assert (found.n_runs, found.n_shards) == (3 * 4 * 4, 2)
    assert len(found.memory) == len(found.whole) == 2
    assert found.whole[0] > found.measuring[0] > 0
    assert 0 < found.idle < 1
    assert experiment.runner is None


def test_many_cells_are_summarised_as_the_library_summarises_few():
    found = studies.summarised(3000, cells_per_shard=1000)
    assert found.n_shards == 6
    assert found.largest_difference < 1e-12
    assert 0 < found.peak_gb < 4


def test_the_page_says_what_was_kept_and_what_was_missed():
    costs = studies.Overhead((0.8, 0.8), (1.0, 1.0), (1.2, 1.2), (0.9, 0.9), 10, 2)
    many = studies.Summarised(studies.CELLS, 2, 0.1, 59.0, 3.9, 0.0)
    page = studies.report(costs, many, "python -m benchmarks.studies")
    assert (
        "adds 20.0% to the time of the same pieces in memory (median of 20.0%, 20.0%); target at most 3%: missed."
        in page
    )
    assert "To cut into pieces of one pair costs 25.0%" in page
    assert "targets 60 s and 4 GB: kept" in page
    few = studies.report(None, replace(many, n_cells=10), "python -m benchmarks.studies")
    assert "of 10,000,000 cells, not measured here" in few
    assert costs.share == pytest.approx(0.2)
