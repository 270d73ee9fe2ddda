"""Summaries shard by shard: the numbers are those of ``Effects.summary``, however the shards lie."""

from dataclasses import replace

import numpy as np
import pytest

from causalpatch.base.errors import StoreCorrupt
from causalpatch.results.status import Status
from causalpatch.studies.results import Results
from causalpatch.studies.shards import decode, encode
from causalpatch.studies.summary import summarise
from small_studies import run_in

MANY = ("pairs.first=12", "steps.0.site=z@-1")


@pytest.mark.parametrize("shards", ["{pairs: 4}", "{pairs: 12, cells: 5}", "{pairs: 5, cells: 6}"])
def test_a_summary_is_that_of_the_effects(tmp_path, shards):
    found, _ = run_in(tmp_path, *MANY, f"shards={shards}")
    effects, kept = found.results["heads"], Results(found.run)
    (name,) = kept.record("heads")["calls"]
    group = effects.to_xarray()["component"].values
    mine = summarise(found.run, kept.call(name), group, effects.direction).to_dataframe()
    own = effects.summary()
    for column in ("effect", "recovered", "low", "high", "n_pairs"):
        np.testing.assert_allclose(mine[column], own[column], rtol=1e-9, atol=1e-12)
    assert (mine["p_bh"] >= mine["p"]).all()
    assert mine.attrs["notes"][0] == (
        f"p_bh: Benjamini-Hochberg over all {len(mine)} cells, a heuristic to screen by, since cells share pairs"
    )
    # Another test than that by flips of signs, of the same question: nothing large is called noise by one alone.
    assert (mine["p"][np.abs(own["recovered"]) > 0.1] < 0.01).all()


def test_a_damaged_shard_is_no_part_of_a_summary(tmp_path):
    found, _ = run_in(tmp_path, *MANY)
    kept = Results(found.run)
    (name,) = kept.record("heads")["calls"]
    for path in (tmp_path / "store").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreCorrupt, match="missing, torn or changed"):
        summarise(found.run, kept.call(name), np.arange(12), "denoise")


def test_pairs_that_were_not_measured_are_no_part_of_a_summary(tmp_path):
    """The numbers of some pairs are taken away, as those of prompts that lack a position are."""
    found, _ = run_in(tmp_path, *MANY)
    run, kept = found.run, Results(found.run)
    (name,) = kept.record("heads")["calls"]
    keys = run.keys()
    for key in keys:
        data, entry = run.read(key)
        measured = decode(key, data, entry)
        status = measured.status.copy()
        status[2::3, 1] = Status.UNALIGNED
        values = np.where(status == Status.UNALIGNED, np.nan, measured.values)
        measured = replace(measured, values=values, status=status)
        run.write(key, encode(key, measured, ["logit_difference"]), entry["about"])
    effects = kept.load("heads")
    mine = summarise(run, kept.call(name), effects.to_xarray()["component"].values, effects.direction).to_dataframe()
    own = effects.summary()
    assert own["n_pairs"].nunique() == 2
    for column in ("effect", "recovered", "low", "high", "n_pairs"):
        np.testing.assert_allclose(mine[column], own[column], rtol=1e-9, atol=1e-12)
