"""Summaries shard by shard: the numbers are those of ``Effects.summary``, however the shards lie."""

import numpy as np
import pytest

from causalpatch.base.errors import StoreCorrupt
from causalpatch.studies.results import Results
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
